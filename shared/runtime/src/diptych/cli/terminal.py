"""What the commands share: options, paths that must exist, and words on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diptych.config import extra
from diptych.configfile import leaves
from diptych.errors import DataError, UsageError
from diptych.findings import Finding, Findings

Function = TypeVar("Function", bound=Callable[..., Any])

COLOURS = {"error": "red", "warning": "yellow", "note": "bright_black"}
MOST_PLACES = 5  # of equal findings; --json lists all
PATH = click.Path(path_type=Path)


@dataclass
class Invocation:
    """What one call of the command line carries beside its options.

    Args:
        debug: Whether a failure shows its traceback.
        json: Whether findings of a failure are printed as JSON alone.
        run: The run folder; keeps the log of a failure once it is a run.
        out: Where the command writes.
        sets: ``KEY=VALUE`` from options that are aliases of config keys.
    """

    debug: bool = False
    json: bool = False
    run: Path | None = None
    out: Path | None = None
    sets: list[str] = field(default_factory=list)


def invocation() -> Invocation:
    """The invocation that the current command belongs to."""
    found: Invocation = click.get_current_context().obj
    return found


def say(text: str, *, on_stderr: bool = False) -> None:
    """Print, in the first process of a launch only."""
    from diptych.progress import is_silent

    if not is_silent():
        click.echo(text, err=on_stderr)


def show(findings: Findings, *, as_json: bool = False, on_stderr: bool = True) -> None:
    """Print findings: as JSON alone on standard output, or as paragraphs, errors first.

    Args:
        findings: What to print; equal ones share a paragraph that names their places.
        as_json: Print the binding JSON form alone.
        on_stderr: Where paragraphs go; on standard output a count follows.
    """
    if as_json:
        say(json.dumps(findings.to_json(), indent=1, ensure_ascii=False))
        return
    places: dict[tuple[str, ...], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: list(COLOURS).index(finding.severity)):
        same = (finding.severity, finding.code, finding.found, finding.fix)
        places.setdefault(same, []).append(finding.where)
    for (severity, code, found, fix), where in places.items():
        head = click.style(f"{severity} {code}", fg=COLOURS[severity])
        more = f" and {len(where) - MOST_PLACES} more" if len(where) > MOST_PLACES else ""
        say(f"{head}: {', '.join(where[:MOST_PLACES])}{more}", on_stderr=on_stderr)
        say(f"    {found}\n    {fix}", on_stderr=on_stderr)
    if not on_stderr:
        say(_counts(findings))


def show_names(findings: Findings) -> None:
    """Print which pseudonym stands for which name of the user's; nothing is written."""
    width = max(map(len, findings.names.values()), default=0)
    for own, stands_for_it in findings.names.items():
        say(f"{stands_for_it:<{width}}  {own}")


def _counts(findings: Findings) -> str:
    notes = len(findings) - len(findings.errors) - len(findings.warnings)
    counts = ((len(findings.errors), "error"), (len(findings.warnings), "warning"), (notes, "note"))
    words = [f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count]
    return ", ".join(words) or "no findings"


def present(path: Path, what: str) -> None:
    """Demand that a path of data exists.

    Args:
        path: As given.
        what: The argument's name: "DATA".

    Raises:
        DataError: It does not exist.
    """
    if path.exists():
        return
    where = "" if path.is_absolute() else f"; relative paths start at {Path.cwd()}"
    fix = f"check the spelling{where}"
    finding = Finding("error", "data.missing", str(path), "no such file or folder", fix)
    raise DataError(f"{what} does not exist, nothing was done", Findings((finding,)))


def existing_run(path: Path) -> None:
    """Demand a run folder or a file of weights; a run keeps the log of a failure.

    Raises:
        UsageError: It does not exist.
    """
    if not path.exists():
        hint = "give the folder that 'train' wrote"
        raise UsageError(f"{path}: no such run folder or file of weights; {hint}")
    invocation().run = path


class InOrder(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _set_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.obj.debug = True


def _set_out(ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    ctx.obj.out = value
    return value


def out_option(words: str, *, required: bool = True) -> Callable[[Function], Function]:
    """The option ``--out``, remembered for the message of a failure."""
    return click.option("--out", type=PATH, required=required, callback=_set_out, help=words)


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show where an error comes from.",
)
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="One value, such as run.threads=2; may be repeated.",
)


def configured(function: Function) -> Function:
    """Add the options that choose a configuration: recipe, file, sets."""
    function = set_option(function)
    function = click.option(
        "--config", "file", type=PATH, metavar="FILE", help="YAML file, over the recipe's values."
    )(function)
    return click.option("--recipe", metavar="NAME", help="Recipe to start from (default fast).")(
        function
    )


def alias_options(model: type[BaseModel], verb: str) -> list[click.Parameter]:
    """Options of a verb that stand for one config key each.

    Args:
        model: The configuration; a field declares an alias by
            ``json_schema_extra={"option": "--box", "verbs": ["predict"]}``.
        verb: Name of the verb.
    """
    options: list[click.Parameter] = []
    for keys, info in leaves(model):
        if verb not in (extra(info, "verbs") or ()):
            continue
        name = ".".join(keys)

        def store(
            ctx: click.Context,
            _parameter: click.Parameter,
            value: str | None,
            name: str = name,
            listed: bool = is_list(info.annotation),
        ) -> None:
            if value is not None:
                bare = listed and not value.lstrip().startswith("[")
                ctx.obj.sets.append(f"{name}=[{value}]" if bare else f"{name}={value}")

        words = f"{info.description or ''} The same as --set {name}=VALUE."
        options.append(
            click.Option(
                [str(extra(info, "option"))],
                expose_value=False,
                callback=store,
                metavar="VALUE",
                help=words.strip(),
            )
        )
    return options


def is_list(annotation: Any) -> bool:
    """Whether a field's annotation is a list or tuple, perhaps with None."""
    kinds = (annotation, *get_args(annotation))
    return any(kind in (list, tuple) or get_origin(kind) in (list, tuple) for kind in kinds)


def field_options(model: type[BaseModel]) -> list[click.Parameter]:
    """The options of a domain verb: one flag a field, validated by the model afterwards."""
    return [_field_option(name, info) for name, info in model.model_fields.items()]


def _field_option(name: str, info: FieldInfo) -> click.Option:
    flag = f"--{name.replace('_', '-')}"
    words = info.description or ""
    if not info.is_required() and info.default not in (None, False, (), ""):
        words += f" Default {info.default}."
    if info.annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=words)
    return click.Option(
        [flag, name],
        multiple=is_list(info.annotation),
        required=info.is_required(),
        metavar="VALUE",
        help=words.strip(),
    )
