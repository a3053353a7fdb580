"""Several runs over the same splits, paired by subject."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from ruamel.yaml import YAML

from diptych.contract import Metric
from diptych.errors import DataError, UsageError
from diptych.evaluate import SubjectValues, subject_values
from diptych.results import (
    SIGNIFICANT,
    decimals,
    interval,
    metric_of,
    number,
    probability,
    read_results,
)
from diptych.statistics import Estimate, holm, paired_differences

Word = Literal["gain", "within margin", "worse", "no evidence", "not tested"]


@dataclass(frozen=True)
class Pair:
    """One metric of a run against the first run.

    Args:
        table: Name and condition of the table; "" is the headline table.
        metric: Name of the metric.
        run: Label of the run.
        first: Value of the first run.
        value: Value of this run.
        difference: This run minus the first over common subjects, p Holm-adjusted over the runs
            and headline metrics of a table.
        word: Whether that is a gain.
    """

    table: str
    metric: str
    run: str
    first: float | None
    value: float | None
    difference: Estimate
    word: Word


@dataclass(frozen=True)
class Comparison:
    """Runs over the same splits, each against the first.

    Args:
        pipeline: Whose runs.
        subject: The domain's word for the independent source.
        labels: Names of the runs, the first one first.
        settings: Config keys whose values differ -> one value a run.
        pairs: Every metric of every later run.
        metrics: The pipeline's metrics.
    """

    pipeline: str
    subject: str
    labels: tuple[str, ...]
    settings: Mapping[str, tuple[Any, ...]]
    pairs: tuple[Pair, ...]
    metrics: Mapping[str, Metric]


def compare(runs: Sequence[Path], metrics: Mapping[str, Metric]) -> Comparison:
    """Pair the subjects of several evaluated runs; nothing is trained.

    Args:
        runs: Two or more run folders; the first is what the others are compared with.
        metrics: The pipeline's metrics; differences up to a metric's margin count as equal.

    Returns:
        Differences of every metric in every table that the runs share.

    Raises:
        UsageError: Fewer than two runs, or runs of different pipelines.
        DataError: A run was not evaluated, or the runs were scored over different splits.
    """
    if len(runs) < 2:
        raise UsageError("compare: give at least two run folders")
    results = [read_results(run / "evaluation") for run in runs]
    pipelines = {result["pipeline"] for result in results}
    if len(pipelines) > 1:
        raise UsageError(f"compare: the runs belong to different pipelines: {sorted(pipelines)}")
    labels = _labels(runs)
    _refuse_other_splits(runs, labels)
    units = [pl.read_parquet(run / "evaluation" / "units.parquet") for run in runs]
    model = results[0]["pipeline"]
    shared = [key for key in _tables(units[0]) if all(key in _tables(unit) for unit in units[1:])]
    pairs: list[Pair] = []
    for table, condition in shared:
        scores = [subject_values(unit, table, condition) for unit in units]
        name = ", ".join(filter(None, (table, condition)))
        pairs += _pairs(scores, labels, model, metrics, name)
    return Comparison(model, results[0]["subject"], labels, _settings(runs), tuple(pairs), metrics)


def _tables(units: pl.DataFrame) -> list[tuple[str, str]]:
    return [
        (table, condition)
        for table, condition in units.select("table", "condition")
        .unique(maintain_order=True)
        .rows()
    ]


def _labels(runs: Sequence[Path]) -> tuple[str, ...]:
    names = [run.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{name} ({place})" for place, name in enumerate(names, start=1))


def _refuse_other_splits(runs: Sequence[Path], labels: Sequence[str]) -> None:
    tested = [_tested_splits(run) for run in runs]
    for label, splits in zip(labels[1:], tested[1:], strict=True):
        if splits != tested[0]:
            raise DataError(
                f"compare: {label} was scored over other splits than {labels[0]}: train both on "
                "the same data with the same section 'split' (run.seeds may differ)"
            )
    files = [_sources(run) for run in runs]
    for label, known in zip(labels[1:], files[1:], strict=True):
        if known != files[0]:
            raise DataError(
                f"compare: {label} was trained on other files than {labels[0]}: compare runs "
                "over the same data"
            )


def _tested_splits(run: Path) -> set[str]:
    try:
        stored = json.loads((run / "split.json").read_text(encoding="utf-8"))
        return {
            digest
            for fit in stored["fits"]
            if stored["splits"][digest := fit["split"]]["test"] and not fit["method"]
        }
    except FileNotFoundError:
        raise DataError(f"{run}: split.json is missing: give folders that 'train' wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run}: split.json is damaged ({error}): train again") from None


def _sources(run: Path) -> set[str]:
    file = run / "manifest.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"sources": []}
    return {source["sha256"] for source in stored["sources"]}


def _pairs(
    scores: Sequence[SubjectValues],
    labels: Sequence[str],
    model: str,
    metrics: Mapping[str, Metric],
    table: str,
) -> list[Pair]:
    measured = dict.fromkeys(metric for score in scores for _, metric in score.columns)
    names = [*(n for n in metrics if n in measured), *(n for n in measured if n not in metrics)]
    subjects = sorted(set().union(*(score.subjects for score in scores)))
    found: list[tuple[str, int, np.ndarray, Estimate]] = []
    for name in names:
        columns = np.stack([_aligned(score, subjects, model, name) for score in scores], axis=1)
        if np.isfinite(columns).any():
            estimates = paired_differences(columns[:, 0], columns[:, 1:])
            found += [(name, run, columns, e) for run, e in enumerate(estimates, start=1)]
    adjusted = holm([e.p if metric_of(metrics, name).headline else None for name, _, _, e in found])
    pairs = []
    for (name, run, columns, estimate), p in zip(found, adjusted, strict=True):
        metric = metric_of(metrics, name)
        difference = _reversed(estimate, p if metric.headline else estimate.p)
        values = [_mean(columns[:, place]) for place in (0, run)]
        word = _word(difference, metric)
        pairs.append(Pair(table, name, labels[run], values[0], values[1], difference, word))
    return pairs


def _aligned(scores: SubjectValues, subjects: Sequence[str], model: str, metric: str) -> np.ndarray:
    known = dict(zip(scores.subjects, scores.column(model, metric).tolist(), strict=True))
    return np.array([known.get(subject, np.nan) for subject in subjects])


def _mean(column: np.ndarray) -> float | None:
    present = column[np.isfinite(column)]
    return float(present.mean()) if present.size else None


def _reversed(first_minus_run: Estimate, p: float | None) -> Estimate:
    e = first_minus_run
    value, low, high = (None if x is None else -x for x in (e.value, e.high, e.low))
    return Estimate(value, low, high, e.n, p, e.reason)


def _word(difference: Estimate, metric: Metric) -> Word:
    if difference.value is None:
        return "not tested"
    if abs(difference.value) <= metric.margin:
        return "within margin"
    if difference.p is None:
        return "not tested"
    if difference.p >= SIGNIFICANT:
        return "no evidence"
    gain = (difference.value > 0) == (metric.better == "higher")
    return "gain" if gain else "worse"


def _settings(runs: Sequence[Path]) -> dict[str, tuple[Any, ...]]:
    configs = [_flat(_yaml(run / "config.yaml")) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: tuple(config.get(key) for config in configs) for key in keys}
    return {key: given for key, given in values.items() if any(v != given[0] for v in given)}


def _yaml(file: Path) -> Any:
    return YAML(typ="safe", pure=True).load(file) if file.is_file() else {}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        key: value
        for name, inner in config.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def table(comparison: Comparison) -> str:
    """The comparison as text for a terminal.

    Args:
        comparison: What :func:`compare` found.

    Returns:
        Differing settings, then one block a table, numbers aligned.
    """
    c = comparison
    first = c.labels[0]
    lines = [f"{c.pipeline}: {', '.join(c.labels[1:])} against {first}, paired by {c.subject}"]
    if c.settings:
        lines += ["", *_columns([("setting", *c.labels), *_shown_settings(c.settings)])]
    for name in dict.fromkeys(pair.table for pair in c.pairs):
        pairs = [pair for pair in c.pairs if pair.table == name]
        head = ("metric", "run", first, "value", "difference", "interval", "p", "")
        lines += ["", *([name] if name else []), *_columns([head, *_shown(pairs, c.metrics)])]
    headline = [n for n, m in c.metrics.items() if m.headline]
    lines += [
        "",
        f"Difference = run minus {first}; 95 % bootstrap interval over {c.subject}s; sign-flip "
        f"permutation test, Holm-adjusted for {', '.join(headline) or 'no metric'}.",
    ]
    fewest = min((pair.difference.n for pair in c.pairs), default=0)
    if fewest < 6:
        lines.append(f"Fewer than 6 {c.subject}s: intervals and tests mean little.")
    return "\n".join(lines)


def compare_runs(runs: Sequence[Path], metrics: Mapping[str, Metric]) -> str:
    """Compare runs and return the text for a terminal."""
    return table(compare(runs, metrics))


def _shown_settings(settings: Mapping[str, tuple[Any, ...]]) -> list[tuple[str, ...]]:
    return [
        (key, *(json.dumps(value, ensure_ascii=False, default=str) for value in values))
        for key, values in settings.items()
    ]


def _shown(pairs: Sequence[Pair], metrics: Mapping[str, Metric]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for pair in pairs:
        metric = metric_of(metrics, pair.metric)
        digits = decimals(metric, [pair.first, pair.value])
        unit = f" ({metric.unit})" if metric.unit else ""
        difference = pair.difference
        ends = {"low": difference.low, "high": difference.high}
        lines.append(
            (
                f"{metric.title}{unit}",
                pair.run,
                number(pair.first, metric, digits),
                number(pair.value, metric, digits),
                number(difference.value, metric, digits, signed=True),
                interval(ends, metric, digits),
                probability(difference.p),
                pair.word,
            )
        )
    return lines


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    aligned = [_aligned_column(column) for column in zip(*lines, strict=True)]
    return ["  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]


def _aligned_column(cells: Sequence[str]) -> list[str]:
    width = max(len(cell) for cell in cells)
    numbers = all(cell[:1].isdigit() or cell[:1] in {"+", "-", "<"} for cell in cells[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]
