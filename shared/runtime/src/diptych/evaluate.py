"""Scores of units -> ``evaluation/``: subject values, intervals, differences, ``results.json``.

Order of averaging: a subject's units first, then its fits (seeds, draws); then subjects are
resampled. Nothing that comes later (report, card, comparison) computes these numbers again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from diptych import artifacts as artifact_files
from diptych.contract import Artifact, Evaluation, Metric, Payload
from diptych.errors import UsageError
from diptych.files import write_json
from diptych.findings import Findings
from diptych.folders import write_folder
from diptych.results import FEW_SUBJECTS, metric_of, validate
from diptych.statistics import (
    Estimate,
    holm,
    mean_intervals,
    paired_differences,
    pooled_difference,
    pooled_interval,
)

COLUMNS = ("table", "condition", "subject", "unit", "method", "metric", "value", "fit")
Key = tuple[str, str, str]  # table, condition, method


@dataclass(frozen=True)
class Setting:
    """What an evaluation measured, and how.

    Args:
        metrics: The pipeline's metrics in the order of the tables.
        pipeline: Name of the model's own method.
        protocol: How the test parts were chosen.
        subject: The domain's word for the independent source.
        seeds: Seeds of the run.
        protocols: Tables whose protocol differs from ``protocol``.
    """

    metrics: Mapping[str, Metric]
    pipeline: str
    protocol: str
    subject: str
    seeds: Sequence[int]
    protocols: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SubjectValues:
    """Scores of one table under one condition, a row a subject, a column a method and metric.

    Args:
        subjects: Names in the order of the rows.
        columns: (method, metric) in the order of the columns.
        values: NaN where a subject has no value.
        whole: Values of (method, metric) that belong to no subject.
    """

    subjects: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    values: Float[np.ndarray, "n m"]
    whole: Mapping[tuple[str, str], float | None]

    def column(self, method: str, metric: str) -> Float[np.ndarray, " n"]:
        """One column of scores; all missing where it was not measured."""
        if (method, metric) not in self.columns:
            return np.full(len(self.subjects), np.nan)
        chosen: Float[np.ndarray, " n"] = self.values[:, self.columns.index((method, metric))]
        return chosen


def combine(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several: the model's and those of its baselines.

    Args:
        evaluations: In the order of the methods in the tables.

    Returns:
        All rows, payloads, artifacts and files; notes that several give are kept once.

    Raises:
        ValueError: If two evaluations write the same file or payload.
    """
    payload: dict[Key, Payload] = {}
    files: dict[str, Artifact] = {}
    fitted: dict[str, dict[str, Mapping[str, Artifact]]] = {}
    findings = Findings()
    for evaluation in evaluations:
        twice = (payload.keys() & evaluation.payload.keys()) | (
            files.keys() & evaluation.files.keys()
        )
        if twice:
            raise ValueError(f"two evaluations give {sorted(map(str, twice))}: rename one")
        payload.update(evaluation.payload)
        files.update(evaluation.files)
        findings = findings + evaluation.findings
        for method, fits in evaluation.artifacts.items():
            fitted.setdefault(method, {}).update(fits)
    return Evaluation(
        rows=pl.concat([checked_rows(evaluation.rows) for evaluation in evaluations]),
        payload=payload,
        artifacts=fitted,
        files=files,
        notes=tuple(dict.fromkeys(note for e in evaluations for note in e.notes)),
        findings=findings,
    )


def checked_rows(rows: pl.DataFrame, pipeline: str = "") -> pl.DataFrame:
    """The binding columns of scored units, with every value that is not finite as null.

    Args:
        rows: As a pipeline's ``evaluate`` returns them; more columns are kept out.
        pipeline: Name that replaces the method "".

    Returns:
        The columns of ``units.parquet`` in their order.

    Raises:
        ValueError: If a column is missing, or a name is null.
    """
    missing = [column for column in COLUMNS if column not in rows.columns]
    if missing:
        raise ValueError(f"evaluation rows lack the columns {missing}; they need {list(COLUMNS)}")
    names = [column for column in COLUMNS if column != "value"]
    rows = rows.select(
        *(pl.col(c).cast(pl.String) for c in names), pl.col("value").cast(pl.Float64)
    )
    empty = [column for column in names if rows[column].null_count()]
    if empty:
        raise ValueError(f"evaluation rows hold null in {empty}; use an empty string")
    value, method = pl.col("value"), pl.col("method")
    return rows.select(COLUMNS).with_columns(
        pl.when(value.is_finite()).then(value).alias("value"),
        pl.when(method == "").then(pl.lit(pipeline)).otherwise(method).alias("method"),
    )


def subject_values(rows: pl.DataFrame, table: str = "", condition: str = "") -> SubjectValues:
    """Average a table's units inside each subject and fit, then its fits.

    Args:
        rows: The columns of ``units.parquet``; subject "" marks a value of the whole set.
        table: Name of the table; "" is the headline table.
        condition: State under which the methods were scored.

    Returns:
        One value a subject, method and metric.
    """
    chosen = rows.filter((pl.col("table") == table) & (pl.col("condition") == condition))
    keys = ["method", "metric", "subject"]
    means = (
        chosen.group_by([*keys, "fit"], maintain_order=True)
        .agg(pl.col("value").mean())
        .group_by(keys, maintain_order=True)
        .agg(pl.col("value").mean())
    )
    scored = means.filter(pl.col("subject") != "")
    subjects = tuple(sorted(set(scored["subject"])))
    pairs = scored.select("method", "metric").unique(maintain_order=True).rows()
    values = np.full((len(subjects), len(pairs)), np.nan)
    row_of = {subject: row for row, subject in enumerate(subjects)}
    column_of = {pair: column for column, pair in enumerate(pairs)}
    for method, metric, subject, value in scored.iter_rows():
        if value is not None:
            values[row_of[subject], column_of[method, metric]] = value
    whole = {
        (method, metric): value
        for method, metric, subject, value in means.iter_rows()
        if subject == ""
    }
    return SubjectValues(subjects, tuple((a, b) for a, b in pairs), values, whole)


def summarise(evaluation: Evaluation, setting: Setting) -> dict[str, Any]:
    """The content of ``results.json``: values, intervals and tested differences of every table.

    Args:
        evaluation: Scored units, and arrays for pooled metrics; an array "fit" in them separates
            seeds, which are averaged.
        setting: What was measured, and how.

    Returns:
        Results in their binding form, checked.
    """
    pipeline = setting.pipeline
    payload = {(t, c, m or pipeline): arrays for (t, c, m), arrays in evaluation.payload.items()}
    rows = checked_rows(evaluation.rows, pipeline)
    lost = rows["value"].null_count() - evaluation.rows["value"].null_count()
    keys = dict.fromkeys([("", ""), *rows.select("table", "condition").iter_rows()])
    keys.update(dict.fromkeys((table, condition) for table, condition, _ in payload))
    tables = [
        {
            "name": table,
            "condition": condition,
            "protocol": setting.protocols.get(table, setting.protocol),
            **_table(
                subject_values(rows, table, condition),
                {
                    m: arrays
                    for (t, c, m), arrays in payload.items()
                    if (t, c) == (table, condition)
                },
                setting.metrics,
                pipeline,
            ),
        }
        for table, condition in keys
    ]
    head = tables[0]
    results: dict[str, Any] = {
        "schema": 1,
        "pipeline": pipeline,
        "protocol": head["protocol"],
        "subject": setting.subject,
        "n_subjects": head["n_subjects"],
        "methods": head["methods"],
        "differences": head["differences"],
        "tables": tables[1:],
        "seeds": [int(seed) for seed in setting.seeds],
        "notes": [*dict.fromkeys([*evaluation.notes, *_notes(tables, setting.subject, lost)])],
    }
    validate(results)
    return results


def _notes(tables: Sequence[Mapping[str, Any]], subject: str, lost: int) -> list[str]:
    notes = []
    few = {table["n_subjects"] for table in tables if 1 < table["n_subjects"] < FEW_SUBJECTS}
    if few:
        notes.append(
            f"With {min(few)} {subject}s intervals and tests mean little: "
            f"below {FEW_SUBJECTS} no difference can reach p < 0.05."
        )
    if any(table["n_subjects"] == 1 for table in tables):
        notes.append(f"With one {subject} nothing can be said about another {subject}.")
    if lost:
        notes.append(f"{lost} unit values were not finite and count as undefined.")
    return notes


def _table(
    scores: SubjectValues,
    payload: Mapping[str, Payload],
    metrics: Mapping[str, Metric],
    pipeline: str,
) -> dict[str, Any]:
    measured = [*scores.columns, *scores.whole]
    pooled = [name for name, metric in metrics.items() if metric.pooled is not None]
    measured += [(method, name) for method in payload for name in pooled]
    order = {name: place for place, name in enumerate(metrics)}
    methods = sorted(dict.fromkeys(m for m, _ in measured), key=lambda m: m != pipeline)
    names = sorted(dict.fromkeys(n for _, n in measured), key=lambda n: order.get(n, len(order)))
    means = dict(zip(scores.columns, mean_intervals(scores.values), strict=True))
    table: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for method in methods:
        for name in names:
            metric = metric_of(metrics, name)
            if metric.pooled is not None and method in payload:
                table[method][name] = _score(pooled_interval(metric, payload[method]))
            elif (method, name) in scores.whole:
                table[method][name] = _whole(scores.whole[method, name])
            elif (method, name) in means:
                table[method][name] = _score(means[method, name])
    subjects = set(scores.subjects).union(*(map(str, p["subject"]) for p in payload.values()))
    return {
        "n_subjects": len(subjects),
        "methods": table,
        "differences": _differences(table, scores, payload, metrics, pipeline),
    }


def _score(estimate: Estimate) -> dict[str, Any]:
    score = {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
    }
    return score if estimate.reason is None else {**score, "reason": estimate.reason}


def _whole(value: float | None) -> dict[str, Any]:
    reason = "one value of the whole set" if value is not None else "undefined on the whole set"
    return {"value": value, "low": None, "high": None, "n": 0, "reason": reason}


def _differences(
    table: Mapping[str, Mapping[str, Any]],
    scores: SubjectValues,
    payload: Mapping[str, Payload],
    metrics: Mapping[str, Metric],
    pipeline: str,
) -> list[dict[str, Any]]:
    found: list[tuple[str, str, Estimate]] = []
    for name in (n for n, m in metrics.items() if m.headline and n in table.get(pipeline, {})):
        others = [method for method in table if method != pipeline and name in table[method]]
        found += zip(
            others,
            [name] * len(others),
            _against(pipeline, others, name, metrics[name], scores, payload),
            strict=True,
        )
    adjusted = holm([estimate.p for _, _, estimate in found])
    return [
        _difference(pipeline, other, name, estimate, p)
        for (other, name, estimate), p in zip(found, adjusted, strict=True)
    ]


def _against(
    model: str,
    others: Sequence[str],
    name: str,
    metric: Metric,
    scores: SubjectValues,
    payload: Mapping[str, Payload],
) -> list[Estimate]:
    if not others:
        return []
    whole = {method for method in (model, *others) if (method, name) in scores.whole}
    if metric.pooled is not None and model in payload:
        return [
            pooled_difference(metric, payload[model], payload[other])
            if other in payload
            else Estimate(None, None, None, 0, reason="one of the two has no predictions to pool")
            for other in others
        ]
    if whole:
        reason = "whole-set values have no interval"
        values = [scores.whole.get((method, name)) for method in (model, *others)]
        return [
            Estimate(
                None if values[0] is None or value is None else values[0] - value,
                None,
                None,
                0,
                reason=reason,
            )
            for value in values[1:]
        ]
    columns = np.stack([scores.column(other, name) for other in others], axis=1)
    return paired_differences(scores.column(model, name), columns)


def _difference(a: str, b: str, metric: str, found: Estimate, p: float | None) -> dict[str, Any]:
    difference = {
        "a": a,
        "b": b,
        "metric": metric,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "p": p,
    }
    return difference if found.reason is None else {**difference, "reason": found.reason}


def write(evaluation: Evaluation, target: Path, setting: Setting) -> dict[str, Any]:
    """Write an evaluation folder whole: results, units, findings, files, fitted baselines.

    Args:
        evaluation: What the pipeline measured, its baselines combined in (:func:`combine`).
        target: The folder, such as ``RUN/evaluation``; an earlier evaluation there is replaced
            when the new one is complete.
        setting: What was measured, and how.

    Returns:
        The content of ``results.json``.

    Raises:
        UsageError: If ``target`` holds something that is no evaluation.
    """
    if target.exists() and any(target.iterdir()) and not (target / "results.json").is_file():
        raise UsageError(
            f"{target} holds files that are no evaluation: give an empty or new folder with --out"
        )
    units = checked_rows(evaluation.rows, setting.pipeline)
    results = summarise(evaluation, setting)

    def content(folder: Path) -> None:
        units.write_parquet(folder / "units.parquet")
        write_json(folder / "findings.json", evaluation.findings.redacted().to_json())
        for name, table in evaluation.files.items():
            _write_file(folder, name, table)
        for method, fits in evaluation.artifacts.items():
            for fit, fitted in fits.items():
                artifact_files.save(fitted, folder / "baselines" / method / fit)
        write_json(folder / "results.json", results)

    write_folder(target, content)
    return results


_OWN = {"results.json", "units.parquet", "findings.json", "pictures", "baselines"}


def _write_file(folder: Path, name: str, content: Artifact) -> None:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or path.parts[0] in _OWN:
        raise ValueError(
            f"evaluation file {name!r} must be a new name inside the evaluation folder"
        )
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pl.DataFrame):
        if path.suffix == ".csv":
            content.write_csv(folder / path)
        else:
            content.write_parquet(folder / path.with_suffix(".parquet"))
    elif isinstance(content, np.ndarray):
        np.save(folder / path.with_suffix(".npy"), content, allow_pickle=False)
    elif (
        isinstance(content, Mapping)
        and content
        and all(isinstance(array, np.ndarray) for array in content.values())
    ):
        np.savez_compressed(folder / path.with_suffix(".npz"), **content)
    else:
        write_json(folder / path.with_suffix(".json"), content)
