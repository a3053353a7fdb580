"""Tables with one event a row, CSV or Parquet, to events; every bad cell named with its row."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diptych.findings import Finding
from diptych_mclrec.config import ColumnsSection, EventDataSection
from diptych_mclrec.read_text import (
    MOST,
    PACK_ERRORS,
    as_utf8,
    broken_pack,
    empty,
    line_faults,
    read_lines,
    recbole_columns,
    reserved,
    row_words,
    unreadable,
)
from diptych_mclrec.times import looks_like_time, parse_times

ROW = "__row__"
NAMES = {
    "subject": ("subject", "subject_id", "user_id", "person_id", "patient", "userid"),
    "item": ("item", "item_id", "code", "movieid", "product_id"),
    "time": ("time", "timestamp", "date", "start"),
    "basket": ("basket", "basket_id", "encounter", "visit_occurrence_id"),
}
LIST_COLUMN = "item_ids"
EVENT_COLUMNS = ("subject", "item", "time", "basket", "row")


@dataclass(frozen=True)
class Raw:
    """What one file gives.

    Args:
        findings: About this file.
        frame: Columns subject, item, time, basket, row; None where an error forbids it.
        rows: Data rows of the file.
    """

    findings: list[Finding]
    frame: pl.DataFrame | None = None
    rows: int = 0


def read_csv(path: Path, data: EventDataSection, *, recbole: bool = False) -> Raw:
    """A delimited table, compressed or not.

    Args:
        path: The file.
        data: Columns, time and encoding.
        recbole: Whether its header is that of RecBole, and its separator a tab.
    """
    if not path.stat().st_size:
        return Raw([empty(path)])
    try:
        with as_utf8(path, data.encoding) as usable:
            separator = "\t" if recbole else separator_of(usable)
            return _scanned(usable, path, data, separator, recbole)
    except pl.exceptions.PolarsError as error:
        return Raw(unreadable(path, path, ",", error))
    except UnicodeDecodeError as error:
        return Raw([_other_encoding(path, error)])
    except PACK_ERRORS as error:
        return Raw([broken_pack(path, error)])


def _scanned(
    usable: Path, path: Path, data: EventDataSection, separator: str, recbole: bool
) -> Raw:
    try:
        scan = pl.scan_csv(
            usable,
            infer_schema_length=0,
            separator=separator,
            quote_char=None if recbole else '"',
            row_index_name=ROW,
            row_index_offset=2,
        )
        header = [name for name in scan.collect_schema().names() if name != ROW]
        if _holds_a_split(header):
            return Raw(_no_events(path))
        if recbole:
            roles, findings = recbole_columns(header, path)
        else:
            roles, findings = find_columns(scan, header, data.columns, path)
        if any(finding.severity == "error" for finding in findings):
            return Raw(findings)
        frame = _select(scan, roles).collect(engine="streaming")
        faults: list[Finding] = []
        skipped: set[int] = set()
        if frame.height and any(frame[name].null_count() for name in roles):
            faults, skipped = line_faults(usable, path, separator)
    except pl.exceptions.PolarsError as error:
        return Raw(unreadable(usable, path, separator, error))
    if skipped:
        frame = frame.filter(~pl.col("row").is_in(sorted(skipped)))
    raw = to_events(frame, path, data, header=1)
    return Raw([*findings, *faults, *raw.findings], None if faults else raw.frame, raw.rows)


def _holds_a_split(header: Sequence[str]) -> bool:
    named = {name.lower() for name in header}
    return "split" in named and not named & set(NAMES["item"])


def _no_events(path: Path) -> list[Finding]:
    from diptych_mclrec.split_file import read_split_file

    _, findings = read_split_file(path)
    fix = "give the events as data and this file as split.file"
    found = "holds a split and no events"
    return findings or [Finding("error", "events.columns", path.name, found, fix)]


def read_parquet(path: Path, data: EventDataSection) -> Raw:
    """A Parquet table: one event a row, or one subject a row with a list of items."""
    try:
        scan = pl.scan_parquet(path, row_index_name=ROW, row_index_offset=1)
        header = [name for name in scan.collect_schema().names() if name != ROW]
        lists = LIST_COLUMN in header
        columns = data.columns.model_copy(update={"item": LIST_COLUMN}) if lists else data.columns
        roles, findings = find_columns(scan, header, columns, path, dated=not lists)
        if any(finding.severity == "error" for finding in findings):
            return Raw(findings)
        if lists:
            roles = {role: roles[role] for role in ("subject", "item")}
        lazy = _select(scan, roles)
        if lists:
            lazy = lazy.explode("item").filter(pl.col("item").is_not_null())
        frame = lazy.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        return Raw([broken_parquet(path, error)])
    if lists:
        odd = reserved(frame.select(pl.col("item").cast(pl.String), "row"), path)
        if odd:
            return Raw(odd, None, frame.height)
    raw = to_events(frame, path, data)
    return Raw([*findings, *raw.findings], raw.frame, raw.rows)


def read_sequence_lines(path: Path, data: EventDataSection) -> Raw:
    """A text file with a subject and its items, or one item, on each line."""
    if not path.stat().st_size:
        return Raw([empty(path)])
    try:
        with as_utf8(path, data.encoding) as usable:
            frame, findings = read_lines(usable, path)
    except UnicodeDecodeError as error:
        return Raw([_other_encoding(path, error)])
    except PACK_ERRORS as error:
        return Raw([broken_pack(path, error)])
    if findings:
        return Raw(findings)
    return to_events(frame, path, data)


def broken_parquet(path: Path, error: Exception) -> Finding:
    """The finding for a Parquet file that cannot be read."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    fix = "the file is truncated or no Parquet: write it again"
    return Finding("error", "parquet.broken", path.name, said.replace(str(path), path.name), fix)


def _other_encoding(path: Path, error: UnicodeDecodeError) -> Finding:
    found = f"not {error.encoding}: {error.reason}"
    fix = "name the encoding of the file in data.encoding"
    return Finding("error", "events.encoding", path.name, found, fix)


def separator_of(path: Path) -> str:
    """The most frequent of comma, semicolon, tab and bar in the header.

    Raises:
        PolarsError: The file is empty once unpacked.
    """
    scan = pl.scan_csv(
        path, separator="\x01", quote_char=None, infer_schema_length=0, encoding="utf8-lossy"
    )
    header = scan.collect_schema().names()[0]
    return max(",;\t|", key=header.count)


def find_columns(
    scan: pl.LazyFrame,
    header: Sequence[str],
    columns: ColumnsSection,
    path: Path,
    *,
    dated: bool = True,
) -> tuple[dict[str, str], list[Finding]]:
    """Which column plays which role.

    A table with subject and item but nothing that could be a time is undated: its order is the
    order of time, and a warning says so.

    Args:
        scan: The table.
        header: Its columns.
        columns: Columns named by the user.
        path: The file.
        dated: Whether a time is expected.
    """
    roles, missing = {}, {}
    for role, names in NAMES.items():
        given = getattr(columns, role)
        lower = {name.lower(): name for name in reversed(header)}
        if given is not None:
            found = given if given in header else None
            wanted = [given]
        else:
            found = next((lower[name] for name in names if name in lower), None)
            wanted = list(names)
        if found is not None:
            roles[role] = found
        elif given is not None or role in ("subject", "item") or (role == "time" and dated):
            missing[role] = wanted
    undated = set(missing) == {"time"} and columns.time is None
    if undated and _time_like(scan, header, roles) is None:
        found = f"no time among the columns {', '.join(header)}: the order of the file is taken"
        fix = "set data.columns.time where there is one"
        return roles, [Finding("warning", "events.columns", path.name, found, fix)]
    return roles, _missing(scan, header, roles, missing, path)


def _missing(
    scan: pl.LazyFrame,
    header: Sequence[str],
    roles: Mapping[str, str],
    missing: Mapping[str, Sequence[str]],
    path: Path,
) -> list[Finding]:
    if not missing:
        return []
    lower = {name.lower(): name for name in header if name not in roles.values()}
    near = []
    for role, names in missing.items():
        close = [one for name in names for one in difflib.get_close_matches(name.lower(), lower)]
        if role == "time" and (like := _time_like(scan, header, roles)) is not None:
            near.append(f"{role}: '{like}' looks like one")
        elif close:
            near.append(f"{role}: nearest is '{lower[close[0]]}'")
    found = f"no column for {', '.join(missing)} among {', '.join(header)}"
    found += f" ({'; '.join(near)})" if near else ""
    fix = " and ".join(f"set data.columns.{role}" for role in missing)
    return [Finding("error", "events.columns", path.name, found, fix)]


def _time_like(scan: pl.LazyFrame, header: Sequence[str], roles: Mapping[str, str]) -> str | None:
    free = [name for name in header if name not in roles.values()]
    if not free:
        return None
    head = scan.select(free).head(100).collect()
    return next((name for name in free if looks_like_time(head[name])), None)


def _select(scan: pl.LazyFrame, roles: Mapping[str, str]) -> pl.LazyFrame:
    chosen = [pl.col(column).alias(role) for role, column in roles.items()]
    return scan.select(*chosen, pl.col(ROW).cast(pl.Int64).alias("row"))


def to_events(frame: pl.DataFrame, path: Path, data: EventDataSection, header: int = 0) -> Raw:
    """Columns by role to events of the right types.

    Args:
        frame: Columns subject, item, row, and time and basket where the source has them.
        path: The file, for findings.
        data: How times are written.
        header: Lines above the data that ``row`` counts too.
    """
    if not frame.height:
        return Raw([empty(path)])
    findings = [
        *_floats(frame, path, header),
        *_null_ids(frame, path, header),
    ]
    times, said = _times(frame, path, data, header)
    findings += said
    if any(finding.severity == "error" for finding in findings):
        return Raw(findings, None, frame.height)
    basket = frame["basket"] if "basket" in frame.columns else None
    if basket is None or basket.dtype.is_integer():
        keys = pl.lit(None, pl.Int64) if basket is None else pl.col("basket").cast(pl.Int64)
    else:
        keys = pl.col("basket").cast(pl.String).rank("dense").cast(pl.Int64)
    events = frame.select(
        _as_id("subject", frame), _as_id("item", frame), times, keys.alias("basket"), "row"
    )
    return Raw(findings, events, frame.height)


def _as_id(role: str, frame: pl.DataFrame) -> pl.Expr:
    column = pl.col(role)
    return (column.cast(pl.Int64) if frame[role].dtype.is_float() else column).cast(pl.String)


def _floats(frame: pl.DataFrame, path: Path, header: int) -> list[Finding]:
    findings = []
    for role in ("subject", "item"):
        if not frame[role].dtype.is_float():
            continue
        value = pl.col(role)
        wrong = frame.filter(~value.is_finite() | (value != value.round()))
        if wrong.height:
            texts = ", ".join(str(one) for one in wrong[role].head(MOST))
            found = f"{role} ids are floating numbers, and {wrong.height} are no integer: {texts}"
            where = row_words(wrong["row"].to_list(), path.name, header)
            fix = "cast the column to integer or text"
            findings.append(Finding("error", "events.item_type", where, found, fix))
    return findings


def _null_ids(frame: pl.DataFrame, path: Path, header: int) -> list[Finding]:
    empty_cell = {
        role: pl.col(role).is_null()
        | ((pl.col(role) == "") if frame[role].dtype == pl.String else pl.lit(False))
        for role in ("subject", "item")
    }
    wrong = frame.filter(pl.any_horizontal(*empty_cell.values()))
    if not wrong.height:
        return []
    counts = [int(wrong.select(expression.sum()).item()) for expression in empty_cell.values()]
    found = f"{counts[0]} empty subject and {counts[1]} empty item ids in {wrong.height} rows"
    where = row_words(wrong["row"].to_list(), path.name, header)
    return [Finding("error", "events.null_id", where, found, "remove or fill the rows")]


def _times(
    frame: pl.DataFrame, path: Path, data: EventDataSection, header: int
) -> tuple[pl.Series, list[Finding]]:
    if "time" not in frame.columns:
        nothing = pl.repeat(None, frame.height, dtype=pl.Datetime("us"), eager=True)
        return nothing.alias("time"), []
    raw = frame["time"]
    parsed = parse_times(raw, form=data.time_format, unit=data.time_unit)
    findings = []
    wrong = frame.filter(parsed.is_bad | raw.is_null())
    if wrong.height:
        texts = ", ".join(repr(one) if one is not None else "empty" for one in wrong["time"][:MOST])
        found = f"{wrong.height} of {frame.height} cells are no time: {texts}"
        where = row_words(wrong["row"].to_list(), path.name, header)
        fix = "write ISO 8601 (2024-05-31T08:00:00), or say the form in data.time_format"
        findings.append(Finding("error", "events.bad_time", where, found, fix))
    if parsed.mixed:
        found = "some times have a zone and some have none"
        fix = "write all times in UTC, or all with their zone"
        findings.append(Finding("error", "events.bad_time", path.name, found, fix))
    if parsed.unit not in ("", "s"):
        found = f"numeric times look like {parsed.unit}, and were read so"
        fix = "set data.time_unit to s, ms, us or ns"
        findings.append(Finding("warning", "events.time_unit", path.name, found, fix))
    return parsed.times.alias("time"), findings
