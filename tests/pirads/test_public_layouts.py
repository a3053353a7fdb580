"""Manifests for folders that lie as public data sets lay them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.pirads.volumes import affine, texture, two_zones, write_dicom, write_nifti

from diptych.errors import UsageError
from diptych_pirads.geometry import Volume
from diptych_pirads.layout import Study, read_manifest
from diptych_pirads.phantom import make_phantom
from diptych_pirads.public_layouts import layout
from diptych_pirads.read import open_volume
from diptych_pirads.verbs import LayoutOptions


def laid_out(folder: Path, kind: str) -> list[Study]:
    out = folder / "manifest" / "studies.csv"
    findings = layout(None, folder / "data", LayoutOptions(kind=kind, out=out))
    assert not findings.errors
    studies, problems = read_manifest(out)
    assert not problems
    for study in studies:
        for path in (*study.images.values(), *study.label):
            assert path.with_name(path.name.partition("#")[0]).exists()
    return studies


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_picai_gives_a_row_a_reader_with_psa_and_lesions(tmp_path: Path) -> None:
    labels = "picai_labels/anatomical_delineations/zonal_pz_tz/AI"
    lesions = "picai_labels/csPCa_lesion_delineations/human_expert/resampled"
    root = touch(
        tmp_path / "data",
        "images/fold0/10000/10000_1000000_t2w.mha",
        "images/fold0/10000/10000_1000000_adc.mha",
        "images/fold1/10001/10001_1000001_t2w.mha",
        f"{labels}/Yuan23/10000_1000000.nii.gz",
        f"{labels}/HeviAI23/10000_1000000.nii.gz",
        f"{lesions}/10000_1000000.nii.gz",
    )
    sheet = root / "picai_labels" / "clinical_information" / "marksheet.csv"
    sheet.parent.mkdir(parents=True)
    sheet.write_text("patient_id,study_id,psa,center\n10000,1000000,7.7,ZGT\n")
    first, second, bare = laid_out(tmp_path, "picai")
    assert (first.reader, second.reader, bare.label) == ("Yuan23", "HeviAI23", ())
    assert (first.subject, first.study, first.scheme) == ("10000", "10000_1000000", "pz_tz")
    assert (first.psa, first.center) == (7.7, "ZGT")
    assert set(first.images) == {"t2", "adc"}
    assert first.lesions is not None
    assert first.lesions.is_file()


def test_msd05_takes_both_volumes_of_a_file(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "Task05/imagesTr/._x.nii.gz", "Task05/labelsTr/x")
    both = np.stack([texture(), texture(seed=1)])
    path = root / "Task05" / "imagesTr" / "prostate_00.nii.gz"
    write_nifti(path, both, affine())
    write_nifti(root / "Task05" / "labelsTr" / "prostate_00.nii.gz", two_zones())
    (study,) = laid_out(tmp_path, "msd05")
    assert study.scheme == "msd05"
    assert np.array_equal(open_volume(study.images["t2"]).volume.array, both[0])
    assert np.array_equal(open_volume(study.images["adc"]).volume.array, both[1])


def test_prostate158_keeps_its_own_split_and_readers(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "data",
        "train/020/t2.nii.gz",
        "train/020/t2_anatomy_reader1.nii.gz",
        "train/021/t2.nii.gz",
        "test/001/t2.nii.gz",
        "test/001/t2_anatomy_reader1.nii.gz",
        "test/001/t2_anatomy_reader2.nii.gz",
    )
    (root / "valid.csv").write_text("ID,t2\n021,train/021/t2.nii.gz\n")
    rows = {(one.study, one.reader): one.split for one in laid_out(tmp_path, "prostate158")}
    assert rows == {
        ("001", "reader1"): "test",
        ("001", "reader2"): "test",
        ("020", "reader1"): "train",
        ("021", ""): "validation",
    }


def test_prostatex_joins_planes_and_labels(tmp_path: Path) -> None:
    touch(
        tmp_path / "data",
        "ProstateX-0217_t2_tra.nrrd",
        "ProstateX-0217_t2_sag.nrrd",
        "ProstateX-0217_t2_cor.nrrd",
        "ProstateX-0217_zones.nii.gz",
        "ProstateX-0227_t2_tra.nrrd",
    )
    labelled, bare = laid_out(tmp_path, "prostatex-meyer")
    assert set(labelled.images) == {"t2", "sag", "cor"}
    assert [path.name for path in labelled.label] == ["ProstateX-0217_zones.nii.gz"]
    assert bare.label == ()


def test_dicom_folders_name_the_patients_and_no_header_does(tmp_path: Path) -> None:
    v = Volume(texture((4, 16, 16)), affine())
    for place, words in (("A/one", "t2_tse_tra"), ("A/two", "localizer"), ("B", "T2_tse_TRA_2")):
        (tmp_path / "data" / place).mkdir(parents=True)
        write_dicom(tmp_path / "data" / place, v, uid="1.2.3.4.5", description=words)
    studies = laid_out(tmp_path, "dicom")
    assert [(one.subject, one.study) for one in studies] == [("A", "A_one"), ("B", "B")]
    assert "Phantom" not in (tmp_path / "manifest" / "studies.csv").read_text()


@pytest.mark.parametrize("kind", ["picai", "msd05", "prostate158", "prostatex-meyer"])
def test_a_folder_of_another_layout_is_told_what_is_sought(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    options = LayoutOptions.model_validate({"kind": kind, "out": tmp_path / "studies.csv"})
    (finding,) = layout(None, tmp_path / "data", options).errors
    assert "there is no " in finding.found
    assert not (tmp_path / "studies.csv").exists()


def test_a_description_that_fits_no_series_is_told_those_that_there_are(tmp_path: Path) -> None:
    image = make_phantom(0, 0).image
    write_dicom(tmp_path / "data", image, uid="1.2.3.4", description="AX T2 FRFSE")
    options = LayoutOptions.model_validate({"kind": "dicom", "out": tmp_path / "studies.csv"})
    (finding,) = layout(None, tmp_path / "data", options).errors
    assert "'AX T2 FRFSE'" in finding.found
    assert "--series" in finding.found


def test_nothing_is_written_into_the_data_or_over_a_manifest(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "ProstateX-0217_t2_tra.nrrd")
    inside = LayoutOptions(kind="prostatex-meyer", out=root / "studies.csv")
    with pytest.raises(UsageError, match="inside the data"):
        layout(None, root, inside)
    (tmp_path / "studies.csv").touch()
    with pytest.raises(UsageError, match="exists"):
        layout(None, root, LayoutOptions(kind="picai", out=tmp_path / "studies.csv"))
    findings = layout(None, root, LayoutOptions(kind="picai", out=tmp_path / "other.csv"))
    assert [one.code for one in findings.errors] == ["E100"]
    assert not (tmp_path / "other.csv").exists()
