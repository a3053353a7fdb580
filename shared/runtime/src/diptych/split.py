"""Splits over rows of the index, and the refusal of leakage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
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
    parts: tuple[str, ...] = field(default=("train", "validation", "test"), init=False, repr=False)

    def rows(self, part: str) -> Rows:
        """The rows of a part by its name."""
        chosen: Rows = getattr(self, part)
        return chosen

    def digest(self) -> str:
        """Sixteen hex digits that name this split."""
        text = repr((self.disjoint_by, self.train, self.validation, self.test))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_rows(values: Iterable[int]) -> Rows:
    """Row numbers of any integer kind as a plain tuple."""
    return tuple(int(value) for value in values)
