"""Figures of a pipeline -> picture files beside the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.contract import Picture
from diptych.files import write_json
from diptych.folders import write_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIST = "pictures.json"
DOTS_PER_INCH = 130
MOST_POINTS = 4_000  # beyond, a scatter is smaller as pixels than as lines

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write figures and close them: SVG for lines, PNG where a figure holds images.

    Args:
        pictures: Figures with names that can be file names.
        folder: Such as ``RUN/evaluation/pictures``; replaced whole.

    Returns:
        The picture files in order; ``pictures.json`` beside them holds titles and captions.

    Raises:
        ValueError: If a name cannot be a file name, or occurs twice.
    """
    names = [picture.name for picture in pictures]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise ValueError(
                f"picture {name!r}: give each picture a name of its own that can be "
                "a file name (letters, digits, '_', '-', '.')"
            )

    def write(beside: Path) -> None:
        entries = []
        for picture in pictures:
            file = _save(picture, beside)
            entries.append(
                {
                    "name": picture.name,
                    "title": picture.title,
                    "caption": picture.caption,
                    "file": file.name,
                }
            )
        write_json(beside / LIST, entries)

    write_folder(folder, write)
    return [folder / entry["file"] for entry in listed(folder)]


def listed(folder: Path) -> list[dict[str, str]]:
    """The entries of ``pictures.json`` whose files are there; none without a folder."""
    import json

    file = folder / LIST
    if not file.is_file():
        return []
    entries: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return [entry for entry in entries if (folder / entry["file"]).is_file()]


def _save(picture: Picture, folder: Path) -> Path:
    import matplotlib as mpl
    from matplotlib import pyplot

    figure = picture.figure
    suffix = "png" if _holds_images(figure) else "svg"
    target = folder / f"{picture.name}.{suffix}"
    # equal figures give equal files: no date, no version, no random ids
    metadata: dict[str, Any] = (
        {"Software": None} if suffix == "png" else {"Date": None, "Creator": None}
    )
    with mpl.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "path"}):
        figure.savefig(
            target,
            format=suffix,
            dpi=DOTS_PER_INCH,
            bbox_inches="tight",
            facecolor="white",
            metadata=metadata,
        )
    pyplot.close(figure)
    return target


def _holds_images(figure: Figure) -> bool:
    from matplotlib.collections import PathCollection, QuadMesh
    from matplotlib.image import AxesImage, FigureImage

    points = 0
    for artist in figure.findobj():
        if isinstance(artist, (AxesImage, FigureImage, QuadMesh)):
            return True
        if isinstance(artist, PathCollection):
            points += np.asarray(artist.get_offsets()).shape[0]
    return points > MOST_POINTS
