"""New studies: what is written, on which grid, what is measured, and what a bad one does."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import polars as pl
import pydicom
import pytest
from tests.pirads.reading_network import CONFIG, Fitted, Reader, use_readers
from tests.pirads.volumes import real_data, write_dicom, write_manifest, write_nifti

from diptych.config import merge
from diptych_pirads.geometry import Volume, reorient_lps, to_grid
from diptych_pirads.label_files import open_label
from diptych_pirads.labels import ZONES
from diptych_pirads.layout import Study
from diptych_pirads.metrics import dice
from diptych_pirads.phantom import Phantom, make_phantom
from diptych_pirads.predict import predict
from diptych_pirads.read import read_volume
from diptych_pirads.sectors import SECTORS_V21
from diptych_pirads.volumetry import ellipsoid_volume, zone_volumes


@pytest.fixture(autouse=True)
def _readers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    use_readers(monkeypatch)


def image_of(label: Volume) -> np.ndarray:
    """Intensities that a `Reader` reads: no voxel is 0, which would count as padding."""
    return (50 + 100 * label.array.astype(np.int16)).astype(np.int16)


def write_study(folder: Path, number: int) -> Phantom:
    made = make_phantom(0, number)
    write_nifti(folder / f"p{number}.nii.gz", image_of(made.label), made.label.affine)
    return made


def test_zones_are_written_on_the_grid_of_the_file(tmp_path: Path) -> None:
    made = make_phantom(0, 0).label
    flipped = made.array[::-1, :, ::-1]
    affine = made.affine.copy()
    affine[:3, 3] = made.to_lps(np.array([made.size[0] - 1, 0, made.size[2] - 1]))
    affine[:3, [0, 2]] *= -1
    stored = Volume(flipped, affine)
    path = write_nifti(tmp_path / "case.nii.gz", image_of(stored), stored.affine)
    assert not predict(CONFIG, Fitted(Reader()), path, tmp_path / "out").errors
    written = nib.load(tmp_path / "out" / "case_zones.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert np.allclose(written.affine, nib.load(path).affine, atol=1e-5)
    zones = read_volume(tmp_path / "out" / "case_zones.nii.gz").array
    for number in range(1, len(ZONES)):
        assert dice(zones == number, flipped == number) > 0.98
    assert (tmp_path / "out" / "case.png").read_bytes()[:4] == b"\x89PNG"


def test_a_row_holds_the_measures_of_its_study(tmp_path: Path) -> None:
    made = write_study(tmp_path, 1)
    asked = merge(CONFIG, {"predict": {"psa": 7.1, "prob": True}})
    predict(asked, Fitted(Reader()), tmp_path / "p1.nii.gz", tmp_path / "out")
    (row,) = pl.read_parquet(tmp_path / "out" / "zones.parquet").to_dicts()
    truth = zone_volumes(made.label)
    for zone, millilitres in truth.items():
        assert row[f"{zone}_ml"] == pytest.approx(millilitres, rel=0.02, abs=0.05)
    assert row["psa_density_ng_ml2"] == pytest.approx(7.1 / row["gland_ml"])
    assert row["psa_density_raised"] == (7.1 / row["gland_ml"] >= 0.15)
    assert row["ellipsoid_ml"] == pytest.approx(ellipsoid_volume(made.label), rel=0.02)
    assert row["disagreement_pz"] == 0
    assert row["review"] is False
    prob = nib.load(tmp_path / "out" / "p1_prob.nii.gz")
    assert prob.shape == (64, 64, 16, 5)
    assert np.allclose(prob.get_fdata().sum(-1), 1, atol=1e-5)


def test_the_good_studies_of_a_manifest_are_written_and_the_bad_ones_named(tmp_path: Path) -> None:
    for number in (1, 2):
        write_study(tmp_path, number)
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    common = {"subject_id": "A", "psa": "", "lesions": ""}
    source = write_manifest(
        tmp_path / "studies.csv",
        common | {"study_id": "one", "t2": "p1.nii.gz", "psa": "12"},
        common | {"study_id": "bad", "t2": "bad.nii.gz"},
        common | {"study_id": "a/two", "t2": "p2.nii.gz"},
    )
    findings = predict(CONFIG, Fitted(Reader()), source, tmp_path / "out")
    assert [(one.code, one.where) for one in findings.errors] == [("E101", "bad.nii.gz")]
    table = pl.read_parquet(tmp_path / "out" / "zones.parquet")
    assert table["study"].to_list() == ["one", "a_two"]
    assert table["psa_density_ng_ml2"].is_null().to_list() == [False, True]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a_two.png",
        "a_two_zones.nii.gz",
        "one.png",
        "one_zones.nii.gz",
        "zones.parquet",
    ]


def test_every_image_of_a_folder_is_a_study(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        write_study(tmp_path / "images", number)
    assert not predict(CONFIG, Fitted(Reader()), tmp_path / "images", tmp_path / "out").errors
    table = pl.read_parquet(tmp_path / "out" / "zones.parquet")
    assert table.select("study", "subject").rows() == [("p1", "p1"), ("p2", "p2")]
    kinds = {name: table.schema[name] for name in ("psa_ng_ml", "novelty_percentile")}
    assert set(kinds.values()) == {pl.Float64}  # though they hold nothing
    assert table.schema["psa_density_raised"] == pl.Boolean
    assert table.schema["review_because"] == pl.String


def test_nothing_is_written_where_every_study_is_bad(tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    findings = predict(CONFIG, Fitted(Reader()), tmp_path / "bad.nii.gz", tmp_path / "out")
    assert findings.errors
    assert not (tmp_path / "out").exists()


def test_each_lesion_gets_its_sector(tmp_path: Path) -> None:
    made = write_study(tmp_path, 3)
    label = made.label.array
    mask = np.zeros_like(label)
    z, y, x = np.argwhere(label == 1)[len(np.argwhere(label == 1)) // 2]
    mask[z, y - 1 : y + 2, x - 1 : x + 2] = 1
    write_nifti(tmp_path / "lesion.nii.gz", mask, made.label.affine)
    asked = merge(CONFIG, {"predict.lesions": tmp_path / "lesion.nii.gz"})
    predict(asked, Fitted(Reader()), tmp_path / "p3.nii.gz", tmp_path / "out")
    (row,) = pl.read_parquet(tmp_path / "out" / "lesions.parquet").to_dicts()
    assert row["sector"] in SECTORS_V21
    assert row["snomed_code"].isdecimal()
    assert row["volume_ml"] == pytest.approx(9 * 3 / 1000)
    assert row["sectors"].startswith(row["sector"])


def test_a_mask_of_lesions_of_another_place_stops_its_study(tmp_path: Path) -> None:
    made = write_study(tmp_path, 3)
    moved = made.label.affine.copy()
    moved[0, 3] += 9
    write_nifti(tmp_path / "lesion.nii.gz", (made.label.array == 2).astype(np.uint8), moved)
    asked = merge(CONFIG, {"predict.lesions": tmp_path / "lesion.nii.gz"})
    findings = predict(asked, Fitted(Reader()), tmp_path / "p3.nii.gz", tmp_path / "out")
    assert [(one.code, one.where) for one in findings.errors] == [("E106", "lesion.nii.gz")]
    assert not (tmp_path / "out").exists()


def test_paths_that_disagree_ask_for_a_look(tmp_path: Path) -> None:
    write_study(tmp_path, 4)
    predict(CONFIG, Fitted(Reader(shift=6)), tmp_path / "p4.nii.gz", tmp_path / "out")
    (row,) = pl.read_parquet(tmp_path / "out" / "zones.parquet").to_dicts()
    assert row["disagreement_pz"] > 0.15
    assert row["review"]
    assert "PZ" in row["review_because"]


def test_an_unusual_volume_asks_for_a_look(tmp_path: Path) -> None:
    made = make_phantom(0, 5).label
    small = np.zeros_like(made.array)
    small[6:9, 28:36, 28:36] = 2
    write_nifti(tmp_path / "small.nii.gz", image_of(made.with_array(small)), made.affine)
    config = merge(CONFIG, {"predict.tta": "none"})
    findings = predict(config, Fitted(Reader()), tmp_path / "small.nii.gz", tmp_path / "out")
    (row,) = pl.read_parquet(tmp_path / "out" / "zones.parquet").to_dicts()
    assert "W121" in [one.code for one in findings.warnings]
    assert "unusual volume" in row["review_because"]


def test_a_dicom_series_gives_a_coded_segmentation_and_no_other_file_names_the_patient(
    tmp_path: Path,
) -> None:
    highdicom = pytest.importorskip("highdicom")
    made = make_phantom(0, 6).label
    folder = write_dicom(
        tmp_path / "series", made.with_array(image_of(made)), uid="1.2.826.0.1.3680043.8.498.1"
    )
    asked = merge(CONFIG, {"predict.dicom_seg": True})
    findings = predict(asked, Fitted(Reader()), folder, tmp_path / "out")
    assert not findings.errors
    assert "W119" in [one.code for one in findings.warnings]
    read = highdicom.seg.segread(tmp_path / "out" / "series_seg.dcm")
    codes = {
        number: read.get_segment_description(number).segmented_property_type.value
        for number in read.segment_numbers
    }
    assert codes == {1: "279706003", 2: "399384005", 3: "71553001", 4: "717025007"}
    sources = sorted(
        (pydicom.dcmread(path) for path in folder.iterdir()),
        key=lambda one: float(one.ImagePositionPatient[2]),
    )
    order = [one.SOPInstanceUID for one in sources]
    masks = read.get_pixels_by_source_instance(order, ignore_spatial_locations=True)
    truth = reorient_lps(made).array
    for number in range(1, len(ZONES)):
        assert dice(masks[..., number - 1] > 0, truth == number) > 0.98
    label = open_label(Study("P", "S", {}, (tmp_path / "out" / "series_seg.dcm",)))
    assert label.scheme.name == "zones4"
    assert np.array_equal(
        to_grid(label.volume, reorient_lps(made), "label").array,
        reorient_lps(read_volume(tmp_path / "out" / "series_zones.nii.gz")).array,
    )
    assert not said(tmp_path / "out", "Test^Phantom")


def said(folder: Path, *words: str) -> list[str]:
    """Files but DICOM segmentations whose content, unpacked, holds one of the words."""
    found = []
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        elif path.suffix == ".parquet":
            content = pl.read_parquet(path).write_csv().encode()
        if path.suffix != ".dcm" and any(word.encode() in content for word in words):
            found.append(path.name)
    return found


@pytest.mark.data
def test_no_field_of_a_real_header_that_identifies_reaches_a_file(tmp_path: Path) -> None:
    data = real_data()
    with zipfile.ZipFile(data / "dicom_small" / "t2_tra.zip") as archive:
        archive.extractall(tmp_path / "series")
    folder = next(path.parent for path in sorted((tmp_path / "series").rglob("*.dcm")))
    meta = data / "picai" / "bpmri" / "10000_1000000_adc.mha"
    sources = {"dicom": folder, "meta": meta}
    assert b"073Y" in meta.read_bytes()
    asked = merge(CONFIG, {"predict": {"dicom_seg": True, "prob": True}})
    for name, source in sources.items():
        findings = predict(asked, Fitted(Reader()), source, tmp_path / name)
        assert not findings.errors
        assert "W119" in [one.code for one in findings.warnings]
        assert not said(tmp_path / name, "Test^Phantom", "19400101", "073Y")
    assert (tmp_path / "dicom" / f"{folder.name}_seg.dcm").is_file()


def test_a_mask_without_lesion_is_said(tmp_path: Path) -> None:
    made = write_study(tmp_path, 3)
    write_nifti(tmp_path / "none.nii.gz", made.label.array * 0, made.label.affine)
    asked = merge(CONFIG, {"predict.lesions": tmp_path / "none.nii.gz"})
    findings = predict(asked, Fitted(Reader()), tmp_path / "p3.nii.gz", tmp_path / "out")
    assert ("I109", "none.nii.gz") in [(one.code, one.where) for one in findings]
    assert not (tmp_path / "out" / "lesions.parquet").exists()
