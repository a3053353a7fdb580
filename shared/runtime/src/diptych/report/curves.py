"""Training curves of all fits of a run, in the colours of the page."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

MOST_PANELS = 12
_COUNTERS = {"epoch", "step", "seconds", "time", "step_index", "wall_s"}
# stand-ins that no figure holds by chance; the page's own colours replace them in the SVG
_COLOURS = {
    "#0a0b01": "var(--ink)",
    "#0a0b02": "var(--soft)",
    "#0a0b03": "var(--line)",
    "#0a0b11": "var(--series-1)",
    "#0a0b12": "var(--series-2)",
    "#0a0b13": "var(--series-3)",
    "#0a0b14": "var(--series-4)",
    "#0a0b15": "var(--series-5)",
    "#0a0b16": "var(--series-6)",
}
_INK, _SOFT, _LINE, *_SERIES = _COLOURS


@dataclass(frozen=True)
class Curve:
    """One logged quantity of one kind of fit over epochs.

    Args:
        label: Method and stage.
        epochs: Epoch numbers.
        values: One row a fit, one column an epoch; NaN where it was not logged.
    """

    label: str
    epochs: np.ndarray
    values: np.ndarray


def read_curves(run: Path, pipeline: str) -> dict[str, list[Curve]]:
    """The logged quantities of a run's fits.

    Args:
        run: The run folder, with ``fits/NAME/metrics.csv``.
        pipeline: Name of the method "".

    Returns:
        Quantity -> one curve for each method and stage, over their fits.
    """
    kinds = _kinds(run, pipeline)
    logged: dict[str, dict[str, list[dict[int, float]]]] = {}
    for file in sorted((run / "fits").rglob("metrics.csv")):
        label = kinds.get(file.parent.relative_to(run / "fits").as_posix(), pipeline)
        for name, series in _by_epoch(file).items():
            logged.setdefault(name, {}).setdefault(label, []).append(series)
    return {
        name: [_curve(label, fits) for label, fits in sorted(by_label.items(), key=_own(pipeline))]
        for name, by_label in logged.items()
    }


def _own(pipeline: str) -> Any:
    return lambda item: (not item[0].startswith(pipeline), item[0])


def _kinds(run: Path, pipeline: str) -> dict[str, str]:
    file = run / "split.json"
    fits: Sequence[Mapping[str, Any]] = (
        json.loads(file.read_text(encoding="utf-8"))["fits"] if file.is_file() else ()
    )
    stages = {fit["stage"] for fit in fits}
    return {
        fit["name"]: (fit["method"] or pipeline) + (f", {fit['stage']}" if len(stages) > 1 else "")
        for fit in fits
    }


def _by_epoch(file: Path) -> dict[str, dict[int, float]]:
    try:
        table = pl.read_csv(file, infer_schema_length=None, truncate_ragged_lines=True)
    except pl.exceptions.PolarsError:
        return {}  # nothing was logged: a fit of zero epochs
    if "epoch" not in table.columns:
        return {}
    numeric = [
        column
        for column, kind in table.schema.items()
        if kind.is_numeric() and column not in _COUNTERS
    ]
    means = (
        table.select("epoch", *(pl.col(column).cast(pl.Float64) for column in numeric))
        .group_by("epoch", maintain_order=True)
        .agg(pl.all().mean())
        .sort("epoch")
    )
    return {
        column: {
            int(epoch): value
            for epoch, value in means.select("epoch", column).iter_rows()
            if value is not None and math.isfinite(value)
        }
        for column in numeric
        if means[column].drop_nulls().len()
    }


def _curve(label: str, fits: Sequence[Mapping[int, float]]) -> Curve:
    epochs = sorted(set().union(*fits))
    values = np.array([[fit.get(epoch, math.nan) for epoch in epochs] for fit in fits])
    return Curve(label, np.array(epochs), values)


def draw(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Small multiples as inline SVG: the median over fits, the band from lowest to highest.

    Args:
        curves: What :func:`read_curves` gave.

    Returns:
        An ``<svg>`` element; empty where nothing was logged.
    """
    shown = [(name, series) for name, series in curves.items() if _has_course(series)]
    if not shown:
        return ""
    import matplotlib as mpl

    labels = list(dict.fromkeys(curve.label for _, series in shown for curve in series))
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure = _figure(shown[:MOST_PANELS], labels)
        if len(labels) > 1:
            _legend(figure, labels)
        return _inline(figure)


def _figure(shown: Sequence[tuple[str, Sequence[Curve]]], labels: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    height = 2.35 * rows + (0.35 if len(labels) > 1 else 0.1)
    figure = Figure(figsize=(9.6, height), layout="constrained")
    for place, (name, series) in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for curve in series:
            _plot(axes, curve, _colour(labels, curve.label))
        axes.set_title(name, loc="left", fontsize=9.5, color=_INK)
        axes.set_xlabel("epoch" if place > len(shown) - columns else "", color=_SOFT)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.locator_params(axis="y", nbins=4)
        axes.tick_params(colors=_SOFT, length=0)
        axes.grid(axis="y", color=_LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_LINE)
    return figure


def _legend(figure: Any, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(labels, label), label=label) for label in labels]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(6, len(labels)),
        frameon=False,
        labelcolor=_INK,
    )


def _colour(labels: Sequence[str], label: str) -> str:
    return _SERIES[list(labels).index(label) % len(_SERIES)]


def _has_course(series: Sequence[Curve]) -> bool:
    """Whether there is anything to see: not one epoch alone, nor one value throughout."""
    values = [curve.values for curve in series if curve.epochs.size > 1]
    return any(np.nanmax(v) > np.nanmin(v) for v in values)


def _plot(axes: Any, curve: Curve, colour: str) -> None:
    low, middle, high = (_over_fits(np.nanquantile, curve.values, q) for q in (0.0, 0.5, 1.0))
    if curve.values.shape[0] > 1:
        axes.fill_between(curve.epochs, low, high, color=colour, alpha=0.16, linewidth=0)
    marker = "o" if curve.epochs.size < 3 else None
    axes.plot(curve.epochs, middle, color=colour, linewidth=1.6, marker=marker, markersize=3)


def _over_fits(function: Any, values: np.ndarray, q: float) -> np.ndarray:
    result: np.ndarray = function(values, q, axis=0)
    return result


def _inline(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--sans)", text)
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return text.replace("<svg ", '<svg role="img" aria-label="Training curves" ', 1)
