"""The verbs as functions: what the command line and the Python interface call."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych import run as runs
from diptych.config import dump_yaml, override
from diptych.contract import Pipeline
from diptych.errors import InterruptedRun, TrainingError, UsageError
from diptych.files import read_json, write_json, write_text
from diptych.findings import Findings
from diptych.memory import keep_freed_memory
from diptych.run import RunFolder, TrainedFits
from diptych.scoring import score_data, score_run
from diptych.training import (
    Job,
    check_source,
    groups,
    is_final,
    open_job,
    refuse_errors,
    refuse_other_plan,
    train_fit,
    unfinished_before,
)

DEMO_MARK = "demo.json"  # only a folder with this file is ever replaced by a new demo

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from diptych.config import RunSection
    from diptych.initial import Published


def check(pipeline: Pipeline, data: Path, config: Any) -> Findings:
    """Findings over the data; never stops at the first."""
    return pipeline.check(config, data)


def prepare(pipeline: Pipeline, data: Path, out: Path, config: Any) -> Findings:
    """Check the data and write the prepared folder.

    Raises:
        DataError: The data have errors; nothing is written.
    """
    from diptych.prepared import is_prepared

    if out.exists() and any(out.iterdir()) and not is_prepared(out):
        raise UsageError(f"{out}: exists and is no prepared folder: choose another --out")
    runs.refuse_inside(out, data)
    findings = check_source(pipeline, data, config)
    pipeline.prepare(config, data, out)
    write_text(out / "config.yaml", dump_yaml(runs.portable(config)))
    write_json(out / "findings.json", findings.redacted().to_json())
    return findings


def train(
    pipeline: Pipeline,
    data: Path,
    out: Path,
    config: Any,
    *,
    init: str | None = None,
    init_partial: bool = False,
    fit: str | None = None,
    resume: bool = False,
    evaluate: bool = True,
    command: str = "",
) -> Path:
    """Check, prepare, train every fit, evaluate and report.

    Args:
        pipeline: Which pipeline.
        data: Raw data or a prepared folder.
        out: The run folder.
        config: The resolved config; None with ``resume`` takes the run's own.
        init: Weights to start from: RUN, RUN:FIT or a published file.
        init_partial: Whether tensors that do not match may be left as initialised.
        fit: Train this fit alone, creating or joining the run.
        resume: Go on with an interrupted run.
        evaluate: Whether to score and report after the last fit.
        command: The command that reproduces the run, with DATA and RUN for paths.

    Returns:
        The run folder.
    """
    from diptych import loop
    from diptych.initial import read_initial

    folder = RunFolder(out)
    if loop.is_first_process():  # others wait at the launch until data and plan are there
        initial = read_initial(pipeline, init, partial=init_partial) if init else None
        job = open_job(
            pipeline,
            data,
            folder,
            config,
            join=resume or fit is not None,
            command=command,
            initial=initial,
        )
        run_section = job.config.run
    else:
        run_section = config.run if config is not None else runs.stored_config(folder, pipeline).run
    fabric = loop.launch(run_section)
    fabric.barrier()
    if not fabric.is_global_zero:
        job = _joined(pipeline, data, folder, config)
    train_fits(job, fabric, only=fit)
    if evaluate and fit is None and fabric.is_global_zero:
        score_run(job)
        report(pipeline, out)
    fabric.barrier()
    return out


def _joined(pipeline: Pipeline, data: Path, folder: RunFolder, config: Any) -> Job:
    """The job as the other processes of a launch see it: everything has been written."""
    from diptych.prepared import Prepared, is_prepared

    own = runs.stored_config(folder, pipeline)
    if config is not None:
        own = own.model_copy(update={"run": config.run})
    prepared = Prepared.open(data if is_prepared(data) else folder.prepared)
    return Job(folder, pipeline, own, prepared, tuple(folder.fits()))


def train_fits(job: Job, fabric: Fabric, *, only: str | None = None) -> None:
    """Train what is not finished, group by group.

    Args:
        job: The run.
        fabric: Device and processes.
        only: Train this fit alone.

    Raises:
        UsageError: ``only`` is unknown, or fits that it needs are unfinished.
    """
    import torch

    keep_freed_memory()
    run_section = job.config.run
    if run_section.threads is not None:
        torch.set_num_threads(run_section.threads)
    if only is not None:
        chosen = [fit for fit in job.fits if fit.name == only]
        if not chosen:
            known = ", ".join(fit.name for fit in job.fits)
            raise UsageError(f"--fit {only}: not in the plan; the plan has {known}")
        missing = unfinished_before(job, chosen[0])
        if missing:
            raise UsageError(f"--fit {only}: needs {', '.join(missing)} first: train them")
        with job.folder.lock(only, wait=False):
            train_fit(job, chosen[0], fabric)
        return
    for group in groups(job.fits):
        todo = [fit for fit in group if not job.folder.finished(fit.name)]
        processes = min(_side_by_side(run_section, fabric), len(todo))
        if processes > 1:
            from diptych.parallel import train_side_by_side

            # the longest first, else one of them runs alone at the end
            todo.sort(key=lambda fit: len(fit.split.train), reverse=True)
            train_side_by_side(job, [fit.name for fit in todo], processes)
            continue
        for fit in todo:
            if fabric.is_global_zero:
                with job.folder.lock(fit.name, wait=False):
                    train_fit(job, fit, fabric)
            else:
                train_fit(job, fit, fabric)


def _side_by_side(run: RunSection, fabric: Fabric) -> int:
    """How many fits may run at a time."""
    if fabric.world_size > 1:
        return 1
    if run.parallel_fits != "auto":
        return run.parallel_fits
    if fabric.device.type != "cpu":
        return 1
    import joblib

    # a process holds a few hundred megabytes before it has read anything
    cores: int = joblib.cpu_count()
    return max(1, min(cores // (run.threads or 1), 8))


def evaluate(
    pipeline: Pipeline,
    target: Path,
    *,
    data: Sequence[Path] = (),
    sets: Sequence[str] = (),
    out: Path | None = None,
) -> Path:
    """Score a run on its own splits, or its final model on other data.

    Args:
        pipeline: Which pipeline.
        target: Run folder or a file of published weights.
        data: Other data sets, one table each.
        sets: ``key=value`` of the sections evaluate and run, and fields marked ``at_predict``.
        out: Where results of other data or of published weights go.

    Returns:
        The folder that holds ``evaluation/`` and the report.
    """
    from diptych import loop

    if data or target.is_file():
        if out is None:
            raise UsageError("evaluate: --out is needed with --data and with published weights")
        if not data:
            raise UsageError("evaluate: published weights need --data")
        trained = open_model(pipeline, target, sets, section="evaluate")
        score_data(pipeline, trained, data, out)
        from diptych.report import render

        render(out, pipeline)
        return out
    folder = runs.open_folder(target)
    config = override(runs.stored_config(folder, pipeline), sets, "evaluate")
    prepared = runs.open_prepared(folder)
    job = Job(folder, pipeline, config, prepared, tuple(pipeline.plan(config, prepared)))
    refuse_other_plan(folder, job.fits)
    planned = {fit.name for fit in job.fits}
    folder.write_fits([*job.fits, *(fit for fit in folder.fits() if fit.name not in planned)])
    train_fits(job, loop.launch(config.run))
    score_run(job)
    report(pipeline, target)
    return target


def open_model(
    pipeline: Pipeline, target: Path, sets: Sequence[str], *, section: str
) -> TrainedFits | Published:
    """The trained fits of a run, or a published checkpoint in the same form."""
    if target.is_file():
        from diptych.initial import published

        return published(pipeline, target, sets, section)
    folder = runs.open_folder(target)
    config = override(runs.stored_config(folder, pipeline), sets, section)
    done = [fit for fit in folder.fits() if folder.finished(fit.name)]
    if not any(is_final(fit) for fit in done):
        raise UsageError(f"{target}: no final model yet: go on with 'train ... --resume'")
    return TrainedFits(folder, pipeline, config, done)


def predict(
    pipeline: Pipeline, target: Path, source: Path, out: Path, sets: Sequence[str] = ()
) -> Findings:
    """Predict for a new file or folder, in the user's own format.

    Raises:
        UsageError: ``out`` exists.
        DataError: The input cannot be used or does not fit the model.
    """
    if pipeline.predict is None:
        raise UsageError(f"{pipeline.name} offers no 'predict'")
    if out.exists():
        raise UsageError(f"{out}: exists: choose another --out")
    if not source.exists():
        raise UsageError(f"{source}: does not exist: give a file or folder to predict")
    trained = open_model(pipeline, target, sets, section="predict")
    out.parent.mkdir(parents=True, exist_ok=True)
    findings = pipeline.predict(trained.config, trained, source, out)
    if findings.errors:
        write_json(_beside(out), findings.to_json())
        rest = f"{out} holds the others" if out.exists() else "no prediction was written"
        refuse_errors(findings, f"what they name was not decoded; {rest}")
    return findings


def _beside(out: Path) -> Path:
    return out / "findings.json" if out.is_dir() else out.with_name("findings.json")


def compare(pipeline: Pipeline, paths: Sequence[Path]) -> str:
    """The paired table of two or more runs over the same splits."""
    from diptych import compare as comparing

    folders = [runs.open_folder(path) for path in paths]
    return comparing.compare_runs([folder.path for folder in folders], pipeline.metrics)


def report(pipeline: Pipeline, target: Path) -> Path:
    """Assemble ``report.html`` and the model card from the files of a run."""
    from diptych import card
    from diptych.report import render

    runs.open_folder(target)
    card.model_card(target, pipeline)
    return render(target, pipeline)


def export(
    pipeline: Pipeline,
    target: Path,
    format: str,
    out: Path,
    part: str | None = None,
    sets: Sequence[str] = (),
) -> Path:
    """Export one graph, checked against the PyTorch model on prepared or generated samples."""
    from diptych import export as exporting
    from diptych.prepared import Prepared, is_prepared

    if pipeline.export is None:
        raise UsageError(f"{pipeline.name} offers no 'export'")
    if out.exists():
        raise UsageError(f"{out}: exists: choose another --out")
    trained = open_model(pipeline, target, sets, section="export")
    own = target / "prepared"
    prepared = Prepared.open(own) if is_prepared(own) else None
    parts = pipeline.export(trained.config, trained, prepared)
    return exporting.export_part(parts, part, format, out)


def sample(pipeline: Pipeline, out: Path, seed: int = 0) -> Path:
    """Write the embedded generated sample."""
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out}: exists and is not empty: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    pipeline.sample(out, seed)
    return out


def demo(pipeline: Pipeline, out: Path, config: Any, seed: int = 0, command: str = "") -> Path:
    """Generate the sample, train on it and report: the whole way in one call.

    Args:
        pipeline: Which pipeline.
        out: Gets ``data`` and ``run``.
        config: The config of the recipe ``demo``.
        seed: Seed of the sample and of the fits.
        command: The command that reproduces it.

    Raises:
        TrainingError: The scores are outside what the generated truth allows.
    """
    run = out / "run"
    wanted = {"pipeline": pipeline.name, "seed": seed}
    if not _goes_on(out, wanted):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / DEMO_MARK, wanted)
        sample(pipeline, out / "data", seed)
    resume = (run / "run.json").is_file()
    try:
        train(
            pipeline, out / "data", run, None if resume else config, resume=resume, command=command
        )
    except InterruptedRun:
        raise InterruptedRun(f"{out}: stopped; the same command goes on where it was") from None
    stored = Findings.from_json(read_json(run / "evaluation" / "findings.json"))
    if stored.errors:
        raise TrainingError("; ".join(finding.found for finding in stored.errors))
    return run


def _goes_on(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether a demo was interrupted here; a finished one is removed, anything else refused."""
    if not out.exists() or not any(out.iterdir()):
        return False
    mark = out / DEMO_MARK
    if not mark.is_file():
        raise UsageError(f"{out}: exists and is no earlier demo: choose another --out")
    started = (out / "run" / "run.json").is_file()
    if started and read_json(mark) == wanted and not (out / "run" / "report.html").is_file():
        return True
    shutil.rmtree(out)
    return False


def run_verb(
    pipeline: Pipeline, name: str, target: Path | None, options: Any, sets: Sequence[str] = ()
) -> Findings:
    """Run a domain verb."""
    verb = pipeline.verbs[name]
    if verb.takes == "run":
        assert target is not None
        trained = open_model(pipeline, target, sets, section="predict")
        return verb.run(trained.config, trained, options)
    return verb.run(override(pipeline.config(), sets, "data"), target, options)
