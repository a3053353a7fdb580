"""The figures of the report; numbers come from the evaluation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diptych.contract import Evaluation, Picture
from diptych.report.look import COLOURS, INK, LINE, SOFT, figure_of_axes
from diptych_pirads.cases import (
    FRACTIONS,
    Case,
    draw_axial,
    draw_difference,
    draw_sagittal,
    draw_sectors,
    from_arrays,
    legend,
    shown_slices,
)
from diptych_pirads.config import PiradsConfig
from diptych_pirads.labels import ZONES
from diptych_pirads.scores import READERS
from diptych_pirads.volumetry import LEVELS

if TYPE_CHECKING:
    from diptych.prepared import Prepared

LABEL_SIZE = 8.5  # of ticks, in points
WORDS = {
    "": "pirads",
    "mean_shape": "mean shape",
    "box_atlas": "box atlas",
    "aniso": "AnisoUNet",
    "unet": "MONAI UNet",
}
MEASURES = {"masd": "mean absolute surface distance (mm)", "dice": "Dice"}
MAPPED = (0.3, 0.5, 0.7)  # slices of a disagreement map, parts of the gland's height
LIMITS = 1.96  # standard deviations that hold 95 %
LEAST = 2  # studies for a standard deviation


def pictures(config: PiradsConfig, prepared: Prepared, evaluation: Evaluation) -> list[Picture]:
    """The report's figures, those left out whose data are not there.

    Args:
        config: The run's configuration.
        prepared: Its data.
        evaluation: Of the model and its baselines.

    Returns:
        Outlines of the worst, the median and the best study; distances and overlap of every
        method beside the readers; thirds of the gland; volumes; the sector map; where the two
        paths disagree.
    """
    scores = _scores(evaluation.files)
    cases = from_arrays(evaluation.files.get("cases", {}))
    drawn: list[Picture | None] = [
        _outlines(cases),
        _boxes(scores, evaluation.rows),
        _levels(scores),
        _volumes(scores, evaluation.files.get("review")),
        _sectors(cases),
        _disagreement(cases),
    ]
    return [picture for picture in drawn if picture is not None]


def _scores(files: Mapping[str, Any]) -> pl.DataFrame:
    """Every method against its first reader: a row a subject, method, zone, region and metric."""
    tables = [
        table for name, table in files.items() if name == "metrics" or name.startswith("metrics-")
    ]
    held = [table for table in tables if table.height]
    if not held:
        return pl.DataFrame(schema=dict.fromkeys(("method", "zone", "metric"), pl.String))
    whole = pl.concat(held)
    first = whole.group_by("unit", maintain_order=True).agg(pl.col("reader").first())
    own = whole.join(first, on=["unit", "reader"], how="semi")
    keys = ["subject", "method", "zone", "region", "metric"]
    per_fit = own.group_by([*keys, "fit"], maintain_order=True).agg(pl.col("value").mean())
    per_subject: pl.DataFrame = per_fit.group_by(keys, maintain_order=True).agg(
        pl.col("value").mean()
    )
    return per_subject


def _methods(scores: pl.DataFrame) -> list[str]:
    known = scores["method"].unique().to_list()
    order = [name for name in WORDS if name in known]
    return [*order, *sorted(set(known) - set(order))]


def _values(scores: pl.DataFrame, region: str = "all", **equal: str) -> np.ndarray:
    held = scores.filter(pl.col("region") == region, **equal)["value"].drop_nulls()
    return held.drop_nans().to_numpy()


def _zones(scores: pl.DataFrame) -> list[str]:
    known = set(scores["zone"].to_list())
    return [zone for zone in (*ZONES[1:], "gland") if zone in known]


def _grid(width: float, height: float, rows: int, columns: int, **more: Any) -> tuple[Figure, Any]:
    return figure_of_axes(
        width, height, label_size=LABEL_SIZE, nrows=rows, ncols=columns, squeeze=False, **more
    )


def _outlines(cases: Mapping[str, Case]) -> Picture | None:
    if not cases:
        return None
    columns = len(FRACTIONS) + 1
    figure = Figure(
        figsize=(2.1 * columns, 2.1 * len(cases) + 0.5), layout="constrained", facecolor="white"
    )
    grid = figure.subplots(len(cases), columns, squeeze=False)
    for (name, case), row in zip(cases.items(), grid, strict=True):
        for axes, z in zip(row, shown_slices(case), strict=False):
            draw_axial(axes, case, z)
        draw_sagittal(row[-1], case)
        row[0].set_ylabel(name, fontsize=10, color=INK)
    for axes, part in zip(grid[0], FRACTIONS, strict=False):
        axes.set_title(f"{part:.0%}", fontsize=9, color=SOFT)
    grid[0, -1].set_title("sagittal", fontsize=9, color=SOFT)
    legend(figure, compared=any(case.reference is not None for case in cases.values()))
    return Picture(
        "outlines",
        f"Outlines of test studies: {', '.join(cases)}",
        "By mean Dice over the zones. Axial slices at parts of the gland's height from apex to "
        "base, seen from the feet (the patient's right is on the left), and the sagittal plane "
        "through the middle of the gland, its front on the left.",
        figure,
    )


def _boxes(scores: pl.DataFrame, rows: pl.DataFrame) -> Picture | None:
    """A box a method and zone, a point a subject, and what the readers reach as a line."""
    zones, methods = _zones(scores), _methods(scores)
    if not zones:
        return None
    width = 1.2 + len(zones) * (0.9 + 0.36 * len(methods))
    figure, grid = _grid(width, 6.0, len(MEASURES), len(zones), sharey="row")
    for row, (metric, words) in zip(grid, MEASURES.items(), strict=True):
        for axes, zone in zip(row, zones, strict=True):
            for place, method in enumerate(methods):
                values = _values(scores, method=method, zone=zone, metric=metric)
                _box(axes, place, values, COLOURS[place % len(COLOURS)])
            line = _reader_line(rows, f"{metric}/{zone}")
            if line is not None:
                axes.axhline(line, color=INK, linewidth=1.2, linestyle="--")
            axes.set_xticks([])
            axes.set_xlim(-0.6, len(methods) - 0.4)
        row[0].set_ylabel(words, fontsize=9, color=INK)
        row[0].set_ylim(bottom=0)
    for axes, zone in zip(grid[0], zones, strict=True):
        axes.set_title(zone.upper() if zone != "gland" else zone, fontsize=10, color=INK)
    handles = [
        _handle(COLOURS[place % len(COLOURS)], WORDS.get(method, method))
        for place, method in enumerate(methods)
    ]
    if any(_reader_line(rows, f"masd/{zone}") is not None for zone in zones):
        handles.append(_handle(INK, "second reader", "--"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return Picture(
        "distances",
        "Every method, zone by zone",
        "A point a patient; boxes show quartiles and median. The dashed line is the mean of the "
        "second readers against the first, where there are any. Missed zones have no distance "
        "and are counted in the table of misses.",
        figure,
    )


def _box(axes: Axes, place: int, values: np.ndarray, colour: str) -> None:
    if not len(values):
        axes.text(place, 0, "none", ha="center", va="bottom", fontsize=8, color=SOFT)
        return
    axes.boxplot(
        values,
        positions=[place],
        widths=0.62,
        showfliers=False,
        manage_ticks=False,
        boxprops={"color": colour},
        whiskerprops={"color": colour},
        capprops={"color": colour},
        medianprops={"color": colour, "linewidth": 2},
    )
    spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
    axes.scatter(place + spread, np.sort(values), s=9, color=colour, alpha=0.55, linewidths=0)


def _handle(colour: str, label: str, style: Any = "-") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label)


def _reader_line(rows: pl.DataFrame, metric: str) -> float | None:
    """Mean over patients of every further reader against the first."""
    held = rows.filter(
        pl.col("table") == READERS,
        pl.col("metric") == metric,
        ~pl.col("method").is_in(["", "pirads"]),
    )
    per_subject = held.group_by("subject").agg(pl.col("value").mean())["value"].drop_nulls()
    return float(np.mean(per_subject.to_numpy())) if len(per_subject) else None


def _levels(scores: pl.DataFrame) -> Picture | None:
    zones, methods = _zones(scores), _methods(scores)
    if not zones:
        return None
    figure, grid = _grid(1.2 + 1.9 * len(zones), 5.2, len(MEASURES), len(zones), sharey="row")
    for row, (metric, words) in zip(grid, MEASURES.items(), strict=True):
        for axes, zone in zip(row, zones, strict=True):
            for number, method in enumerate(methods):
                found = [
                    _values(scores, level, method=method, zone=zone, metric=metric)
                    for level in LEVELS
                ]
                means = [float(values.mean()) if len(values) else np.nan for values in found]
                colour = COLOURS[number % len(COLOURS)]
                thick = 2.0 if not method else 1.1
                axes.plot(
                    range(len(LEVELS)), means, color=colour, marker="o", ms=4, linewidth=thick
                )
                if not method:
                    for place, mean in enumerate(means):
                        if np.isfinite(mean):
                            axes.annotate(
                                f"{mean:.2f}",
                                (place, mean),
                                (0, 5),
                                textcoords="offset points",
                                fontsize=7.5,
                                ha="center",
                                color=colour,
                            )
            axes.set_xticks(range(len(LEVELS)), LEVELS)
            axes.set_xlim(-0.35, len(LEVELS) - 0.65)
        row[0].set_ylabel(words, fontsize=9, color=INK)
        row[0].set_ylim(bottom=0)
    for axes, zone in zip(grid[0], zones, strict=True):
        axes.set_title(zone.upper() if zone != "gland" else zone, fontsize=10, color=INK)
    figure.legend(
        handles=[
            _handle(COLOURS[number % len(COLOURS)], WORDS.get(method, method))
            for number, method in enumerate(methods)
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8.5,
    )
    return Picture(
        "levels",
        "Apex, mid and base",
        "Means over patients in the lower, middle and upper third of the reader's gland; numbers "
        "are the model's. A zone that a third does not hold is left out there.",
        figure,
    )


def _volumes(scores: pl.DataFrame, review: pl.DataFrame | None) -> Picture | None:
    """Bland and Altman: error over the mean of both volumes."""
    zones = _zones(scores)
    if review is None or not zones:
        return None
    figure, grid = _grid(1.0 + 2.2 * len(zones), 3.0, 1, len(zones))
    for axes, zone in zip(grid[0], zones, strict=True):
        errors = scores.filter(method="", zone=zone, region="all", metric="volume_error_ml")
        own = review.group_by("subject").agg(pl.col(f"{zone}_ml").mean())
        table = errors.join(own, on="subject").drop_nulls()
        error = table["value"].to_numpy()
        axes.set_title(zone.upper() if zone != "gland" else zone, fontsize=10, color=INK)
        if not len(error):
            continue
        axes.scatter(table[f"{zone}_ml"].to_numpy() - error / 2, error, s=14, color=COLOURS[0])
        axes.axhline(0, color=LINE, linewidth=1)
        axes.axhline(error.mean(), color=INK, linewidth=1.2)
        words = f"bias {error.mean():+.1f} mL"
        if len(error) >= LEAST:
            spread = LIMITS * float(error.std(ddof=1))
            for limit in (error.mean() - spread, error.mean() + spread):
                axes.axhline(limit, color=SOFT, linewidth=1, linestyle="--")
            words += f"\n± {spread:.1f} mL"
        axes.text(0.03, 0.97, words, transform=axes.transAxes, va="top", fontsize=8, color=INK)
        most = 1.7 * max(np.abs(axes.get_ylim()))
        axes.set_ylim(-most, most)
        axes.set_xlabel("mean of both (mL)", fontsize=8.5, color=INK)
    grid[0, 0].set_ylabel("model - reader (mL)", fontsize=9, color=INK)
    return Picture(
        "volumes",
        "Volumes against the reader's (Bland and Altman)",
        "A point a patient: error of the model's volume over the mean of both. Solid: mean error; "
        "dashed: where 95 % of errors lie if they are normal.",
        figure,
    )


def _sectors(cases: Mapping[str, Case]) -> Picture | None:
    name = "median" if "median" in cases else next(iter(cases), "")
    if not name or not cases[name].predicted.any():
        return None
    figure = Figure(figsize=(9.0, 3.4), layout="constrained", facecolor="white")
    for axes, level in zip(figure.subplots(1, len(LEVELS)), LEVELS, strict=True):
        draw_sectors(axes, cases[name], level)
    return Picture(
        "sectors",
        f"The PI-RADS sectors of the {name} study",
        "How the predicted zones are divided (PI-RADS 2.1) on the middle slice of each third: "
        "halves by the urethra or the middle of the gland, PZ behind the middle of its depth into "
        "medial (PZpm) and lateral (PZpl). At the base TZp may be the central zone, which these "
        "zones do not tell apart.",
        figure,
    )


def _disagreement(cases: Mapping[str, Case]) -> Picture | None:
    shown = {name: case for name, case in cases.items() if case.difference is not None}
    if not shown:
        return None
    columns = len(MAPPED)
    figure = Figure(
        figsize=(2.5 * columns + 1.0, 2.1 * len(shown)), layout="constrained", facecolor="white"
    )
    grid = figure.subplots(len(shown), columns, squeeze=False)
    coloured: Sequence[Any] = []
    for (name, case), row in zip(shown.items(), grid, strict=True):
        coloured = [
            draw_difference(axes, case, z)
            for axes, z in zip(row, shown_slices(case, MAPPED), strict=True)
        ]
        row[0].set_ylabel(name, fontsize=10, color=INK)
    for axes, part in zip(grid[0], MAPPED, strict=True):
        axes.set_title(f"{part:.0%}", fontsize=9, color=SOFT)
    bar = figure.colorbar(coloured[-1], ax=grid, shrink=0.6)
    bar.set_label("difference of probabilities", fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, colors=SOFT)
    return Picture(
        "disagreement",
        "Where the two paths disagree",
        "Largest difference of the two paths' probabilities for the zones that both know, on "
        "slices at parts of the gland's height. Bright lines along borders are usual; bright "
        "areas deserve a look.",
        figure,
    )
