"""Results as rows and cells for the template: formatted, never recomputed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.contract import Metric
from diptych.results import (
    evidence,
    headline_metric,
    interval,
    metric_decimals,
    metric_of,
    number,
    probability,
    tone,
)

MINUS = "\u2212"
DASH = "\u2013"


def typeset(text: str) -> str:
    """A formatted number or interval with a true minus sign and dash."""
    return DASH if text == "-" else text.replace("-", MINUS)


def score_table(
    table: Mapping[str, Any], results: Mapping[str, Any], metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    """One table of results: methods as rows, metrics as columns.

    Args:
        table: The top level of ``results.json`` or one of its tables.
        results: The whole results, so that equal metrics have equal decimals everywhere.
        metrics: The pipeline's metrics.

    Returns:
        ``columns`` (title, unit, arrow, headline) and ``rows`` (method, own, cells of value,
        interval, best, reason).
    """
    names = list(dict.fromkeys(name for scores in table["methods"].values() for name in scores))
    columns = []
    for name in names:
        metric = metric_of(metrics, name)
        columns.append(
            {
                "title": metric.title,
                "unit": metric.unit,
                "arrow": "\u2191" if metric.better == "higher" else "\u2193",
                "headline": metric.headline,
            }
        )
    rows = []
    for method, scores in table["methods"].items():
        cells = [_cell(scores.get(name), name, table, results, metrics) for name in names]
        rows.append({"method": method, "own": method == results["pipeline"], "cells": cells})
    return {"columns": columns, "rows": rows}


def _cell(
    score: Mapping[str, Any] | None,
    name: str,
    table: Mapping[str, Any],
    results: Mapping[str, Any],
    metrics: Mapping[str, Metric],
) -> dict[str, Any]:
    if score is None:
        return {"value": "", "interval": "", "best": False, "reason": "not measured"}
    metric = metric_of(metrics, name)
    digits = metric_decimals(results, name, metric)
    others = [
        scores[name]["value"]
        for scores in table["methods"].values()
        if name in scores and scores[name]["value"] is not None
    ]
    best = max(others, default=None) if metric.better == "higher" else min(others, default=None)
    return {
        "value": typeset(number(score["value"], metric, digits)),
        "interval": typeset(interval(score, metric, digits)),
        "best": score["value"] is not None and score["value"] == best and len(others) > 1,
        "reason": score.get("reason", ""),
    }


def forests(
    table: Mapping[str, Any], results: Mapping[str, Any], metrics: Mapping[str, Metric]
) -> list[dict[str, Any]]:
    """The differences of each headline metric as rows of a forest plot.

    Args:
        table: The top level of ``results.json`` or one of its tables.
        results: The whole results.
        metrics: The pipeline's metrics.

    Returns:
        For each metric its title, axis ticks and rows; positions are in percent of the axis.
    """
    found = []
    for name in dict.fromkeys(d["metric"] for d in table["differences"]):
        metric = metric_of(metrics, name)
        digits = metric_decimals(results, name, metric)
        differences = [d for d in table["differences"] if d["metric"] == name]
        ends = [0.0] + [d[k] for d in differences for k in ("value", "low", "high") if d[k]]
        low, high, ticks = _axis(min(ends), max(ends))

        def at(value: float, low: float = low, high: float = high) -> float:
            return round(100 * (value - low) / (high - low), 2)

        found.append(
            {
                "title": metric.title,
                "unit": "percentage points" if metric.unit == "%" else metric.unit,
                "model": results["pipeline"],
                "better_side": "right" if metric.better == "higher" else "left",
                "zero": at(0.0),
                "ticks": [
                    {"at": at(tick), "label": typeset(_tick(tick, metric, digits))}
                    for tick in ticks
                ],
                "rows": [_forest_row(d, metric, digits, at) for d in differences],
            }
        )
    return found


def _forest_row(
    difference: Mapping[str, Any], metric: Metric, digits: int, at: Any
) -> dict[str, Any]:
    word = evidence(difference, metric)
    drawn = {
        key: None if difference[key] is None else at(difference[key])
        for key in ("value", "low", "high")
    }
    return {
        "method": difference["b"],
        "at": drawn,
        "value": typeset(number(difference["value"], metric, digits, signed=True)),
        "interval": typeset(interval(difference, metric, digits)),
        "p": typeset(probability(difference["p"])),
        "word": word,
        "kind": tone(word),
        "reason": difference.get("reason", ""),
    }


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    from matplotlib.ticker import MaxNLocator

    if low == high:
        low, high = low - 1e-3, high + 1e-3
    room = 0.05 * (high - low)
    low, high = low - room, high + room
    ticks = [float(t) for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    return low, high, ticks


def _tick(tick: float, metric: Metric, digits: int) -> str:
    shown = number(tick, metric, digits, signed=True)
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def condition_overview(
    results: Mapping[str, Any], metrics: Mapping[str, Metric]
) -> dict[str, Any] | None:
    """The headline metric under every condition: conditions as rows, methods as columns.

    Args:
        results: The content of ``results.json``.
        metrics: The pipeline's metrics.

    Returns:
        Title, columns and rows; None where fewer than two further tables have this metric.
    """
    name = headline_metric(results, metrics)
    measured = [t for t in results["tables"] if any(name in m for m in t["methods"].values())]
    if name is None or len(measured) < 2:
        return None
    metric = metric_of(metrics, name)
    tables = [{"name": "", "condition": "headline", **results}, *measured]
    methods = list(
        dict.fromkeys(m for t in tables for m in t["methods"] if name in t["methods"][m])
    )
    rows = [
        {
            "label": table_title(table) or "headline",
            "cells": [
                _cell(table["methods"].get(m, {}).get(name), name, table, results, metrics)
                for m in methods
            ],
        }
        for table in tables
    ]
    return {"title": metric.title, "unit": metric.unit, "methods": methods, "rows": rows}


def table_title(table: Mapping[str, Any]) -> str:
    """Name and condition of a table in one line."""
    return ", ".join(filter(None, (table.get("name", ""), table.get("condition", ""))))


def grouped_findings(findings: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Findings by severity and code, so that a hundred equal ones take one line.

    Args:
        findings: Entries of a ``findings.json``.

    Returns:
        Errors first: severity, code, count, fix, and up to three examples.
    """
    order = {"error": 0, "warning": 1, "note": 2}
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for finding in findings:
        groups.setdefault((finding["severity"], finding["code"]), []).append(finding)
    return [
        {
            "severity": severity,
            "code": code,
            "count": len(group),
            "examples": [f"{f['where']}: {f['found']}".lstrip(": ") for f in group[:3]],
            "fix": group[0]["fix"],
        }
        for (severity, code), group in sorted(groups.items(), key=lambda item: order[item[0][0]])
    ]


def split_notes(notes: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Notes apart: sentences, and ``KEY=VALUE`` pairs."""
    sentences, pairs = [], []
    for note in notes:
        key, sign, value = note.partition("=")
        if sign and key and not any(c.isspace() for c in key):
            pairs.append((key, value))
        else:
            sentences.append(note)
    return sentences, pairs


def split_table(stored: Mapping[str, Any], pipeline: str) -> list[dict[str, Any]]:
    """The fits of a run by method and stage, with the sizes of their parts.

    Args:
        stored: The content of ``split.json``.
        pipeline: Name of the method "".

    Returns:
        One row a method and stage: fits, different splits, seeds, rows of each part, level.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for fit in stored["fits"]:
        groups.setdefault((fit["method"] or pipeline, fit["stage"]), []).append(fit)
    rows = []
    for (method, stage), fits in groups.items():
        splits = [stored["splits"][fit["split"]] for fit in fits]
        rows.append(
            {
                "method": method,
                "stage": stage,
                "fits": len(fits),
                "splits": len({fit["split"] for fit in fits}),
                "seeds": ", ".join(str(seed) for seed in sorted({fit["seed"] for fit in fits})),
                "parts": [
                    _span([len(split[part]) for split in splits])
                    for part in ("train", "validation", "test")
                ],
                "level": ", ".join(sorted({split["disjoint_by"] for split in splits})),
            }
        )
    return rows


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}{DASH}{high:,}"


def size(n_bytes: float) -> str:
    """Bytes in words, in powers of 1000."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    power = min(4, int(math.log10(n_bytes) // 3))
    return f"{n_bytes / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"
