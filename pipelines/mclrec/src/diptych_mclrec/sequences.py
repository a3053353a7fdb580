"""What the pipeline's rooms hand to each other: an event table, ragged sequences, a catalogue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Int
from numpy.typing import NDArray

Kind = Literal["interactions", "clinical"]
EVENT_SCHEMA = pl.Schema(
    {
        "subject": pl.String(),
        "item": pl.String(),
        "time": pl.Datetime("us"),
        "basket": pl.Int64(),
        "row": pl.Int64(),
        "source": pl.Int32(),
    }
)
UNKNOWN = 0  # the id of an item that the catalogue does not hold; padding is never stored


@dataclass(frozen=True)
class SourceTable:
    """One source file of an event table.

    Args:
        path: The file; stays in memory, only ``sha256`` is ever written.
        sha256: Of its bytes, 64 hex digits.
        rows: Data rows in it, events or not.
    """

    path: Path
    sha256: str
    rows: int


@dataclass(frozen=True)
class EventTable:
    """Events as their source gives them: unsorted, unfiltered, with the source's own names.

    Args:
        frame: Columns subject, item (String), time (UTC without zone, null in undated sources),
            basket (Int64 key, comparable within a subject; null where the source has none), row
            (line of a text file or row of a Parquet file, from 1), source (position in
            ``sources``).
        kind: "clinical" for omop, meds and synthea, else "interactions".
        sources: The files behind it.
        descriptions: Item -> name in words, where the source has them.
        splits: Subject -> "train", "validation" or "test", where the source comes with a split.
    """

    frame: pl.DataFrame
    kind: Kind
    sources: tuple[SourceTable, ...] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Events of many subjects, one after the other, without padding.

    Args:
        subjects: Name of each subject, (S,).
        offsets: Events of subject s are ``offsets[s]:offsets[s + 1]``, int64 (S + 1,).
        items: Ids 1..I of a catalogue in the order of time, int32 (E,); 0 for an item that the
            catalogue does not hold.
        times: Microseconds, int64 (E,); None for undated events.
        baskets: Number of each event's basket within its subject, int32 (E,): 0, ..., 0, 1, ...
            without gaps. None: every event is a step of its own.

    Raises:
        ValueError: The arrays do not fit together.

    Example:
        >>> Sequences.from_lists([[3, 1], [2]]).offsets.tolist()
        [0, 2, 3]
    """

    subjects: NDArray[np.str_]
    offsets: Int[np.ndarray, " subjects_and_one"]
    items: Int[np.ndarray, " events"]
    times: Int[np.ndarray, " events"] | None = None
    baskets: Int[np.ndarray, " events"] | None = None

    def __post_init__(self) -> None:
        events = len(self.items)
        if (
            len(self.offsets) != len(self.subjects) + 1
            or self.offsets[0] != 0
            or self.offsets[-1] != events
            or bool((np.diff(self.offsets) < 0).any())
        ):
            raise ValueError(
                f"offsets must rise from 0 to the {events} events, one entry more than the "
                f"{len(self.subjects)} subjects"
            )
        for name in ("times", "baskets"):
            array = getattr(self, name)
            if array is not None and len(array) != events:
                raise ValueError(f"{name} has {len(array)} entries for {events} events")

    @classmethod
    def from_lists(
        cls, lists: Iterable[Sequence[int]], subjects: Sequence[str] | None = None
    ) -> Sequences:
        """Sequences from one list of item ids a subject.

        Args:
            lists: Item ids in the order of time.
            subjects: Names; None counts from "0".
        """
        arrays = [np.asarray(one, dtype=np.int32) for one in lists]
        names = [str(row) for row in range(len(arrays))] if subjects is None else list(subjects)
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(one) for one in arrays], out=offsets[1:])
        items = np.concatenate([*arrays, np.empty(0, np.int32)])
        return cls(np.asarray(names, dtype=np.str_), offsets, items)

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, subject: int) -> Int[np.ndarray, " events_of_subject"]:
        return self.items[self.offsets[subject] : self.offsets[subject + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " subjects"]:
        """Events of each subject."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> Int[np.ndarray, " events"]:
        """The position of each event's subject."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def steps(self) -> Int[np.ndarray, " events"]:
        """Number of each event's step within its subject: its basket, else its own position."""
        if self.baskets is not None:
            return np.asarray(self.baskets, dtype=np.int64)
        place = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)
        return np.asarray(place, dtype=np.int64)

    @property
    def step_counts(self) -> Int[np.ndarray, " subjects"]:
        """Steps of each subject: baskets, else events."""
        if self.baskets is None:
            return self.lengths
        counts = np.zeros(len(self), np.int64)
        held = self.lengths > 0
        counts[held] = self.baskets[self.offsets[1:][held] - 1].astype(np.int64) + 1
        return counts

    def keep(self, events: Bool[np.ndarray, " events"]) -> Sequences:
        """The same subjects with some of their events; baskets are numbered anew.

        Args:
            events: Which events stay.
        """
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.bincount(self.rows[events], minlength=len(self)), out=offsets[1:])
        times = None if self.times is None else self.times[events]
        shorter = Sequences(self.subjects, offsets, self.items[events], times)
        if self.baskets is None:
            return shorter
        return Sequences(
            self.subjects,
            offsets,
            shorter.items,
            times,
            number_runs(shorter.rows, self.baskets[events]),
        )

    def select(self, subjects: Int[np.ndarray, " chosen"]) -> Sequences:
        """Some of the subjects, in the given order, with all their events.

        Args:
            subjects: Positions of subjects.
        """
        chosen = np.asarray(subjects, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        return Sequences(
            self.subjects[chosen],
            offsets,
            self.items[events],
            None if self.times is None else self.times[events],
            None if self.baskets is None else self.baskets[events],
        )

    def with_items(self, items: Int[np.ndarray, " events"]) -> Sequences:
        """The same events under other item ids."""
        return Sequences(
            self.subjects, self.offsets, items.astype(np.int32), self.times, self.baskets
        )

    def equals(self, other: Sequences) -> bool:
        """Whether two hold the same subjects and events."""

        def same(a: NDArray[np.generic] | None, b: NDArray[np.generic] | None) -> bool:
            return a is b if a is None or b is None else np.array_equal(a, b)

        names = ("subjects", "offsets", "items", "times", "baskets")
        return all(same(getattr(self, name), getattr(other, name)) for name in names)


def joined(first: Sequences, second: Sequences) -> Sequences:
    """The subjects of one after those of the other.

    Args:
        first: Sequences.
        second: Others of the same form.
    """

    def together(
        a: NDArray[np.integer] | None, b: NDArray[np.integer] | None
    ) -> NDArray[np.integer] | None:
        return None if a is None or b is None else np.concatenate([a, b])

    return Sequences(
        np.concatenate([first.subjects, second.subjects]),
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        np.concatenate([first.items, second.items]),
        together(first.times, second.times),
        together(first.baskets, second.baskets),
    )


def number_runs(
    rows: Int[np.ndarray, " events"], keys: Int[np.ndarray, " events"]
) -> Int[np.ndarray, " events"]:
    """Number the runs of equal keys within each row from 0.

    Args:
        rows: Position of each event's subject, not decreasing.
        keys: Whatever is equal within a run and differs between neighbours.

    Returns:
        Run of each event, int32.
    """
    if not len(rows):
        return np.zeros(0, np.int32)
    new_row = np.r_[True, rows[1:] != rows[:-1]]
    run = np.cumsum(new_row | np.r_[True, keys[1:] != keys[:-1]])
    number = run - run[new_row][np.cumsum(new_row) - 1]
    return np.asarray(number, dtype=np.int32)


@dataclass(frozen=True)
class Catalogue:
    """Which item has which id.

    Args:
        names: The source's own names; the item of id i is ``names[i - 1]``.
        counts: Events of each item where the catalogue was fitted, (I,).
        descriptions: Item -> name in words, for some or all items.

    Example:
        >>> Catalogue(("tea", "rice"), (3, 1)).encode(["rice", "salt"]).tolist()
        [2, 0]
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    descriptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of items, I."""
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """Sixteen hex digits of names and their order: equal hashes mean equal ids."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:16]

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        return {name: row + 1 for row, name in enumerate(self.names)}

    def encode(self, items: Iterable[str]) -> Int[np.ndarray, " items"]:
        """Ids of items by name, int32; 0 for an item that is not in the catalogue."""
        known = self._ids
        return np.fromiter((known.get(name, UNKNOWN) for name in items), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Names of items by id.

        Raises:
            ValueError: An id is not 1..I.
        """
        wanted = [int(one) for one in ids]
        wrong = [one for one in wanted if not 1 <= one <= self.size]
        if wrong:
            raise ValueError(f"item ids {wrong[:5]} are not in 1..{self.size}")
        return [self.names[one - 1] for one in wanted]

    def to_table(self) -> pl.DataFrame:
        """The catalogue as a table with one row an item, in the order of ids."""
        words = [self.descriptions.get(name) for name in self.names]
        return pl.DataFrame(
            {"item": list(self.names), "count": list(self.counts), "description": words},
            schema={"item": pl.String, "count": pl.Int64, "description": pl.String},
        )

    @classmethod
    def from_table(cls, table: pl.DataFrame) -> Catalogue:
        """The catalogue that :meth:`to_table` wrote."""
        described = table.filter(pl.col("description").is_not_null())
        return cls(
            tuple(table["item"].to_list()),
            tuple(table["count"].to_list()),
            dict(described.select("item", "description").rows()),
        )
