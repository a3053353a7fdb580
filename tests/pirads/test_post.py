import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from tests.pirads.masks import gland_of_four

from diptych_pirads.geometry import Volume
from diptych_pirads.phantom import make_phantom
from diptych_pirads.post import postprocess_zones, to_original_grid

SPACING = (3.0, 1.0, 1.0)
CORNERS = np.ones((3, 3, 3), bool)


def probabilities(label: np.ndarray, certainty: float = 0.9) -> np.ndarray:
    one_hot = np.stack([label == c for c in range(5)]).astype(np.float32)
    return certainty * one_hot + (1 - certainty) / 5


def noisy(seed: int, shape: tuple[int, int, int], sigma: float) -> np.ndarray:
    draw = np.random.default_rng(seed).random((5, *shape))
    return ndimage.gaussian_filter(draw, (0, sigma / 2, sigma, sigma))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 100_000),
    st.tuples(st.integers(2, 9), st.integers(2, 14), st.integers(2, 14)),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_cleaning_twice_is_cleaning_once_and_every_zone_is_one_piece(
    seed: int, shape: tuple[int, int, int], sigma: float
) -> None:
    clean = postprocess_zones(noisy(seed, shape, sigma), (3, 0.5, 0.5))
    np.testing.assert_array_equal(postprocess_zones(clean, (3, 0.5, 0.5)), clean)
    assert ndimage.label(clean > 0)[1] <= 1
    for zone in range(1, 5):
        assert ndimage.label(clean == zone, CORNERS)[1] <= (2 if zone == 3 else 1)


def test_a_clean_label_stays_as_it_is_in_every_form() -> None:
    label = gland_of_four()
    for kind in ("diptych", "none", "meyer"):
        np.testing.assert_array_equal(postprocess_zones(label, SPACING, kind), label)
        np.testing.assert_array_equal(postprocess_zones(probabilities(label), SPACING, kind), label)


def test_on_clean_anatomy_the_public_form_changes_a_voxel_in_a_thousand() -> None:
    label = make_phantom(0, 0).label.array
    np.testing.assert_array_equal(postprocess_zones(label, SPACING), label)
    # It takes voxels that touch by an edge for pieces of their own.
    assert (postprocess_zones(label, SPACING, "meyer") == label).mean() >= 0.999


def test_the_gland_does_not_grow() -> None:
    for index in range(3):
        label = make_phantom(1, index).label.array
        draw = np.random.default_rng(index).random((5, *label.shape))
        prob = probabilities(label) + ndimage.gaussian_filter(draw, (0, 0.5, 1, 1))
        before = np.count_nonzero(prob.argmax(axis=0))
        assert np.count_nonzero(postprocess_zones(prob, SPACING)) <= 1.01 * before


def test_removed_voxels_go_to_the_class_that_is_nearest_in_mm() -> None:
    label = np.zeros((7, 9, 9), np.uint8)
    label[1:6, 1:8, 1:8] = 1
    label[3, 1:8, 1:8] = 2
    island = (3, 4, 4)
    label[island] = 4
    label[1, 1:8, 1:3] = 4  # the piece of AFS that stays
    # In the slice TZ is one voxel of 1 mm away, PZ above and below 3 mm.
    assert postprocess_zones(label, SPACING)[island] == 2
    # Were slices thin, PZ would be nearer.
    assert postprocess_zones(label, (0.5, 1.0, 1.0))[island] == 1


def test_an_island_beside_the_gland_becomes_background() -> None:
    label = gland_of_four()
    island = label.copy()
    island[4:6, 22:24, 22:24] = 1
    np.testing.assert_array_equal(postprocess_zones(island, SPACING), label)


def test_small_holes_of_the_gland_are_filled_and_large_ones_stay() -> None:
    label = np.zeros((9, 20, 20), np.uint8)
    label[1:8, 2:18, 2:18] = 2
    label[4, 8:12, 8:12] = 0  # 16 voxels of 3 mm³
    assert (postprocess_zones(label, SPACING)[1:8, 2:18, 2:18] == 2).all()
    large = postprocess_zones(label, (9.0, 2.0, 2.0))  # 0.58 mL
    assert (large[4, 8:12, 8:12] == 0).all()


def test_a_second_piece_of_dpu_stays_from_a_fifth_on() -> None:
    label = np.full((5, 30, 12), 1, np.uint8)
    label[2, 2:12, 5] = 3
    for voxels, stays in ((2, True), (1, False)):
        two = label.copy()
        two[2, 20 : 20 + voxels, 5] = 3
        clean = postprocess_zones(two, SPACING)
        assert (np.count_nonzero(clean == 3) == 10 + voxels) == stays


def test_an_empty_label_stays_empty() -> None:
    empty = np.zeros((3, 4, 4), np.uint8)
    for kind in ("diptych", "none", "meyer"):
        assert not postprocess_zones(empty, SPACING, kind).any()


def test_the_public_form_leaves_voxels_without_a_majority_to_background() -> None:
    prob = probabilities(gland_of_four())
    unsure = (4, 15, 10)
    prob[:, *unsure] = (0.1, 0.4, 0.3, 0.1, 0.1)
    assert postprocess_zones(prob, SPACING, "meyer")[unsure] == 0
    assert postprocess_zones(prob, SPACING, "diptych")[unsure] == 1


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 3, 3, 3\)"):
        postprocess_zones(np.zeros((4, 3, 3, 3)), SPACING)
    with pytest.raises(ValueError, match="'meier'"):
        postprocess_zones(np.zeros((3, 3, 3), np.uint8), SPACING, "meier")  # type: ignore[arg-type]


@pytest.mark.parametrize("resample", ["prob", "sdf_gauss"])
def test_zones_come_back_to_a_finer_grid_where_they_were(resample: str) -> None:
    phantom = make_phantom(0, 2)
    fine = phantom.label.affine @ np.diag([0.5, 0.5, 1, 1])
    original = Volume(np.zeros((16, 150, 150), np.uint8), fine)
    prob = phantom.label.with_array(probabilities(phantom.label.array))
    zones = to_original_grid(prob, original, resample)  # type: ignore[arg-type]
    at_old_voxels = zones.array[:, :128:2, :128:2]
    assert (at_old_voxels == phantom.label.array).mean() > 0.995
    assert not zones.array[:, 130:].any()


def test_the_public_resampling_is_that_of_its_library_calls() -> None:
    label = gland_of_four()
    prob = Volume(probabilities(label), np.diag([1.0, 1.0, 3.0, 1.0]))
    fine = Volume(np.zeros((12, 45, 45), np.uint8), np.diag([0.5, 0.5, 3.0, 1.0]))
    like = SimpleITK.GetImageFromArray(fine.array)
    like.SetSpacing((0.5, 0.5, 3.0))
    scores = []
    for zone in range(5):
        one = SimpleITK.GetImageFromArray((label == zone).astype(np.uint8))
        one.SetSpacing((1.0, 1.0, 3.0))
        distance = SimpleITK.SignedMaurerDistanceMap(one, True, False, True)
        seen = SimpleITK.Resample(
            distance, like, SimpleITK.Transform(), SimpleITK.sitkLinear, -3000.0
        )
        scores.append(SimpleITK.GetArrayFromImage(SimpleITK.DiscreteGaussian(seen, [1.0] * 3)))
    found = to_original_grid(prob, fine, "sdf_gauss").array
    np.testing.assert_array_equal(found, np.argmax(scores, axis=0))
