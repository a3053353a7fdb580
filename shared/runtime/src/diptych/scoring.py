"""From finished fits to ``evaluation/``: the model, its baselines, the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from diptych import evaluate as evaluation_files
from diptych.contract import Evaluation, Fit, Pipeline, Trained
from diptych.errors import DataError
from diptych.files import read_json, write_json
from diptych.findings import Findings
from diptych.progress import progress
from diptych.run import RunFolder, TrainedFits, for_other_data
from diptych.split import Split
from diptych.training import Job, check_source, overlap_finding, subjects_seen

if TYPE_CHECKING:
    from diptych.initial import Published
    from diptych.prepared import Prepared


def score_run(job: Job) -> Path:
    """Score the fits of a run on their own test parts and write ``evaluation/``.

    Args:
        job: A run whose fits are finished.

    Returns:
        The evaluation folder.
    """
    evaluation = score(job.pipeline, job.config, job.prepared, job.trained())
    return _write(job.pipeline, job.config, job.prepared, evaluation, job.folder.evaluation)


def score(pipeline: Pipeline, config: Any, prepared: Prepared, trained: Trained) -> Evaluation:
    """The model's evaluation and those of the chosen baselines, in one.

    Args:
        pipeline: Gives the functions.
        config: Its ``evaluate.baselines``, where it has such a field, chooses the baselines.
        prepared: The data.
        trained: The fits; baselines are fitted and scored on the same splits.
    """
    wanted = getattr(config.evaluate, "baselines", None)
    chosen = [name for name in pipeline.baselines if wanted is None or name in wanted]
    parts = [pipeline.evaluate(config, prepared, trained)]
    for name in progress(chosen, "baselines"):
        parts.append(pipeline.baselines[name](config, prepared, trained))
    return evaluation_files.combine(parts)


def _write(
    pipeline: Pipeline,
    config: Any,
    prepared: Prepared,
    evaluation: Evaluation,
    target: Path,
    protocols: dict[str, str] | None = None,
) -> Path:
    from diptych.report import save_pictures

    setting = evaluation_files.Setting(
        metrics=pipeline.metrics,
        pipeline=pipeline.name,
        protocol=config.split.kind,
        subject=pipeline.subject,
        seeds=config.run.seeds,
        protocols=protocols or {},
    )
    evaluation_files.write(evaluation, target, setting)
    if pipeline.pictures is not None:
        save_pictures(pipeline.pictures(config, prepared, evaluation), target / "pictures")
    return target


@dataclass(frozen=True)
class _OnlyFinal:
    """Trained fits seen as one final model whose test part is a whole data set."""

    trained: TrainedFits | Published
    fits: Sequence[Fit]
    final: str = "final"

    def modules(self, fit: str) -> Any:
        return self.trained.modules(fit)

    def facts(self, fit: str) -> Any:
        return self.trained.facts(fit)

    def artifacts(self, fit: str) -> Any:
        return self.trained.artifacts(fit)


def score_data(
    pipeline: Pipeline, trained: TrainedFits | Published, data: Sequence[Path], out: Path
) -> Path:
    """Score a final model on other data sets, one table each.

    Args:
        pipeline: Gives the functions.
        trained: A run's fits or published weights.
        data: Raw data or prepared folders; the first one is the headline table.
        out: Gets ``evaluation/`` and the report's files.

    Returns:
        ``out``.

    Raises:
        DataError: Data with errors, or subjects that the model was trained on.
    """
    from diptych.prepared import Prepared, is_prepared

    config, reading = trained.config, for_other_data(trained.config)
    parts: list[Evaluation] = []
    first: Prepared | None = None
    findings = Findings()
    for number, source in enumerate(data, start=1):
        findings = findings + check_source(pipeline, source, reading)
        folder = out / "prepared" if number == 1 else out / f"prepared-{number}"
        prepared = (
            Prepared.open(source)
            if is_prepared(source)
            else pipeline.prepare(reading, source, folder)
        )
        view: Trained = trained
        own_folder = trained.folder if isinstance(trained, TrainedFits) else None
        if own_folder is None or not _same_data(own_folder, prepared):
            if own_folder is not None:
                _refuse_known(own_folder, prepared)
            view = _as_test_set(trained, prepared)
        part = score(pipeline, config, prepared, view)
        name = "" if number == 1 else f"data set {number}"
        parts.append(_in_table(part, name))
        first = first or prepared
    assert first is not None
    target = out / "evaluation"
    protocols = {f"data set {n}": "other data" for n in range(2, len(data) + 1)}
    _write(pipeline, config, first, evaluation_files.combine(parts), target, protocols)
    write_json(out / "findings.json", findings.redacted().to_json())
    return out


def _same_data(folder: RunFolder, prepared: Prepared) -> bool:
    stored: str = read_json(folder.path / "manifest.json")["digest"]
    return stored == prepared.digest()


def _refuse_known(folder: RunFolder, prepared: Prepared) -> None:
    known = subjects_seen(folder, prepared)
    if known:
        raise DataError("these data were trained on", overlap_finding(known))


def _as_test_set(trained: TrainedFits | Published, prepared: Prepared) -> _OnlyFinal:
    rows = tuple(range(prepared.index.height))
    final = next(fit for fit in trained.fits if fit.name == trained.final)
    return _OnlyFinal(trained, (replace(final, split=Split((), (), rows)),))


def _in_table(part: Evaluation, name: str) -> Evaluation:
    """The same evaluation under a table's name; tables of its own keep their names behind it."""
    if not name:
        return part
    inner = (
        pl.when(pl.col("table") == "").then(pl.lit(name)).otherwise(name + ": " + pl.col("table"))
    )
    payload = {
        (f"{name}: {table}" if table else name, condition, method): arrays
        for (table, condition, method), arrays in part.payload.items()
    }
    files = {f"{name.replace(' ', '-')}-{key}": value for key, value in part.files.items()}
    return replace(part, rows=part.rows.with_columns(table=inner), payload=payload, files=files)
