"""A motion that was put in is found and undone; one that no patient makes is told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tests.pirads.volumes import write_nifti

from diptych.config import merge
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import Volume, to_grid
from diptych_pirads.layout import Study
from diptych_pirads.phantom import make_phantom
from diptych_pirads.prepare import prepare_study
from diptych_pirads.register import register

CONFIG = merge(
    PiradsConfig(),
    {
        "data.channels": ["t2", "adc"],
        "data.registration": "rigid",
        "data.geometry": {"spacing": [3.0, 1.0, 1.0], "size": [16, 64, 64]},
    },
)


def rigid(mm: tuple[float, float, float], degrees: float) -> np.ndarray:
    """Turned about the patient's long axis through the origin, then shifted."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(4)
    matrix[:2, :2] = [[c, -s], [s, c]]
    matrix[:3, 3] = mm
    return matrix


def moved_adc(index: int, motion: np.ndarray) -> tuple[Volume, Volume]:
    """A generated T2 series, and another contrast of the same prostate that has moved."""
    t2 = make_phantom(0, index).image
    contrast = 2500 - 1800 * np.sqrt(t2.array)  # what is bright there is dark here
    coarse = Volume(np.empty((16, 32, 32)), t2.affine @ np.diag([2.0, 2.0, 1.0, 1.0]))
    seen = to_grid(t2.with_array(contrast), coarse, "image")
    return t2, Volume(seen.array, motion @ seen.affine)


@pytest.mark.parametrize(
    ("index", "mm", "degrees"), [(0, (3.0, -2.0, 1.0), 2.0), (1, (-1.5, 3.0, -2.0), -3.0)]
)
def test_a_motion_that_was_put_in_is_found(
    index: int, mm: tuple[float, float, float], degrees: float
) -> None:
    truth = rigid(mm, degrees)
    t2, adc = moved_adc(index, truth)
    found = register(adc, t2, np.zeros(3))
    assert found is not None
    assert found.plausible
    corners = np.array([[x, y, z, 1] for x in (-20, 20) for y in (-15, 15) for z in (-15, 15)])
    apart = (corners @ (found.matrix - truth).T)[:, :3]
    assert np.linalg.norm(apart, axis=1).max() < 1.0
    assert found.mm == pytest.approx(np.linalg.norm(mm), abs=0.7)
    assert found.degrees == pytest.approx(abs(degrees), abs=1.0)
    again = register(adc, t2, np.zeros(3))
    assert again is not None
    assert np.array_equal(again.matrix, found.matrix)


def test_a_prepared_channel_lies_where_its_tissue_is_and_says_how_far_it_came(
    tmp_path: Path,
) -> None:
    t2, still = moved_adc(2, np.eye(4))
    _, moved = moved_adc(2, rigid((3.0, 2.0, 0.0), 0.0))
    files = {"t2": t2, "still": still, "moved": moved}
    for name, v in files.items():
        write_nifti(tmp_path / f"{name}.nii", (1000 * v.array).astype(np.int32), v.affine)

    def adc(name: str, how: str) -> tuple[np.ndarray, list[str]]:
        images = {"t2": tmp_path / "t2.nii", "adc": tmp_path / f"{name}.nii"}
        config = merge(CONFIG, {"data.registration": how})
        made = prepare_study(Study("P", "S", images), config)
        return made.image.array[1, 3:13, 12:52, 12:52], [one.code for one in made.findings]

    expected, _ = adc("still", "none")
    by_header, silent = adc("moved", "none")
    registered, told = adc("moved", "rigid")
    assert "I125" in told
    assert "I125" not in silent
    assert np.abs(registered - expected).mean() < 0.4 * np.abs(by_header - expected).mean()


def test_a_motion_that_no_patient_makes_is_told_and_not_used(tmp_path: Path) -> None:
    t2, far = moved_adc(3, rigid((8.0, -4.0, 0.0), 0.0))
    write_nifti(tmp_path / "t2.nii", (1000 * t2.array).astype(np.int32), t2.affine)
    write_nifti(tmp_path / "adc.nii", (1000 * far.array).astype(np.int32), far.affine)
    images = {"t2": tmp_path / "t2.nii", "adc": tmp_path / "adc.nii"}
    made, plain = (
        prepare_study(Study("P", "S", images), merge(CONFIG, {"data.registration": how}))
        for how in ("rigid", "none")
    )
    (told,) = (one for one in made.findings if one.code == "W125")
    assert told.where == "adc.nii"
    assert "5 mm" in told.found
    assert np.array_equal(made.image.array, plain.image.array)


def test_series_without_a_common_voxel_have_no_motion() -> None:
    t2, adc = moved_adc(4, rigid((500.0, 0.0, 0.0), 0.0))
    assert register(adc, t2, np.zeros(3)) is None
