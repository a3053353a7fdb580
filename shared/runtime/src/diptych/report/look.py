"""How the figures of all pipelines look: their colours and axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, LINE = "#1f2430", "#6b7280", "#d9dde3"
COLOURS = ("#0b6bb8", "#d1582a", "#3f8f5f", "#8257b8", "#b8860b", "#2b9aa0", "#a03a6a")


def figure_of_axes(
    width: float, height: float, *, label_size: float = 9, **layout: Any
) -> tuple[Figure, Any]:
    """A figure with quiet axes.

    Args:
        width: In inches.
        height: In inches.
        label_size: Of the tick labels, in points.
        layout: As ``Figure.subplots`` takes it.

    Returns:
        The figure, and its axes in the form that ``Figure.subplots`` gives them.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(**layout)
    for one in np.atleast_1d(axes).ravel():
        _tidy(one, label_size)
    return figure, axes


def _tidy(axes: Axes, label_size: float) -> None:
    axes.tick_params(colors=SOFT, length=0, labelsize=label_size)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
