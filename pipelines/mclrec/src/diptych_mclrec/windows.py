"""Ragged histories to the padded arrays that the encoder takes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from diptych_mclrec.sequences import Sequences


def windows(
    sequences: Sequences,
    subjects: Int[np.ndarray, " B"],
    ends: Int[np.ndarray, " B"],
    max_len: int,
) -> tuple[Int[np.ndarray, "B L ..."], Int[np.ndarray, " B"]]:
    """The last steps of prefixes, from the left, with 0 behind them.

    Args:
        sequences: All events.
        subjects: Position of each prefix's subject.
        ends: Steps of each prefix, counted from the subject's first.
        max_len: Most steps of a window, at least 1.

    Returns:
        Ids int64, (B, L) or, where events lie in baskets, (B, L, M); and steps of each window.
        L and M are the largest that occur, at least 1.

    Example:
        >>> windows(Sequences.from_lists([[3, 1, 2]]), np.array([0]), np.array([2]), 9)[0].tolist()
        [[3, 1]]
    """
    ends = np.asarray(ends, dtype=np.int64)
    lengths = np.minimum(ends, max_len)
    width = int(lengths.max(initial=1))
    inside = np.arange(width) < lengths[:, None]
    first = (ends - lengths)[:, None] + np.arange(width)
    if sequences.baskets is None:
        return _taken(sequences, sequences.offsets[subjects][:, None] + first, inside), lengths
    starts, offsets = _steps(sequences)
    step = np.where(inside, offsets[subjects][:, None] + first, 0)
    sizes = np.where(inside, np.diff(starts, append=starts[-1:])[step], 0)
    place = np.arange(int(sizes.max(initial=1)))
    return _taken(sequences, starts[step][..., None] + place, place < sizes[..., None]), lengths


def _taken(
    sequences: Sequences, events: NDArray[np.int64], inside: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Items of events; 0 outside."""
    items = np.append(sequences.items, np.int32(0))
    return items[np.where(inside, events, len(items) - 1)].astype(np.int64)


def _steps(sequences: Sequences) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First event of each step, and one beyond the last; first step of each subject."""
    assert sequences.baskets is not None
    rows = sequences.rows
    new = np.r_[True, (np.diff(rows) != 0) | (np.diff(sequences.baskets) != 0)][: len(rows)]
    starts = np.append(np.flatnonzero(new), len(rows)).astype(np.int64)
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(sequences.step_counts, out=offsets[1:])
    return starts, offsets
