"""A segmented study as it is shown: image, outlines and sectors on slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy import ndarray

from diptych.report.look import INK, SOFT
from diptych_pirads.geometry import bounding_box, crop_pad, to_grid
from diptych_pirads.infer import Segmentation
from diptych_pirads.labels import BG, UNSEEN, ZONES
from diptych_pirads.prepare import PreparedStudy, crop_image
from diptych_pirads.volumetry import LEVELS, gland_levels

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the gland's height, from apex to base
COLOURS = {"pz": "#4db8ff", "tz": "#ffa14a", "dpu": "#ffe45c", "afs": "#6ee07a"}
MARGIN_MM = 12.0  # around the gland
BRIGHTEST = 255
SHOWN_FROM = 0.1  # differences of probabilities


@dataclass(frozen=True, eq=False)
class Case:
    """One study on the crop of the working grid.

    Args:
        image: T2-weighted, 0 to 255.
        predicted: Class numbers 0 to 4, after post-processing.
        reference: A reader's, where there is one.
        difference: Difference of the two paths' probabilities, 0 to 255; None for one path.
        spacing: mm along z, y, x.
    """

    image: UInt8[ndarray, "z y x"]
    predicted: UInt8[ndarray, "z y x"]
    reference: UInt8[ndarray, "z y x"] | None
    difference: UInt8[ndarray, "z y x"] | None
    spacing: tuple[float, float, float]


def case_of(found: Segmentation, study: PreparedStudy) -> Case:
    """What is worth looking at of a segmented study.

    Args:
        found: From `infer.segment`.
        study: The study; its label, if it has one, is the reference. A value that leaves several
            zones open is shown as the first of them.
    """
    size = found.prob.size
    image = np.asarray(crop_image(study, found.center, size).array[0], np.float32)
    low, high = float(image.min()), float(image.max())
    reference = None
    if study.label is not None:
        values = crop_pad(study.label.values, found.center, size).array
        drawn = np.zeros(UNSEEN + 1, np.uint8)
        for value, allowed in study.label.scheme.allowed.items():
            drawn[value] = BG if BG in allowed else min(allowed)
        reference = drawn[values]
    return Case(
        image=_bytes((image - low) / max(high - low, 1e-6)),
        predicted=to_grid(found.zones, found.prob, "label").array,
        reference=reference,
        difference=None if found.difference is None else _bytes(found.difference.array),
        spacing=found.prob.spacing,
    )


def to_arrays(cases: Mapping[str, Case]) -> dict[str, ndarray]:
    """Cases as arrays for an evaluation's files, by ``<name>/<field>``."""
    arrays = {}
    for name, case in cases.items():
        for key, value in vars(case).items():
            if value is not None:
                arrays[f"{name}/{key}"] = np.asarray(value)
    return arrays


def from_arrays(arrays: Mapping[str, ndarray]) -> dict[str, Case]:
    """The cases of `to_arrays`."""
    cases = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in arrays):
        z, y, x = (float(mm) for mm in arrays[f"{name}/spacing"])
        cases[name] = Case(
            image=arrays[f"{name}/image"],
            predicted=arrays[f"{name}/predicted"],
            reference=arrays.get(f"{name}/reference"),
            difference=arrays.get(f"{name}/difference"),
            spacing=(z, y, x),
        )
    return cases


def shown_slices(case: Case, fractions: Sequence[float] = FRACTIONS) -> list[int]:
    """Slices at fractions of the gland's height, from apex to base.

    Args:
        case: The case; where it has no gland, the fractions are those of the crop.
        fractions: In [0, 1].
    """
    held = np.flatnonzero(_gland(case).any(axis=(1, 2)))
    first, last = (held[0], held[-1]) if len(held) else (0, len(case.image) - 1)
    return [round(float(first + part * (last - first))) for part in fractions]


def draw_axial(axes: Axes, case: Case, z: int) -> None:
    """One axial slice, seen from the feet: the patient's right is on the left.

    Args:
        axes: Where to draw.
        case: The case.
        z: The slice.
    """
    _, rows, columns = _shown(case)
    _draw(axes, case, (z, rows, columns), case.spacing[1] / case.spacing[2])


def draw_sagittal(axes: Axes, case: Case) -> None:
    """The sagittal plane through the middle of the gland, its front on the left, head on top."""
    slices, rows, columns = _shown(case)
    middle = (columns.start + columns.stop) // 2
    _draw(axes, case, (slices, rows, middle), case.spacing[0] / case.spacing[1], origin="lower")


def draw_sectors(axes: Axes, case: Case, level: str) -> None:
    """The sector map on the middle slice of a level, each sector named.

    Args:
        axes: Where to draw.
        case: The case; its prediction is divided.
        level: "base", "mid" or "apex".
    """
    from diptych_pirads.sectors import SECTORS_V21, sector_map

    codes = sector_map(case.predicted.astype(np.int64))
    held = case.predicted.any(axis=(1, 2))
    there = np.flatnonzero(held & (gland_levels(case.predicted > 0) == LEVELS.index(level)))
    _, rows, columns = _shown(case)
    _plain(axes)
    axes.set_title(level, fontsize=9, color=INK)
    if not len(there):
        return
    z = int(there[len(there) // 2])
    seen = codes[z, rows, columns]
    aspect = case.spacing[1] / case.spacing[2]
    axes.imshow(case.image[z, rows, columns], cmap="gray", aspect=aspect)
    for code in np.unique(seen[seen > 0]):
        mask = seen == code
        place = SECTORS_V21[code - 1].split("-")[2]
        colour = COLOURS[{"PZ": "pz", "TZ": "tz", "AF": "afs"}[place[:2]]]
        axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0)
        # The innermost voxel: the centre of a crescent lies outside it.
        y, x = _innermost(mask)
        axes.text(
            x,
            y,
            place,
            color="white",
            fontsize=6,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "#000000a0", "edgecolor": "none"},
        )


def draw_difference(axes: Axes, case: Case, z: int) -> Any:
    """Where the two paths disagree on a slice, over the image.

    Args:
        axes: Where to draw.
        case: A case of two paths.
        z: The slice.

    Returns:
        The coloured image, for a colour bar.
    """
    assert case.difference is not None
    _, rows, columns = _shown(case)
    aspect = case.spacing[1] / case.spacing[2]
    _plain(axes)
    axes.imshow(case.image[z, rows, columns], cmap="gray", aspect=aspect)
    seen = case.difference[z, rows, columns] / BRIGHTEST
    masked = np.ma.masked_less(seen, SHOWN_FROM)
    return axes.imshow(masked, cmap="inferno", vmin=0, vmax=1, alpha=0.85, aspect=aspect)


def legend(figure: Figure, *, compared: bool) -> None:
    """Names the colours of the zones, and which line is whose."""
    lines = [Line2D([], [], color=colour, label=zone.upper()) for zone, colour in COLOURS.items()]
    if compared:
        lines += [
            Line2D([], [], color=SOFT, label="model"),
            Line2D([], [], color=SOFT, linestyle=":", label="reader"),
        ]
    figure.legend(
        handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8.5
    )


def case_page(case: Case, title: str, lines: Sequence[str], warnings: Sequence[str]) -> Figure:
    """One study on one page: what to be warned of, the measures, five slices and the profile.

    Args:
        case: The study.
        title: Its name.
        lines: What was measured, a line each.
        warnings: What stands above everything else.
    """
    figure = Figure(figsize=(11.0, 6.4), layout="constrained", facecolor="white")
    grid = figure.subplots(2, 4)
    for axes, z, part in zip(grid.flat, shown_slices(case), FRACTIONS, strict=False):
        draw_axial(axes, case, z)
        axes.set_title(f"{part:.0%} of the height from apex to base", fontsize=8.5, color=SOFT)
    draw_sagittal(grid[1, 1], case)
    grid[1, 1].set_title("sagittal", fontsize=8.5, color=SOFT)
    for axes in grid[1, 2:]:
        axes.set_axis_off()
    grid[1, 2].text(0, 1, "\n".join(lines), va="top", fontsize=9, color=INK)
    heading = "\n".join([title, *warnings])
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10.5, color=INK)
    legend(figure, compared=case.reference is not None)
    return figure


def _draw(
    axes: Axes,
    case: Case,
    part: tuple[Any, ...],
    aspect: float,
    origin: Any = "upper",
) -> None:
    _plain(axes)
    axes.imshow(case.image[part], cmap="gray", aspect=aspect, origin=origin, vmin=0, vmax=BRIGHTEST)
    outlines = ((case.predicted, "-", 1.3), (case.reference, ":", 1.1))
    for label, style, width in outlines:
        if label is None:
            continue
        for number, zone in enumerate(ZONES):
            mask = label[part] == number
            if number and mask.any():
                axes.contour(
                    mask, levels=[0.5], colors=[COLOURS[zone]], linewidths=width, linestyles=style
                )


def _plain(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _gland(case: Case) -> Bool[ndarray, "z y x"]:
    gland: Bool[ndarray, "z y x"] = case.predicted > 0
    return gland if case.reference is None else gland | (case.reference > 0)


def _shown(case: Case) -> tuple[slice, slice, slice]:
    """The gland and some millimetres around it; the whole crop without gland."""
    z, y, x = (round(MARGIN_MM / mm) for mm in case.spacing)
    box = bounding_box(_gland(case), (z, y, x))
    if box is None:
        rows = [slice(0, n) for n in case.image.shape]
        return rows[0], rows[1], rows[2]
    return box


def _innermost(mask: Bool[ndarray, "y x"]) -> tuple[int, int]:
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(y), int(x)


def _bytes(values: Integer[ndarray, "z y x"] | ndarray) -> UInt8[ndarray, "z y x"]:
    scaled: UInt8[ndarray, "z y x"] = np.rint(np.clip(values, 0, 1) * BRIGHTEST).astype(np.uint8)
    return scaled
