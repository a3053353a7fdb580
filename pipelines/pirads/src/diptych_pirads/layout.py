"""Which files belong to which study: the manifest `studies.csv`, one image, or a DICOM folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import polars as pl

from diptych.findings import Finding
from diptych_pirads.labels import FROM_SEGMENTS, SCHEMES
from diptych_pirads.read import SUFFIXES

MANIFEST = "studies.csv"
REQUIRED = ("subject_id", "study_id", "t2")
SERIES = ("t2", "adc", "hbv", "sag", "cor")
TEXT = ("scheme", "reader", "split", "center", "scanner")
COLUMNS = (*REQUIRED, *SERIES[1:], "label", *TEXT, "psa", "lesions")
SPLITS = ("train", "validation", "test")
MAX_BYTES = 2**28
PARTS = ";"  # between the three files of a `prostatex_masks` label


@dataclass(frozen=True)
class Study:
    """One row of the manifest: a study and one reader's label of it.

    Args:
        subject: The patient, in the user's own name.
        study: The examination, in the user's own name.
        images: Series -> file or DICOM folder; "t2" always, of "adc", "hbv", "sag", "cor" those
            that exist.
        label: The files of the label: none, one, or the three of `prostatex_masks`.
        scheme: What its values mean; "" where the manifest does not say.
        reader: Who drew it; "" for one reader.
        split: "train", "validation", "test" or "".
        psa: Serum PSA in ng/mL; NaN where unknown.
        center: Where it was made.
        scanner: On which machine.
        lesions: Mask of lesions whose sectors `predict` names; None without one.
        shown: File -> how findings name it.
    """

    subject: str
    study: str
    images: Mapping[str, Path]
    label: tuple[Path, ...] = ()
    scheme: str = ""
    reader: str = ""
    split: str = ""
    psa: float = math.nan
    center: str = ""
    scanner: str = ""
    lesions: Path | None = None
    shown: Mapping[Path, str] = field(default_factory=dict, repr=False)

    def name_of(self, path: Path) -> str:
        """How findings name a file: its name, or with its folders where that is not unique."""
        return self.shown.get(path, path.name)


def locate(path: Path) -> tuple[list[Study], list[Finding]]:
    """The studies behind what the user points at.

    Args:
        path: A manifest (CSV or parquet), a folder that holds `studies.csv`, one image file, a
            folder of image files, each a T2-weighted series, or a folder of DICOM files.

    Returns:
        The studies, and findings E100 about the manifest.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        path = path / MANIFEST
    images = _images_in(path) if path.is_dir() else []
    if images:
        return [Study(image.name, image.name, {"t2": image}) for image in images], []
    if path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        return read_manifest(path)
    if path.is_dir() or path.name.lower().endswith(SUFFIXES):
        return [Study(path.name, path.name, {"t2": path})], []
    found = "no manifest, image or DICOM folder" if path.exists() else "there is nothing here"
    return [], [_wrong(path.name, found, f"give {MANIFEST}, an image or a folder of DICOM files")]


def _images_in(folder: Path) -> list[Path]:
    """Image files that lie directly in a folder, hidden ones apart."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
    )


def read_manifest(path: Path) -> tuple[list[Study], list[Finding]]:
    """Read a manifest; paths in it are relative to its folder.

    Args:
        path: CSV (commas, semicolons or tabs) or parquet with the columns `COLUMNS`, of which only
            `REQUIRED` must be there.

    Returns:
        The studies of all rows that can be understood, and what is wrong with the others.
    """
    where = path.name
    try:
        if path.stat().st_size > MAX_BYTES:
            return [], [_wrong(where, f"more than {MAX_BYTES} bytes", "split it")]
        if path.suffix.lower() == ".parquet":
            table = pl.read_parquet(path)
        else:
            table = pl.read_csv(path, infer_schema=False, separator=_separator(path))
        table = table.rename(lambda name: name.strip().lower())
    except (OSError, pl.exceptions.PolarsError):
        return [], [_wrong(where, "cannot be read as a table", "save it as CSV in UTF-8")]
    missing = [column for column in REQUIRED if column not in table.columns]
    if missing:
        fix = f"add them; known columns are {', '.join(COLUMNS)}"
        return [], [_wrong(where, f"no column {', '.join(missing)}", fix)]
    findings = []
    unknown = [column for column in table.columns if column not in COLUMNS]
    if unknown:
        found = f"columns that are not used: {', '.join(unknown)}"
        fix = f"nothing, or rename them; known are {', '.join(COLUMNS)}"
        findings.append(Finding("note", "I100", where, found, fix))
    rows = [
        {name: "" if value is None else str(value).strip() for name, value in row.items()}
        for row in table.iter_rows(named=True)
    ]
    shown = _names(path.parent, rows)
    studies = []
    for number, row in enumerate(rows, 2):
        problems = _problems(row)
        findings += [_wrong(f"{where} line {number}", *problem) for problem in problems]
        if not problems:
            studies.append(_study(row, path.parent, shown))
    if not rows:
        findings.append(_wrong(where, "no rows", "write a row a study"))
    return studies, findings


def _separator(path: Path) -> str:
    """What parts the columns: spreadsheets of many countries write semicolons, some write tabs."""
    with path.open("rb") as stream:
        header = stream.readline()
    return max(",;\t", key=lambda sign: header.count(sign.encode()))


def leave_out(
    studies: Sequence[Study], patterns: Sequence[str]
) -> tuple[list[Study], list[Finding]]:
    """The studies without the files that glob patterns name.

    Args:
        studies: All rows.
        patterns: As in `data.exclude`, for a file's name or its path in the manifest.

    Returns:
        The rows that keep their T2-weighted series, the other files of a row dropped one by one;
        and a note I100 for each file that is left out.
    """
    kept, findings = [], []
    told: set[Path] = set()
    for study in studies:
        files = (*study.images.values(), *study.label)
        out = {f for f in files if any(_fits(f, study.name_of(f), p) for p in patterns)}
        for file in sorted(out - told):
            found = "left out (data.exclude)"
            findings.append(Finding("note", "I100", study.name_of(file), found, "nothing"))
        told |= out
        if study.images["t2"] not in out:
            images = {name: file for name, file in study.images.items() if file not in out}
            label = () if out & set(study.label) else study.label
            kept.append(replace(study, images=images, label=label))
    return kept, findings


def _fits(path: Path, shown: str, pattern: str) -> bool:
    names = (path.name, shown, path.name.partition("#")[0], shown.partition("#")[0])
    return any(fnmatch(name, pattern) for name in names)


def check_rows(studies: Sequence[Study], where: str) -> list[Finding]:
    """E117: one study and reader twice, or a subject in two splits.

    Args:
        studies: All rows.
        where: The manifest, for messages.
    """
    findings = []
    for key, count in Counter((s.subject, s.study, s.reader) for s in studies).items():
        if count > 1:
            subject, study, reader = key
            found = f"study {study} of subject {subject} stands in {count} rows"
            found += f" for reader {reader}" if reader else ""
            fix = "remove the copies, or name the readers in the column reader"
            findings.append(Finding("error", "E117", where, found, fix))
    images: dict[tuple[str, str], Path] = {}
    for row in studies:
        if images.setdefault((row.subject, row.study), row.images["t2"]) != row.images["t2"]:
            found = f"study {row.study} of subject {row.subject} has two T2-weighted series"
            fix = "give all rows of a study one series, or each series its own study_id"
            findings.append(Finding("error", "E117", where, found, fix))
    parts: dict[str, set[str]] = {}
    for row in studies:
        parts.setdefault(row.subject, set()).add(row.split)
    for subject, splits in parts.items():
        if len(splits) > 1:
            named = " and ".join(sorted(split or "(empty)" for split in splits))
            found = f"subject {subject} is in the splits {named}"
            fix = "give all studies of a subject one split"
            findings.append(Finding("error", "E117", where, found, fix))
    return findings


def _problems(row: Mapping[str, str]) -> list[tuple[str, str]]:
    problems = [(f"{name} is empty", "fill it in") for name in REQUIRED if not row[name]]
    scheme, split, psa = (row.get(name, "") for name in ("scheme", "split", "psa"))
    schemes = (*SCHEMES, FROM_SEGMENTS)
    if scheme and scheme not in schemes:
        problems.append((f"scheme '{scheme}' is not known", f"use {', '.join(schemes)}"))
    if split and split not in SPLITS:
        problems.append((f"split '{split}' is not known", f"use {', '.join(SPLITS)}"))
    labels = _label_names(row)
    if scheme == "prostatex_masks" and labels and len(labels) != 3:
        fix = f"give prostate{PARTS}pz{PARTS}tz"
        problems.append((f"prostatex_masks needs three files, here are {len(labels)}", fix))
    if scheme != "prostatex_masks" and len(labels) > 1:
        fix = "give one file, or scheme prostatex_masks"
        problems.append((f"{len(labels)} label files", fix))
    try:
        if psa and not 0 <= float(psa) < math.inf:
            raise ValueError
    except ValueError:
        fix = "give ng/mL with a decimal point, or leave it empty"
        problems.append((f"psa '{psa}' is no amount", fix))
    return problems


def _study(row: Mapping[str, str], folder: Path, shown: Mapping[Path, str]) -> Study:
    return Study(
        subject=row["subject_id"],
        study=row["study_id"],
        images={name: folder / row[name] for name in SERIES if row.get(name)},
        label=tuple(folder / name for name in _label_names(row)),
        scheme=row.get("scheme", ""),
        reader=row.get("reader", ""),
        split=row.get("split", ""),
        psa=float(row.get("psa") or math.nan),
        center=row.get("center", ""),
        scanner=row.get("scanner", ""),
        lesions=folder / row["lesions"] if row.get("lesions") else None,
        shown=shown,
    )


def _label_names(row: Mapping[str, str]) -> list[str]:
    return [name.strip() for name in row.get("label", "").split(PARTS) if name.strip()]


def _names(folder: Path, rows: Sequence[Mapping[str, str]]) -> dict[Path, str]:
    given = {
        name
        for row in rows
        for name in (*(row.get(series, "") for series in (*SERIES, "lesions")), *_label_names(row))
        if name
    }
    often = Counter(Path(name).name for name in given)
    return {
        folder / name: Path(name).name if often[Path(name).name] == 1 else Path(name).as_posix()
        for name in given
    }


def _wrong(where: str, found: str, fix: str) -> Finding:
    return Finding("error", "E100", where, found, fix)
