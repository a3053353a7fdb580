import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist
from tests.pirads.masks import gland_of_four, mask, picai, studies_of_one_grid, volume

from diptych_pirads.geometry import Volume
from diptych_pirads.labels import scheme_of_segments
from diptych_pirads.metrics import (
    Conventions,
    bootstrap,
    centerline_distance,
    dice,
    evaluate_case,
    hd95,
    masd,
    nsd,
)

SPACING = (3.0, 0.5, 0.7)


def random_masks(seed: int, shape: tuple[int, int, int] = (6, 12, 11)) -> np.ndarray:
    draw = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(draw.standard_normal((2, *shape)), (0, 0.7, 1.5, 1.5))
    return smooth > np.quantile(smooth, 0.7)


def dense_distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of surface voxels; a surface voxel has a face neighbour outside."""

    def surface(m: np.ndarray) -> np.ndarray:
        padded = np.pad(m, 1)
        inner = np.ones_like(m)
        for axis in range(3):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(m & ~inner) * SPACING

    pairs = cdist(surface(a), surface(b))
    return pairs.min(axis=1), pairs.min(axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_distances_equal_the_search_over_all_pairs_of_surface_voxels(seed: int) -> None:
    a, b = random_masks(seed)
    there, back = dense_distances(a, b)
    both = np.concatenate([there, back])
    assert masd(a, b, SPACING) == pytest.approx(both.mean())
    assert masd(a, b, SPACING, average="two_sided") == pytest.approx(
        (there.mean() + back.mean()) / 2
    )
    assert hd95(a, b, SPACING) == pytest.approx(
        max(np.percentile(there, 95), np.percentile(back, 95))
    )
    assert nsd(a, b, SPACING, 1.5) == pytest.approx((both <= 1.5 + 1e-9).mean())


@pytest.mark.parametrize("seed", range(4))
def test_distances_equal_those_of_monai(seed: int) -> None:
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    a, b = random_masks(seed)
    one_hot = [np.stack([~m, m])[None] for m in (a, b)]
    average = monai.compute_average_surface_distance(*one_hot, symmetric=True, spacing=SPACING)
    percentile = monai.compute_hausdorff_distance(*one_hot, percentile=95, spacing=SPACING)
    assert masd(a, b, SPACING) == pytest.approx(float(average), abs=1e-4)
    assert hd95(a, b, SPACING) == pytest.approx(float(percentile), abs=1e-4)


def test_single_voxels_seven_slices_apart_are_21_mm_apart() -> None:
    a, b = np.zeros((2, 9, 4, 4), bool)
    a[1, 2, 2] = b[8, 2, 2] = True
    assert masd(a, b, (3, 0.5, 0.5)) == 21.0


def test_plates_two_voxels_of_half_a_millimetre_apart_are_1_mm_apart() -> None:
    a, b = np.zeros((2, 10, 10, 5), bool)
    a[..., 1] = b[..., 3] = True
    assert masd(a, b, (3, 0.5, 0.5)) == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_metrics_are_symmetric_and_blind_to_padding(seed: int, margin: int) -> None:
    a, b = random_masks(seed)
    padded = [np.pad(m, margin) for m in (a, b)]
    for metric in (masd, hd95, nsd):
        assert metric(a, b, SPACING) == pytest.approx(metric(b, a, SPACING))
        assert metric(*padded, SPACING) == pytest.approx(metric(a, b, SPACING))
    assert dice(a, b) == pytest.approx(dice(b, a))
    assert masd(a, a, SPACING) == 0 == hd95(a, a, SPACING)
    assert nsd(a, a, SPACING) == 1 == dice(a, a)


def test_an_empty_mask_gives_no_distance_unless_the_public_form_is_asked_for() -> None:
    full, empty = np.ones((2, 3, 3), bool), np.zeros((2, 3, 3), bool)
    for a, b in ((full, empty), (empty, full)):
        assert dice(a, b) == 0 == nsd(a, b, SPACING)
        assert math.isnan(masd(a, b, SPACING))
        assert math.isnan(hd95(a, b, SPACING))
        assert masd(a, b, SPACING, empty="zero") == 0
    assert math.isnan(dice(empty, empty))
    assert math.isnan(nsd(empty, empty, SPACING))
    assert math.isnan(masd(empty, empty, SPACING, empty="zero"))


def test_wrong_shapes_and_spacings_are_named() -> None:
    a = np.ones((2, 3, 3), bool)
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and \(2, 3, 4\)"):
        masd(a, np.ones((2, 3, 4), bool), SPACING)
    with pytest.raises(ValueError, match="three positive mm"):
        hd95(a, a, (3, 0, 1))


def test_the_centre_line_is_compared_where_both_have_one() -> None:
    a, b = np.zeros((2, 5, 6, 8), bool)
    a[0:3, 2, 2] = True
    b[1:5, 3, 5] = True
    assert centerline_distance(a, b, (3, 0.4, 0.5)) == pytest.approx(math.hypot(0.4, 1.5))
    assert math.isnan(centerline_distance(a, np.zeros_like(b), (3, 0.5, 0.5)))


def test_a_missed_zone_counts_as_a_miss_and_is_penalised_by_the_gland() -> None:
    label = gland_of_four()
    missed = np.where(label == 4, 0, label)
    row = evaluate_case(volume(missed), volume(label))
    assert row["miss/afs"] == 1
    assert row["dice/afs"] == 0
    assert math.isnan(row["masd/afs"])
    # The gland is 8 x 16 x 16 voxels of 3 x 1 x 1 mm.
    assert row["masd_penalised/afs"] == pytest.approx(math.hypot(24, 16, 16) / 2)
    assert row["miss/pz"] == 0 == row["absent/pz"]
    assert row["masd_penalised/pz"] == row["masd/pz"] == 0
    public = evaluate_case(volume(missed), volume(label), conventions=Conventions(empty="zero"))
    assert public["masd/afs"] == 0
    absent = evaluate_case(volume(missed), volume(missed))
    assert absent["absent/afs"] == 1
    assert math.isnan(absent["dice/afs"])


def test_volume_errors_are_prediction_minus_reference() -> None:
    label = gland_of_four()
    smaller = label.copy()
    smaller[:3] = 0
    row = evaluate_case(volume(smaller), volume(label))
    lost = 16 * 16 * 3 / 1000
    assert row["volume_error_ml/gland"] == pytest.approx(-lost)
    assert row["volume_error_percent/gland"] == pytest.approx(-100 / 8)


def test_thirds_are_those_of_the_reference_gland() -> None:
    reference = np.zeros((11, 8, 8), np.uint8)
    reference[1:10, 2:6, 2:6] = 1
    prediction = reference.copy()
    prediction[7:10] = 0  # the upper third is missing
    row = evaluate_case(volume(prediction), volume(reference))
    assert row["dice/pz/base"] == 0
    assert row["dice/pz/mid"] == 1 == row["dice/pz/apex"]
    # Two rims of 12 voxels and a lid of 16 stand above the prediction, which ends at z = 6.
    distances = [3.0] * 12 + [6.0] * 12 + [9.0] * 16
    assert row["masd/pz/base"] == pytest.approx(np.mean(distances))
    image = evaluate_case(
        volume(reference), volume(prediction), conventions=Conventions(regions="image")
    )
    assert image["dice/pz/base"] == 0


def test_a_prediction_is_scored_on_the_readers_grid_whatever_its_own() -> None:
    label = gland_of_four()
    reference = volume(label)
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = label.shape[2] - 1
    mirrored_storage = Volume(label[:, :, ::-1].copy(), reference.affine @ flipped)
    assert evaluate_case(mirrored_storage, reference)["dice/afs"] == 1
    moved = np.diag([1.0, 1.0, 3.0, 1.0])
    moved[:3, 3] = (2, 2, 3)
    cropped = Volume(label[1:-1, 2:-2, 2:-2].copy(), moved)
    row = evaluate_case(cropped, reference)
    assert {row[f"dice/{zone}"] for zone in ("pz", "tz", "dpu", "afs", "gland")} == {1.0}


def test_zones_that_the_reader_does_not_tell_apart_are_merged_before_scoring() -> None:
    label = gland_of_four()
    two = np.where(label > 2, 2, label)
    row = evaluate_case(volume(label), volume(two), "pz_tz")
    assert row["dice/pz"] == row["dice/tz"] == row["dice/gland"] == 1
    assert "dice/dpu" not in row
    swapped = np.array([0, 2, 1], np.uint8)[two]
    assert evaluate_case(volume(label), volume(swapped), "prostate158")["dice/pz"] == 1
    assert evaluate_case(volume(two), volume(label), "zones4", "pz_tz")["dice/tz"] == 1
    only = evaluate_case(volume(label), volume((two > 0).astype(np.uint8)), "gland")
    assert [key for key in only if key.startswith("dice/") and key.count("/") == 1] == [
        "dice/gland"
    ]


def test_a_value_open_between_the_zones_counts_for_the_gland_alone() -> None:
    label = gland_of_four()
    scheme = scheme_of_segments(
        {1: "Peripheral zone", 2: "Transition zone", 3: "Urethra", 4: "Anterior stroma"}
    )
    prediction = label.copy()
    prediction[label == 3] = 2  # whatever is said there
    row = evaluate_case(volume(prediction), volume(label), scheme)
    assert row["dice/tz"] == row["dice/pz"] == row["dice/gland"] == 1


def test_values_outside_a_scheme_are_refused() -> None:
    label = gland_of_four()
    with pytest.raises(ValueError, match=r"\[3, 4\] are not in label scheme pz_tz"):
        evaluate_case(volume(label), volume(label), "pz_tz")
    with pytest.raises(ValueError, match="'zones5'"):
        evaluate_case(volume(label), volume(label), "zones5")


@pytest.mark.data
@pytest.mark.parametrize(
    ("study", "zone", "mean", "percentile"),
    [
        ("10699_1000715", "pz", 0.588, 3.000),
        ("10699_1000715", "tz", 1.353, 5.759),
        ("10021_1000021", "pz", 0.463, 3.000),
        ("10021_1000021", "tz", 0.936, 3.742),
        ("10040_1000040", "pz", 0.784, None),
        ("10098_1000098", "pz", 0.243, None),
    ],
)
def test_two_readers_of_public_studies_differ_as_measured(
    study: str, zone: str, mean: float, percentile: float | None
) -> None:
    first, second = mask("zonal_yuan23", study), mask("zonal_hevi23", study)
    value = {"pz": 1, "tz": 2}[zone]
    a, b = first.array == value, second.array == value
    assert masd(a, b, first.spacing) == pytest.approx(mean, abs=1e-3)
    if percentile is not None:
        assert hd95(a, b, first.spacing) == pytest.approx(percentile, abs=1e-3)


@pytest.mark.data
@pytest.mark.parametrize(
    ("study", "voxels", "contour"),
    [
        ("10699_1000715", 0.509, 0.471),
        ("10040_1000040", 0.582, 0.626),
        ("10021_1000021", 0.377, 0.366),
        ("10098_1000098", 0.246, 0.188),
    ],
)
def test_the_public_forms_of_the_surface_give_their_own_figures(
    study: str, voxels: float, contour: float
) -> None:
    first, second = mask("zonal_yuan23", study), mask("zonal_hevi23", study)
    a, b = first.array == 1, second.array == 1
    assert masd(a, b, first.spacing, surface="uats_voxel") == pytest.approx(voxels, abs=2e-3)
    assert masd(a, b, first.spacing, surface="contour26") == pytest.approx(contour, abs=2e-3)


@pytest.mark.data
@pytest.mark.slow
def test_the_readers_agree_over_all_studies_as_published() -> None:
    rows = [
        evaluate_case(mask("zonal_yuan23", study), mask("zonal_hevi23", study), "pz_tz", "pz_tz")
        for study in studies_of_one_grid()
    ]
    assert len(rows) == 43
    expected = {
        "pz": (0.880, 0.553, 3.29),
        "tz": (0.912, 0.822, 3.70),
        "gland": (0.940, 0.695, None),
    }
    for zone, (overlap, mean, percentile) in expected.items():
        assert np.mean([row[f"dice/{zone}"] for row in rows]) == pytest.approx(overlap, abs=1e-3)
        assert np.mean([row[f"masd/{zone}"] for row in rows]) == pytest.approx(mean, abs=1e-3)
        if percentile is not None:
            found = np.mean([row[f"hd95/{zone}"] for row in rows])
            assert found == pytest.approx(percentile, abs=6e-3)


@pytest.mark.data
def test_masks_on_different_grids_are_compared_in_patient_space() -> None:
    expected = {
        "10000_1000000": 0.932,
        "10257_1000261": 0.945,
        "10349_1000355": 0.958,
        "10905_1000922": 0.943,
        "11050_1001070": 0.874,
        "11278_1001301": 0.940,
    }
    picai()
    for study, overlap in expected.items():
        row = evaluate_case(
            mask("zonal_hevi23", study), mask("zonal_yuan23", study), "pz_tz", "pz_tz"
        )
        assert row["dice/gland"] == pytest.approx(overlap, abs=2e-3)


def test_a_patients_studies_are_averaged_before_patients_are_resampled() -> None:
    draw = np.random.default_rng(1)
    values, subjects = list(draw.normal(0.8, 0.05, 40)), [f"P{k // 2}" for k in range(40)]
    found = bootstrap([*values, math.nan], [*subjects, "P99"])
    means = np.reshape(values, (20, 2)).mean(axis=1)
    assert found.n == 20
    assert found.value == pytest.approx(means.mean())
    assert found.low is not None
    assert found.high is not None
    # Twenty means: the percentile interval is the normal one to a tenth of its half-width.
    half = 1.96 * means.std() / math.sqrt(20)
    assert found.low == pytest.approx(means.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(means.mean() + half, abs=0.1 * half)
    assert bootstrap(values, subjects, seed=0) == bootstrap(values, subjects)
    assert bootstrap(values, subjects, seed=1) != bootstrap(values, subjects)


def test_what_cannot_be_resampled_has_no_interval_and_says_why() -> None:
    assert bootstrap([0.7, 0.9], ["a", "a"]).value == pytest.approx(0.8)
    assert bootstrap([0.7, 0.9], ["a", "a"]).low is None
    assert "one subject" in str(bootstrap([0.7, 0.9], ["a", "a"]).reason)
    assert bootstrap([math.nan], ["a"]).value is None
    with pytest.raises(ValueError, match="argument"):
        bootstrap([0.7], ["a", "b"])
