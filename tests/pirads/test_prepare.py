"""A prepared study: its grid, its intensities, its label."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.pirads.volumes import affine, texture, two_zones, write_nifti

from diptych.config import merge
from diptych.errors import DataError
from diptych_pirads.config import NormalizeSection, PiradsConfig
from diptych_pirads.geometry import Volume, crop_pad
from diptych_pirads.labels import UNSEEN
from diptych_pirads.layout import Study
from diptych_pirads.prepare import (
    PreparedStudy,
    crop_image,
    crop_label,
    normalize,
    prepare_study,
    signed_distances,
)

SPACING = (3.0, 1.0, 1.0)
SMALL = {"data.geometry.spacing": list(SPACING), "data.geometry.size": [14, 48, 48]}
CONFIG = merge(PiradsConfig(), SMALL)


def prepared(folder: Path, config: PiradsConfig = CONFIG, **changes: Any) -> PreparedStudy:
    images = {"t2": write_nifti(folder / "t2.nii", texture())}
    label = (write_nifti(folder / "zones.nii", two_zones()),)
    row = {"images": images, "label": label, "scheme": "pz_tz"} | changes
    return prepare_study(Study("P", "S", **row), config)


def test_the_working_grid_covers_the_series(tmp_path: Path) -> None:
    study = prepared(tmp_path, merge(CONFIG, {"data.geometry.spacing": [3.0, 0.5, 0.75]}))
    assert study.image.array.shape == (1, 14, 128, 85)
    assert study.image.array.dtype == np.float32
    assert study.image.spacing == pytest.approx((3.0, 0.5, 0.75))
    assert study.original.size == (14, 64, 64)


def test_intensities_of_the_middle_fill_zero_to_one(tmp_path: Path) -> None:
    image = texture().astype(np.int16)
    image[:, :4] = 30000  # a bright rim that no crop at the middle sees
    write_nifti(tmp_path / "t2.nii", image)
    row = Study("P", "S", {"t2": tmp_path / "t2.nii"})
    values = prepare_study(row, CONFIG).image.array
    assert values.min() == 0
    assert values.max() == 1
    inside = image[:, 8:56, 8:56]
    low, high = np.percentile(inside, [1, 99])
    expected = (np.clip(inside, low, high) - low) / (high - low)
    assert np.allclose(values[0, :, 8:56, 8:56], expected, atol=1e-6)


def test_no_label_changes_the_image(tmp_path: Path) -> None:
    with_label = prepared(tmp_path)
    without = prepared(tmp_path, label=())
    assert np.array_equal(with_label.image.array, without.image.array)
    assert np.array_equal(with_label.center, without.center)
    assert without.label is None


def test_training_crops_start_from_the_gland_and_others_do_not(tmp_path: Path) -> None:
    moved = np.roll(two_zones(), (1, 5), axis=(0, 1))
    study = prepared(tmp_path, label=(write_nifti(tmp_path / "moved.nii", moved),))
    assert study.training_center_from == "label"
    assert np.allclose(study.training_center - study.center, [0, 5, 3], atol=0.51)
    assert np.allclose(study.original.to_index(study.center), [6.5, 31.5, 31.5])


def test_three_series_give_the_center_without_a_label(tmp_path: Path) -> None:
    sagittal = np.array([[0, 0, 3.0, -2], [1, 0, 0, -25], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    coronal = np.array([[1, 0, 0, -30], [0, 0, 3.0, 1], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    ones = np.ones((4, 70, 70), np.int16)
    images = {
        "t2": write_nifti(tmp_path / "t2.nii", texture()),
        "sag": write_nifti(tmp_path / "sag.nii", ones, sagittal),
        "cor": write_nifti(tmp_path / "cor.nii", ones, coronal),
    }
    study = prepare_study(Study("P", "S", images), CONFIG)
    assert study.training_center_from == "roi3"
    assert np.allclose(study.center, study.training_center)
    assert np.allclose(study.center[:2], [2.5, 5.5], atol=0.51)


def test_a_center_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="roi3"):
        prepared(tmp_path, merge(CONFIG, {"data.crop.center": "roi3"}))


def test_a_label_comes_back_whole_from_its_crop(tmp_path: Path) -> None:
    study = prepared(tmp_path)
    values = crop_label(study, study.center, (14, 64, 64))
    assert np.array_equal(values, two_zones())
    assert np.array_equal(crop_image(study, study.center, (14, 64, 64)).array, study.image.array)


@pytest.mark.parametrize("shift", [(0, 0, 0), (3.0, -7.0, 2.0), (0.5, 0.5, 1.5)])
def test_image_and_label_crops_stay_together(
    tmp_path: Path, shift: tuple[float, float, float]
) -> None:
    study = prepared(tmp_path)
    center = study.center + shift
    whole = study.image.with_array(two_zones())
    expected = crop_pad(whole, center, (10, 48, 48), fill=UNSEEN)
    assert np.array_equal(crop_label(study, center, (10, 48, 48)), expected.array)


def test_voxels_that_a_smaller_mask_does_not_reach_allow_everything(tmp_path: Path) -> None:
    whole = Volume(two_zones(), affine())
    part = crop_pad(whole, whole.to_lps(np.array([6.5, 31.5, 31.5])), (14, 50, 54))
    path = write_nifti(tmp_path / "part.nii", part.array, part.affine)
    study = prepared(tmp_path, label=(path,))
    assert [f.code for f in study.findings] == ["W106"]
    values = crop_label(study, study.center, (14, 64, 64))
    seen = np.zeros(values.shape, bool)
    seen[:, 7:57, 5:59] = True
    assert np.array_equal(values == UNSEEN, ~seen)
    assert np.array_equal(values[seen], two_zones()[seen])


def test_an_unlabelled_study_allows_everything(tmp_path: Path) -> None:
    study = prepared(tmp_path, label=())
    assert (crop_label(study, study.center, (10, 48, 48)) == UNSEEN).all()


def test_the_reference_keeps_the_label_on_its_own_grid(tmp_path: Path) -> None:
    config = merge(CONFIG, {"data.geometry.spacing": [3.0, 2.0, 2.0]})
    study = prepared(tmp_path, config)
    assert study.label is not None
    reference = study.label.reference
    assert reference.spacing == pytest.approx(SPACING)
    for value in (1, 2):
        assert (reference.array == value).sum() == (two_zones() == value).sum()
    gland = np.argwhere(two_zones() > 0)
    assert reference.size == tuple(np.ptp(gland, axis=0) + 5)
    assert np.allclose(
        reference.to_lps(np.full(3, 2)), Volume(two_zones(), affine()).to_lps(gland.min(0))
    )


def test_the_ceiling_is_one_on_the_same_grid_and_falls_on_a_coarser_one(tmp_path: Path) -> None:
    same = prepared(tmp_path).label
    coarse = prepared(tmp_path, merge(CONFIG, {"data.geometry.spacing": [3.0, 2.0, 2.0]})).label
    assert same is not None
    assert coarse is not None
    assert same.ceiling == {1: 1.0, 2: 1.0}
    assert all(0.85 < dice < 1 for dice in coarse.ceiling.values())


def test_signed_distances_are_mm_and_positive_inside() -> None:
    values = np.zeros((5, 30, 30), np.uint8)
    values[1:4, 10:20, 10:20] = 2
    pz, tz = signed_distances(values, (1, 2), (3.0, 1.0, 0.5))
    assert (pz == -127).all()
    assert tz[2, 15, 10] == 5  # half a mm along x
    assert tz[2, 15, 8] == -10
    assert tz[0, 15, 15] == -30
    assert tz[2, 0, 15] == -100
    assert ((tz > 0) == (values == 2)).all()


def test_a_crop_that_cuts_the_gland_is_told_in_mm(tmp_path: Path) -> None:
    study = prepared(tmp_path, merge(CONFIG, {"data.geometry.size": [14, 32, 32]}))
    (finding,) = study.findings
    assert finding.code == "W112"
    gland = np.argwhere(two_zones() > 0)
    assert f"{np.ptp(gland, axis=0)[2] + 1 - 32:.1f} mm" in finding.found


def test_missing_channels_are_zero_and_flagged(tmp_path: Path) -> None:
    config = merge(CONFIG, {"data.channels": ["t2", "adc", "hbv"]})
    images = {
        "t2": write_nifti(tmp_path / "t2.nii", texture()),
        "adc": write_nifti(tmp_path / "adc.nii", texture() * 10),
    }
    study = prepared(tmp_path, config, images=images)
    assert study.present == (True, True, False)
    assert np.allclose(study.image.array[1], texture() * 10 / 3000, atol=1e-5)
    assert not study.image.array[2].any()


def test_an_adc_in_other_units_is_brought_to_one(tmp_path: Path) -> None:
    config = merge(CONFIG, {"data.channels": ["t2", "adc"]})
    images = {
        "t2": write_nifti(tmp_path / "t2.nii", texture()),
        "adc": write_nifti(tmp_path / "adc.nii", (texture() / 100).astype(np.float32)),
    }
    study = prepared(tmp_path, config, images=images)
    assert [f.code for f in study.findings] == ["W120"]
    assert np.allclose(study.image.array[1], texture() * 10 / 3000, atol=1e-4)


def test_errors_of_check_stop_a_preparation(tmp_path: Path) -> None:
    shifted = write_nifti(tmp_path / "far.nii", two_zones(), affine(origin=(0.0, -25.0, 10.0)))
    with pytest.raises(DataError, match="E106"):
        prepared(tmp_path, label=(shifted,))
    broken = texture().astype(np.float32)
    broken[0, 0, 0] = np.inf
    images = {"t2": write_nifti(tmp_path / "inf.nii", broken)}
    with pytest.raises(DataError, match="E102"):
        prepared(tmp_path, images=images)


def test_mended_voxels_take_the_median_of_their_slice(tmp_path: Path) -> None:
    broken = texture().astype(np.float32)
    broken[5, 30, 30] = np.nan
    mended = broken.copy()
    mended[5, 30, 30] = np.nanmedian(broken[5])
    config = merge(CONFIG, {"data.repair_nan": "median"})
    one = prepared(tmp_path, config, images={"t2": write_nifti(tmp_path / "a.nii", broken)})
    two = prepared(tmp_path, images={"t2": write_nifti(tmp_path / "b.nii", mended)})
    assert np.array_equal(one.image.array, two.image.array)
    assert [f.code for f in one.findings] == ["W102"]


def test_padding_of_zeros_does_not_move_the_percentiles() -> None:
    values = np.concatenate([np.zeros(500), np.linspace(100, 200, 101)])[None, None]
    with_padding = normalize(values, values, NormalizeSection(ignore_padding=False))
    without = normalize(values, values, NormalizeSection())
    assert without[0, 0, 500 + 50] == pytest.approx(0.5)
    assert with_padding[0, 0, 500 + 50] > 0.7
    z = normalize(values, values, NormalizeSection(mode="zscore"))[0, 0, 500:]
    assert z.mean() == pytest.approx(0, abs=1e-6)
    assert z.std() == pytest.approx(1, abs=1e-6)


def test_a_region_without_contrast_becomes_zero() -> None:
    flat = np.full((2, 3, 3), 4.0)
    assert not normalize(flat, flat, NormalizeSection()).any()
    assert not normalize(flat, np.zeros(0), NormalizeSection()).any()
