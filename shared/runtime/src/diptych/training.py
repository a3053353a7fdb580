"""From data to finished fits: check, prepare, plan, train, resume."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diptych import run as runs
from diptych.config import load_yaml, resolve
from diptych.configfile import values_of
from diptych.contract import Config, Fit, FitResult, Pipeline
from diptych.errors import DataError, UsageError
from diptych.files import read_json, write_json
from diptych.findings import Finding, Findings
from diptych.log import TERMINAL_ONLY
from diptych.run import RunFolder, TrainedFits
from diptych.split import leakage, level_keys

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from pydantic import BaseModel

    from diptych.initial import Initial
    from diptych.prepared import Prepared


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that the fits of a run share."""

    folder: RunFolder
    pipeline: Pipeline
    config: Config
    prepared: Prepared
    fits: tuple[Fit, ...]

    def trained(self) -> TrainedFits:
        """The finished fits."""
        done = [fit for fit in self.fits if self.folder.finished(fit.name)]
        return TrainedFits(self.folder, self.pipeline, self.config, done)


def open_job(
    pipeline: Pipeline,
    data: Path,
    folder: RunFolder,
    config: BaseModel | None,
    *,
    join: bool,
    command: str,
    initial: Initial | None = None,
) -> Job:
    """Create a run or join one, and make sure that its data and its plan are there.

    Args:
        pipeline: Whose run.
        data: Raw data or a prepared folder.
        folder: The run folder.
        config: The resolved config; None takes the run's own.
        join: Whether an existing run may be continued.
        command: The command that reproduces the run.
        initial: Weights that a new run starts from; an existing run keeps its own.

    Returns:
        The job, with its plan written to ``split.json``.

    Raises:
        UsageError: The run exists and may not be joined, or has another config or plan.
        DataError: The data have errors, or a split leaks.
    """
    created = not (join and folder.exists())
    if created and config is None:
        raise UsageError(f"{folder.path}: nothing to resume: start with 'train' without --resume")
    if created:
        existed = folder.path.exists()
        runs.refuse_occupied(folder.path)
        runs.refuse_inside(folder.path, data)
        findings = check_source(pipeline, data, config)
        for line in findings.summary():
            log.warning("%s", line, extra=TERMINAL_ONLY)
        runs.create(folder, pipeline, config, command)  # type: ignore[arg-type]
        write_json(folder.path / "findings.json", findings.redacted().to_json())
        with _removed_on_error(folder.path, keep_folder=existed):
            if initial is not None:
                initial.keep(folder)
            return _complete(pipeline, data, folder, config)
    if config is not None:
        runs.require_same(folder, pipeline, config)
    # A given config differs in the section run at most, and knows where the user's files lie.
    own = runs.stored_config(folder, pipeline) if config is None else config
    return _complete(pipeline, data, folder, own)


def check_source(pipeline: Pipeline, data: Path, config: Any) -> Findings:
    """The findings over raw data, or those that a prepared folder remembers.

    Raises:
        DataError: There are errors among them.
    """
    from diptych.prepared import is_prepared

    if is_prepared(data):
        _require_prepared_for(pipeline, data, config)
        stored = data / "findings.json"
        return Findings.from_json(read_json(stored)) if stored.is_file() else Findings()
    if not data.exists():
        raise DataError(f"{data}: does not exist: give a file or folder with the data")
    findings = pipeline.check(config, data)
    refuse_errors(findings)
    return findings


MEND = (
    "mend them, or leave single files out with --set data.exclude=[PATTERN] or "
    "--set data.on_error=skip"
)


def refuse_errors(findings: Findings, remedy: str = MEND) -> None:
    """Stop at findings of severity error; ``remedy`` says what to do.

    Raises:
        DataError: With all findings.
    """
    if findings.errors:
        count = len(findings.errors)
        raise DataError(f"{count} error{'s' * (count > 1)} in the data: {remedy}", findings)


def _require_prepared_for(pipeline: Pipeline, data: Path, config: Any) -> None:
    """Refuse prepared data that were made with another ``data`` section."""
    made_with = data / "config.yaml"
    if not made_with.is_file():
        return
    before = values_of(load_yaml(pipeline.config, made_with))["data"]
    now = values_of(runs.portable(config))["data"]
    odd = [f"data.{key}" for key in now if now[key] != before.get(key)]
    if odd:
        raise UsageError(
            f"{data}: was prepared with other values of {', '.join(odd)}: give the same values, "
            "or prepare again"
        )


def _complete(pipeline: Pipeline, data: Path, folder: RunFolder, config: Any) -> Job:
    from diptych.prepared import Prepared, is_prepared

    with folder.lock("prepare", wait=True):
        if is_prepared(data):
            prepared = Prepared.open(data)
        elif is_prepared(folder.prepared):
            prepared = Prepared.open(folder.prepared)
        else:
            runs.require_files(folder, config)
            prepared = pipeline.prepare(config, data, folder.prepared)
        assert prepared.path is not None
        shutil.copyfile(prepared.path / "manifest.json", folder.path / "manifest.json")
        fits = tuple(pipeline.plan(config, prepared))
        refuse_other_plan(folder, fits)
        _refuse_leakage(folder, config, prepared, fits)
        folder.write_fits(fits)
        log.info(
            "%d rows of %d subjects, %d fits",
            prepared.index.height,
            prepared.index["subject"].n_unique(),
            len(fits),
        )
    return Job(folder, pipeline, config, prepared, fits)


def refuse_other_plan(folder: RunFolder, fits: Sequence[Fit]) -> None:
    """Refuse a plan in which a fit of the run now means another training.

    Raises:
        UsageError: Names the first such fit.
    """
    names = [fit.name for fit in fits]
    if len(set(names)) != len(names):
        raise ValueError(f"the plan names a fit twice: {names}")
    if not (folder.path / "split.json").is_file():
        return
    planned = {fit.name: fit for fit in fits}
    for known in folder.fits():
        now = planned.get(known.name)
        if now is not None and not runs.same_fit(known, now):
            raise UsageError(
                f"{folder.path}: fit '{known.name}' was planned with another split or seed: the "
                "data changed, or the config did; choose another --out"
            )


def _refuse_leakage(
    folder: RunFolder, config: Any, prepared: Prepared, fits: Sequence[Fit]
) -> None:
    seen = {fit.name: _seen_by_chain(fit, fits, config) for fit in fits if fit.starts_from}
    initial = folder.path / "init.json"
    if initial.is_file():
        known = _rows_from(prepared, set(read_json(initial)["sources"]))
        seen |= {fit.name: known for fit in fits if fit.starts_from is None}
    found = leakage({fit.name: fit.split for fit in fits}, prepared.index, seen)
    if found.errors and not config.split.allow_leakage:
        raise DataError("training and test data overlap", found)
    if found.errors:
        allowed = tuple(
            replace(item, fix="split.allow_leakage is set: the scores are not honest")
            for item in found
        )
        stored = Findings.from_json(read_json(folder.path / "findings.json"))
        new = [item for item in allowed if item not in stored.items]
        write_json(folder.path / "findings.json", (stored + new).to_json())


def _seen_by_chain(fit: Fit, fits: Sequence[Fit], config: Any) -> tuple[int, ...]:
    """Rows that the earlier stages of a fit were trained on."""
    by_name = {known.name: known for known in fits}
    seen: set[int] = set()
    earlier = by_name.get(fit.starts_from or "")
    while earlier is not None:
        free = config.split.transductive and earlier.stage != "train"
        if not free:
            seen |= {*earlier.split.train, *earlier.split.validation}
        earlier = by_name.get(earlier.starts_from or "")
    return tuple(sorted(seen))


@contextmanager
def _removed_on_error(path: Path, *, keep_folder: bool) -> Iterator[None]:
    """Leave nothing behind when the data turn out to be unusable; an interrupt leaves all."""
    try:
        yield
    except (DataError, UsageError):
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not keep_folder:
            path.rmdir()
        raise


def groups(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Fits that do not wait for each other, in the order in which the groups run.

    A group holds the fits of one stage and method; final fits wait for all others. Within a group
    nothing depends on the order, except a fit that starts from another.
    """
    ordered: dict[tuple[bool, str, str], list[Fit]] = {}
    for fit in sorted(fits, key=is_final):
        ordered.setdefault((is_final(fit), fit.stage, fit.method), []).append(fit)
    return list(ordered.values())


def is_final(fit: Fit) -> bool:
    """Whether a fit is one of those that predict: "final" or "final-<subject>"."""
    return fit.name == "final" or fit.name.startswith("final-")


def earlier_results(job: Job, fit: Fit) -> dict[str, FitResult]:
    """What a fit may know: the fits of the groups before its own, and those it starts from."""
    known: dict[str, FitResult] = {}
    for group in groups(job.fits):
        if fit in group:
            break
        known |= {e.name: job.folder.result(e.name) for e in group if job.folder.finished(e.name)}
    if fit.starts_from:
        known[fit.starts_from] = job.folder.result(fit.starts_from)
    return known


def unfinished_before(job: Job, fit: Fit) -> list[str]:
    """Names of the fits that must end before this one can start."""
    needed = [fit.starts_from] if fit.starts_from else []
    if is_final(fit):
        needed += [other.name for other in job.fits if not is_final(other)]
    return [name for name in needed if not job.folder.finished(name)]


def train_fit(job: Job, fit: Fit, fabric: Fabric) -> None:
    """Train one fit to its end, or go on with it, and write ``fit.json``.

    Raises:
        InterruptedRun: A signal arrived; the state is saved.
        TrainingError: The loss stayed non-finite.
    """
    from diptych import loop
    from diptych.initial import initialise
    from diptych.randomness import seed_globals

    if job.folder.finished(fit.name):
        return
    config: Any = resolve(job.config, fit)
    facts = job.prepared.facts
    folder = job.folder.fit(fit.name)
    seed_globals(fit.seed, fit.stage, 0, 0)
    modules = job.pipeline.modules(config, facts, fit)
    for line in initialise(job.folder, fit, modules):
        log.info("fit %s: %s", fit.name, line)
    task = job.pipeline.build(config, job.prepared, fit, modules, earlier_results(job, fit))
    settings = loop.Settings(
        train=config.train,
        run=config.run,
        seed=fit.seed,
        stage=fit.stage,
        label=fit.name,
        facts=facts,
        better=_direction(job.pipeline, config.train.metric),
        validate_first=fit.starts_from is not None,
    )
    result = loop.fit(task, settings, folder=folder, fabric=fabric)
    if fabric.is_global_zero:
        stored = {key: value for key, value in asdict(result).items() if key != "artifacts"}
        write_json(
            folder / "fit.json",
            {"name": fit.name, "facts": dict(facts), "result": stored},
        )
    fabric.barrier()


def _direction(pipeline: Pipeline, metric: str | None) -> Literal["higher", "lower"] | None:
    """Which direction of a validation metric is better, where its name tells."""
    if metric is not None and metric in pipeline.metrics:
        return pipeline.metrics[metric].better
    return "lower" if metric is not None and "loss" in metric else None


def subjects_seen(folder: RunFolder, prepared: Prepared) -> list[str]:
    """Subjects of prepared data that share a source file with a run's own data."""
    from diptych.manifest import Manifest

    known = {name for entry in Manifest.read(folder.path).sources for name in entry.names}
    keys = level_keys(prepared.index, "subject")
    return sorted({keys[row] for row in _rows_from(prepared, known)})


def _rows_from(prepared: Prepared, known: set[str]) -> tuple[int, ...]:
    """Rows whose source, or one of its files, is known by the first 12 hex of its hash."""
    from diptych.manifest import Manifest

    entries = Manifest.read(prepared.path).sources if prepared.path is not None else ()
    names = {entry.sha256[:12]: entry.names for entry in entries}
    rows = prepared.index["source"].to_list() if "source" in prepared.index.columns else []
    return tuple(row for row, name in enumerate(rows) if names.get(name, {name}) & known)


def overlap_finding(subjects: Sequence[str]) -> Findings:
    """The refusal of data that a model was trained on."""
    text = f"{len(subjects)} subject(s) were in the training data: {', '.join(subjects[:3])}"
    fix = "give data of other subjects"
    return Findings((Finding("error", "split.overlap", "--data", text, fix),))
