"""Text files: delimited tables and lines of item ids, with every malformed row named."""

from __future__ import annotations

import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

import polars as pl

from diptych.findings import Finding

MOST = 5  # rows that a finding names
PACK_ERRORS = (OSError, EOFError, zlib.error)
RECBOLE_TYPES = ("token", "float", "token_seq", "float_seq")


def row_words(rows: Sequence[int], name: str, header: int = 0) -> str:
    """Where something is: file, the first rows, and data rows where a header stands above."""
    shown = list(rows[:MOST])
    word = "row" if len(shown) == 1 else "rows"
    more = ", ..." if len(rows) > MOST else ""
    text = f"{name}, {word} {', '.join(map(str, shown))}{more}"
    if not header:
        return text
    data = ", ".join(str(row - header) for row in shown)
    return f"{text} of the file (data {word} {data}{more})"


@contextmanager
def as_utf8(path: Path, encoding: str) -> Iterator[Path]:
    """A file that polars can scan: itself, or a decoded copy that lives as long as the context.

    Raises:
        UnicodeDecodeError: The file is not in that encoding.
    """
    if encoding in ("utf-8", "ascii", "utf-8-sig"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name.removesuffix(".gz")
        with _opened(path) as source, copy.open("w", encoding="utf-8", newline="") as target:
            text = io.TextIOWrapper(source, encoding=encoding, newline="")
            while piece := text.read(1 << 24):
                target.write(piece)
        yield copy


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def not_utf8(path: Path) -> Finding:
    """The finding for a file that is not UTF-8, with the first wrong byte and its row."""
    where, found = path.name, "not UTF-8"
    if path.suffix != ".zst":
        try:
            where, found = _first_wrong_byte(path)
        except PACK_ERRORS as error:
            return broken_pack(path, error)
    fix = "convert the file to UTF-8, or name its encoding in data.encoding (latin-1, cp1252)"
    return Finding("error", "events.encoding", where, found, fix)


def _first_wrong_byte(path: Path) -> tuple[str, str]:
    offset = 0
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"{path.name}, row {number} of the file"
                at = offset + error.start
                return where, f"byte {at} (0x{line[error.start]:02x}) is not UTF-8"
            offset += len(line)
    return path.name, "not UTF-8"


def broken_pack(path: Path, error: Exception) -> Finding:
    """The finding for a file that cannot be read or unpacked."""
    found = str(error).replace(str(path), path.name) or type(error).__name__
    return Finding("error", "events.unreadable", path.name, found, "write the file again")


def unreadable(path: Path, shown: Path, separator: str, error: Exception) -> list[Finding]:
    """Findings for a text file that polars refuses.

    Args:
        path: The file that was scanned.
        shown: The user's own file.
        separator: Between fields.
        error: What polars said.
    """
    said = str(error)
    if isinstance(error, pl.exceptions.NoDataError):
        return [empty(shown)]
    if "utf" in said.lower():
        return [not_utf8(shown)]
    try:
        ragged, _ = line_faults(path, shown, separator)
    except pl.exceptions.PolarsError:  # polars stopped at the field, here at the byte
        return [not_utf8(shown)]
    return ragged or [broken_pack(shown, error)]


def empty(path: Path) -> Finding:
    """The finding for a file without a single event."""
    found = "zero bytes" if path.is_file() and not path.stat().st_size else "no data rows"
    fix = "give a table with at least one event"
    return Finding("error", "events.empty", path.name, found, fix)


def line_faults(path: Path, shown: Path, separator: str) -> tuple[list[Finding], set[int]]:
    """Lines with a wrong number of fields, and lines to leave out of further findings.

    polars fills short rows with nulls without a word, so the separators are counted.

    Args:
        path: The file that is scanned; UTF-8.
        shown: The user's own file.
        separator: Between fields; a separator in quotes is not one.

    Returns:
        At most one finding, and the numbers of blank and wrong lines, from 1.
    """
    line = pl.col("line")
    outside = line.str.replace_all('"[^"]*"', "") if separator != "\t" else line
    odd = (line.str.count_matches('"', literal=True) % 2 == 1) & (separator != "\t")
    lines = pl.scan_lines(path, row_index_name="row", row_index_offset=1).select(
        pl.col("row").cast(pl.Int64),
        fields=(outside.str.count_matches(separator, literal=True) + 1).cast(pl.Int64),
        blank=line.str.strip_chars() == "",
        quoted=odd | (odd.cast(pl.Int64).cum_sum() % 2 == 1),  # a record over several lines
    )
    table = lines.collect()
    if not table.height:
        return [], set()
    wanted = int(table["fields"][0])
    blank = table.filter("blank")["row"].to_list()
    wrong = table.filter((pl.col("fields") != wanted) & ~pl.col("blank") & ~pl.col("quoted"))
    if not wrong.height:
        return [], set(blank)
    rows, fields = wrong["row"].to_list(), wrong["fields"].to_list()
    said = "; ".join(
        f"line {row} has {count} of {wanted} fields"
        for row, count in list(zip(rows, fields, strict=True))[:MOST]
    )
    found = f"{said} ({len(rows)} such lines)" if len(rows) > 1 else said
    fix = "put fields that contain the separator in quotes, or remove the rows"
    finding = Finding("error", "events.ragged", row_words(rows, shown.name, 1), found, fix)
    return [finding], {*blank, *rows}


def recbole_columns(header: Sequence[str], path: Path) -> tuple[dict[str, str], list[Finding]]:
    """Roles and columns of a RecBole table.

    Args:
        header: Its header cells, ``name:type``.
        path: The file.
    """
    untyped = [cell for cell in header if cell.rpartition(":")[2] not in RECBOLE_TYPES]
    if untyped or any(":" not in cell for cell in header):
        found = f"header cells without a type: {', '.join(untyped or header)}"
        fix = "write them as name:type with type token, float, token_seq or float_seq"
        return {}, [Finding("error", "recbole.header", f"{path.name}, row 1", found, fix)]
    wanted = {"subject": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    roles = {role: cell for role, cell in wanted.items() if cell in header}
    missing = [wanted[role] for role in ("subject", "item") if role not in roles]
    if not missing:
        return roles, []
    found = f"no column {' and '.join(missing)} among {', '.join(header)}"
    return {}, [Finding("error", "events.columns", path.name, found, "add these columns")]


def line_form(path: Path, head: int = 1000) -> Literal["pairs", "sequences"]:
    """Whether lines are «user item» or «user item item ...»; judged by the first lines."""
    counts = (
        pl.scan_lines(path, n_rows=head)
        .select(pl.col("line").str.count_matches(r"\S+"))
        .collect()["line"]
    )
    counts = counts.filter(counts > 0)
    return "pairs" if len(counts) and bool((counts == 2).all()) else "sequences"


def read_lines(path: Path, shown: Path) -> tuple[pl.DataFrame, list[Finding]]:
    """Lines of a subject and its items to events in the order of the file.

    Args:
        path: The file; UTF-8.
        shown: The user's own file.

    Returns:
        Columns subject, item, row; and findings.
    """
    scan = pl.scan_lines(path, row_index_name="row", row_index_offset=1)
    tokens = pl.col("line").str.extract_all(r"\S+")
    try:
        table = (
            scan.with_columns(tokens=tokens)
            .filter(pl.col("tokens").list.len() > 1)
            .select(
                subject=pl.col("tokens").list.first(),
                item=pl.col("tokens").list.slice(1),
                row=pl.col("row").cast(pl.Int64),
            )
            .explode("item")
            .collect(engine="streaming")
        )
    except pl.exceptions.PolarsError as error:
        return pl.DataFrame(), unreadable(path, shown, " ", error)
    return table, reserved(table, shown)


def reserved(table: pl.DataFrame, path: Path) -> list[Finding]:
    """Id 0 and odd tokens in a file of numbers, where 0 would silently be padding.

    Args:
        table: Columns item (text) and row.
        path: The file.
    """
    if not table.height:
        return []
    number = table["item"].str.contains(r"^\d+$")
    if int(number.sum()) <= table.height / 2:
        return []
    wrong = table.filter(~number | table["item"].str.contains("^0+$"))
    if not wrong.height:
        return []
    said = "; ".join(
        f"id 0 on line {row}" if item.strip("0") == "" else f"token '{item}' on line {row}"
        for item, row in wrong.select("item", "row").head(MOST).rows()
    )
    found = f"{said} ({wrong.height} in all)" if wrong.height > MOST else said
    rows = wrong["row"].unique(maintain_order=True).to_list()
    fix = "shift ids by one so that 0 is free for padding, or give the events as csv"
    return [Finding("error", "events.reserved", row_words(rows, path.name), found, fix)]
