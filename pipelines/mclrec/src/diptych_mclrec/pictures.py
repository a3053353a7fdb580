"""The figures of the report; numbers come from the evaluation alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from diptych.contract import Evaluation, Picture
from diptych.report.look import COLOURS, INK, LINE, SOFT, figure_of_axes
from diptych_mclrec.config import MCLRecConfig

if TYPE_CHECKING:
    from diptych.prepared import Prepared

MODEL = "MCLRec"
REFIT = " (train+valid)"  # end of the name of a count that has seen validation
NORMAL = 1.96  # standard errors that hold 95 %
HEAD = 10
LAST_EVENTS = 5  # of a shown history
WIDTH = 50  # letters of a column of names
FEW = 5  # steps below which a bin says nothing
STRATA = {
    "length of the history": "steps of the history",
    "frequency of the target": "frequency of the target",
}
ALL_STEPS = "all steps"
GAPS = ("gap up to 7 days", "8 to 30 days", "31 to 365 days", "more than 365 days")


def pictures(config: MCLRecConfig, prepared: Prepared, evaluation: Evaluation) -> list[Picture]:
    """The report's figures, those left out whose data are not there.

    Args:
        config: The run's configuration.
        prepared: Its data; not looked at.
        evaluation: Of the model and its baselines.

    Returns:
        Hits over the length of the list; repeated and new targets; strata by length, frequency
        and gap; calibration; how far views are apart; single histories; neighbours of items.
    """
    rows, files = evaluation.rows, evaluation.files
    drawn = [
        _hits(rows, config.evaluate.k),
        _repeats(rows),
        _strata(files),
        _gaps(rows),
        _calibration(files.get("calibration")),
        _views(files.get("views")),
        _examples(files.get("examples")),
        _neighbours(files.get("neighbours")),
    ]
    return [picture for picture in drawn if picture is not None]


def _name(method: str) -> str:
    return method or MODEL


def _order(methods: Sequence[str]) -> list[str]:
    """The model first, the others as they came; second fits would only cover the first ones."""
    known = [method for method in dict.fromkeys(methods) if not method.endswith(REFIT)]
    return sorted(known, key=lambda method: method != "")


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _style(place: int) -> Literal["-", "--"]:
    return "-" if place < len(COLOURS) else "--"


def _legend(figure: Figure, methods: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=_colour(place), linestyle=_style(place), label=_name(method))
        for place, method in enumerate(methods)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5)


def _per_subject(rows: pl.DataFrame, **equal: str) -> pl.DataFrame:
    """Method, metric, subject and the mean value over fits."""
    held = rows.filter(pl.col("subject") != "", **equal).drop_nulls("value")
    return held.group_by("method", "metric", "subject", maintain_order=True).agg(
        pl.col("value").mean()
    )


def _means(rows: pl.DataFrame, metrics: Sequence[str], **equal: str) -> pl.DataFrame:
    """Mean and standard error over subjects of each method and metric."""
    held = _per_subject(rows, **equal).filter(pl.col("metric").is_in(list(metrics)))
    return held.group_by("method", "metric", maintain_order=True).agg(
        mean=pl.col("value").mean(), error=pl.col("value").std() / pl.len().sqrt(), n=pl.len()
    )


def _row(table: pl.DataFrame, method: str, metric: str) -> Mapping[str, Any] | None:
    found = table.filter(method=method, metric=metric)
    return found.row(0, named=True) if found.height else None


def _hits(rows: pl.DataFrame, ks: Sequence[int]) -> Picture | None:
    """Share of hits over the length of the list, a line a method."""
    known = set(rows.filter(table="", condition="")["metric"].to_list())
    word = "recall" if f"recall@{HEAD}" in known else "hr"
    shown = [k for k in ks if f"{word}@{k}" in known]
    table = _means(rows, [f"{word}@{k}" for k in shown], table="", condition="")
    if not table.height:
        return None
    methods = _order(table["method"].to_list())
    figure, axes = figure_of_axes(8.6, 4.2)
    for place, method in reversed(list(enumerate(methods))):
        found = [_row(table, method, f"{word}@{k}") for k in shown]
        held = [(k, one) for k, one in zip(shown, found, strict=True) if one is not None]
        x = [k for k, _ in held]
        y = np.array([one["mean"] for _, one in held])
        error = NORMAL * np.array([one["error"] or 0.0 for _, one in held])
        ours = not method
        axes.plot(
            x, y, color=_colour(place), linestyle=_style(place), marker="o", markersize=4,
            linewidth=2.2 if ours else 1.2, zorder=3 if ours else 2,
        )  # fmt: skip
        axes.fill_between(x, y - error, y + error, color=_colour(place), alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length of the list", color=INK)
    axes.set_ylabel("recall" if word == "recall" else "share of hits", color=INK)
    _legend(figure, methods)
    return Picture(
        "hits",
        "How often the list holds what followed",
        "Mean over subjects by the length of the list; shades are 95 % (normal) and unpaired, the "
        "tested differences are in the table.",
        figure,
    )


def _repeats(rows: pl.DataFrame) -> Picture | None:
    known = set(rows.filter(table="", condition="")["metric"].to_list())
    metric = f"recall@{HEAD}" if f"recall@{HEAD}_repeat" in known else f"ndcg@{HEAD}"
    parts = {f"{metric}_repeat": "repeated targets", f"{metric}_novel": "new targets"}
    table = _means(rows, list(parts), table="", condition="")
    if not table.height:
        return None
    methods = _order(table["method"].to_list())
    figure, axes = figure_of_axes(8.6, 0.3 * len(methods) + 1.5, ncols=2, sharex=True, sharey=True)
    for one, (name, words) in zip(axes, parts.items(), strict=True):
        one.grid(visible=False)
        one.grid(axis="x", color=LINE, linewidth=0.7)
        for place, method in enumerate(methods):
            found = _row(table, method, name)
            if found is None:
                continue
            error = NORMAL * (found["error"] or 0.0)
            one.barh(place, found["mean"], 0.62, xerr=error, color=_colour(0 if not method else 5),
                     error_kw={"ecolor": INK, "elinewidth": 1})  # fmt: skip
        subjects = int(table.filter(metric=name)["n"].max() or 0)  # type: ignore[arg-type]
        one.set_title(f"{words} ({subjects} subjects)", fontsize=10, color=INK)
    axes[0].set_yticks(range(len(methods)), [_name(method) for method in methods])
    axes[0].invert_yaxis()
    for one in axes:
        one.set_xlabel(metric.replace("ndcg", "NDCG"), color=INK)
    return Picture(
        "repeats",
        "What was there before, and what is new",
        "The same steps, divided by whether the target is in the history already. A method that "
        "lives from repeats shows nothing on the right. Bars of error: 95 % (normal).",
        figure,
    )


def _strata(files: Mapping[str, Any]) -> Picture | None:
    tables = [
        table for name, table in files.items() if name == "strata" or name.startswith("strata-")
    ]
    held = [table for table in tables if table.height]
    if not held:
        return None
    whole = pl.concat(held, how="diagonal_relaxed")
    methods = _order(whole["method"].to_list())
    figure, axes = figure_of_axes(9.6, 3.8, ncols=2, sharey=True)
    for one, (by, words) in zip(axes, STRATA.items(), strict=True):
        part = whole.filter(by=by)
        names = list(dict.fromkeys(part["stratum"].to_list()))
        for place, method in reversed(list(enumerate(methods))):
            found = part.filter(method=method).group_by("stratum").agg(pl.col("ndcg@10").mean())
            value = dict(found.rows())
            y = [value.get(name, np.nan) for name in names]
            _line(one, place, method, y)
        sizes = dict(part.filter(method="").group_by("stratum").agg(pl.col("steps").max()).rows())
        one.set_xticks(range(len(names)), [_stratum(name, sizes.get(name)) for name in names])
        one.set_xlabel(words, color=INK, fontsize=9)
        one.tick_params(labelsize=8)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("NDCG@10", color=INK)
    _legend(figure, methods)
    return Picture(
        "strata",
        "Short and long histories, frequent and rare targets",
        "NDCG@10 of the tested steps, divided by the steps of the history and by how frequent the "
        "target is in training; below each part, how many steps it has.",
        figure,
    )


def _line(axes: Axes, place: int, method: str, y: Sequence[float] | NDArray[np.float64]) -> None:
    ours = not method
    axes.plot(
        range(len(y)), y, color=_colour(place), linestyle=_style(place), marker="o", markersize=4,
        linewidth=2.2 if ours else 1.2, zorder=3 if ours else 2,
    )  # fmt: skip


def _stratum(name: str, steps: int | None) -> str:
    return f"{name}\n{steps or 0:,}"


def _gaps(rows: pl.DataFrame) -> Picture | None:
    """Scores by the time to the next event, where there are times."""
    held = rows.filter(pl.col("condition").is_in(GAPS), table=ALL_STEPS)
    if not held.height:
        return None
    metric = f"recall@{HEAD}" if f"recall@{HEAD}" in set(held["metric"]) else f"ndcg@{HEAD}"
    tables = {gap: _means(held, [metric], condition=gap) for gap in GAPS}
    methods = _order(held["method"].to_list())
    figure, axes = figure_of_axes(8.6, 3.6)
    for place, method in reversed(list(enumerate(methods))):
        found = [_row(table, method, metric) for table in tables.values()]
        _line(axes, place, method, [np.nan if one is None else one["mean"] for one in found])
    sizes = [int(table["n"].max() or 0) for table in tables.values()]  # type: ignore[arg-type]
    labels = [f"{gap}\n{size} subjects" for gap, size in zip(GAPS, sizes, strict=True)]
    axes.set_xticks(range(len(GAPS)), labels)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(metric, color=INK)
    _legend(figure, methods)
    return Picture(
        "gaps",
        "How far ahead the next event was",
        "All steps of the tested subjects by the days since the step before. A method may live "
        "from what follows within days.",
        figure,
    )


def _calibration(table: pl.DataFrame | None) -> Picture | None:
    if table is None:
        return None
    own = table.filter(pl.col("method") == "", pl.col("steps") >= FEW)
    sums = pl.col("confidence", "hits") * pl.col("steps")
    bins = own.with_columns(sums).group_by("low", maintain_order=True).agg(
        pl.col("confidence", "hits", "steps").sum()
    )  # fmt: skip
    if not bins.height:
        return None
    steps = bins["steps"].to_numpy()
    x, y = bins["confidence"].to_numpy() / steps, bins["hits"].to_numpy() / steps
    error = NORMAL * np.sqrt(np.maximum(y * (1 - y), 0.01) / steps)
    figure, axes = figure_of_axes(4.6, 4.2)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--")
    axes.errorbar(x, y, yerr=error, color=COLOURS[0], marker="o", markersize=4)
    axes.set_xlim(0, max(0.3, 1.1 * float(x.max())))
    axes.set_ylim(0, max(0.3, min(1.0, 1.2 * float(y.max()))))
    axes.set_xlabel("probability of the first item", color=INK)
    axes.set_ylabel("share that was right", color=INK)
    return Picture(
        "calibration",
        "Calibration",
        "How often the first item of a list is what followed, by its probability (softmax over all "
        "items; bars: 95 %; bins below five steps are left out). Above the dashed line the model "
        "is too modest.",
        figure,
    )


def _views(table: pl.DataFrame | None) -> Picture | None:
    if table is None or not table.height:
        return None
    words = {"h": "random views (h)", "z": "learnt views (z)"}
    figure, axes = figure_of_axes(6.4, 1.2 + 0.35 * table.height, ncols=2, sharey=True)
    for one, name in zip(axes, ("alignment", "uniformity"), strict=True):
        one.grid(visible=False)
        values = table[name].to_numpy()
        one.barh(range(table.height), values, 0.55, color=COLOURS[0])
        for place, value in enumerate(values):
            one.annotate(f"{value:.2f}", (value, place), (4 if value >= 0 else -4, 0),
                         textcoords="offset points", va="center", fontsize=8.5, color=INK,
                         ha="left" if value >= 0 else "right")  # fmt: skip
        one.set_title(name, fontsize=10, color=INK)
        one.margins(x=0.25)
    axes[0].set_yticks(range(table.height), [words[name] for name in table["views"]])
    axes[0].invert_yaxis()
    return Picture(
        "views",
        "How far two views are apart",
        "Of test histories, vectors of length 1 (Wang and Isola, 2020). Alignment: mean squared "
        "distance of the two views of a history, 0 is best. Uniformity: lower is more even; near "
        "0 all histories have the same vector.",
        figure,
    )


def _examples(table: pl.DataFrame | None) -> Picture | None:
    if table is None or not table.height:
        return None
    rows = []
    for one in table.iter_rows(named=True):
        history = list(one["history"])[-LAST_EVENTS:]
        if one["days"] is not None:
            days = list(one["days"])[-LAST_EVENTS:]
            history = [f"{item} ({day:g})" for item, day in zip(history, days, strict=True)]
        rank = "-" if one["rank"] is None else f"{one['rank']:g}"
        target = ", ".join(one["target"]) or "not known"
        rows.append([one["subject"], ", ".join(history), target, rank, ", ".join(one["top"])])
    dated = table["days"].is_not_null().any()
    words = "; in brackets, how many days before the target" if dated else ""
    return Picture(
        "examples",
        "Single histories",
        f"Last known events{words}, what followed, its rank, and the five items ranked first. "
        "Subjects are evenly spread over the tested ones.",
        _text_table(("subject", "history", "followed by", "rank", "expected"), rows,
                    (13, WIDTH, 26, 5, WIDTH)),
    )  # fmt: skip


def _neighbours(table: pl.DataFrame | None) -> Picture | None:
    if table is None or not table.height:
        return None
    rows = [
        [
            one["item"],
            ", ".join(
                f"{name} {cosine:.2f}"
                for name, cosine in zip(one["neighbours"], one["cosine"], strict=True)
            ),
        ]
        for one in table.iter_rows(named=True)
    ]
    return Picture(
        "neighbours",
        "Items that the model takes for alike",
        "The most frequent items of training, and the items whose vectors point most nearly where "
        "theirs do (cosine).",
        _text_table(("item", "nearest"), rows, (32, 2 * WIDTH)),
    )


def _text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]
) -> Figure:
    """A table as a figure, long cells on at most two lines."""
    cells = [
        [_two_lines(text, width) for text, width in zip(row, widths, strict=True)] for row in rows
    ]
    heights = [1 + max(cell.count("\n") for cell in row) for row in cells]
    height = 0.5 + 0.17 * sum(heights) + 0.1 * len(rows)
    figure = Figure(figsize=(0.068 * sum(widths) + 0.3, height), facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, sum(widths))
    axes.set_ylim(-height, 0)
    places = np.cumsum([0, *widths[:-1]])
    for place, text in zip(places, header, strict=True):
        axes.text(place, -0.1, text, va="top", fontsize=8.5, color=SOFT)
    y = -0.38
    for row, lines in zip(cells, heights, strict=True):
        axes.axhline(y + 0.05, color=LINE, linewidth=0.7)
        for place, text in zip(places, row, strict=True):
            axes.text(place, y, text, va="top", fontsize=8, color=INK, parse_math=False)
        y -= 0.17 * lines + 0.1
    return figure


def _two_lines(text: str, width: int) -> str:
    lines = textwrap.wrap(text, width - 2, break_on_hyphens=False) or [""]
    if len(lines) > 2:
        lines = [lines[0], lines[1][: width - 4] + " …"]
    return "\n".join(lines)
