"""The verb ``layout``: a manifest for a folder whose files lie as public data sets lay them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import polars as pl
import pydicom

from diptych.errors import UsageError
from diptych.files import write_text
from diptych.findings import Finding, Findings
from diptych_pirads.layout import COLUMNS
from diptych_pirads.read import SEGMENTATION, SUFFIXES
from diptych_pirads.verbs import LayoutOptions

Row = dict[str, str | Path]

PICAI_READERS = ("Yuan23", "HeviAI23")
PROSTATEX = re.compile(r"ProstateX-\d{4}", re.IGNORECASE)
SHOWN = 10  # descriptions of series in a message
SOUGHT = {
    "picai": "PATIENT_STUDY_t2w.mha",
    "msd05": "imagesTr/*.nii.gz",
    "prostate158": "t2.nii.gz in a folder a patient",
    "prostatex-meyer": "series named ProstateX-0000 with t2 and tra",
}
LABEL_WORDS = ("seg", "label", "zones", "mask")


def layout(config: Any, target: Path | None, options: LayoutOptions) -> Findings:
    """Write ``studies.csv`` for a folder of a known layout.

    Args:
        config: Not looked at.
        target: The folder; nothing is written into it.
        options: Layout and manifest.

    Returns:
        A note that counts the rows, or an error where the folder holds no such studies.

    Raises:
        UsageError: The manifest exists or lies inside the data.
    """
    assert target is not None
    root, out = target.resolve(), options.out.resolve()
    if out.exists():
        raise UsageError(f"{options.out}: exists: choose another --out")
    if root == out.parent or root in out.parents:
        raise UsageError(f"{options.out}: lies inside the data, which stay as they are")
    if options.kind == "dicom":
        rows = list(_dicom(root, options.series))
    else:
        rows = list(LAYOUTS[options.kind](root))
    if not rows:
        found = f"no study in the layout {options.kind}: {_sought(root, options)}"
        fix = "give the folder that holds the data set, or another --kind"
        return Findings((Finding("error", "E100", target.name, found, fix),))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _csv(rows, out.parent))
    labelled = sum(bool(row.get("label")) for row in rows)
    found = f"{len(rows)} rows, {labelled} with a label, in {options.out.name}"
    return Findings((Finding("note", "I100", target.name, found, "look at them, then check"),))


def _sought(root: Path, options: LayoutOptions) -> str:
    """What a layout consists of, in words."""
    if options.kind != "dicom":
        return f"there is no {SOUGHT[options.kind]}"
    known = sorted({_description(first) for _, first in _series_folders(root)})
    held = ", ".join(f"'{name}'" for name in known[:SHOWN]) or "none"
    return f"no series is described as --series '{options.series}'; descriptions are {held}"


def _csv(rows: list[Row], folder: Path) -> str:
    """The manifest; paths are relative to it where that is possible."""
    table = io.StringIO()
    used = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    writer = csv.DictWriter(table, used, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _shown(value, folder) for name, value in row.items() if value})
    return table.getvalue()


def _shown(value: str | Path, folder: Path) -> str:
    if isinstance(value, str):
        return value
    try:
        return Path(os.path.relpath(value, folder)).as_posix()
    except ValueError:  # on another drive
        return value.as_posix()


def _picai(root: Path) -> Iterator[Row]:
    """PI-CAI: ``<patient>_<study>_t2w.mha`` and the labels of ``picai_labels`` beside them."""
    marks = _marks(root)
    labels = {reader: _stems(root, f"zonal_pz_tz/AI/{reader}") for reader in PICAI_READERS}
    lesions = _stems(root, "human_expert/resampled")
    for t2 in sorted(root.rglob("*_t2w.mha")):
        name = t2.name.removesuffix("_t2w.mha")
        row: Row = {"subject_id": name.partition("_")[0], "study_id": name, "t2": t2}
        for column, suffix in (("adc", "adc"), ("hbv", "hbv"), ("sag", "sag"), ("cor", "cor")):
            row |= _if_file(column, t2.with_name(f"{name}_{suffix}.mha"))
        row |= marks.get(name, {}) | _if_file("lesions", lesions.get(name))
        drawn = [(reader, files[name]) for reader, files in labels.items() if name in files]
        for reader, label in drawn:
            yield {**row, "label": label, "scheme": "pz_tz", "reader": reader}
        if not drawn:
            yield row


def _marks(root: Path) -> dict[str, Row]:
    """PSA and centre by study from the marksheet, where there is one."""
    sheet = next(iter(sorted(root.rglob("marksheet*.csv*"))), None)
    if sheet is None:
        return {}
    table = pl.read_csv(sheet, infer_schema=False)
    if not {"patient_id", "study_id"} <= set(table.columns):
        return {}
    marks = {}
    for row in table.iter_rows(named=True):
        name = f"{row['patient_id']}_{row['study_id']}"
        marks[name] = {key: row[key] for key in ("psa", "center") if row.get(key)}
    return marks


def _stems(root: Path, below: str) -> dict[str, Path]:
    files = sorted(root.rglob(f"{below}/*.nii.gz"))
    return {file.name.removesuffix(".nii.gz"): file for file in files}


def _msd05(root: Path) -> Iterator[Row]:
    """Task05 of the Medical Segmentation Decathlon: T2 and ADC as volumes of one file."""
    for images in ("imagesTr", "imagesTs"):
        for file in sorted(root.rglob(f"{images}/*.nii.gz")):
            if file.name.startswith("."):
                continue
            name = file.name.removesuffix(".nii.gz")
            row: Row = {"subject_id": name, "study_id": name, "t2": _part(file, 0)}
            label = file.parents[1] / "labelsTr" / file.name
            row |= {"adc": _part(file, 1)}
            if images == "imagesTr" and label.is_file():
                row |= {"label": label, "scheme": "msd05"}
            yield row


def _part(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}#{number}")


def _prostate158(root: Path) -> Iterator[Row]:
    """Prostate158: a folder a patient, with ``t2.nii.gz`` and the readers' anatomy."""
    validation = set()
    for table in sorted(root.rglob("valid.csv")):
        rows = pl.read_csv(table, infer_schema=False)
        validation |= {int(name) for name in rows[rows.columns[0]].to_list() if name.isdecimal()}
        if "ID" in rows.columns:
            validation |= {int(name) for name in rows["ID"].to_list() if name.isdecimal()}
    for t2 in sorted(root.rglob("t2.nii.gz")):
        folder = t2.parent
        row: Row = {"subject_id": folder.name, "study_id": folder.name, "t2": t2}
        row |= _if_file("adc", folder / "adc.nii.gz") | _if_file("hbv", folder / "dwi.nii.gz")
        row |= _if_file("lesions", folder / "t2_tumor_reader1.nii.gz")
        number = int(folder.name) if folder.name.isdecimal() else -1
        row["split"] = "validation" if number in validation else "train"
        if folder.parent.name == "test":
            row["split"] = "test"
        readers = sorted(folder.glob("t2_anatomy_reader*.nii.gz"))
        for label in readers:
            reader = label.name.removeprefix("t2_anatomy_").removesuffix(".nii.gz")
            yield {**row, "label": label, "scheme": "prostate158", "reader": reader}
        if not readers:
            yield row


def _prostatex(root: Path) -> Iterator[Row]:
    """PROSTATEx with the zones of Meyer et al.: images as files or DICOM series, labels beside.

    A DICOM segmentation says which series it was drawn on; that one is taken.
    """
    folders: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        found = PROSTATEX.search(path.relative_to(root).as_posix())
        if found and (path.is_dir() or path.name.lower().endswith((*SUFFIXES, SEGMENTATION))):
            folders.setdefault(found.group(), []).append(path)
    for subject, paths in folders.items():
        images = [path for path in paths if _is_image(path)]
        label = next((path for path in paths if _is_label(path)), None)
        drawn_on = _reference(label)
        transversal = [path for path in images if _named(path, "t2", "tra")]
        chosen = [path for path in transversal if drawn_on and _series_uid(path) == drawn_on]
        if not transversal:
            continue
        row: Row = {
            "subject_id": subject,
            "study_id": subject,
            "t2": (chosen or transversal)[-1],
        }
        for column in ("sag", "cor"):
            planes = [path for path in images if _named(path, column)]
            row |= {column: planes[-1]} if planes else {}
        yield {**row, "label": label} if label else row


def _is_image(path: Path) -> bool:
    if path.is_dir():
        return any(entry.suffix.lower() == ".dcm" for entry in path.iterdir())
    return path.name.lower().endswith(SUFFIXES) and not _is_label(path)


def _is_label(path: Path) -> bool:
    if path.is_dir():
        return False
    if path.suffix.lower() == SEGMENTATION:
        return _header(path, "Modality") == "SEG"
    words = PROSTATEX.sub("", path.name).lower()
    return any(word in words for word in LABEL_WORDS)


def _named(path: Path, *words: str) -> bool:
    name = path.name.lower()
    return all(word in name for word in words)


def _reference(label: Path | None) -> str:
    """The series that a DICOM segmentation was drawn on; "" for other labels."""
    if label is None or label.suffix.lower() != SEGMENTATION:
        return ""
    header = pydicom.dcmread(label, stop_before_pixels=True)
    series = header.get("ReferencedSeriesSequence") or []
    return str(series[0].SeriesInstanceUID) if series else ""


def _series_uid(path: Path) -> str:
    files = sorted(path.glob("*.dcm")) if path.is_dir() else []
    return _header(files[0], "SeriesInstanceUID") if files else ""


def _header(path: Path, tag: str) -> str:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[tag])
    except (OSError, pydicom.errors.InvalidDicomError):
        return ""
    return str(header.get(tag) or "")


def _dicom(root: Path, pattern: str) -> Iterator[Row]:
    """Every folder that directly holds a series of the description; folders name the patients."""
    for folder, first in _series_folders(root):
        if fnmatch(_description(first).lower(), pattern.lower()):
            parts = folder.relative_to(root).parts or (root.name,)
            yield {"subject_id": parts[0], "study_id": "_".join(parts), "t2": folder}


def _series_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    """Folders that directly hold DICOM images, each with its first file."""
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        files = (entry for entry in sorted(folder.iterdir()) if entry.is_file())
        first = next((one for one in files if _header(one, "SeriesInstanceUID")), None)
        if first is not None:
            yield folder, first


def _description(file: Path) -> str:
    return _header(file, "SeriesDescription")


def _if_file(column: str, path: Path | None) -> Row:
    return {column: path} if path is not None and path.is_file() else {}


LAYOUTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "picai": _picai,
    "msd05": _msd05,
    "prostate158": _prostate158,
    "prostatex-meyer": _prostatex,
}
