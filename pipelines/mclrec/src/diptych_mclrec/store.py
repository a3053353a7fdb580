"""The events of a prepared folder, as the rooms after it take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from diptych_mclrec.sequences import Catalogue, Kind, Sequences

if TYPE_CHECKING:
    from diptych.prepared import Prepared

EVENTS, CODES = "events", "codes"  # tables of the prepared folder


@dataclass(frozen=True, eq=False)
class Events:
    """Ordered events: unfiltered, not divided, every code of the source.

    Args:
        sequences: One row a row of the index, subjects by pseudonym, items as ids of ``codes``.
        codes: Every code of the source.
        kind: "interactions" or "clinical".
        parts: "train", "validation", "test" or None for each subject, where the source or
            ``split.file`` has a split.
    """

    sequences: Sequences
    codes: Catalogue
    kind: Kind = "interactions"
    parts: tuple[str | None, ...] | None = None


def load(prepared: Prepared) -> Events:
    """The events of a prepared folder.

    Args:
        prepared: The opened folder; ``config.py`` says what it holds.

    Returns:
        Events in the rows of its index.
    """
    index, events, codes = prepared.index, prepared.table(EVENTS), prepared.table(CODES)
    offsets = np.zeros(index.height + 1, np.int64)
    np.cumsum(index["events"].to_numpy(), out=offsets[1:])
    items = events["code"].to_numpy() + 1
    sequences = Sequences(
        index["subject"].to_numpy().astype(np.str_),
        offsets,
        items.astype(np.int32),
        None if events["time"].null_count() else events["time"].to_numpy(),
        None if events["basket"].null_count() else events["basket"].to_numpy(),
    )
    counts = np.bincount(items, minlength=codes.height + 1)[1:]
    described = codes.filter(pl.col("description").is_not_null())
    words = dict(described.select("code", "description").rows())
    catalogue = Catalogue(tuple(codes["code"]), tuple(counts.tolist()), words)
    parts = tuple(index["split"]) if "split" in index.columns else None
    return Events(sequences, catalogue, prepared.facts["kind"], parts)
