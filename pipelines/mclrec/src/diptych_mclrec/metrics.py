"""Ranks of the true next items among all items, and what is computed from them.

A target's rank counts the candidates that score higher, and says what it does with those that
score the same: a model that gives equal scores to everything ranks last, not first. Column 0 of
every score matrix belongs to no item and is never a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from diptych.errors import TrainingError

if TYPE_CHECKING:
    import polars as pl

    import diptych_mclrec.split

Ties = Literal["pessimistic", "optimistic", "average"]
KS = (5, 10, 20, 50)
ROWS = 512  # queries at a time: their scores over one tile of items stay in the cache
History = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class Counts:
    """How many candidates score higher than each target, and how many the same.

    Args:
        greater: Of each target, int64, the shape of the targets; -1 where there is none.
        equal: Likewise, the target itself not counted.
    """

    greater: NDArray[np.int64]
    equal: NDArray[np.int64]

    def ranks(self, ties: Ties = "pessimistic") -> NDArray[np.float64]:
        """Ranks from 1; NaN where there is no target.

        Args:
            ties: Candidates of equal score count all ("pessimistic"), not ("optimistic"), or by
                half ("average").
        """
        shares = {"pessimistic": 1.0, "optimistic": 0.0, "average": 0.5}
        if ties not in shares:
            raise ValueError(f"evaluate.ties is {ties!r}: choose one of {', '.join(shares)}")
        ranks = 1 + self.greater + shares[ties] * self.equal
        return np.where(self.greater < 0, np.nan, ranks)


def rank_of_targets(
    scores: Float[Tensor, "S items"] | Float[np.ndarray, "S items"],
    targets: Int[np.ndarray, " S"] | Int[np.ndarray, "S G"],
    *,
    ties: Ties = "pessimistic",
    exclude: Sequence[History] | None = None,
) -> NDArray[np.float64]:
    """Ranks of targets from scores of all items.

    Args:
        scores: One column an item, column 0 for none; I + 1 columns.
        targets: Ids 1..I, one or several a row; 0 is no target.
        ties: As in :meth:`Counts.ranks`.
        exclude: Items of each row that are no candidates, ids 0..I.

    Returns:
        Ranks from 1, in the shape of ``targets``; NaN where there is none.

    Raises:
        TrainingError: A score is not a number.
        ValueError: A target is no item, or is excluded in its own row.

    Example:
        >>> rank_of_targets(np.array([[9.0, 1.0, 3.0, 3.0]]), np.array([2])).tolist()
        [2.0]
    """
    return count_ranks(scores, targets, exclude=exclude).ranks(ties)


def count_ranks(
    scores: Float[Tensor, "S items"] | Float[np.ndarray, "S items"],
    targets: Int[np.ndarray, " S"] | Int[np.ndarray, "S G"],
    *,
    exclude: Sequence[History] | None = None,
) -> Counts:
    """The counts behind :func:`rank_of_targets`, with the same arguments."""
    table = torch.as_tensor(scores).detach()
    known = _Targets.read(targets, table.shape[1], exclude)

    def product(rows: slice, _: int) -> Tensor:
        return table[rows].clone()

    return _count(known, product, range(1), table.device)


def tiled_ranks(
    queries: Float[Tensor, "S H"],
    weight: Float[Tensor, "items H"],
    targets: Int[np.ndarray, " S"] | Int[np.ndarray, "S G"],
    *,
    seen: Sequence[History] | None = None,
    ties: Ties = "pessimistic",
    tile: int = 8192,
) -> NDArray[np.float64]:
    """Ranks of targets among all items, without the matrix of all scores.

    Args:
        queries: Vectors of histories.
        weight: Item vectors, I + 1 rows.
        targets: Ids 1..I, one or several a row; 0 is no target.
        seen: Items of each row that are no candidates; None: all items are.
        ties: As in :meth:`Counts.ranks`.
        tile: Items at a time.

    Returns:
        Ranks from 1, in the shape of ``targets``; NaN where there is none.

    Raises:
        TrainingError: A score is not a number.
        ValueError: A target is no item, or has been seen.
    """
    return tiled_counts(queries, weight, targets, seen=seen, tile=tile).ranks(ties)


@torch.no_grad()
def tiled_counts(
    queries: Float[Tensor, "S H"],
    weight: Float[Tensor, "items H"],
    targets: Int[np.ndarray, " S"] | Int[np.ndarray, "S G"],
    *,
    seen: Sequence[History] | None = None,
    tile: int = 8192,
) -> Counts:
    """The counts behind :func:`tiled_ranks`, with the same arguments."""
    if tile < 1:
        raise ValueError(f"evaluate.tile is {tile}: choose at least 1 item")
    known = _Targets.read(targets, len(weight), seen)
    queries, weight = queries.detach(), weight.detach()

    def product(rows: slice, first: int) -> Tensor:
        return queries[rows] @ weight[first : first + tile].t()

    return _count(known, product, range(0, len(weight), tile), queries.device)


def row_item_pairs(
    lists: Sequence[History] | None, rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and item of every entry of one list of items a row, in the order of rows.

    Args:
        lists: Ids of items; None is an empty list a row.
        rows: How many lists there have to be.

    Raises:
        ValueError: There are more or fewer.
    """
    arrays = [np.asarray(one, dtype=np.int64) for one in (lists if lists is not None else ())]
    if lists is not None and len(arrays) != rows:
        raise ValueError(f"{len(arrays)} lists of excluded items for {rows} rows: pass one each")
    owners = np.repeat(np.arange(len(arrays)), [len(one) for one in arrays])
    return owners, np.concatenate([*arrays, np.empty(0, np.int64)])


@dataclass(frozen=True)
class _Targets:
    """Targets as a table (S, G), and the pairs of row and item that are no candidates."""

    table: NDArray[np.int64]
    shape: tuple[int, ...]
    rows: NDArray[np.int64]
    items: NDArray[np.int64]

    @classmethod
    def read(cls, targets: ArrayLike, columns: int, exclude: Sequence[History] | None) -> _Targets:
        given = np.asarray(targets, dtype=np.int64)
        table = given.reshape(len(given), -1)
        if table.size and (table.min() < 0 or table.max() >= columns):
            raise ValueError(
                f"targets hold ids {table.min()} to {table.max()}, the scores know 1 to "
                f"{columns - 1}: count a target outside the catalogue as a miss"
            )
        rows, items = row_item_pairs(exclude, len(table))
        repeated = (table[rows] == items[:, None]) & (items[:, None] > 0)
        if repeated.any():
            row = int(rows[repeated.any(1)][0])
            raise ValueError(
                f"row {row} has its target among its seen items: leave such steps out, since the "
                "target would be the only seen item that is a candidate"
            )
        return cls(table, given.shape, rows, items)

    def block(self, start: int, stop: int) -> tuple[slice, NDArray[np.int64], NDArray[np.int64]]:
        """The block's part of the pairs: rows within the block, and items in rising order."""
        inside = slice(*np.searchsorted(self.rows, [start, stop]))
        order = np.argsort(self.items[inside], kind="stable")
        return slice(start, stop), self.rows[inside][order] - start, self.items[inside][order]


Product = Callable[[slice, int], Tensor]  # rows, first item -> scores of the rows over one tile


def _count(known: _Targets, product: Product, starts: range, device: torch.device) -> Counts:
    greater = torch.full(known.table.shape, -1, dtype=torch.int64)
    equal = torch.zeros(known.table.shape, dtype=torch.int64)
    for start in range(0, len(known.table), ROWS):
        rows, at, items = known.block(start, min(start + ROWS, len(known.table)))
        targets = torch.as_tensor(known.table[rows], device=device)
        single = product(rows, 0) if len(starts) == 1 else None
        own = None
        for first in starts:
            scores = product(rows, first) if single is None else single
            found = _own_scores(targets, first, scores, start)
            own = found if own is None else torch.maximum(own, found)
        if own is None:
            continue
        above, same = torch.zeros_like(targets), torch.full_like(targets, -1)
        for first in starts:
            scores = product(rows, first) if single is None else single
            _leave_out(scores, first, targets, own, at, items)
            for column in range(targets.shape[1]):
                wanted = targets[:, column].nonzero()[:, 0]
                chosen = scores if len(wanted) == len(scores) else scores[wanted]
                score = own[wanted, column, None]
                above[wanted, column] += (chosen > score).sum(1)
                same[wanted, column] += (chosen == score).sum(1)
        greater[rows] = torch.where(targets > 0, above, -1).cpu()
        equal[rows] = torch.where(targets > 0, same, 0).cpu()
    return Counts(greater.numpy().reshape(known.shape), equal.numpy().reshape(known.shape))


def _own_scores(targets: Tensor, first: int, scores: Tensor, start: int) -> Tensor:
    """Scores of the targets that lie in a tile, minus infinity for the others.

    They are taken from the product that the candidates come from: one of its own can differ in
    the last bit, and a target would then not tie with an item of the same vector.
    """
    suspects = scores.sum(1).isnan().nonzero()[:, 0]  # a sum is cheaper than looking at each
    broken = suspects[scores[suspects].isnan().any(1)]
    if len(broken):
        row = start + int(broken[0])
        raise TrainingError(
            f"the scores of row {row} are not numbers: the model has diverged, use an earlier "
            "checkpoint or a lower optim.lr"
        )
    column = targets - first
    inside = (column >= 0) & (column < scores.shape[1])
    own = scores.gather(1, column.clamp(0, scores.shape[1] - 1))
    return own.masked_fill(~inside, -torch.inf)


def _leave_out(
    scores: Tensor,
    first: int,
    targets: Tensor,
    own: Tensor,
    at: NDArray[np.int64],
    items: NDArray[np.int64],
) -> None:
    """Overwrite what is no candidate with NaN, which is neither above nor equal to anything.

    The targets' own cells get the scores that are compared with them, so that each ties with
    itself exactly once even where a product computed again differs in its last bit.
    """
    stop = first + scores.shape[1]
    row, column = ((targets >= max(first, 1)) & (targets < stop)).nonzero(as_tuple=True)
    scores[row, targets[row, column] - first] = own[row, column]
    part = slice(*np.searchsorted(items, [first, stop]))
    scores[torch.as_tensor(at[part]), torch.as_tensor(items[part] - first)] = torch.nan
    if first == 0:
        scores[:, 0] = torch.nan


def usable_cutoffs(ks: Sequence[int], n_items: int) -> tuple[int, ...]:
    """The cut-offs that say something: a list of k of I items is complete from k = I on."""
    return tuple(k for k in ks if k < n_items)


def step_metrics(
    ranks: Float[np.ndarray, " S"] | Float[np.ndarray, "S G"], ks: Sequence[int] = KS
) -> dict[str, Float[np.ndarray, " S"]]:
    """Metrics of each predicted step.

    For one target: ``hr@k = [rank <= k]``, ``ndcg@k = [rank <= k] / log2(rank + 1)``,
    ``mrr = 1 / rank`` and ``mrr@k``, the same cut off at k. For a basket of g targets: ``hr@k``
    any hit, ``recall@k`` hits / min(g, k), ``recall_all@k`` hits / g, ``ndcg@k`` over its ideal
    of min(g, k) places, ``mrr`` of the first hit.

    Args:
        ranks: From :func:`tiled_ranks`, NaN for no target; at least one target a row.
        ks: Cut-offs.

    Returns:
        One value a row by name of the metric.

    Raises:
        ValueError: A row has no target.
    """
    table = np.asarray(ranks, dtype=np.float64)
    basket = table.ndim == 2
    table = table if basket else table[:, None]
    known = ~np.isnan(table)
    if not known.any(1).all():
        row = int(np.flatnonzero(~known.any(1))[0])
        raise ValueError(f"row {row} has no target: leave out steps that predict nothing")
    table = np.where(known, table, np.inf)
    best, sizes = table.min(1), known.sum(1)
    metrics: dict[str, NDArray[np.float64]] = {"mrr": 1 / best}
    ideal = np.cumsum(1 / np.log2(np.arange(2, table.shape[1] + 2)))
    for k in ks:
        hit = table <= k
        places = np.minimum(sizes, k)
        metrics[f"hr@{k}"] = (best <= k).astype(np.float64)
        metrics[f"ndcg@{k}"] = (hit / np.log2(table + 1)).sum(1) / ideal[places - 1]
        metrics[f"mrr@{k}"] = np.where(best <= k, 1 / best, 0.0)
        if basket:
            metrics[f"recall@{k}"] = hit.sum(1) / places
            metrics[f"recall_all@{k}"] = hit.sum(1) / sizes
    return metrics


def ranking_metrics(
    ranks: Float[np.ndarray, " S"] | Float[np.ndarray, "S G"],
    ks: Sequence[int] = KS,
    *,
    subjects: Int[np.ndarray, " S"] | None = None,
) -> dict[str, float]:
    """Means of :func:`step_metrics`; each subject counts once.

    Args:
        ranks: As :func:`step_metrics` takes them, at least one row.
        ks: Cut-offs.
        subjects: Subject of each row; None: each row is a subject's only one.

    Returns:
        Means by name of the metric.

    Example:
        >>> ranking_metrics(np.array([1.0, 3.0]), ks=(1,))["hr@1"]
        0.5
    """
    values = step_metrics(ranks, ks)
    if subjects is None:
        return {name: float(value.mean()) for name, value in values.items()}
    _, number = np.unique(subjects, return_inverse=True)
    sizes = np.bincount(number)
    return {
        name: float((np.bincount(number, weights=value) / sizes).mean())
        for name, value in values.items()
    }


def evaluate(
    recommender: Any,
    split: diptych_mclrec.split.Split,
    *,
    ks: Sequence[int] = KS,
    steps: Literal["last", "all"] = "last",
    ties: Ties = "pessimistic",
) -> pl.DataFrame:
    """Metrics of the test part of a split, with the items of histories as candidates and without.

    Args:
        recommender: A trained one, or a fitted baseline.
        split: Of sequences in its ids, from :func:`diptych_mclrec.split.split_sequences`.
        ks: Cut-offs; those that hold every item are left out.
        steps: Each subject's last step, or all from its first tested one.
        ties: As in :meth:`Counts.ranks`.

    Returns:
        policy ("kept" or "masked"), metric, value (each subject counts once), subjects, steps.
        Masked leaves out targets that are in the history already.

    Example:
        ``evaluate(Markov1().fit(split.train), split)``
    """
    import polars as pl

    from diptych_mclrec import scores
    from diptych_mclrec.config import RankingSection
    from diptych_mclrec.queries import queries_of

    queries = queries_of(split.test, split.test_start, steps)
    model = getattr(recommender, "ready", recommender)
    if hasattr(model, "encoder"):
        scorer, size = scores.network_scorer(model.encoder, model.fitted), model.encoder.n_items
    else:
        scorer, size = scores.baseline_scorer(model), len(model.counts) - 1
    ranked = scores.rank_all(scorer, queries, RankingSection(ties=ties), "keep", size)
    rows = []
    for policy, ranks in (("kept", ranked.kept), ("masked", ranked.masked)):
        left = ~np.isnan(ranks).all(1)
        if not left.any():
            continue
        known = ranks[left] if split.test.baskets is not None else ranks[left, 0]
        subjects = queries.subject[left]
        found = ranking_metrics(known, usable_cutoffs(ks, size), subjects=subjects)
        about = {"subjects": len(np.unique(subjects)), "steps": int(left.sum())}
        rows += [{"policy": policy, "metric": k, "value": v, **about} for k, v in found.items()]
    return pl.DataFrame(rows)
