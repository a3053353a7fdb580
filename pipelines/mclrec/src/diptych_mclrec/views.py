"""Views of a history: a part of it, some steps hidden, a part shuffled.

The three augmentations of CL4SRec (Xie et al., ICDE 2022) that MCLRec draws two of. Each is one
function of a 1-D history, and :func:`two_views` does a whole batch at once; there every draw is
keyed by the instance's id, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from diptych.randomness import Draw, Ids

Rng = np.random.Generator | Draw
OPERATIONS = ("crop", "mask", "reorder")
RATIOS: Mapping[str, float] = {"crop": 0.5, "mask": 0.5, "reorder": 0.8}
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
    chosen = _uniform(rng, "aug", ids, len(items), 1)[:, 0]
    pairs = _PAIRS[(chosen * len(_PAIRS)).astype(np.int64)]
    views: list[NDArray[Any]] = []
    for number in (0, 1):
        draws = _uniform(rng, f"aug{number + 1}", ids, len(items), 1 + items.shape[1])
        views += _view(items, lengths, pairs[:, number], draws, ratios)
    return views[0], views[1], views[2], views[3]


def _view(
    items: NDArray[np.integer],
    lengths: NDArray[np.int64],
    operations: NDArray[np.int64],
    draws: NDArray[np.float64],
    ratios: Mapping[str, float],
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """One operation a row: first which step comes where, then which steps are nothing."""
    shares = np.array([1 - ratios["crop"], ratios["mask"], ratios["reorder"]])
    counts = _part(lengths, shares[operations])
    cropped, masked, reordered = (
        (operations == operation) & (lengths > 1) for operation in range(len(OPERATIONS))
    )
    counts = np.where(cropped, np.maximum(counts, 1), counts)
    starts = (draws[:, 0] * (lengths - counts + 1)).astype(np.int64)
    steps = np.arange(items.shape[1])
    inside = (steps >= starts[:, None]) & (steps < (starts + counts)[:, None])

    # steps sort by (their place), those to be shuffled by a draw within the place of their run
    source = np.where(cropped[:, None], steps + starts[:, None], steps)
    order = np.where(inside, starts[:, None] + draws[:, 1:], steps)
    source = np.where(reordered[:, None], np.argsort(order, axis=1, kind="stable"), source)
    new_lengths = np.where(cropped, counts, lengths)
    hidden = steps >= new_lengths[:, None]
    hidden |= masked[:, None] & _smallest(draws[:, 1:], lengths, counts)

    source = np.minimum(source, items.shape[1] - 1)
    extra = tuple(range(2, items.ndim))
    view = np.take_along_axis(items, np.expand_dims(source, extra), axis=1)
    return np.where(np.expand_dims(hidden, extra), 0, view), new_lengths


def _smallest(
    draws: NDArray[np.float64], lengths: NDArray[np.int64], counts: NDArray[np.int64]
) -> Bool[np.ndarray, "B L"]:
    """Where the ``counts`` smallest draws within each row's length stand."""
    within = np.arange(draws.shape[1]) < lengths[:, None]
    ranks = np.argsort(np.argsort(np.where(within, draws, 2.0), axis=1), axis=1)
    return ranks < counts[:, None]


def _uniform(rng: Rng, purpose: str, ids: Ids | None, rows: int, count: int) -> NDArray[np.float64]:
    if not isinstance(rng, Draw):
        return rng.random((rows, count))
    if ids is None:
        raise ValueError("two_views: a keyed draw needs ids: pass each history's instance")
    return rng.of(purpose).uniform(ids, count)


def _part(count: int | NDArray[np.int64], share: float | NDArray[np.float64]) -> NDArray[np.int64]:
    """``floor(count share)``, where a product like 0.29 * 100 does not fall below its integer."""
    return np.floor(np.asarray(count) * share + 1e-9).astype(np.int64)
