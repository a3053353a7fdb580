"""Splits over rows of the index, and the refusal of leakage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from diptych.findings import Finding, Findings

if TYPE_CHECKING:
    import polars as pl

Level = Literal["subject", "session", "recording", "item", "time"]
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """Rows of ``index.parquet`` for training, validation and test.

    Args:
        train: Rows that training may index.
        validation: Rows that choose the best epoch; may be empty.
        test: Rows that are scored; empty for a final model.
        disjoint_by: The level at which no value may stand in two parts. "session" and
            "recording" mean the pair of subject and that column; "item" the row itself (or the
            index's ``item`` column); "time" permits a row in all parts.
    """

    train: Rows
    validation: Rows = ()
    test: Rows = ()
    disjoint_by: Level = "subject"

    @property
    def parts(self) -> dict[str, Rows]:
        """The rows by the name of their part."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def digest(self) -> str:
        """Sixteen hex digits that name this split."""
        text = repr((self.disjoint_by, self.train, self.validation, self.test))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_rows(values: Iterable[int]) -> Rows:
    """Row numbers of any integer kind as a plain tuple."""
    return tuple(int(value) for value in values)


def level_keys(index: pl.DataFrame, level: Level) -> list[str]:
    """What each row of the index is called at a level, one string a row.

    Args:
        index: Needs the column subject; session and run where the level asks for them. Rows that
            overlap (windows of one trial) name their common origin in a column ``origin``.
        level: See :class:`Split`.
    """
    import polars as pl

    wanted: dict[str, tuple[str, ...]] = {
        "subject": ("subject",),
        "session": ("subject", "session"),
        "recording": ("subject", "session", "run", "source"),
        "item": ("origin",) if "origin" in index.columns else ("item",),
    }
    columns = [column for column in wanted[level] if column in index.columns]
    joined = pl.concat_str(
        [pl.col(c).cast(pl.String) for c in columns], separator="/", ignore_nulls=True
    )
    keys: list[str] = index.select(joined.alias("key"))["key"].to_list()
    return keys


def overlaps(split: Split, index: pl.DataFrame) -> dict[tuple[str, str], list[str]]:
    """What stands in two parts of a split at its level.

    Returns:
        Pairs of part names -> names that both hold; empty for a sound split.
    """
    if split.disjoint_by == "time":
        return {}
    keys = level_keys(index, split.disjoint_by)
    held = {part: {keys[row] for row in rows} for part, rows in split.parts.items()}
    return {
        (a, b): sorted(held[a] & held[b]) for a, b in combinations(held, 2) if held[a] & held[b]
    }


def seen_before(split: Split, index: pl.DataFrame, trained_rows: Iterable[int]) -> list[str]:
    """What the test part shares, at the split's level, with rows that were trained on earlier.

    Args:
        split: The split of the fit that is to be scored.
        index: The index of both.
        trained_rows: Rows of the index that an earlier stage or an initial model has seen.
    """
    if split.disjoint_by == "time":
        return []
    keys = level_keys(index, split.disjoint_by)
    return sorted({keys[row] for row in trained_rows} & {keys[row] for row in split.test})


def leakage(
    splits: Mapping[str, Split],
    index: pl.DataFrame,
    trained_rows: Mapping[str, Sequence[int]] | None = None,
) -> Findings:
    """Findings for every split whose parts are not disjoint.

    Args:
        splits: Splits by the name of their fit.
        index: The index that their rows point to.
        trained_rows: For fits that start from other weights, the rows those were trained on.

    Returns:
        One ``split.overlap`` error for each pair of parts that share something.
    """
    found: list[Finding] = []
    fix = (
        "give every subject to one part only; to go on all the same (the report will say so in "
        "red) use --set split.allow_leakage=true"
    )
    for name, split in splits.items():
        for (a, b), shared in overlaps(split, index).items():
            text = f"{len(shared)} {split.disjoint_by}(s) in both {a} and {b}: {_some(shared)}"
            found.append(Finding("error", "split.overlap", f"fit {name}", text, fix))
        seen = seen_before(split, index, (trained_rows or {}).get(name, ()))
        if seen:
            text = f"the weights it starts from have seen {_some(seen)} of its test part"
            found.append(Finding("error", "split.overlap", f"fit {name}", text, fix))
    return Findings(tuple(found))


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
