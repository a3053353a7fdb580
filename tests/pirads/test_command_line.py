"""From files to exported graphs by the command line: what is refused, and that no one is named."""

from __future__ import annotations

import base64
import gzip
import io
import re
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import nibabel as nib
import numpy as np
import polars as pl
import pydicom
import pytest
import SimpleITK
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from tests.pirads.volumes import write_dicom, write_manifest, write_nifti

from diptych import installed
from diptych.cli import run
from diptych_pirads.geometry import Volume
from diptych_pirads.phantom import make_phantom

pytestmark = pytest.mark.slow
HEADER, USER = "QZHEADER", "QZUSER"  # in every header field that names people, in the user's words
DATE, TIME, AGE, NUMBERS = "19010203", "071359.917253", "087Y", "918273645"
BY_VR = {
    "PN": f"{HEADER}^ANN",
    "DA": DATE,
    "TM": TIME,
    "DT": f"{DATE}{TIME}",
    "AS": AGE,
    "UI": f"1.2.826.{NUMBERS}.7",
    "SQ": None,
}
NAMING = """
AccessionNumber AcquisitionDate AcquisitionDateTime AcquisitionTime AdditionalPatientHistory
AdmittingDiagnosesDescription Allergies CountryOfResidence ContentDate ContentTime
CurrentPatientLocation DeviceSerialNumber EthnicGroup ImageComments InstanceCreationDate
InstitutionAddress InstitutionName InstitutionalDepartmentName IssuerOfPatientID
MedicalRecordLocator MilitaryRank NameOfPhysiciansReadingStudy Occupation OperatorsName
OtherPatientIDs OtherPatientIDsSequence OtherPatientNames PatientAddress PatientAge
PatientBirthDate PatientBirthName PatientBirthTime PatientComments PatientID
PatientInstitutionResidence PatientMotherBirthName PatientName PatientReligiousPreference
PatientTelephoneNumbers PerformedProcedureStepDescription PerformingPhysicianName
PhysiciansOfRecord ProtocolName ReferringPhysicianAddress ReferringPhysicianName
ReferringPhysicianTelephoneNumbers RegionOfResidence RequestAttributesSequence
RequestedProcedureDescription RequestingPhysician RequestingService ResponsibleOrganization
ResponsiblePerson SeriesDate SeriesTime SpecialNeeds StationName StudyDate StudyDescription
StudyID StudyInstanceUID StudyTime FrameOfReferenceUID
"""
# What the standard makes a segmentation share with its patient and study, and nothing more.
SHARED = {
    *("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
}
SECRETS = tuple(word.encode() for word in (HEADER, DATE, TIME, AGE, NUMBERS))
TINY = [
    "data.geometry.spacing=[6.0, 2.0, 2.0]",
    "data.geometry.size=[8, 32, 32]",
    "model.base=2",
    "train.epochs=1",
    "stages={stage-2: {train.epochs: 1}}",
    "evaluate.baselines=[mean_shape, box_atlas]",
    "run.threads=1",
]
SETTINGS = ["--recipe", "demo", *(word for one in TINY for word in ("--set", one))]
PARTS = ("train", "train", "train", "validation", "test", "test")


@pytest.fixture(autouse=True, scope="module")
def _pirads_is_installed() -> Iterator[None]:
    point = EntryPoint("pirads", "diptych_pirads.pipeline:PIPELINE", installed.GROUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "points", lambda: {"pirads": point})
        yield


def plant(path: Path) -> None:
    """Name people in every field of a DICOM file that can."""
    file = pydicom.dcmread(path)
    for keyword in NAMING.split():
        vr = dictionary_VR(keyword)
        if vr == "SQ":
            item = Dataset()
            item.PatientID, item.RequestedProcedureDescription = HEADER, HEADER
            setattr(file, keyword, [item])
        else:
            setattr(file, keyword, BY_VR.get(vr, HEADER))
    file.private_block(0x0029, HEADER, create=True).add_new(0x01, "LO", HEADER)
    file.save_as(path)


def write_t2(folder: Path, number: int, image: Volume) -> str:
    """A series whose file names people: DICOM, MetaImage or NIfTI in turn."""
    whole = image.with_array((1000 * image.array).astype(np.int16))
    name = f"{USER}-t2-{number}"
    if number % 3 == 0:
        write_dicom(folder / name, whole, uid=f"1.2.{NUMBERS}.{number}", description=HEADER)
        for path in (folder / name).iterdir():
            plant(path)
        return name
    if number % 3 == 1:
        made = SimpleITK.GetImageFromArray(whole.array)
        made.SetSpacing(image.spacing[::-1])
        made.SetOrigin(image.affine[:3, 3].tolist())
        made.SetDirection(image.directions.ravel().tolist())
        for key, value in {"0010|0010": HEADER, "0010|0030": DATE, "0010|1010": AGE}.items():
            made.SetMetaData(key, value)
        SimpleITK.WriteImage(made, str(folder / f"{name}.mha"))
        return f"{name}.mha"
    path = write_nifti(folder / f"{name}.nii.gz", whole.array, whole.affine)
    stored = nib.load(path)
    for field, value in {"descrip": f"{HEADER} {DATE}", "db_name": HEADER, "aux_file": AGE}.items():
        stored.header[field] = value.encode()
    stored.header.extensions.append(nib.nifti1.Nifti1Extension("comment", HEADER.encode()))
    nib.save(stored, path)
    return path.name


def write_data(folder: Path) -> Path:
    """Six patients in the user's own words, the last one drawn by two readers."""
    folder.mkdir()
    rows = []
    for number, part in enumerate(PARTS):
        made = make_phantom(0, number)
        row = {
            "subject_id": f"{USER}-P{number}",
            "study_id": f"{USER}-S{number}",
            "t2": write_t2(folder, number, made.image),
            "scheme": "zones4",
            "split": part,
            "psa": "7.1",
            "center": f"{USER}-hospital",
            "scanner": f"{USER}-scanner",
        }
        drawn = {"first": made.label} | ({"second": made.reader2} if number == 5 else {})
        for reader, label in drawn.items():
            name = f"{USER}-{number}-{reader}.nii.gz"
            write_nifti(folder / name, label.array, label.affine)
            rows.append({**row, "label": name, "reader": f"{USER}-{reader}"})
    return write_manifest(folder / "studies.csv", *rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, prepared data, and a run with everything that it writes."""
    folder = tmp_path_factory.mktemp("work")
    data = write_data(folder / f"{USER} data")
    assert run(["pirads", "prepare", str(data), "--out", str(folder / "prepared"), *SETTINGS]) == 0
    assert run(["pirads", "train", str(data), "--out", str(folder / "run"), *SETTINGS]) == 0
    return folder


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is packed in them."""
    content = path.read_bytes()
    yield content
    if path.suffix == ".gz":
        yield gzip.decompress(content)
    elif path.suffix == ".parquet":
        yield pl.read_parquet(path).write_ndjson().encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    elif path.suffix == ".html":
        for packed in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content):
            yield base64.b64decode(packed)


def leaks(target: Path, *words: bytes) -> list[tuple[str, bytes]]:
    """Files below a folder, or one file, and the words that they hold."""
    files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
    assert files
    return [
        (path.name, word)
        for path in files
        for content in contents(path)
        for word in words
        if word in content or word.decode().encode("utf-16-le") in content
    ]


def test_the_markers_would_be_found(folder: Path) -> None:
    found = leaks(folder / f"{USER} data", *SECRETS, USER.encode())
    assert {word for _, word in found} == {*SECRETS, USER.encode()}
    packed = io.BytesIO()
    pl.DataFrame({"a": [HEADER]}).write_parquet(packed)
    (folder / "marked.parquet").write_bytes(packed.getvalue())
    assert leaks(folder / "marked.parquet", *SECRETS)


@pytest.mark.parametrize("name", ["prepared", "run"])
def test_neither_a_header_nor_the_users_words_reach_a_run(folder: Path, name: str) -> None:
    assert not leaks(folder / name, *SECRETS, USER.encode(), str(folder).encode())


def test_evaluation_on_other_data_names_nobody(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluated"
    made = make_phantom(1, 0)
    row = {"subject_id": f"{USER}-new", "study_id": USER, "scheme": "zones4"}
    row |= {"t2": write_t2(tmp_path, 0, made.image), "label": f"{USER}.nii.gz"}
    write_nifti(tmp_path / f"{USER}.nii.gz", made.label.array, made.label.affine)
    data = write_manifest(tmp_path / "studies.csv", row)
    words = ["pirads", "evaluate", str(folder / "run"), "--data", str(data), "--out", str(out)]
    assert run(words) == 0
    assert not leaks(out, *SECRETS, USER.encode(), str(tmp_path).encode())


def test_predictions_hold_no_header_but_in_the_segmentation(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    source = next((folder / f"{USER} data").glob("*t2-3"))
    case, out = tmp_path / "case", tmp_path / "out"
    case.mkdir()
    for path in source.iterdir():
        (case / path.name).write_bytes(path.read_bytes())
    words = ["predict.dicom_seg=true", "predict.prob=true", "predict.psa=6.0"]
    sets = [word for one in words for word in ("--set", one)]
    assert run(["pirads", "predict", str(folder / "run"), str(case), "--out", str(out), *sets]) == 0
    written = {path.name for path in out.iterdir()}
    assert written >= {"case_zones.nii.gz", "case_prob.nii.gz", "case.png", "zones.parquet"}
    for path in out.iterdir():
        if path.suffix != ".dcm":
            assert not leaks(path, *SECRETS, USER.encode())
    segmentation = pydicom.dcmread(out / "case_seg.dcm")
    marked = {
        element.keyword
        for element in segmentation.iterall()
        if any(secret.decode() in str(element.value) for secret in SECRETS)
        and element.VR not in ("SQ", "UI")
    }
    assert marked == SHARED
    assert not any(element.tag.is_private for element in segmentation.iterall())


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_an_exported_graph_names_nobody(folder: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / f"zones.{form}"
    words = ["pirads", "export", str(folder / "run"), "--format", form, "--out", str(out)]
    assert run(words) == 0
    machine = [
        str(place).encode() for place in (folder, Path(sys.prefix), Path(__file__).parents[2])
    ]
    for path in tmp_path.iterdir():
        assert not leaks(path, *SECRETS, USER.encode(), *machine)


def resplit(folder: Path, parts: dict[int, str]) -> Path:
    """The same studies in other parts."""
    data = folder / f"{USER} data"
    table = pl.read_csv(data / "studies.csv", infer_schema=False)
    number = table["subject_id"].str.slice(-1).cast(pl.Int64)
    split = [parts.get(n, PARTS[n]) for n in number]
    name = "".join(f"{n}{part}" for n, part in parts.items())
    table.with_columns(split=pl.Series(split)).write_csv(data / f"{name}.csv")
    return data / f"{name}.csv"


def start_from(folder: Path, data: Path, out: Path, *more: str) -> int:
    origin = str(folder / "run")
    words = ["--init", origin, "--no-evaluate", *SETTINGS, *more]
    return run(["pirads", "train", str(data), "--out", str(out), *words])


def test_weights_that_have_seen_a_test_patient_are_no_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = resplit(folder, {0: "test", 4: "train"})  # patient 0 was trained on before
    assert start_from(folder, data, tmp_path / "run") == 3
    said = capsys.readouterr().err
    assert "the weights it starts from have seen" in said
    assert "split.allow_leakage" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    validated = resplit(folder, {3: "test", 4: "validation"})  # chose the weights before
    assert start_from(folder, validated, tmp_path / "run") == 3
    assert not (tmp_path / "run").exists()


def test_weights_that_have_not_seen_the_test_patients_are_a_start(
    folder: Path, tmp_path: Path
) -> None:
    data = resplit(folder, {5: "train"})  # patient 4, still tested, was never trained on
    assert start_from(folder, data, tmp_path / "run") == 0
    allowed = resplit(folder, {0: "test", 4: "train"})
    leaky = ["--set", "split.allow_leakage=true"]
    assert start_from(folder, allowed, tmp_path / "other", *leaky) == 0


def test_a_run_is_not_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    data = folder / f"{USER} data" / "studies.csv"
    assert run(["pirads", "train", str(data), "--out", str(folder / "run"), *SETTINGS]) == 2
    assert "--resume" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
