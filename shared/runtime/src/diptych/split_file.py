"""The user's own split: a CSV with subject, perhaps finer columns, and split or fold."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diptych.errors import UsageError
from diptych.findings import Finding

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitFile:
    """A user's split.

    Args:
        name: Its path as the user gave it; what findings call it.
        keys: The columns by which it names rows, subject among them.
        column: "split" or "fold".
        part: Values of the keys -> part or fold.
        findings: Rows that contradict each other.
    """

    name: str
    keys: tuple[str, ...]
    column: str
    part: dict[tuple[str, ...], str]
    findings: tuple[Finding, ...]

    def part_of(self, row: Mapping[str, object]) -> str | None:
        """Part or fold of what has these values of the keys; None where the file has no line."""
        return self.part.get(tuple(plain(row[key]) for key in self.keys))


def read_split_file(path: Path, keys: Sequence[str]) -> SplitFile:
    """Read ``split.file``.

    Args:
        path: A CSV with a header line.
        keys: Columns by which it may name what it divides; subject must be there.

    Returns:
        The split, with a ``split.overlap`` error for everything that stands in two parts.

    Raises:
        UsageError: The file cannot be read or lacks a column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"split.file {path}: cannot be read: {error}") from error
    columns = set(rows[0]) if rows else set()
    column = next((name for name in ("split", "fold") if name in columns), None)
    if column is None or "subject" not in columns:
        raise UsageError(
            f"split.file {path}: columns subject and split ({', '.join(PARTS)}) or fold are "
            f"needed; {', '.join(key for key in keys if key != 'subject')} may stand beside them"
        )
    keys = tuple(key for key in keys if key in columns)
    part: dict[tuple[str, ...], str] = {}
    line_of: dict[tuple[str, ...], int] = {}
    findings = []
    for line, row in enumerate(rows, start=2):
        value = (row[column] or "").strip()
        if column == "split" and value not in PARTS:
            raise UsageError(
                f"split.file {path}, line {line}: split is {value!r}; one of {', '.join(PARTS)}"
            )
        key = tuple(plain(row[name] or "") for name in keys)
        if part.setdefault(key, value) != value:
            named = ", ".join(f"{name} {one}" for name, one in zip(keys, key, strict=True))
            findings.append(
                Finding(
                    "error",
                    "split.overlap",
                    f"{path}, {named}",
                    f"{part[key]} in line {line_of[key]}, {value} in line {line}",
                    "keep one of the two lines",
                )
            )
        line_of.setdefault(key, line)
    return SplitFile(str(path), keys, column, part, tuple(findings))


def plain(text: object) -> str:
    """A name or number without blanks, numbers without leading zeros: "04" is "4"."""
    tidy = str(text).strip()
    return tidy.lstrip("0") or "0" if tidy.isdigit() else tidy


def join_split_file(rows: pl.DataFrame, split: SplitFile) -> pl.DataFrame:
    """Rows with the user's part or fold.

    Args:
        rows: The columns that the file names, in the user's own names.
        split: From :func:`read_split_file`.

    Returns:
        The rows with a column ``split`` or ``fold``, null where the file does not name them.
    """
    values = [split.part_of(row) for row in rows.select(split.keys).iter_rows(named=True)]
    return rows.with_columns(pl.Series(split.column, values, dtype=pl.String))
