import csv
import gzip
import math

import numpy as np
import pytest
from tests.pirads.masks import gland_of_four, mask, picai, studies_of_one_grid, volume

from diptych_pirads.volumetry import ellipsoid_volume, gland_levels, psa_density, zone_volumes


def test_volumes_are_voxels_times_their_size() -> None:
    label = gland_of_four()
    found = zone_volumes(volume(label, (3.0, 0.5, 0.5)))
    for zone, name in enumerate(("pz", "tz", "dpu", "afs"), start=1):
        assert found[name] == pytest.approx((label == zone).sum() * 0.75 / 1000)
    assert found["gland"] == pytest.approx((label > 0).sum() * 0.75 / 1000)


def test_the_ellipsoid_of_an_ellipsoid_is_its_volume() -> None:
    z, y, x = np.mgrid[-20:21, -30:31, -40:41]
    ball = ((z / 18.5) ** 2 + (y / 24.5) ** 2 + (x / 30.5) ** 2) < 1
    seen = volume(ball.astype(np.uint8), (1.0, 1.0, 1.0))
    assert ellipsoid_volume(seen) == pytest.approx(ball.sum() / 1000, rel=0.02)
    assert ellipsoid_volume(volume(np.zeros((2, 2, 2), np.uint8))) == 0


def test_psa_density_is_psa_over_volume() -> None:
    assert psa_density(6.0, 40.0) == pytest.approx(0.15)
    assert math.isnan(psa_density(None, 40.0))
    assert math.isnan(psa_density(6.0, 0.0))


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        (3, [0, 0, 1, 2, 2]),
        (1, [0, 1, 2]),
        # Of four slices the second has its middle at 3/8, the third at 5/8: both in the middle.
        (4, [0, 0, 1, 1, 2, 2]),
        # Of six slices the borders lie between slices.
        (6, [0, 0, 0, 1, 1, 2, 2, 2]),
    ],
)
def test_slices_go_to_thirds_by_their_middle(slices: int, expected: list[int]) -> None:
    gland = np.zeros((slices + 2, 2, 2), bool)
    gland[1:-1] = True
    assert gland_levels(gland).tolist() == expected


@pytest.mark.data
@pytest.mark.slow
def test_ellipsoids_and_volumes_of_public_masks_are_as_measured() -> None:
    with gzip.open(picai() / "marksheet_subset.csv.gz", "rt", encoding="utf-8") as file:
        reported = {row["case_id"]: row["prostate_volume"] for row in csv.DictReader(file)}
    ratios, pairs = [], []
    for study in studies_of_one_grid():
        zones = mask("zonal_yuan23", study)
        gland = zone_volumes(zones)["gland"]
        ratios.append(ellipsoid_volume(zones) / gland)
        if reported[study]:
            pairs.append((gland, float(reported[study])))
    assert np.mean(ratios) == pytest.approx(1.112, abs=0.01)
    assert np.std(ratios) == pytest.approx(0.081, abs=0.005)
    assert np.corrcoef(np.transpose(pairs))[0, 1] >= 0.87
