"""Views of a history: a part of it, some steps hidden, a part shuffled.

The three augmentations of CL4SRec (Xie et al., ICDE 2022) that MCLRec draws two of. Each is one
function of a 1-D history, and :func:`two_views` does a whole batch at once; there every draw is
keyed by the instance's id, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from diptych.randomness import Draw, Ids

Rng = np.random.Generator | Draw
OPERATIONS = ("crop", "mask", "reorder")
RATIOS: Mapping[str, float] = {"crop": 0.5, "mask": 0.5, "reorder": 0.8}
SHORT = 10  # steps whose draws fit three blocks of the generator
_PAIRS = np.array([(a, b) for a in range(3) for b in range(3) if a != b])


def crop(
    seq: Int[np.ndarray, " n"], ratio: float, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """A run of consecutive steps.

    Args:
        seq: A history, at least one step.
        ratio: Share of the steps left out; ``m = max(1, floor(n (1 - ratio)))`` stay.
        rng: Where the run starts.
    """
    kept = max(1, int(_part(len(seq), 1 - ratio)))
    start = rng.integers(len(seq) - kept + 1)
    return np.array(seq[start : start + kept])


def mask(
    seq: Int[np.ndarray, " n"], ratio: float, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """The history with ``floor(n ratio)`` steps hidden as id 0.

    Args:
        seq: A history.
        ratio: Share of the steps hidden.
        rng: Which ones.
    """
    view = np.array(seq)
    view[rng.permutation(len(seq))[: int(_part(len(seq), ratio))]] = 0
    return view


def reorder(
    seq: Int[np.ndarray, " n"], ratio: float, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """The history with ``floor(n ratio)`` consecutive steps in random order.

    Args:
        seq: A history.
        ratio: Share of the steps shuffled.
        rng: Which ones, and their order.
    """
    view, count = np.array(seq), int(_part(len(seq), ratio))
    start = rng.integers(len(seq) - count + 1)
    view[start : start + count] = rng.permutation(view[start : start + count])
    return view


def two_views(
    items: Int[np.ndarray, "B L ..."],
    lengths: Int[np.ndarray, " B"],
    rng: Rng,
    ratios: Mapping[str, float] = RATIOS,
    *,
    ids: Ids | None = None,
) -> tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.integer], NDArray[np.int64]]:
    """Two views of each history by two different operations, all ordered pairs equally likely.

    A history of one step is both its views.

    Args:
        items: Histories from the left, 0 behind them, (B, L); or baskets, (B, L, M), which are
            moved and hidden whole.
        lengths: Steps of each history, 1..L.
        rng: A keyed draw, with ``ids``; or a generator, whose numbers depend on the batch.
        ratios: Share of each of ``OPERATIONS``, as the functions of these names take it.
        ids: Number of each history's instance.

    Returns:
        First view, its lengths, second view, its lengths; views of the shape of ``items``.

    Raises:
        ValueError: A keyed draw without ids.

    Example:
        >>> rows = np.array([[5, 6, 7, 8], [9, 0, 0, 0]])
        >>> two_views(rows, np.array([4, 1]), Draw(1).at(0), ids=[3, 4])[2][1].tolist()
        [9, 0, 0, 0]
    """
    items, lengths = np.asarray(items), np.asarray(lengths, dtype=np.int64)
    if isinstance(rng, Draw) and ids is None:
        raise ValueError("two_views: a keyed draw needs ids: pass each history's instance")
    known = np.arange(len(items)) if ids is None else np.asarray(ids, dtype=np.int64)
    views, new_lengths = (
        (np.zeros_like(items), np.zeros_like(items)),
        np.zeros((2, len(items)), int),
    )
    short = lengths <= SHORT
    # most histories are far shorter than the longest, and draws and sorts cost by the column
    for rows in (np.flatnonzero(short), np.flatnonzero(~short)):
        if not len(rows):
            continue
        width = min(SHORT, items.shape[1]) if short[rows[0]] else items.shape[1]
        first = _uniform(rng, "aug1", known[rows], width + 2)
        second = _uniform(rng, "aug2", known[rows], width + 1)
        pairs = _PAIRS[(first[:, 0] * len(_PAIRS)).astype(np.int64)]
        operations = np.where(lengths[rows] > 1, pairs.T, -1).ravel()
        both = np.tile(rows, 2)
        view, steps = _views(
            items[both, :width],
            lengths[both],
            operations,
            np.concatenate([first[:, 1:], second]),
            ratios,
        )
        for number, part in enumerate((slice(len(rows)), slice(len(rows), None))):
            views[number][rows, :width] = view[part]
            new_lengths[number, rows] = steps[part]
    return views[0], new_lengths[0], views[1], new_lengths[1]


def _views(
    items: NDArray[np.integer],
    lengths: NDArray[np.int64],
    operations: NDArray[np.int64],
    draws: NDArray[np.float64],
    ratios: Mapping[str, float],
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """One operation a row: which step comes where, and which steps are nothing.

    Of a row's draws the first places its run, the others belong to its steps.
    """
    width = items.shape[1]
    steps = np.arange(width)
    source = np.tile(steps, (len(items), 1))
    new_lengths = lengths.copy()
    cropped, masked, reordered = (np.flatnonzero(operations == number) for number in range(3))

    kept = np.maximum(_part(lengths[cropped], 1 - ratios["crop"]), 1)
    source[cropped] += _starts(draws[cropped], lengths[cropped], kept)
    new_lengths[cropped] = kept

    count = _part(lengths[reordered], ratios["reorder"])[:, None]
    start = _starts(draws[reordered], lengths[reordered], count[:, 0])
    inside = (steps >= start) & (steps < start + count)
    # the steps of the run sort by a draw within the place of its first step, the others stay
    source[reordered] = np.argsort(np.where(inside, start + draws[reordered, 1:], steps), axis=1)

    hidden = steps >= new_lengths[:, None]
    marks = np.where(hidden[masked], np.inf, draws[masked, 1:])
    count = _part(lengths[masked], ratios["mask"])[:, None]
    largest = np.take_along_axis(np.sort(marks, axis=1), np.maximum(count - 1, 0), axis=1)
    hidden[masked] |= (marks <= largest) & (count > 0)

    extra = tuple(range(2, items.ndim))
    source = np.expand_dims(np.minimum(source, width - 1), extra)
    view = np.take_along_axis(items, source, axis=1)
    return np.where(np.expand_dims(hidden, extra), 0, view), new_lengths


def _starts(
    draws: NDArray[np.float64], lengths: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where runs of ``counts`` steps start, a column."""
    return (draws[:, :1] * (lengths - counts + 1)[:, None]).astype(np.int64)


def _uniform(rng: Rng, purpose: str, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    if isinstance(rng, Draw):
        return rng.of(purpose).uniform(ids, count)
    return rng.random((len(ids), count))


def _part(count: int | NDArray[np.int64], share: float | NDArray[np.float64]) -> NDArray[np.int64]:
    """``floor(count share)``, where a product like 0.29 * 100 does not fall below its integer."""
    return np.floor(np.asarray(count) * share + 1e-9).astype(np.int64)
