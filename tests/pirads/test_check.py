"""Each defect gives its finding, and sound data none."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from scipy import ndimage
from tests.pirads.volumes import (
    affine,
    texture,
    two_zones,
    write_dicom,
    write_manifest,
    write_nifti,
)

from diptych.config import merge
from diptych.errors import UsageError
from diptych.findings import Findings
from diptych_pirads.check import check, check_axial, check_manifest, read_same_studies
from diptych_pirads.check_label import solidity
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import Volume, crop_pad
from diptych_pirads.label_files import open_label
from diptych_pirads.layout import Study, read_manifest
from diptych_pirads.read import read_volume
from diptych_pirads.sample import write_dataset

CONFIG = PiradsConfig()


def run(folder: Path, **changes: Any) -> Findings:
    """Check one study of the folder, with some columns changed."""
    if not (folder / "t2.nii").exists():
        write_nifti(folder / "t2.nii", texture())
    row = {"subject_id": "P1", "study_id": "S1", "t2": "t2.nii", **changes}
    return check(CONFIG, write_manifest(folder / "studies.csv", row))


def label_codes(folder: Path, label: np.ndarray, lps: np.ndarray | None = None) -> list[str]:
    write_nifti(folder / "zones.nii", label, lps)
    return [f.code for f in run(folder, label="zones.nii", scheme="pz_tz")]


def test_a_sound_study_has_no_findings(tmp_path: Path) -> None:
    assert label_codes(tmp_path, two_zones()) == []


def test_generated_studies_have_no_findings(tmp_path: Path) -> None:
    write_dataset(tmp_path, 3)
    assert not list(check(CONFIG, tmp_path))


def test_nan_in_an_image_is_an_error_unless_it_is_mended(tmp_path: Path) -> None:
    image = texture().astype(np.float32)
    image[3, :2, :5] = np.nan
    write_nifti(tmp_path / "t2.nii", image)
    (finding,) = run(tmp_path)
    assert (finding.code, finding.severity) == ("E102", "error")
    assert "10 voxels" in finding.found
    assert "slices 4" in finding.found
    mended = merge(CONFIG, {"data.repair_nan": "median"})
    (finding,) = check(mended, tmp_path)
    assert (finding.code, finding.severity) == ("W102", "warning")


def test_a_constant_image_is_an_error(tmp_path: Path) -> None:
    write_nifti(tmp_path / "t2.nii", np.full((6, 20, 20), 7, np.int16))
    assert [f.code for f in run(tmp_path)] == ["E103"]


def test_fractions_in_a_label_are_an_error(tmp_path: Path) -> None:
    assert label_codes(tmp_path, two_zones() * np.float32(0.5)) == ["E104"]


def test_whole_numbers_stored_as_floats_are_sound(tmp_path: Path) -> None:
    assert label_codes(tmp_path, two_zones().astype(np.float32)) == []


def test_values_outside_the_scheme_are_listed_with_their_counts(tmp_path: Path) -> None:
    label = two_zones()
    label[0, 0, :5] = 255
    write_nifti(tmp_path / "zones.nii", label)
    (finding,) = run(tmp_path, label="zones.nii", scheme="pz_tz")
    assert finding.code == "E105"
    assert "255 in 5 voxels" in finding.found


def test_an_empty_label_is_an_error(tmp_path: Path) -> None:
    assert label_codes(tmp_path, two_zones() * 0) == ["E109"]


def test_a_shifted_label_is_an_error_with_its_distance(tmp_path: Path) -> None:
    write_nifti(tmp_path / "zones.nii", two_zones(), affine(origin=(-21.0, -25.0, 10.0)))
    (finding,) = run(tmp_path, label="zones.nii", scheme="pz_tz")
    assert finding.code == "E106"
    assert finding.found == "origin differs from the image by 9.00 mm (x)"


def test_a_tilted_label_is_an_error(tmp_path: Path) -> None:
    assert label_codes(tmp_path, two_zones(), affine(tilt_degrees=2)) == ["E106"]


def test_rounding_of_the_geometry_is_only_a_note(tmp_path: Path) -> None:
    assert label_codes(tmp_path, two_zones(), affine(origin=(-30.001, -25.0, 10.0))) == ["I122"]


def cropped(size: tuple[int, int, int], center: tuple[float, float, float]) -> Volume:
    whole = Volume(two_zones(), affine())
    return crop_pad(whole, whole.to_lps(np.array(center)), size)


def test_a_label_on_a_smaller_grid_is_resampled(tmp_path: Path) -> None:
    part = cropped((14, 50, 54), (6.5, 31.5, 31.5))
    assert label_codes(tmp_path, part.array, part.affine) == ["W106"]


def test_a_label_that_its_grid_cuts_is_an_error(tmp_path: Path) -> None:
    part = cropped((8, 64, 64), (9.5, 31.5, 31.5))
    assert label_codes(tmp_path, part.array, part.affine) == ["E106"]


def test_a_label_outside_the_image_is_an_error(tmp_path: Path) -> None:
    part = cropped((14, 50, 54), (6.5, 31.5, 31.5))
    far = part.affine.copy()
    far[:3, 3] += (0, 40, 0)
    assert "E106" in label_codes(tmp_path, part.array, far)


def test_exchanged_zones_are_told_and_strict_makes_it_an_error(tmp_path: Path) -> None:
    exchanged = np.array([0, 2, 1], np.uint8)[two_zones()]
    assert label_codes(tmp_path, exchanged) == ["W108"]
    (finding,) = check_manifest(tmp_path / "studies.csv", strict=True)
    assert finding.severity == "error"


def test_the_other_scheme_makes_the_same_file_sound(tmp_path: Path) -> None:
    write_nifti(tmp_path / "zones.nii", np.array([0, 2, 1], np.uint8)[two_zones()])
    assert not list(run(tmp_path, label="zones.nii", scheme="prostate158"))


def test_a_flipped_label_is_told_from_an_exchanged_one(tmp_path: Path) -> None:
    flipped = np.ascontiguousarray(two_zones()[:, ::-1])
    assert label_codes(tmp_path, flipped) == ["W110"]
    assert label_codes(tmp_path, np.array([0, 2, 1], np.uint8)[flipped]) == ["W108", "W110"]


def test_islands_are_counted_with_their_volume(tmp_path: Path) -> None:
    label = two_zones()
    label[0, 2:6, 2:6] = 1
    write_nifti(tmp_path / "zones.nii", label)
    (finding,) = run(tmp_path, label="zones.nii", scheme="pz_tz")
    assert finding.code == "W114"
    assert "gland 1 (0.048 mL), pz/dpu 1 (0.048 mL)" in finding.found


def test_unusual_volumes_are_told(tmp_path: Path) -> None:
    label = np.zeros((14, 64, 64), np.uint8)
    label[4:9, 20:40, 20:40] = 2
    label[4:9, 40:42, 20:40] = 1
    assert label_codes(tmp_path, label) == ["W121"]


def test_a_guessed_scheme_is_told(tmp_path: Path) -> None:
    write_nifti(tmp_path / "zones.nii", two_zones())
    (finding,) = run(tmp_path, label="zones.nii")
    assert finding.code == "I105"
    assert "pz_tz" in finding.found


def test_three_masks_are_one_label_and_their_overlap_is_told(tmp_path: Path) -> None:
    zones = two_zones()
    pz = (zones == 1).astype(np.uint8)
    tz = (zones == 2).astype(np.uint8)
    for name, mask in {"gland": zones > 0, "pz": pz, "tz": tz}.items():
        write_nifti(tmp_path / f"{name}.nii", mask.astype(np.uint8))
    row = {"label": "gland.nii;pz.nii;tz.nii", "scheme": "prostatex_masks"}
    assert not list(run(tmp_path, **row))
    write_nifti(tmp_path / "tz.nii", tz | (pz & (pz.cumsum(2) < 3)))
    assert "W105" in [f.code for f in run(tmp_path, **row)]


def test_a_sagittal_series_is_not_axial(tmp_path: Path) -> None:
    sagittal = np.array([[0, 0, 3.0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / "t2.nii", texture(), sagittal)
    (finding,) = run(tmp_path)
    assert finding.code == "E111"
    assert "sagittal" in finding.found


def test_an_axial_series_stored_with_other_axes_is_axial() -> None:
    v = Volume(np.zeros((20, 20, 6)), affine())
    slices_along_x = Volume(v.array, affine()[:, [2, 0, 1, 3]])
    assert check_axial(slices_along_x, "t2") == []


def test_manifest_mistakes_are_told_by_line(tmp_path: Path) -> None:
    write_nifti(tmp_path / "t2.nii", texture())
    rows = [
        {"subject_id": "P1", "study_id": "", "t2": "t2.nii", "split": "train", "psa": ""},
        {"subject_id": "P2", "study_id": "S2", "t2": "t2.nii", "split": "tset", "psa": "seven"},
    ]
    findings = check(CONFIG, write_manifest(tmp_path / "studies.csv", *rows))
    assert [(f.code, f.where) for f in findings] == [
        ("E100", "studies.csv line 2"),
        ("E100", "studies.csv line 3"),
        ("E100", "studies.csv line 3"),
    ]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "subject_id,study_id,t2\n", "\x00\x01"])
def test_a_file_that_is_no_manifest_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "studies.csv").write_text(text)
    assert {f.code for f in check(CONFIG, tmp_path / "studies.csv")} <= {"E100", "I100"}
    assert check(CONFIG, tmp_path / "studies.csv").errors


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_from_any_spreadsheet_is_read(tmp_path: Path, separator: str) -> None:
    write_nifti(tmp_path / "t2.nii", texture())
    write_nifti(tmp_path / "zones.nii", two_zones())
    lines = ["\ufeffSubject_ID, study_id ,T2,label,scheme", "P,S,t2.nii,zones.nii,pz_tz"]
    text = "\r\n".join(lines).replace(",", separator)
    (tmp_path / "studies.csv").write_text(text, encoding="utf-8")
    (study,), findings = read_manifest(tmp_path / "studies.csv")
    assert not findings
    assert (study.subject, study.study, study.scheme) == ("P", "S", "pz_tz")
    assert check_manifest(tmp_path / "studies.csv") == []
    text = text.replace(f"Scheme{separator}", "").replace("scheme", "psa").replace("pz_tz", "7,1")
    (tmp_path / "studies.csv").write_text(text, encoding="utf-8")
    (finding,) = read_manifest(tmp_path / "studies.csv")[1]
    assert "decimal point" in finding.fix


def test_series_of_different_frames_of_reference_are_told(tmp_path: Path) -> None:
    v = Volume(texture(), affine())
    for name, uid in (("t2", "1.2.1"), ("adc", "1.2.2"), ("hbv", "1.2.3")):
        write_dicom(tmp_path / name, v, uid=uid)
    for path in (tmp_path / "adc").iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.FrameOfReferenceUID = "1.2.3.5"
        slice_.save_as(path)
    findings = list(run(tmp_path, t2="t2", adc="adc", hbv="hbv"))
    assert [f.where for f in findings if f.code == "W126"] == ["adc"]
    one = next((tmp_path / "hbv").iterdir())
    slice_ = pydicom.dcmread(one)
    slice_.FrameOfReferenceUID = "1.2.3.5"
    slice_.save_as(one)
    (error,) = run(tmp_path, t2="t2", hbv="hbv").errors
    assert (error.code, error.where) == ("E113", "hbv")
    assert "frames of reference" in error.found


def test_copies_and_a_subject_in_two_splits_are_errors(tmp_path: Path) -> None:
    write_nifti(tmp_path / "t2.nii", texture())
    write_nifti(tmp_path / "b.nii", texture(seed=1))
    row = {"subject_id": "P1", "study_id": "S1", "t2": "t2.nii", "split": "train"}
    other = row | {"study_id": "S2", "t2": "b.nii", "split": "test"}
    findings = check(CONFIG, write_manifest(tmp_path / "studies.csv", row, row, other))
    assert [f.code for f in findings] == ["E117", "E117"]


def test_two_readers_of_one_study_are_sound(tmp_path: Path) -> None:
    write_nifti(tmp_path / "t2.nii", texture())
    write_nifti(tmp_path / "a.nii", two_zones())
    row = {"subject_id": "P1", "study_id": "S1", "t2": "t2.nii", "label": "a.nii"}
    rows = [row | {"scheme": "pz_tz", "reader": reader} for reader in ("r1", "r2")]
    assert not list(check(CONFIG, write_manifest(tmp_path / "studies.csv", *rows)))


def twins(folder: Path, splits: tuple[str, str], seeds: tuple[int, int]) -> Path:
    rows = []
    names = (("ProstateX-0001", "ProstateX-0001_a"), ("11", "22"))
    for (subject, study), split, seed in zip(names, splits, seeds, strict=True):
        write_nifti(folder / f"{subject}.nii", texture(seed=seed))
        row = {"subject_id": subject, "study_id": study, "t2": f"{subject}.nii", "split": split}
        rows.append(row)
    return write_manifest(folder / "studies.csv", *rows)


@pytest.mark.parametrize(
    ("splits", "severity"), [(("train", "test"), "error"), (("train", "train"), "warning")]
)
def test_equal_voxels_under_two_names_are_told(
    tmp_path: Path, splits: tuple[str, str], severity: str
) -> None:
    (finding,) = check(CONFIG, twins(tmp_path, splits, (0, 0)))
    assert (finding.code, finding.severity) == ("W118", severity)


def test_studies_that_a_table_joins_are_refused_across_splits(tmp_path: Path) -> None:
    table = tmp_path / "same.json.gz"
    table.write_bytes(gzip.compress(json.dumps({"ProstateX-0001_07-07": "11_22"}).encode()))
    config = merge(CONFIG, {"data.same_studies": str(table)})
    manifest = twins(tmp_path, ("train", "test"), (0, 1))
    assert not list(check(CONFIG, manifest))
    (finding,) = check(config, manifest)
    assert (finding.code, finding.severity) == ("W118", "error")


def test_a_broken_table_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "same.json").write_text("[1")
    with pytest.raises(UsageError, match="same_studies"):
        read_same_studies(tmp_path / "same.json")


def test_kept_findings_hold_no_names(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "doe_t2.nii", np.full((6, 20, 20), 7, np.int16))
    row = {"subject_id": "DOE", "study_id": "DOE-1", "t2": "scans/doe_t2.nii"}
    findings = check(CONFIG, write_manifest(tmp_path / "studies.csv", row, row))
    assert "doe_t2.nii" in json.dumps(findings.to_json())
    kept = json.dumps(findings.redacted().to_json()).lower()
    assert "doe" not in kept
    assert "S-".lower() in kept


def test_equal_file_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_nifti(tmp_path / name / "t2.nii", np.full((6, 20, 20), 7, np.int16))
        rows.append({"subject_id": name, "study_id": name, "t2": f"{name}/t2.nii"})
    findings = check(CONFIG, write_manifest(tmp_path / "studies.csv", *rows))
    assert [f.where for f in findings if f.code == "E103"] == ["a/t2.nii", "b/t2.nii"]


def test_files_that_are_left_out_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "broken.nii").write_bytes(b"")
    write_nifti(tmp_path / "t2.nii", texture())
    rows = [
        {"subject_id": "P1", "study_id": "S1", "t2": "broken.nii", "label": ""},
        {"subject_id": "P2", "study_id": "S2", "t2": "t2.nii", "label": "broken.nii"},
    ]
    manifest = write_manifest(tmp_path / "studies.csv", *rows)
    assert check(CONFIG, manifest).errors
    findings = check(merge(CONFIG, {"data.exclude": ["brok*"]}), manifest)
    assert [(f.code, f.where) for f in findings] == [("I100", "broken.nii")]


def test_slices_with_contours_are_joined_on_the_grid_of_the_image(tmp_path: Path) -> None:
    zones = two_zones()
    edge = ndimage.binary_dilation(zones == 2, np.ones((1, 3, 3))) & (zones != 2)
    drawn = np.where(edge, 255, zones).astype(np.uint8)
    (tmp_path / "zones").mkdir()
    for n, part in enumerate(drawn):
        image = SimpleITK.GetImageFromArray(part)
        SimpleITK.WriteImage(image, str(tmp_path / "zones" / f"slice{n}.png"))
    row = {"label": "zones", "scheme": "ucla_png"}
    assert {f.code for f in run(tmp_path, **row)} <= {"W114"}
    study = Study("P", "S", {"t2": tmp_path / "t2.nii"}, (tmp_path / "zones",), "ucla_png")
    label = open_label(study, image=read_volume(tmp_path / "t2.nii"))
    assert set(np.unique(label.volume.array)) == {0, 1, 2}
    assert (label.volume.array[~edge] == zones[~edge]).all()
    (tmp_path / "zones" / "slice10.png").unlink()
    assert [f.code for f in run(tmp_path, **row)] == ["E106"]


def test_segment_names_give_the_scheme(tmp_path: Path) -> None:
    write_nifti(tmp_path / "t2.nii", texture())
    image = SimpleITK.ReadImage(str(write_nifti(tmp_path / "zones.nii", two_zones())))
    row = {"label": "zones.nrrd", "scheme": "prostatezones"}
    SimpleITK.WriteImage(image, str(tmp_path / "zones.nrrd"))
    assert [f.code for f in run(tmp_path, **row)] == ["E105"]
    for n, name in enumerate(("Peripheral zone", "Transition zone")):
        image.SetMetaData(f"Segment{n}_LabelValue", str(n + 1))
        image.SetMetaData(f"Segment{n}_Name", name)
    SimpleITK.WriteImage(image, str(tmp_path / "zones.nrrd"))
    assert not run(tmp_path, **row).errors
    assert not run(tmp_path, **row).warnings


def test_solidity_is_one_for_a_box_and_less_for_a_crescent() -> None:
    box = np.zeros((3, 20, 20), bool)
    box[:, 5:15, 5:15] = True
    assert solidity(box) == pytest.approx(1)
    assert solidity(two_zones() == 1) < 0.75
    assert np.isnan(solidity(np.zeros((2, 3, 3), bool)))
