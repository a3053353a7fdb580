"""Findings over studies: files, images, labels, and all of them together.

Codes: E stops, W warns, I is for the record. Every reader of files raises the same findings.

    E100 manifest         E101 unreadable         E102 NaN or Inf        E103 constant image
    E104 fractions        E105 values             E106 other place       E107 voxel size
    E109 empty label      E111 not axial          E113 not 3-D           E115 missing slice
    E116 several series   E117 duplicates         W102 NaN mended        W105 zones overlap
    W106 other grid       W108 zones exchanged    W110 flipped           W111 no orientation
    W112 gland cut        W113 4-D, one volume    W114 islands           W118 one study twice
    W119 patient named    W120 ADC unit           W121 volumes           W123 unlike training
    W124 no DICOM SEG     W125 not registered     W126 other frame       I100 unused columns
    I105 scheme guessed   I109 no lesion          I122 rounding          I125 registered
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import DataError, UsageError
from diptych.findings import Finding, Findings
from diptych.manifest import sha256_of
from diptych.privacy import pseudonyms
from diptych.progress import progress
from diptych.split_file import SplitFile, read_split_file
from diptych_pirads.check_label import check_frame, check_label
from diptych_pirads.config import PiradsConfig, PiradsDataSection
from diptych_pirads.geometry import Volume, reorient_lps
from diptych_pirads.label_files import open_label
from diptych_pirads.layout import Study, check_rows, leave_out, locate
from diptych_pirads.read import names_of, open_volume

AXIAL = 0.7  # cosine between the slice normal and the body axis
THICKER = 1.2  # slices this much thicker than pixels are wide say which axis is the slice axis
MAX_MAPPING_BYTES = 2**26
VOXELS = "voxels"
SPLIT_KEYS = ("subject", "study")  # columns of `split.file`


@dataclass(frozen=True)
class Checked:
    """What the check of one study found.

    Args:
        findings: Its findings.
        digest: SHA-256 of the voxels of the T2-weighted series; "" where it cannot be read.
        frame: DICOM's frame of reference of a series; "" where the file knows none.
    """

    findings: tuple[Finding, ...] = ()
    digest: str = ""
    frame: str = ""


@dataclass(frozen=True)
class Survey:
    """What all files hold together.

    Args:
        findings: Everything that was found.
        studies: The rows that can be used, in the order of the manifest.
        subjects: Own name of each subject -> pseudonym; one for those that share a study.
        units: (subject, study), own names -> pseudonym of the study.
        digests: File or DICOM folder -> SHA-256 of its content.
        split: The user's own split, if there is one.
    """

    findings: Findings
    studies: tuple[Study, ...]
    subjects: Mapping[str, str]
    units: Mapping[tuple[str, str], str]
    digests: Mapping[Path, str]
    split: SplitFile | None = None


def check(config: PiradsConfig, path: Path) -> Findings:
    """Everything that is wrong or remarkable about the data; never stops at the first.

    Args:
        config: The configuration.
        path: A manifest, a folder with `studies.csv`, one image, or a DICOM folder.

    Returns:
        The findings, study by study and then about all of them together.

    Raises:
        UsageError: `data.same_studies` or `split.file` cannot be read.
    """
    return survey(config, path).findings


def survey(config: PiradsConfig, path: Path) -> Survey:
    """Open every file once and look at all of them together.

    Args:
        config: The configuration.
        path: As for `check`.

    Returns:
        Findings and usable rows. With `data.on_error: skip` the errors of rows that are left out
        are warnings that say so.

    Raises:
        UsageError: `data.same_studies` or `split.file` cannot be read.
    """
    studies, findings = locate(path)
    same = read_same_studies(config.data.same_studies)
    split = read_split_file(config.split.file, SPLIT_KEYS) if config.split.file else None
    studies, left_out = leave_out(studies, config.data.exclude)
    findings += left_out
    named = bool(studies)
    seen: dict[Path, Checked] = {}  # images that several rows share
    kept, voxels = [], []
    for study in progress(studies, "check"):
        one = _check_study(study, config.data, seen)
        broken = any(f.severity == "error" for f in one.findings) or any(
            f.severity == "error" for path in study.images.values() for f in seen[path].findings
        )
        skipped = broken and config.data.on_error == "skip"
        findings += [_left_out(f) if skipped else f for f in one.findings]
        if not skipped:
            kept.append(study)
            voxels.append(one.digest)
    if named and not kept:
        fix = "mend the files that the warnings name"
        findings.append(Finding("error", "E100", path.name, "no study can be used", fix))
    findings += check_rows(kept, path.name)
    twice = _same_studies(kept, voxels, same)
    findings += [_twice(*pair, path.name) for pair in twice]
    findings += _check_split(split, kept)
    digests = _digests(studies)
    subjects = _subject_names(kept, digests, twice, config.run.pseudonym_key)
    units = _unit_names(kept, subjects)
    names = _names(studies, subjects, units, digests)
    if split is not None:
        names[split.name] = "split.file"
    return Survey(Findings(tuple(findings), names), tuple(kept), subjects, units, digests, split)


def check_manifest(path: Path, strict: bool = False) -> list[Finding]:
    """The findings about a manifest and its files, with the default configuration.

    Args:
        path: As for `check`.
        strict: Zones that look exchanged are an error.
    """
    return list(check(PiradsConfig(data=PiradsDataSection(strict=strict)), path))


def check_study(study: Study, data: PiradsDataSection) -> Checked:
    """The findings about the files of one row.

    Args:
        study: The row.
        data: The section `data` of the configuration.
    """
    return _check_study(study, data, {})


def check_image(v: Volume, where: str, *, repair: bool = False) -> list[Finding]:
    """E102, E103: voxels that are no numbers, or all the same.

    Args:
        v: Any image that the network sees.
        where: Its file, for messages.
        repair: Voxels that are no number will be mended.
    """
    finite = np.isfinite(v.array)
    findings = []
    if not finite.all():
        slices = np.flatnonzero(~finite.all(axis=(1, 2)))
        found = f"{int((~finite).sum())} voxels are NaN or infinite (slices {_ranges(slices)})"
        if repair:
            fix = "nothing: they become the median of their slice (data.repair_nan)"
            findings.append(Finding("warning", "W102", where, found, fix))
        else:
            fix = "export the series again, or set data.repair_nan=median"
            findings.append(Finding("error", "E102", where, found, fix))
    values = v.array[finite]
    if values.size == 0 or values.min() == values.max():
        found = "no voxel is a number" if values.size == 0 else f"all voxels are {values[0]:g}"
        findings.append(Finding("error", "E103", where, found, "give the original series"))
    return findings


def check_axial(v: Volume, where: str) -> list[Finding]:
    """E111: the slices of a T2-weighted series must be axial, tilted by 45 degrees at most.

    Args:
        v: Axes as stored.
        where: Its file, for messages.
    """
    in_x_y_z = np.array(v.spacing[::-1])
    order = np.argsort(in_x_y_z)
    thick = in_x_y_z[order[2]] > THICKER * in_x_y_z[order[1]]
    normal = v.directions[:, order[2] if thick else 2]
    if abs(normal[2]) >= AXIAL:
        return []
    plane = ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]
    found = f"the slices are {plane} (normal {', '.join(f'{n:.2f}' for n in normal)})"
    fix = "give the axial series as t2, this one in the column sag or cor"
    return [Finding("error", "E111", where, found, fix)]


def read_same_studies(path: Path | None) -> dict[str, str]:
    """A table of studies that stand in two data sets under different names.

    Args:
        path: JSON, also `.gz`: {"ProstateX-0227_<date>": "10699_1000715", ...}; or None.

    Returns:
        Name -> name in lower case; names of the form SUBJECT_DATE also without the date.

    Raises:
        UsageError: The file cannot be read.
    """
    if path is None:
        return {}
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            table: Any = json.loads(stream.read(MAX_MAPPING_BYTES))
        pairs = {str(name): str(other) for name, other in table.items()}
    except (OSError, EOFError, ValueError, AttributeError):
        found = f"data.same_studies {path.name}: cannot be read as a JSON table of names"
        raise UsageError(f"{found}; give one name for each name") from None
    same = {_key(name): _key(other) for name, other in pairs.items()}
    return {_key(name.rpartition("_")[0] or name): _key(o) for name, o in pairs.items()} | same


def _check_study(study: Study, data: PiradsDataSection, seen: dict[Path, Checked]) -> Checked:
    findings: list[Finding] = []
    stored: Volume | None = None
    digest = frame = ""
    for role, path in study.images.items():
        known = seen.get(path)
        if known is not None and not (role == "t2" and study.label):
            digest, frame = (known.digest, known.frame) if role == "t2" else (digest, frame)
            continue
        one, volume = _check_series(study, role, data)
        if known is None:
            findings += one.findings
            seen[path] = one
        if role == "t2":
            stored, digest, frame = volume, one.digest, one.frame
        elif known is None:
            findings += check_frame(one.frame, frame, study.name_of(path))
    if study.label:
        where = study.name_of(study.label[0])
        try:
            label = open_label(study, data.scheme, stored)
        except DataError as error:
            findings += _renamed(error.findings, study, *study.label)
        else:
            image = None if stored is None else reorient_lps(stored)
            findings += _renamed(label.findings, study, *study.label)
            findings += check_frame(label.frame, frame, where)
            findings += check_label(label, where, image, strict=data.strict)
    return Checked(tuple(findings), digest)


def _check_series(
    study: Study, role: str, data: PiradsDataSection
) -> tuple[Checked, Volume | None]:
    path = study.images[role]
    where = study.name_of(path)
    try:
        opened = open_volume(path, data.series if path.is_dir() else None)
    except DataError as error:
        return Checked(tuple(_renamed(error.findings, study, path))), None
    findings = _renamed(opened.findings, study, path)
    if role not in ("sag", "cor"):  # of these two only the geometry is used
        findings += check_image(opened.volume, where, repair=data.repair_nan == "median")
    if role != "t2":
        return Checked(tuple(findings), frame=opened.frame), opened.volume
    findings += check_axial(opened.volume, where)
    voxels = np.ascontiguousarray(reorient_lps(opened.volume).array, np.float32)
    digest = hashlib.sha256(voxels.tobytes()).hexdigest()
    return Checked(tuple(findings), digest, opened.frame), opened.volume


def _renamed(findings: Iterable[Finding] | None, study: Study, *paths: Path) -> list[Finding]:
    """Readers know only a file's name; where that is not unique its folders are added."""
    names = {path.name: study.name_of(path) for path in paths}
    return [replace(one, where=names.get(one.where, one.where)) for one in findings or ()]


def _left_out(finding: Finding) -> Finding:
    if finding.severity != "error":
        return finding
    found = f"{finding.found}; the row is left out (data.on_error=skip)"
    return replace(finding, severity="warning", found=found)


def _check_split(split: SplitFile | None, studies: Sequence[Study]) -> list[Finding]:
    if split is None:
        return []
    named = [split.part_of({"subject": one.subject, "study": one.study}) for one in studies]
    if studies and not any(named):
        fix = "write the manifest's subject_id into its column subject"
        return [Finding("error", "E117", split.name, "names no study of the manifest", fix)]
    return list(split.findings)


def _digests(studies: Sequence[Study]) -> dict[Path, str]:
    paths = dict.fromkeys(path for one in studies for path in (*one.images.values(), *one.label))
    digests = {}
    for path in paths:
        parts = [sha256_of(file) for file in names_of(path)]
        digests[path] = (
            parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
        )
    return digests


def _subject_names(
    studies: Sequence[Study],
    digests: Mapping[Path, str],
    twice: Sequence[tuple[Study, Study, bool]],
    key_file: Path | None,
) -> dict[str, str]:
    """Own name of each subject -> pseudonym; subjects that share a study become one."""
    first = {study.subject: study.subject for study in studies}
    for a, b, _ in twice:
        old, new = first[b.subject], first[a.subject]
        first = {own: new if name == old else name for own, name in first.items()}
    files: dict[str, list[str]] = {}
    for study in studies:
        own = (digests[path] for path in (*study.images.values(), *study.label))
        files.setdefault(first[study.subject], []).extend(own)
    names = pseudonyms(files, key_file)
    return {own: names[name] for own, name in first.items()}


def _unit_names(
    studies: Sequence[Study], subjects: Mapping[str, str]
) -> dict[tuple[str, str], str]:
    units: dict[tuple[str, str], str] = {}
    counts: Counter[str] = Counter()
    for study in studies:
        if (study.subject, study.study) not in units:
            name = subjects[study.subject]
            counts[name] += 1
            units[study.subject, study.study] = f"{name}-{counts[name]}"
    return units


def _names(
    studies: Sequence[Study],
    subjects: Mapping[str, str],
    units: Mapping[tuple[str, str], str],
    digests: Mapping[Path, str],
) -> dict[str, str]:
    """Own names of subjects, studies and files -> what stands for them in a run folder."""
    names = dict(subjects)
    for study in studies:
        names.setdefault(study.subject, "subject")
        names.setdefault(study.study, units.get((study.subject, study.study), "study"))
    names = {name: code for name, code in names.items() if not _is_small_number(name)}
    for study in studies:
        for path in (*study.images.values(), *study.label):
            names.setdefault(study.name_of(path), digests[path][:12])
    return names


def _is_small_number(name: str) -> bool:
    """It says nothing about a patient, and would be replaced inside measured values."""
    return name.isdecimal() and len(name) < 3


def _shared_names(study: Study, same: Mapping[str, str]) -> list[str]:
    """What a study is called in the data set that the table's names lead to."""
    names = (study.study, study.subject, f"{study.subject}_{study.study}")
    targets = set(same.values())
    mapped = [same.get(_key(name), _key(name)) for name in names]
    return [name for name in dict.fromkeys(mapped) if name in targets]


def _same_studies(
    studies: Sequence[Study], digests: Sequence[str], same: Mapping[str, str]
) -> list[tuple[Study, Study, bool]]:
    """Pairs of rows that are one study under two names, and whether their voxels say so.

    Args:
        studies: All rows.
        digests: Hash of the voxels of each row's T2-weighted series, or "".
        same: Study of one data set -> its name in another, from `read_same_studies`.
    """
    pairs = []
    first: dict[str, Study] = {}
    told: set[frozenset[tuple[str, str]]] = set()
    for study, digest in zip(studies, digests, strict=True):
        for key in [f"{VOXELS} {digest}"] * bool(digest) + _shared_names(study, same):
            other = first.setdefault(key, study)
            pair = frozenset({(other.subject, other.study), (study.subject, study.study)})
            by_voxels = key.startswith(VOXELS)
            if (
                len(pair) == 2
                and pair not in told
                and (by_voxels or other.subject != study.subject)
            ):
                told.add(pair)
                pairs.append((other, study, by_voxels))
    return pairs


def _twice(a: Study, b: Study, by_voxels: bool, where: str) -> Finding:
    how = "their voxels are equal" if by_voxels else "data.same_studies joins them"
    found = f"{a.study} of {a.subject} and {b.study} of {b.subject} are one study ({how})"
    if a.split != b.split:
        found += f", in the splits {a.split or '(empty)'} and {b.split or '(empty)'}"
        return Finding("error", "W118", where, found, "keep one of them, or give both one split")
    found += "; no split parts them"
    fix = "keep one of them, or give both one subject_id"
    return Finding("warning", "W118", where, found, fix)


def _key(name: str) -> str:
    return name.strip().casefold()


def _ranges(numbers: Sequence[int] | np.ndarray) -> str:
    """`1, 3-5` for 1, 3, 4, 5 counted from 1."""
    runs: list[list[int]] = []
    for number in (int(n) + 1 for n in numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
