"""The real masks that measured figures are known for, and small generated ones."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from diptych_pirads.geometry import Volume, reorient_lps, same_grid
from diptych_pirads.read import read_volume


def picai() -> Path:
    """The folder of public masks; skips the test where it is not there."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("DIPTYCH_TEST_DATA", default)) / "pirads" / "picai"
    if not folder.is_dir():
        pytest.skip("no real prostate masks: set DIPTYCH_TEST_DATA to their folder")
    return folder


@cache
def mask(reader: str, study: str) -> Volume:
    return reorient_lps(read_volume(picai() / reader / f"{study}.nii.gz"))


@cache
def studies_of_one_grid() -> tuple[str, ...]:
    """The 43 studies whose two zonal masks lie on one grid."""
    names = sorted(path.name.split(".")[0] for path in (picai() / "zonal_yuan23").iterdir())
    return tuple(
        name for name in names if same_grid(mask("zonal_yuan23", name), mask("zonal_hevi23", name))
    )


def volume(array: np.ndarray, spacing: tuple[float, float, float] = (3.0, 1.0, 1.0)) -> Volume:
    return Volume(array, np.diag([*spacing[::-1], 1.0]))


def gland_of_four(shape: tuple[int, int, int] = (12, 24, 24)) -> np.ndarray:
    """A box of a gland: AFS in front, TZ in the middle above, DPU below it, PZ around."""
    label = np.zeros(shape, np.uint8)
    label[2:10, 4:20, 4:20] = 1
    label[5:10, 6:14, 8:16] = 2
    label[2:5, 9:12, 10:14] = 3
    label[2:10, 4:6, 6:18] = 4
    return label
