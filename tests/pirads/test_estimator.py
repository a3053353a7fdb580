"""Zones from Python, without a run folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diptych.errors import DataError
from diptych_pirads.estimator import ZonalSegmenter
from diptych_pirads.sample import write_dataset

TINY = {
    "data.normalize.mode": "nyul",
    "data.geometry": {"spacing": [6.0, 2.0, 2.0], "size": [8, 32, 32]},
    "model.base": 2,
    "train.epochs": 1,
    "stages": {"stage-2": {"train.epochs": 1}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 3)
    return folder


@pytest.fixture(scope="module")
def fitted(data: Path) -> ZonalSegmenter:
    return ZonalSegmenter("demo", seed=3, overrides=TINY).fit(data / "studies.csv")


def test_zones_of_a_study_have_its_grid_and_its_measures(
    fitted: ZonalSegmenter, data: Path
) -> None:
    zones = fitted.predict(data / "P01_t2.nii.gz", psa=5.0)
    assert zones.volume.size == (16, 64, 64)
    assert set(zones.volumes) == {"pz", "tz", "dpu", "afs", "gland"}
    assert set(zones.disagreement) == {"pz", "tz"}
    assert zones.row["psa_ng_ml"] == 5.0
    assert np.allclose(zones.prob.array.sum(axis=0), 1, atol=1e-5)


def test_a_saved_segmenter_says_the_same(
    fitted: ZonalSegmenter, data: Path, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "model")
    again = ZonalSegmenter.load(tmp_path / "model")
    one, other = (each.predict(data / "P02_t2.nii.gz") for each in (fitted, again))
    assert np.array_equal(one.prob.array, other.prob.array)
    assert np.array_equal(one.volume.array, other.volume.array)
    for path in (tmp_path / "model").rglob("*"):
        assert path.is_dir() or b"P02" not in path.read_bytes()


@pytest.mark.slow
def test_a_seed_gives_the_same_network_again(fitted: ZonalSegmenter, data: Path) -> None:
    again = ZonalSegmenter("demo", seed=3, overrides=TINY).fit(data / "studies.csv")
    one, other = (each.predict(data / "P03_t2.nii.gz").prob.array for each in (fitted, again))
    assert np.array_equal(one, other)


def test_what_cannot_be_used_is_said(fitted: ZonalSegmenter, data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    with pytest.raises(DataError, match="E101"):
        fitted.predict(tmp_path / "bad.nii.gz")
    with pytest.raises(ValueError, match="3 studies"):
        fitted.predict(data / "studies.csv")
    with pytest.raises(ValueError, match="not fitted"):
        ZonalSegmenter().predict(data / "P01_t2.nii.gz")
    with pytest.raises(DataError, match="no saved segmenter"):
        ZonalSegmenter.load(tmp_path)
