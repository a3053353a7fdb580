"""Files to an event table: which format it is, and one reader for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import polars as pl

from diptych.errors import DataError
from diptych.findings import Finding, Findings
from diptych.manifest import sha256_of
from diptych.progress import progress
from diptych_mclrec.config import EventDataSection, Format, MCLRecConfig
from diptych_mclrec.read_clinical import (
    Clinical,
    meds_files,
    read_meds,
    read_omop,
    read_synthea,
    table_of,
)
from diptych_mclrec.read_tables import (
    Raw,
    read_csv,
    read_parquet,
    read_sequence_lines,
)
from diptych_mclrec.read_text import PACK_ERRORS, as_utf8, empty, line_form
from diptych_mclrec.sequences import EVENT_SCHEMA, EventTable, Kind, SourceTable

FORMATS: tuple[str, ...] = get_args(Format)
CLINICAL = ("omop", "meds", "synthea")
ENDS = {
    "csv": (".csv", ".tsv"),
    "recbole": (".inter",),
    "sequences": (".txt",),
    "parquet": (".parquet",),
}
PACKED = ("", ".gz", ".zst")
MEDS_COLUMNS = {"subject_id", "time", "code", "numeric_value"}
FIX_FORMAT = (
    "give .csv, .inter, .txt or .parquet, or a folder of OMOP, MEDS or Synthea tables; "
    "or set data.format"
)


@dataclass(frozen=True)
class Reading:
    """What a path gives.

    Args:
        format: How it was read.
        kind: "interactions" or "clinical".
        findings: Everything that was found on the way.
        table: The events; None where an error forbids it.
    """

    format: str
    kind: Kind
    findings: tuple[Finding, ...]
    table: EventTable | None = None


def read_events(
    path: Path | str,
    *,
    format: str = "auto",
    kind: str = "auto",
    columns: Mapping[str, str] | None = None,
    **opts: Any,
) -> EventTable:
    """The events of a file or folder.

    Args:
        path: A table (.csv, .inter, .txt, .parquet) or a folder (OMOP, MEDS, Synthea, tables).
        format: "auto", "csv", "parquet", "recbole", "sequences", "pairs", "omop", "meds",
            "synthea".
        kind: "auto", "interactions" or "clinical".
        columns: Role (subject, item, time, basket) -> column; found by name where left out.
        **opts: More of the section ``data``: time_format, time_unit, encoding, omop, meds.

    Returns:
        The events as they stand in the source.

    Raises:
        DataError: The data have errors; the findings say which.

    Example:
        ``read_events("ratings.csv", columns={"item": "movie"})``
    """
    given = {"format": format, "kind": kind, "columns": dict(columns or {}), **opts}
    data = MCLRecConfig.model_validate({"data": given}).data
    reading = read_source(Path(path), data)
    if reading.table is None:
        errors = [one for one in reading.findings if one.severity == "error"]
        raise DataError("\n".join(one.line() for one in errors), Findings(reading.findings))
    return reading.table


def read_source(path: Path, data: EventDataSection) -> Reading:
    """Events and findings of a file or folder; never stops at the first error.

    Args:
        path: A file or a folder.
        data: How it is read.
    """
    form, findings = find_format(path, data)
    if form is None:
        return Reading("none", "interactions", tuple(findings))
    kind: Kind = "clinical" if form in CLINICAL else "interactions"
    if data.kind != "auto":
        kind = data.kind
    if form in CLINICAL:
        clinical = _CLINICAL_READERS[form](path, data)
    else:
        clinical = _read_files(_files(path, data), form, data)
    findings += clinical.findings
    broken = any(one.severity == "error" for one in findings)
    if not broken and not any(raw.frame is not None for _, raw in clinical.parts):
        findings.append(empty(path))
        broken = True
    if broken:
        return Reading(form, kind, tuple(findings))
    read_as = f"read as {form}, kind {kind}"
    fix = "set data.format or data.kind where that is wrong"
    findings.append(Finding("note", "data.kind", whole(path).name, read_as, fix))
    return Reading(form, kind, tuple(findings), _table(clinical, kind))


def whole(path: Path) -> Path:
    """What findings about all events name: the file, but never a folder of the user's own."""
    return path if path.is_file() else Path("the data")


def _table(clinical: Clinical, kind: Kind) -> EventTable:
    frames = [
        raw.frame.with_columns(pl.lit(number, pl.Int32).alias("source"))
        for number, (_, raw) in enumerate(clinical.parts)
        if raw.frame is not None
    ]
    frame = frames[0] if len(frames) == 1 else pl.concat(frames)
    rows = [(path, raw.rows) for path, raw in clinical.parts]
    rows += [(path, 0) for path in clinical.others]
    sources = tuple(SourceTable(path, sha256_of(path), count) for path, count in rows)
    return EventTable(
        frame.select(EVENT_SCHEMA.names()).cast(EVENT_SCHEMA),
        kind,
        sources,
        clinical.descriptions,
        clinical.splits,
    )


def find_format(path: Path, data: EventDataSection) -> tuple[str | None, list[Finding]]:
    """The format of a file or folder: what the user says, else by its names and columns.

    Returns:
        The format or None, and findings where there is none.
    """
    if not path.exists():
        return None, [Finding("error", "file.none", path.name, "no such file", "check the path")]
    if data.format != "auto":
        return data.format, []
    if path.is_dir() and (form := _clinical_form(path)) is not None:
        return form, []
    files = _files(path, data)
    forms = {_form_of(one, data) for one in files}
    if len(forms) == 1 and (form := forms.pop()) is not None:
        return form, []
    if len(forms) > 1:
        found = f"files of several forms: {', '.join(sorted(map(str, forms)))}"
        fix = "set data.format, or leave the others out with data.exclude"
        return None, [Finding("error", "data.format", path.name, found, fix)]
    found = "no file that holds events" if path.is_dir() else f"unknown ending '{path.suffix}'"
    return None, [Finding("error", "data.format", path.name, found, FIX_FORMAT)]


def _clinical_form(folder: Path) -> str | None:
    if table_of(folder, "person") is not None:
        return "omop"
    if (folder / "metadata").is_dir() and (folder / "data").is_dir():
        return "meds"
    return "synthea" if table_of(folder, "patients") is not None else None


def _files(path: Path, data: EventDataSection) -> list[Path]:
    """The tables of a folder that are not excluded, or the file itself."""
    if not path.is_dir():
        return [path]
    ends = tuple(end + pack for group in ENDS.values() for end in group for pack in PACKED)
    return sorted(
        one
        for one in path.iterdir()
        if one.name.lower().endswith(ends)
        and not any(fnmatch(one.name, pattern) for pattern in data.exclude)
    )


def _form_of(path: Path, data: EventDataSection) -> str | None:
    name = path.name.lower()
    form = next(
        (
            form
            for form, ends in ENDS.items()
            if name.endswith(tuple(end + pack for end in ends for pack in PACKED))
        ),
        None,
    )
    if form == "sequences" and path.stat().st_size:
        try:
            with as_utf8(path, data.encoding) as usable:
                return line_form(usable)
        except (UnicodeDecodeError, pl.exceptions.PolarsError, *PACK_ERRORS):
            return form
    if form == "parquet":
        try:
            columns = set(pl.read_parquet_schema(path))
        except (pl.exceptions.PolarsError, OSError):
            return form
        return "meds" if columns >= MEDS_COLUMNS else form
    return form


def _read_files(files: Sequence[Path], form: str, data: EventDataSection) -> Clinical:
    findings: list[Finding] = []
    parts: list[tuple[Path, Raw]] = []
    with progress(len(files), "read") as bar:
        for path in files:
            raw = _READERS[form](path, data)
            skip = raw.frame is None and data.on_error == "skip" and len(files) > 1
            findings += [_left_out(one) for one in raw.findings] if skip else raw.findings
            if not skip:
                parts.append((path, raw))
            bar.advance()
    return Clinical(findings, parts)


def _left_out(finding: Finding) -> Finding:
    if finding.severity != "error":
        return finding
    fix = f"the file is left out (on_error=skip); {finding.fix}"
    return replace(finding, severity="warning", fix=fix)


_READERS: Mapping[str, Callable[[Path, EventDataSection], Raw]] = {
    "csv": read_csv,
    "recbole": lambda path, data: read_csv(path, data, recbole=True),
    "parquet": read_parquet,
    "sequences": read_sequence_lines,
    "pairs": read_sequence_lines,
}
_CLINICAL_READERS: Mapping[str, Callable[[Path, EventDataSection], Clinical]] = {
    "omop": read_omop,
    "meds": read_meds,
    "synthea": read_synthea,
}


def files_of(path: Path, data: EventDataSection) -> list[Path]:
    """Every file that the events of a source may come from, in a fixed order.

    Args:
        path: A file or a folder.
        data: What is left out.
    """
    if (path / "metadata").is_dir():
        return meds_files(path, data) + sorted(path.glob("metadata/*.parquet"))
    return _files(path, data)
