"""The verbs of a pipeline as commands; each reads its options and calls one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from diptych.cli.terminal import (
    PATH,
    InOrder,
    alias_options,
    configured,
    debug_option,
    existing_run,
    field_options,
    invocation,
    out_option,
    present,
    say,
    set_option,
    show,
    show_names,
)
from diptych.config import default_recipe, list_recipes, load, recipes_folder
from diptych.configfile import dotted, is_path, leaves
from diptych.contract import Pipeline, Verb
from diptych.errors import DataError, UsageError
from diptych.findings import Findings


def pipeline_group(pipeline: Pipeline) -> click.Group:
    """The verbs of one pipeline; a verb whose callable is None does not exist.

    Args:
        pipeline: Any pipeline, installed or not.
    """
    builders: dict[str, Callable[[Pipeline], click.Command]] = {
        "demo": _demo,
        "sample": _sample,
        "recipe": _recipe,
        "check": _check,
        "prepare": _prepare,
        "train": _train,
        "evaluate": _evaluate,
        "predict": _predict,
        "compare": _compare,
        "report": _report,
        "export": _export,
    }
    if pipeline.predict is None:
        del builders["predict"]
    if pipeline.export is None:
        del builders["export"]
    group = InOrder(pipeline.name, help=f"{pipeline.title}.")
    for name, build in builders.items():
        command = build(pipeline)
        command.params += alias_options(pipeline.config, name)
        group.add_command(debug_option(command), name)
    for name, verb in pipeline.verbs.items():
        group.add_command(debug_option(_domain_verb(pipeline, name, verb)), name)
    return group


def _config(
    pipeline: Pipeline, recipe: str | None, file: Path | None, sets: Sequence[str]
) -> BaseModel:
    chosen = recipe or default_recipe(pipeline.config)
    return load(pipeline.config, recipe=chosen, file=file, sets=_with_aliases(sets))


def _with_aliases(sets: Sequence[str]) -> list[str]:
    return [*sets, *invocation().sets]


def _code(findings: Findings) -> int:
    return DataError.exit_code if findings.errors else 0


def _demo(pipeline: Pipeline) -> click.Command:
    @click.command(help="Generate a sample, train on it and report.")
    @out_option(f"Folder for it (default demo/{pipeline.name}).", required=False)
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of sample and fits.")
    def demo(out: Path | None, seed: int) -> None:
        from diptych import verbs

        folder = out or Path("demo") / pipeline.name
        invocation().run = folder / "run"
        recipe = default_recipe(pipeline.config, "demo")
        config = load(pipeline.config, recipe=recipe, sets=[f"run.seeds=[{seed}]"])
        command = f"diptych {pipeline.name} demo --out DIR --seed {seed}"
        _show_run(pipeline, verbs.demo(pipeline, folder, config, seed, command))

    return demo


def _sample(pipeline: Pipeline) -> click.Command:
    @click.command(help="Write the generated sample.")
    @out_option("Folder for the sample.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
    def sample(out: Path, seed: int) -> None:
        from diptych import verbs

        verbs.sample(pipeline, out, seed)
        say(f"sample: {out}")

    return sample


def _recipe(pipeline: Pipeline) -> click.Command:
    @click.command(help="List the recipes, or print one to edit.")
    @click.argument("name", required=False)
    def recipe(name: str | None) -> None:
        folder = recipes_folder(pipeline.config)
        if name is None:
            for known, comment in list_recipes(folder).items():
                say(f"{known:<12} {comment}")
            return
        from diptych.config import dump_yaml

        config = load(pipeline.config, recipe=name)
        lines = (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
        use = f"Save and edit it, then: diptych {pipeline.name} train DATA --out RUN --config FILE"
        say(dump_yaml(config, "\n".join([*comments, use])).rstrip())

    return recipe


def _check(pipeline: Pipeline) -> click.Command:
    @click.command(help="Say what in the data would stop or disturb a training.")
    @click.argument("data", type=PATH)
    @configured
    @click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
    @click.option("--names", is_flag=True, help="Print which pseudonym stands for whom, too.")
    def check(
        data: Path,
        recipe: str | None,
        file: Path | None,
        sets: tuple[str, ...],
        as_json: bool,
        names: bool,
    ) -> int:
        if as_json and names:
            raise UsageError("--names: JSON holds none: leave out --json or --names")
        invocation().json = as_json
        config = _config(pipeline, recipe, file, sets)
        present(data, "DATA")
        from diptych import verbs

        findings = verbs.check(pipeline, data, config)
        show(findings, as_json=as_json, on_stderr=False)
        if names:
            show_names(findings)
        return _code(findings)

    return check


def _prepare(pipeline: Pipeline) -> click.Command:
    @click.command(help="Check data and write the prepared folder.")
    @click.argument("data", type=PATH)
    @out_option("The prepared folder.")
    @configured
    def prepare(
        data: Path, out: Path, recipe: str | None, file: Path | None, sets: tuple[str, ...]
    ) -> int:
        config = _config(pipeline, recipe, file, sets)
        present(data, "DATA")
        from diptych import verbs

        findings = verbs.prepare(pipeline, data, out, config)
        show(findings)
        say(f"prepared: {out}")
        return _code(findings)

    return prepare


def _train(pipeline: Pipeline) -> click.Command:
    @click.command(help="Train on raw or prepared data, evaluate and report.")
    @click.argument("data", type=PATH, metavar="DATA|PREPARED")
    @out_option("The run folder.")
    @configured
    @click.option("--init", metavar="RUN[:FIT]|FILE", help="Weights to start from.")
    @click.option("--init-partial", is_flag=True, help="Accept that some tensors do not match.")
    @click.option("--fit", metavar="NAME", help="Train this fit alone; creates or joins the run.")
    @click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
    @click.option("--no-evaluate", is_flag=True, help="Stop after the last fit.")
    def train(
        data: Path,
        out: Path,
        recipe: str | None,
        file: Path | None,
        sets: tuple[str, ...],
        init: str | None,
        init_partial: bool,
        fit: str | None,
        resume: bool,
        no_evaluate: bool,
    ) -> None:
        invocation().run = out
        if init_partial and init is None:
            raise UsageError("--init-partial: needs --init, the weights to start from")
        everything = _with_aliases(sets)
        config = None
        if not resume or recipe or file:
            config = _config(pipeline, recipe, file, sets)
        elif everything and (out / "config.yaml").is_file():
            config = load(pipeline.config, file=out / "config.yaml", sets=everything)
        present(data, "DATA")
        from diptych import verbs

        path = verbs.train(
            pipeline,
            data,
            out,
            config,
            init=init,
            init_partial=init_partial,
            fit=fit,
            resume=resume,
            evaluate=not no_evaluate,
            command=_reproducing(pipeline, recipe, file, everything, init, init_partial),
        )
        if fit is None and not no_evaluate:
            _show_run(pipeline, path)
        else:
            say(f"run: {path}")

    return train


def _reproducing(
    pipeline: Pipeline,
    recipe: str | None,
    file: Path | None,
    sets: Sequence[str],
    init: str | None,
    init_partial: bool,
) -> str:
    """The command that gives the run again, with words in the place of the user's paths."""
    import shlex

    words = ["diptych", pipeline.name, "train", "DATA", "--out", "RUN"]
    words += ["--recipe", recipe] if recipe else []
    words += ["--config", "CONFIG"] if file else []
    files = {dotted(keys) for keys, info in leaves(pipeline.config) if is_path(info.annotation)}
    for pair in sets:
        key, _, value = pair.partition("=")
        hidden = key in files or "/" in value or chr(92) in value
        words += ["--set", f"{key}={'PATH' if hidden else value}"]
    words += ["--init", "INIT"] if init else []
    words += ["--init-partial"] if init_partial else []
    return shlex.join(words)


def _show_run(pipeline: Pipeline, run: Path) -> None:
    from diptych.results import read_results, verdict

    say(f"run: {run}")
    say(f"report: {run / 'report.html'}")
    if (run / "evaluation" / "results.json").is_file():
        say(verdict(read_results(run / "evaluation"), pipeline.metrics))


def _evaluate(pipeline: Pipeline) -> click.Command:
    @click.command(help="Score a run again, or its final model on other data.")
    @click.argument("target", type=PATH, metavar="RUN|WEIGHTS")
    @click.option("--data", type=PATH, multiple=True, help="Other data; may be repeated.")
    @set_option
    @out_option("Folder for the results of other data.", required=False)
    def evaluate(
        target: Path, data: tuple[Path, ...], sets: tuple[str, ...], out: Path | None
    ) -> None:
        existing_run(target)
        for path in data:
            present(path, "--data")
        from diptych import verbs

        path = verbs.evaluate(pipeline, target, data=data, sets=_with_aliases(sets), out=out)
        _show_run(pipeline, path)

    return evaluate


def _predict(pipeline: Pipeline) -> click.Command:
    @click.command(help="Predict for new data.")
    @click.argument("target", type=PATH, metavar="RUN|WEIGHTS")
    @click.argument("source", type=PATH, metavar="INPUT")
    @out_option("File or folder for the predictions.")
    @set_option
    def predict(target: Path, source: Path, out: Path, sets: tuple[str, ...]) -> int:
        existing_run(target)
        present(source, "INPUT")
        from diptych import verbs

        findings = verbs.predict(pipeline, target, source, out, _with_aliases(sets))
        show(findings)
        say(f"predictions: {out}")
        return _code(findings)

    return predict


def _compare(pipeline: Pipeline) -> click.Command:
    @click.command(help="Compare runs over the same splits; trains nothing.")
    @click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN RUN...")
    def compare(runs: tuple[Path, ...]) -> None:
        if len(runs) < 2:
            raise UsageError("compare: needs two runs or more")
        for path in runs:
            existing_run(path)
        from diptych import verbs

        say(verbs.compare(pipeline, runs).rstrip())

    return compare


def _report(pipeline: Pipeline) -> click.Command:
    @click.command(help="Write the report of a run again.")
    @click.argument("target", type=PATH, metavar="RUN")
    def report(target: Path) -> None:
        existing_run(target)
        from diptych import verbs

        say(f"report: {verbs.report(pipeline, target)}")

    return report


def _export(pipeline: Pipeline) -> click.Command:
    @click.command(help="Export a model, checked against PyTorch.")
    @click.argument("target", type=PATH, metavar="RUN|WEIGHTS")
    @click.option(
        "--format", "form", type=click.Choice(["onnx", "pt2"]), required=True, help="File format."
    )
    @out_option("File to write.")
    @click.option("--part", metavar="NAME", help="Which graph, where a model has several.")
    @set_option
    def export(target: Path, form: str, out: Path, part: str | None, sets: tuple[str, ...]) -> None:
        existing_run(target)
        from diptych import verbs

        path = verbs.export(pipeline, target, form, out, part, _with_aliases(sets))
        say(f"exported: {path}")

    return export


def _domain_verb(pipeline: Pipeline, name: str, verb: Verb) -> click.Command:
    def call(sets: tuple[str, ...], target: Path | None = None, **given: Any) -> int:
        options = _options(verb.options, given)
        if target is not None:
            existing_run(target) if verb.takes == "run" else present(target, "DATA")
        from diptych import verbs

        findings = verbs.run_verb(pipeline, name, target, options, sets)
        show(findings)
        return _code(findings)

    command = click.Command(name, callback=call, help=verb.help, params=field_options(verb.options))
    if verb.takes != "nothing":
        argument = click.Argument(["target"], type=PATH, metavar=verb.takes.upper())
        command.params.insert(0, argument)
    return set_option(command)


def _options(model: type[BaseModel], given: dict[str, Any]) -> BaseModel:
    """The options of a domain verb, validated.

    Raises:
        UsageError: Every wrong option at once.
    """
    values = {name: value for name, value in given.items() if value not in (None, ())}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        from diptych.configwords import explain

        problems = [
            f"--{'.'.join(keys).replace('_', '-')}: {sentence}"
            for keys, _, sentence in explain(model, values, error)
        ]
        raise UsageError("\n".join(problems)) from None
