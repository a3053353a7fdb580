import numpy as np
import pytest
from tests.pirads.masks import gland_of_four, mask, picai, volume

from diptych_pirads.geometry import reorient_lps
from diptych_pirads.read import read_volume
from diptych_pirads.sectors import (
    SECTORS_V2,
    SECTORS_V21,
    assign_sector,
    lesion_sectors,
    sector_map,
    snomed_code,
)


def test_there_are_39_and_41_sectors_each_with_a_code_of_its_own() -> None:
    assert len(set(SECTORS_V2)) == 39
    assert len(set(SECTORS_V21)) == 41
    assert len({snomed_code(sector)[0] for sector in SECTORS_V21}) == 41
    assert set(SECTORS_V2) < set(SECTORS_V21)
    assert snomed_code("R-base-PZpm")[0] == "836428004"
    assert snomed_code("L-mid-PZpl")[0] == "716922000"
    assert snomed_code("R-base-CZ")[0] == "716900007"
    with pytest.raises(ValueError, match="'R-mid-PZ'"):
        snomed_code("R-mid-PZ")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        # The gland: z 2..9, y 4..19, x 4..19; TZ y 6..13; DPU at x 10..13 on slices 2..4.
        ((9, 18, 5), "R-base-PZpl"),
        ((9, 18, 18), "L-base-PZpl"),
        ((9, 18, 13), "L-base-PZpm"),
        ((6, 18, 10), "R-mid-PZpm"),
        ((6, 8, 4), "R-mid-PZa"),
        ((6, 7, 13), "L-mid-TZa"),
        ((6, 10, 13), "L-mid-TZp"),
        ((3, 9, 11), "R-apex-TZa"),  # urethra, on a slice without TZ
        ((6, 4, 16), "L-mid-AFS"),
        ((3, 18, 11), "R-apex-PZpm"),
        # The nearest gland voxel of these is 3 mm below and 4 mm to the right.
        ((10, 18, 5), "R-base-PZpl"),
        ((6, 18, 0), "R-mid-PZpl"),
        ((6, 18, 23 + 3), "outside"),
    ],
)
def test_points_lie_in_the_sector_they_were_put_in(
    index: tuple[int, int, int], expected: str
) -> None:
    zones = volume(gland_of_four())
    assert assign_sector(zones.to_lps(np.array([index])), zones) == [expected]


def test_version_2_calls_the_medial_base_central_zone() -> None:
    zones = volume(gland_of_four())
    point = zones.to_lps(np.array([[9, 18, 13]]))
    assert assign_sector(point, zones, "2") == ["L-base-CZ"]
    with pytest.raises(ValueError, match="'3'"):
        assign_sector(point, zones, "3")  # type: ignore[arg-type]


def mirrored(codes: np.ndarray) -> np.ndarray:
    """Codes with left and right exchanged: 6 places to a side, 12 to a level."""
    level, place = divmod(codes - 1, 12)
    return np.where(codes > 0, 12 * level + (place + 6) % 12 + 1, 0)


def test_a_mirrored_gland_has_mirrored_sectors() -> None:
    label = gland_of_four()
    found = sector_map(label[:, :, ::-1])[:, :, ::-1]
    np.testing.assert_array_equal(mirrored(found), sector_map(label))


def test_the_urethra_is_the_midline() -> None:
    label = gland_of_four()
    label[2:10][:, 9:12, 10:14] = 1
    label[2:10, 9:12, 14:18] = 3
    zones = volume(label)
    points = zones.to_lps(np.array([[6, 18, 14], [6, 18, 17]]))
    assert [name[0] for name in assign_sector(points, zones)] == ["R", "L"]


def test_a_slice_without_tz_is_halved_at_the_middle_of_its_own_gland() -> None:
    label = gland_of_four()
    label[2:5, 13:] = 0  # rows 4 to 12 stay
    zones = volume(label)
    points = zones.to_lps(np.array([[3, 9, 11], [3, 11, 12]]))
    assert assign_sector(points, zones) == ["R-apex-TZp", "L-apex-TZp"]


def test_a_lesion_is_placed_by_its_voxels_within_the_gland() -> None:
    label = gland_of_four()
    lesions = np.zeros_like(label)
    lesions[6, 16:19, 0:7] = 1  # four of seven columns lie beside the gland
    lesions[9, 5:8, 9] = 3
    first, second = lesion_sectors(volume(lesions), volume(label))
    assert first.main == "R-mid-PZpl"
    assert first.inside == pytest.approx(3 / 7)
    assert first.fractions == {"R-mid-PZpl": 1.0}
    assert second.main == "R-base-TZa"
    assert not second.maybe_central_zone
    assert sum(second.fractions.values()) == pytest.approx(1)
    assert list(second.fractions.values()) == sorted(second.fractions.values(), reverse=True)
    far = np.zeros_like(label)
    far[0, 0, 0] = 1
    assert lesion_sectors(volume(far), volume(label))[0].main == "outside"


def test_a_lesion_on_another_grid_is_found_where_it_lies() -> None:
    label = gland_of_four()
    fine = np.zeros((12, 48, 48), np.uint8)
    fine[6, 34:38, 10:14] = 1
    lesion = volume(fine, (3.0, 0.5, 0.5))
    assert lesion_sectors(lesion, volume(label))[0].main == "R-mid-PZpl"


@pytest.mark.data
def test_every_public_lesion_lies_in_a_sector() -> None:
    found = {}
    for path in sorted((picai() / "lesion_expert").iterdir()):
        study = path.name.split(".")[0]
        found[study] = lesion_sectors(read_volume(path), mask("zonal_yuan23", study))
    lesions = [lesion for entries in found.values() for lesion in entries]
    assert len(found) == 20
    assert len(lesions) == 21
    assert all(lesion.main in SECTORS_V21 for lesion in lesions)
    # Their centres of mass lie outside the zones.
    assert found["10268_1000272"][1].main.startswith("L-base")
    assert "PZ" in found["11080_1001102"][0].main


@pytest.mark.data
def test_a_mirrored_public_gland_has_mirrored_sectors_but_for_the_midline_itself() -> None:
    zones = reorient_lps(mask("zonal_yuan23", "10699_1000715")).array
    right = sector_map(zones)
    left = mirrored(sector_map(zones[:, :, ::-1])[:, :, ::-1])
    assert np.count_nonzero(right != left) < 0.01 * np.count_nonzero(zones)
