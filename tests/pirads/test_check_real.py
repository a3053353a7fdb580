"""The findings of real and of broken real files are those that are known."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from scipy import stats
from tests.pirads.masks import mask, studies_of_one_grid
from tests.pirads.volumes import real_data, write_manifest

from diptych.config import merge
from diptych_pirads.check import check, check_manifest
from diptych_pirads.check_label import check_grid, check_label
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import (
    Volume,
    bounding_box,
    crop_pad,
    reorient_lps,
    resample_label,
    roi_from_three_series,
    to_grid,
)
from diptych_pirads.label_files import Label
from diptych_pirads.labels import SCHEMES
from diptych_pirads.metrics import dice
from diptych_pirads.read import read_volume

pytestmark = pytest.mark.data
IMAGES = {
    "b01_truncated.nii.gz": "E101",
    "b02_nan_t2.nii.gz": "E102",
    "b03_constant_t2.nii.gz": "E103",
    "b12_sagittal_as_axial.nrrd": "E111",
    "b13_four_dim.nii.gz": "E113",
    "b15_not_an_image.nii.gz": "E101",
}
LABELS = {
    "b04_fractional_labels.nii.gz": "E104",
    "b05_label_255.nii.gz": "E105",
    "b06_mask_smaller_grid.nii.gz": "W106",
    "b07_mask_shifted_origin.nii.gz": "E106",
    "b08_zero_pixdim.nii.gz": "E107",
    "b09_swapped_pz_tz.nii.gz": "W108",
    "b10_empty_mask.nii.gz": "E109",
    "b11_flipped_ap_mask.nii.gz": "W110",
    "b14_island.nii.gz": "W114",
}
FOLDERS = {"b17_dicom_missing_slice": "E115", "b18_dicom_mixed_series": "E116"}
OTHER_GRID = {
    "10000_1000000": 0.932,
    "10257_1000261": 0.945,
    "10349_1000355": 0.958,
    "10905_1000922": 0.943,
    "11050_1001070": 0.874,
    "11278_1001301": 0.940,
}
CUT_BY_ITS_GRID = "11050_1001070"  # its first slice holds more than half of its largest one


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image that the broken labels belong to."""
    source = real_data() / "prostatex_t2" / "ProstateX-0227_t2_tra.nrrd"
    path = tmp_path_factory.mktemp("image") / "t2.nrrd"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(source))[112:208, 112:208, 6:14], str(path))
    return path


def codes(folder: Path, name: str, **files: object) -> set[str]:
    """The codes that one file gets, notes and the other warnings of cropped masks apart."""
    row = {"subject_id": "P", "study_id": "S", **files}
    findings = check_manifest(write_manifest(folder / "studies.csv", row))
    return {f.code for f in findings if f.where == name and f.severity != "note"}


@pytest.mark.parametrize("name", IMAGES)
def test_broken_images_are_told(tmp_path: Path, name: str) -> None:
    assert IMAGES[name] in codes(tmp_path, name, t2=real_data() / "bad" / name)


@pytest.mark.parametrize("name", LABELS)
def test_broken_labels_are_told(tmp_path: Path, image: Path, name: str) -> None:
    label = real_data() / "bad" / name
    assert codes(tmp_path, name, t2=image, label=label, scheme="pz_tz") == {LABELS[name]}


@pytest.mark.parametrize("name", FOLDERS)
def test_broken_dicom_folders_are_told(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(real_data() / "bad" / f"{name}.zip") as archive:
        archive.extractall(tmp_path / name)
    assert codes(tmp_path, name, t2=name) == {FOLDERS[name]}


def test_a_manifest_with_copies_is_told() -> None:
    manifest = real_data() / "bad" / "b16_manifest_duplicate.csv"
    findings = [f for f in check_manifest(manifest) if f.where == manifest.name]
    assert [f.code for f in findings if f.severity == "error"] == ["E117", "E117"]


@pytest.mark.slow
def test_zones_of_real_masks_are_neither_exchanged_nor_flipped_and_changed_copies_are() -> None:
    msd = reorient_lps(read_volume(real_data() / "msd" / "prostate_00_label.nii.gz"))
    names = sorted(p.name[:-7] for p in (real_data() / "picai" / "zonal_yuan23").iterdir())
    masks = [mask(f"zonal_{reader}", name) for name in names for reader in ("yuan23", "hevi23")]
    for whole in [msd, *masks]:
        box = bounding_box(whole.array > 0, (2, 2, 2))
        assert box is not None
        v = Volume(whole.array[box], whole.affine)
        exchanged = np.array([0, 2, 1], np.uint8)[v.array]
        for array, expected in (
            (v.array, set()),
            (exchanged, {"W108"}),
            (v.array[:, ::-1], {"W110"}),
        ):
            findings = check_label(Label(v.with_array(array), SCHEMES["pz_tz"]), "mask")
            assert {f.code for f in findings} & {"W108", "W110"} == expected


@pytest.mark.parametrize("name", OTHER_GRID)
def test_masks_on_other_grids_are_compared_in_the_patient(name: str) -> None:
    a, b = mask("zonal_yuan23", name), mask("zonal_hevi23", name)
    expected = "E106" if name == CUT_BY_ITS_GRID else "W106"
    assert [f.code for f in check_grid(b, a, name)] == [expected]
    moved = to_grid(b, a, "label")
    ratio = (moved.array > 0).sum() * moved.voxel_ml / ((b.array > 0).sum() * b.voxel_ml)
    assert ratio == pytest.approx(1, abs=1e-4)
    assert dice(moved.array > 0, a.array > 0) == pytest.approx(OTHER_GRID[name], abs=2e-3)


def test_masks_on_one_grid_differ_at_most_by_rounding() -> None:
    for name in studies_of_one_grid()[::8]:
        found = check_grid(mask("zonal_hevi23", name), mask("zonal_yuan23", name), name)
        assert {f.code for f in found} <= {"I122"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_plane", "mean", "least"),
    [
        (0.5, (0.996, 0.998), (0.983, 0.98)),
        (0.75, (0.981, 0.989), (0.976, 0.98)),
        (1.0, (0.972, 0.984), (0.966, 0.97)),
    ],
)
def test_the_way_to_the_working_grid_and_back_costs_little(
    in_plane: float, mean: tuple[float, float], least: tuple[float, float]
) -> None:
    scores = []
    for path in sorted((real_data() / "picai" / "zonal_yuan23").iterdir())[::4]:
        whole = mask("zonal_yuan23", path.name[:-7])
        working = resample_label(whole, (3.0, in_plane, in_plane))
        shares = np.stack([working.array == c for c in range(3)]).astype(np.float32)
        box = bounding_box(whole.array > 0, (3, 3, 3))
        assert box is not None
        size = [part.stop - part.start for part in box]
        middle = [(part.start + part.stop - 1) / 2 for part in box]
        part = crop_pad(whole, whole.to_lps(np.array(middle)), size)
        back = to_grid(working.with_array(shares), part, "prob").array.argmax(0)
        scores.append([dice(back == c, part.array == c) for c in (1, 2)])
    assert (np.mean(scores, 0) >= np.array(mean) - 2e-3).all()
    assert (np.min(scores, 0) >= np.array(least) - 2e-3).all()


@pytest.mark.parametrize(
    ("name", "lo", "hi", "center"),
    [
        ("0227", (0, 105, 103), (19, 198, 215), (-13.38, -31.59, -0.87)),
        ("0217", (0, 114, 113), (23, 194, 214), (6.47, -13.04, -48.86)),
    ],
)
def test_three_real_series_find_the_prostate(
    name: str, lo: tuple[int, ...], hi: tuple[int, ...], center: tuple[float, ...]
) -> None:
    series = [
        read_volume(real_data() / "prostatex_t2" / f"ProstateX-{name}_{kind}.nrrd")
        for kind in ("t2_tra", "sag_geometry", "cor_geometry")
    ]
    roi = roi_from_three_series(reorient_lps(series[0]), *series[1:])
    assert np.abs(np.subtract(roi.lo, lo)).max() <= 1
    assert np.abs(np.subtract(roi.hi, hi)).max() <= 1
    assert np.abs(roi.center_lps - center).max() < 0.5


def test_zones_of_a_real_image_have_their_known_intensities() -> None:
    image = reorient_lps(read_volume(real_data() / "prostatex_t2/ProstateX-0227_t2_tra.nrrd"))
    zones = mask("zonal_yuan23", "10699_1000715").array
    for value, (mean, deviation) in {1: (374, 123), 2: (255, 77)}.items():
        voxels = image.array[zones == value]
        assert voxels.mean() == pytest.approx(mean, abs=1)
        assert voxels.std() == pytest.approx(deviation, abs=1)
    pz, tz = image.array[zones == 1], image.array[zones == 2]
    order = stats.mannwhitneyu(pz, tz).statistic / (len(pz) * len(tz))
    assert order == pytest.approx(0.791, abs=2e-3)  # so much does intensity alone tell


def test_one_study_of_two_data_sets_is_refused_across_splits(tmp_path: Path) -> None:
    t2 = real_data() / "prostatex_t2"
    table = real_data() / "picai" / "prostatex_to_picai.json.gz"
    rows: list[dict[str, Any]] = [
        {"subject_id": "ProstateX-0227", "study_id": "ProstateX-0227", "split": "train"},
        {"subject_id": "10699", "study_id": "1000715", "split": "test"},
    ]
    files = ("ProstateX-0227_t2_tra.nrrd", "ProstateX-0217_t2_tra.nrrd")  # no equal voxels help
    rows = [row | {"t2": t2 / file} for row, file in zip(rows, files, strict=True)]
    config = merge(PiradsConfig(), {"data.same_studies": str(table)})
    (finding,) = check(config, write_manifest(tmp_path / "studies.csv", *rows)).errors
    assert finding.code == "W118"
    assert "train" in finding.found


def test_no_name_of_a_real_patient_is_kept(tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data() / "dicom_small" / "t2_tra.zip") as archive:
        archive.extractall(tmp_path / "t2")
    rows: list[dict[str, Any]] = [
        {"subject_id": "A", "study_id": "1", "t2": "t2", "adc": ""},
        {
            "subject_id": "10000",
            "study_id": "1000000",
            "t2": real_data() / "prostatex_t2" / "ProstateX-0217_t2_tra.nrrd",
            "adc": real_data() / "picai" / "bpmri" / "10000_1000000_adc.mha",
        },
    ]
    findings = check(PiradsConfig(), write_manifest(tmp_path / "studies.csv", *rows))
    assert [f.code for f in findings] == ["W119", "W119"]
    text = " ".join(f.line() for f in findings)
    kept = " ".join(f.line() for f in findings.redacted())
    for secret in ("Test^Phantom", "19400101", "073Y"):
        assert secret not in text
    assert "1000000" not in kept
