"""Voxels keep their place in the patient, whatever is done to the grid."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pirads.volumes import affine, texture, two_zones

from diptych_pirads.geometry import (
    Volume,
    bounding_box,
    crop_pad,
    field_of_view,
    reorient_lps,
    resample,
    resample_label,
    resampled_size,
    roi_from_three_series,
    to_grid,
)

TILTED = affine(spacing=(3.0, 0.5, 0.7), tilt_degrees=17)
positions = st.tuples(*[st.floats(-20, 20)] * 3)


def linear_field(v: Volume) -> np.ndarray:
    """2x - y + 0.5z in LPS mm at every voxel centre."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in v.size), indexing="ij"), -1)
    field: np.ndarray = v.to_lps(index) @ np.array([2.0, -1.0, 0.5])
    return field


def ramp(lps: np.ndarray, size: tuple[int, int, int] = (6, 20, 24)) -> Volume:
    grid = Volume(np.zeros(size), lps)
    return grid.with_array(linear_field(grid))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(permutations(range(3)))), st.tuples(*[st.booleans()] * 3))
def test_sorting_axes_moves_no_voxel(order: tuple[int, ...], flips: tuple[bool, ...]) -> None:
    steps = np.eye(4)[:, [*order, 3]] @ np.diag([*(-1.0 if flip else 1.0 for flip in flips), 1.0])
    stored = ramp(affine(tilt_degrees=12) @ steps, (4, 5, 6))
    sorted_ = reorient_lps(stored)
    assert np.allclose(linear_field(sorted_), sorted_.array)
    assert (np.diag(sorted_.directions) > 0.9).all()
    assert sorted(sorted_.array.ravel()) == sorted(stored.array.ravel())


@given(positions)
def test_index_and_position_are_inverse(point: tuple[float, float, float]) -> None:
    v = Volume(np.zeros((4, 5, 6)), TILTED)
    assert np.allclose(v.to_lps(v.to_index(np.array(point))), point)


def test_spacing_and_voxel_volume_follow_from_the_affine() -> None:
    v = Volume(np.zeros((4, 5, 6)), TILTED)
    assert v.spacing == pytest.approx((3.0, 0.5, 0.7))
    assert v.voxel_ml == pytest.approx(3 * 0.5 * 0.7 / 1000)


def test_resampling_keeps_the_corner_of_the_first_voxel() -> None:
    v = Volume(texture((8, 30, 40)), TILTED)
    new = resample(v, (2.0, 0.75, 0.35))
    first_corner = np.full(3, -0.5)
    assert np.allclose(new.to_lps(first_corner), v.to_lps(first_corner))
    assert new.size == (12, 20, 80)


def test_linear_resampling_is_exact_on_a_linear_field() -> None:
    new = resample(ramp(TILTED), (2.5, 0.8, 0.6))
    inside = (slice(1, -1),) * 3  # beyond the outer voxel centres the edge value goes on
    assert np.allclose(new.array[inside], linear_field(new)[inside], atol=1e-4)


def test_size_rounds_where_the_published_code_truncates() -> None:
    assert resampled_size((19, 320, 320), (3.0, 0.5625, 0.5625), (3.0, 0.7, 1.0)) == (19, 257, 180)
    floor = resampled_size((19, 321, 320), (3.0, 0.5625, 0.5625), (3.0, 0.7, 1.0), "floor")
    assert floor == (19, 257, 180)


def test_labels_keep_their_values_and_volume_when_resampled() -> None:
    v = Volume(two_zones(), affine())
    fine = resample_label(v, (3.0, 0.5, 0.5))
    assert set(np.unique(fine.array)) == {0, 1, 2}
    for value in (1, 2):
        before = (v.array == value).sum() * v.voxel_ml
        assert (fine.array == value).sum() * fine.voxel_ml == pytest.approx(before, rel=0.02)


def test_an_empty_label_stays_empty_when_resampled() -> None:
    v = Volume(np.zeros((4, 8, 8), np.uint8), affine())
    assert not resample_label(v, (2.0, 0.5, 0.5)).array.any()


@settings(max_examples=30, deadline=None)
@given(positions, st.tuples(*[st.integers(1, 30)] * 3))
def test_a_crop_has_its_size_and_its_voxels_their_place(
    center: tuple[float, float, float], size: tuple[int, int, int]
) -> None:
    v = ramp(TILTED)
    crop = crop_pad(v, center, size, fill=-1e6)
    assert crop.size == size
    inside = crop.array > -1e6
    assert np.allclose(crop.array[inside], linear_field(crop)[inside])
    assert np.array_equal(inside, field_of_view(v, crop))
    middle = crop.to_lps((np.array(size) - 1) / 2)
    assert np.abs(v.to_index(middle) - v.to_index(np.array(center))).max() <= 0.5 + 1e-3


def test_channels_are_cropped_alike() -> None:
    v = ramp(TILTED)
    both = v.with_array(np.stack([v.array, -v.array]))
    crop = crop_pad(both, v.to_lps(np.array([3, 8, 9])), (4, 6, 6))
    assert crop.array.shape == (2, 4, 6, 6)
    assert np.array_equal(crop.array[0], -crop.array[1])


def test_a_volume_on_its_own_grid_is_unchanged() -> None:
    v = Volume(two_zones(), affine(tilt_degrees=9))
    assert np.array_equal(to_grid(v, v, "label").array, v.array)
    assert np.allclose(to_grid(v, v, "image").array, v.array)


def test_a_cropped_label_keeps_its_volume_on_the_full_grid() -> None:
    v = Volume(two_zones(), affine(tilt_degrees=9))
    part = crop_pad(v, v.to_lps(np.array([6.5, 31.5, 31.5])), (14, 50, 54))
    assert np.array_equal(to_grid(part, v, "label").array, v.array)


def test_images_are_interpolated_between_tilted_grids() -> None:
    v = ramp(TILTED, (10, 60, 60))
    other = Volume(np.zeros((6, 12, 12)), affine(origin=(-20.0, -22.0, 18.0), tilt_degrees=5))
    seen = to_grid(v, other, "image").array
    index = np.moveaxis(v.to_index(other.to_lps(np.moveaxis(np.indices(other.size), 0, -1))), -1, 0)
    within = np.all([(i > 0) & (i < n - 1) for i, n in zip(index, v.size, strict=True)], axis=0)
    assert within.any()
    assert np.allclose(seen[within], linear_field(other)[within], atol=1e-3)
    assert (seen[~field_of_view(v, other)] == 0).all()


def test_probabilities_beyond_the_volume_are_background() -> None:
    label = two_zones((4, 10, 10)) * 0 + 1
    v = Volume(np.stack([label == c for c in range(3)]).astype(np.float32), affine())
    wider = crop_pad(v.with_array(v.array[0]), v.to_lps(np.array([1.5, 4.5, 4.5])), (6, 12, 12))
    seen = to_grid(v, wider, "prob").array
    assert np.allclose(seen.sum(0), 1)
    assert np.array_equal(seen[1] == 1, field_of_view(v, wider))


def test_the_common_box_of_three_series_is_found() -> None:
    tra = Volume(np.zeros((10, 40, 40)), affine(spacing=(3.0, 1.0, 1.0), origin=(0, 0, 0)))
    sagittal = np.array([[0, 0, 3.0, 14], [1, 0, 0, -5], [0, 1, 0, -5], [0, 0, 0, 1.0]])
    coronal = np.array([[1, 0, 0, -5], [0, 0, 3.0, 11], [0, 1, 0, -5], [0, 0, 0, 1.0]])
    sag = Volume(np.zeros((4, 60, 60)), sagittal)  # x from 12.5 to 24.5 mm
    cor = Volume(np.zeros((5, 60, 60)), coronal)  # y from 9.5 to 24.5 mm
    roi = roi_from_three_series(tra, sag, cor)
    assert roi.lo == (0, 10, 13)
    assert roi.hi == (10, 25, 25)
    assert np.allclose(roi.center_lps, [18.5, 17.0, 13.5])


def test_series_without_a_common_voxel_are_refused() -> None:
    tra = Volume(np.zeros((4, 8, 8)), affine(origin=(0, 0, 0)))
    far = Volume(np.zeros((4, 8, 8)), affine(origin=(500, 0, 0)))
    with pytest.raises(ValueError, match="no voxel in common"):
        roi_from_three_series(tra, tra, far)


def test_the_box_of_an_empty_mask_is_none() -> None:
    mask = np.zeros((3, 4, 5), bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = True
    assert bounding_box(mask, (5, 1, 0)) == (slice(0, 3), slice(1, 4), slice(3, 4))
