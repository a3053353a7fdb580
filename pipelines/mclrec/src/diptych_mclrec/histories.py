"""Histories in the forms that users have them, in the ids of a model's catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int
from numpy.typing import NDArray

from diptych.errors import DataError
from diptych.findings import Findings
from diptych_mclrec.config import EventDataSection, MCLRecConfig
from diptych_mclrec.events import Ordered, order_events
from diptych_mclrec.read import Reading, read_source
from diptych_mclrec.sequences import Catalogue, EventTable, Sequences, number_runs

Given = Any  # lists of names, lists of baskets of names, a table, a file, an EventTable, Sequences
TABLE = "events.parquet"
NAME = (str, int, np.integer)


@dataclass(frozen=True, eq=False)
class Histories:
    """Histories that a model can read.

    Args:
        sequences: Ids 1..I of the model's catalogue; a history may be empty.
        unknown: Events of each history that were left out, since the catalogue does not hold
            their item.
    """

    sequences: Sequences
    unknown: Int[np.ndarray, " S"]

    def __len__(self) -> int:
        return len(self.sequences)


def read_histories(
    given: Given, catalogue: Catalogue, config: MCLRecConfig, *, baskets: bool
) -> Histories:
    """Histories from lists, a table or a file.

    Args:
        given: One list of item names a history, oldest first, or of baskets, each a list of
            names; or a frame, a file or an `EventTable` with one event a row; or `Sequences`
            of the catalogue's ids.
        catalogue: The model's.
        config: How tables are read and ordered.
        baskets: Whether the model takes baskets.

    Returns:
        The histories: lists in their order, subjects of tables in the order in which they occur.

    Raises:
        DataError: A table has errors; the findings say which.
        ValueError: A list holds something else than names.
    """
    if isinstance(given, Sequences):
        return _known_only(given, catalogue.size)
    if isinstance(given, pl.DataFrame | EventTable | Path | str):
        table = events_of(given, config.data)
        ordered = ordered_events(table, config, baskets=baskets)
        return encoded(ordered, catalogue)
    return _from_lists(list(given), catalogue, baskets)


def encoded(ordered: Ordered, catalogue: Catalogue) -> Histories:
    """Ordered events in the ids of a model's catalogue.

    Args:
        ordered: From :func:`diptych_mclrec.events.order_events`.
        catalogue: The model's.
    """
    ids = np.append(np.int32(0), catalogue.encode(ordered.catalogue.names))
    return _known_only(ordered.sequences.with_items(ids[ordered.sequences.items]), catalogue.size)


def ordered_events(table: EventTable, config: MCLRecConfig, *, baskets: bool) -> Ordered:
    """Events in the order that the configuration asks for.

    Args:
        table: The events.
        config: The sections data and split count.
        baskets: Whether events of one time or basket key are joined.
    """
    return order_events(
        table,
        ties="random" if config.data.ties == "random" else "source",
        baskets=baskets,
        drop_duplicates=config.data.drop_duplicates,
        seed=config.split.seed,
    )


def events_of(given: pl.DataFrame | EventTable | Path | str, data: EventDataSection) -> EventTable:
    """The events of a frame, a file or a folder.

    Args:
        given: A frame has one event a row; its columns are found as those of a file are.
        data: How it is read.

    Raises:
        DataError: It has errors; the findings say which.
    """
    if isinstance(given, EventTable):
        return given
    if isinstance(given, pl.DataFrame):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / TABLE
            given.write_parquet(path)
            reading = read_source(path, data.model_copy(update={"format": "auto"}))
    else:
        reading = read_source(Path(given), data)
    return table_of(reading)


def table_of(reading: Reading) -> EventTable:
    """The events of a reading.

    Raises:
        DataError: It has errors.
    """
    if reading.table is None:
        findings = Findings(reading.findings)
        raise DataError("\n".join(one.line() for one in findings.errors), findings)
    return reading.table


def list_table(lists: Iterable[Sequence[Any]]) -> pl.DataFrame:
    """Lists of names, or of baskets of names, as a table that `train` reads.

    Args:
        lists: One a subject, oldest first.

    Returns:
        Columns subject ("0", "1", ...), item and basket (the step), a row an event.
    """
    names, rows, steps = _flattened(list(lists))
    return pl.DataFrame(
        {"subject": rows, "item": names, "basket": steps},
        schema={"subject": pl.Int64, "item": pl.String, "basket": pl.Int64},
    ).with_columns(pl.col("subject").cast(pl.String))


def _from_lists(lists: list[Sequence[Any]], catalogue: Catalogue, baskets: bool) -> Histories:
    names, rows, steps = _flattened(lists)
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(lists)), out=offsets[1:])
    sequences = Sequences(
        np.asarray([str(row) for row in range(len(lists))], dtype=np.str_),
        offsets,
        catalogue.encode(names),
        None,
        number_runs(rows, np.asarray(steps)) if baskets else None,
    )
    return _known_only(sequences, catalogue.size)


def _flattened(lists: list[Sequence[Any]]) -> tuple[list[str], NDArray[np.int64], list[int]]:
    """Name, position of the list, and step of every event; a basket holds an item once."""
    names: list[str] = []
    rows: list[int] = []
    steps: list[int] = []
    for row, history in enumerate(lists):
        if isinstance(history, str) or not isinstance(history, Iterable):
            raise ValueError(
                f"history {row} is {history!r}: give one list of item names a history, also "
                "where there is only one"
            )
        for step, entry in enumerate(history):
            basket = [entry] if isinstance(entry, NAME) else entry
            if not isinstance(basket, Iterable) or not all(isinstance(i, NAME) for i in basket):
                raise ValueError(
                    f"history {row}, step {step} is {entry!r}: give item names as text or whole "
                    "numbers, or a list of them for a basket"
                )
            once = list(dict.fromkeys(map(str, basket)))
            names += once
            rows += [row] * len(once)
            steps += [step] * len(once)
    return names, np.asarray(rows, dtype=np.int64), steps


def _known_only(sequences: Sequences, size: int) -> Histories:
    if len(sequences.items) and not 0 <= sequences.items.min() <= sequences.items.max() <= size:
        raise DataError(
            f"histories hold ids up to {sequences.items.max()}, the model knows 1 to {size}: "
            "encode them by the model's own catalogue"
        )
    known = sequences.items > 0
    unknown = np.bincount(sequences.rows[~known], minlength=len(sequences))
    return Histories(sequences if known.all() else sequences.keep(known), unknown)
