"""The command line: ``diptych list``, ``diptych doctor`` and ``diptych PIPELINE VERB``."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

import click

from diptych import installed
from diptych.cli.commands import pipeline_group
from diptych.cli.terminal import Invocation, debug_option, say, show
from diptych.errors import DataError, DiptychError, UsageError
from diptych.log import failure, messages
from diptych.progress import is_silent


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Args:
        arguments: Words after ``diptych``; None takes them from the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names on disk may not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    # Threads that spin while they wait make a step several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after ``diptych``; None takes them from the process.

    Returns:
        0 done, 1 a bug, 2 usage or config, 3 data, 4 training or export, 5 interrupted.
    """
    invocation = Invocation()
    words = None if arguments is None else list(arguments)
    try:
        with messages(lambda: invocation.run):
            code = root.main(args=words, prog_name="diptych", obj=invocation, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except click.Abort:
        return _fail(KeyboardInterrupt(), invocation)
    except Exception as error:
        return _fail(error, invocation)
    return code if isinstance(code, int) else 0


def _fail(error: BaseException, invocation: Invocation) -> int:
    if invocation.debug:
        traceback.print_exception(error)
    said: set[str] = set()
    if isinstance(error, DataError) and error.findings is not None:
        show(error.findings, as_json=invocation.json)
        said = {finding.line() for finding in error.findings}
    failed = failure(error, invocation.run, invocation.out or invocation.run)
    if not is_silent() or failed.exit_code == 1:  # a bug of one process alone must be seen too
        for line in failed.message.splitlines():
            if line not in said:
                click.echo(f"{click.style('error', fg='red')}: {line}", err=True)
    # Fabric ends the first process as soon as one that it started fails: let the first one speak.
    return 0 if _was_started_by_fabric() and isinstance(error, DiptychError) else failed.exit_code


def _was_started_by_fabric() -> bool:
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


class _Pipelines(click.Group):
    """Imports a pipeline only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *installed.points()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        if near := get_close_matches(cmd_name, self.commands, n=1):
            raise UsageError(f"no command '{cmd_name}': did you mean '{near[0]}'?")
        return _pipeline(cmd_name)


def _pipeline(name: str) -> click.Command:
    try:
        return pipeline_group(installed.load(name))
    except UsageError:
        raise
    except Exception as error:  # one broken wheel must not hide the others
        broken = error

        def refuse() -> NoReturn:
            raise broken

        return click.Command(
            name,
            {"ignore_unknown_options": True, "allow_extra_args": True},
            refuse,
            short_help=f"cannot be loaded: {error}",
            add_help_option=False,
        )


@click.group(cls=_Pipelines, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diptych", message="%(prog)s %(version)s")
def root() -> None:
    """Train and evaluate contrastive models on recordings, images, scans and event logs.

    `diptych PIPELINE --help` lists the verbs of a pipeline; its `demo` needs no data.
    """


@root.command("list")
@debug_option
def list_pipelines() -> None:
    """List the installed pipelines."""
    names = list(installed.points())
    if not names:
        say("No pipeline is installed. Install one, such as: pip install diptych-mvcnet")
    for name in names:
        try:
            title = installed.load(name).title
        except Exception as error:  # one broken wheel must not hide the others
            title = f"cannot be loaded: {error}"
        say(f"{name:<12} {title}")


@root.command("doctor")
@debug_option
def show_doctor() -> int:
    """Look at this machine: versions, devices, memory, optional packages."""
    from diptych.doctor import doctor

    checks = doctor()
    width = max(len(check.name) for check in checks)
    for check in checks:
        fix = f"; {check.fix}" if check.fix else ""
        say(f"{check.status:<8} {check.name:<{width}} {check.found}{fix}")
    return UsageError.exit_code if any(check.status == "problem" for check in checks) else 0
