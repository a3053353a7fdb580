"""The user's own split: a CSV with subject and perhaps session, run, trial, and split or fold."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diptych.errors import UsageError
from diptych.findings import Finding

KEYS = ("subject", "session", "run", "trial")
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitFile:
    """A user's split.

    Args:
        name: Its path as the user gave it; what findings call it.
        keys: Which of subject, session, run, trial it names.
        column: "split" or "fold".
        part: Values of the keys -> part or fold.
        findings: Rows that contradict each other.
    """

    name: str
    keys: tuple[str, ...]
    column: str
    part: dict[tuple[str, ...], str]
    findings: tuple[Finding, ...]


def read_split_file(path: Path) -> SplitFile:
    """Read ``split.file``.

    Args:
        path: A CSV with a header line; ``trial`` counts from 0 within subject, session and run.

    Returns:
        The split, with a ``split.overlap`` error for every trial in two parts.

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
            "needed; session, run and trial may stand beside them"
        )
    keys = tuple(key for key in KEYS if key in columns)
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
        rows: Columns subject (own name), session, run, trial.
        split: From :func:`read_split_file`.

    Returns:
        The rows with a column ``split`` or ``fold``, null where the file does not name them.
    """
    keys = zip(*(map(plain, rows[name].to_list()) for name in split.keys), strict=True)
    values = [split.part.get(key) for key in keys]
    return rows.with_columns(pl.Series(split.column, values, dtype=pl.String))
