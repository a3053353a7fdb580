"""Splits that come with the data: a CSV of the user's own, or the one of a MEDS folder."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from diptych.findings import Finding
from diptych_mclrec.read_tables import NAMES
from diptych_mclrec.read_text import unreadable

WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "tuning": "validation",
    "test": "test",
    "held_out": "test",
}


def read_split_file(path: Path) -> tuple[dict[str, str], list[Finding]]:
    """A CSV with a subject and a split column.

    Returns:
        Subject -> "train", "validation" or "test"; and findings.
    """
    try:
        table = pl.read_csv(path, infer_schema_length=0)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        return {}, [Finding("error", "split.file", path.name, found, "give split.file a CSV")]
    except pl.exceptions.PolarsError as error:
        return {}, unreadable(path, path, ",", error)
    subject = next((name for name in table.columns if name.lower() in NAMES["subject"]), None)
    if subject is None or "split" not in table.columns:
        found = f"needs the columns subject and split, has {', '.join(table.columns)}"
        return {}, [Finding("error", "split.file", path.name, found, "rename the columns")]
    return parts_of(table.select(pl.col(subject).alias("subject_id"), "split"), path)


def parts_of(table: pl.DataFrame, path: Path) -> tuple[dict[str, str], list[Finding]]:
    """Subject -> part from a table with the columns subject_id and split.

    Args:
        table: Text columns.
        path: Where it comes from, for findings.
    """
    findings = []
    table = table.drop_nulls().unique(maintain_order=True)
    odd = [word for word in table["split"].unique(maintain_order=True) if word not in WORDS]
    if odd:
        found = f"unknown parts: {', '.join(map(str, odd[:5]))}"
        fix = f"use {', '.join(WORDS)}"
        findings.append(Finding("error", "split.file", path.name, found, fix))
    known = table.with_columns(
        pl.col("split").replace_strict(WORDS, default=None, return_dtype=pl.String)
    ).drop_nulls()
    known = known.unique(maintain_order=True)
    twice = known.filter(pl.col("subject_id").is_duplicated())
    if twice.height:
        name = twice["subject_id"][0]
        parts = " and ".join(twice.filter(pl.col("subject_id") == name)["split"])
        total = twice["subject_id"].n_unique()
        found = f"{total} subjects are in two parts, such as {name} in {parts}"
        fix = "give every subject to one part only"
        findings.append(Finding("error", "split.leak", path.name, found, fix))
    return dict(known.rows()), findings
