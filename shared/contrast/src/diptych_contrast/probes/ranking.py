"""Retrieval in both directions, with ties resolved by expectation over their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_dimension, check_finite, check_integers
from diptych_contrast.kernel import unit_rows

_BLOCK = 2**21  # scores held at a time
_GRID = 2.0**25


@dataclass(frozen=True)
class RetrievalDirection:
    """Retrieval of the items of one side by the items of the other.

    Queries without a relevant item are left out. ``recall`` is a share in [0, 1] by k, for those
    k that are no larger than the number of candidates; ``recall_rows`` holds the same query by
    query, ``queries`` the row numbers of these queries. ``map_at_r`` is the mean average precision
    at R, a query's number of relevant items (Musgrave et al., 2020); ranks are those of the first
    relevant item.
    """

    recall: Mapping[int, float]
    map_at_r: float
    mean_rank: float
    median_rank: float
    queries: Int[Tensor, " q"]
    recall_rows: Float[Tensor, "q k"]


@dataclass(frozen=True)
class Retrieval:
    """Retrieval in both directions; ``r_sum`` adds up all recalls in percent, 0 to 600.

    ``r_sum`` is None where a recall is missing, for lack of candidates.
    """

    x_to_y: RetrievalDirection
    y_to_x: RetrievalDirection
    r_sum: float | None


@torch.no_grad()
def retrieval(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    relevant: Int[Tensor, " n"] | Bool[Tensor, "n m"] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Rank the rows of ``y`` by cosine for every row of ``x``, and the other way round.

    Items of equal score are in random order, and every figure is the expectation over it, so a
    collapsed model scores k/N, not 1. Coordinates of unit vectors are rounded to 2^-25; fp64
    products of such numbers are exact, so equal embeddings tie exactly.

    Args:
        relevant: For each row of ``x`` the one relevant row of ``y``, or a matrix that is true
            where several are. Default: the row of equal number.

    Example:
        >>> retrieval(torch.ones(4, 2), torch.ones(4, 2)).x_to_y.recall[1]
        0.25
    """
    check_dimension("retrieval", x=x, y=y)
    check_finite("retrieval", "x", x)
    check_finite("retrieval", "y", y)
    _check_ks("retrieval", ks)
    forward, backward = _relevance(x, y, relevant)
    rows, columns = (torch.round(unit_rows(each.double()) * _GRID) / _GRID for each in (x, y))
    x_to_y = _direction(rows, columns, forward, ks)
    y_to_x = _direction(columns, rows, backward, ks)
    recalls = [each.recall.get(k) for each in (x_to_y, y_to_x) for k in ks]
    present = [recall for recall in recalls if recall is not None]
    r_sum = 100 * sum(present) if len(present) == len(recalls) else None
    return Retrieval(x_to_y, y_to_x, r_sum)


def recall_at_k(
    scores: Float[Tensor, "q c"], relevant: Bool[Tensor, "q c"], ks: Sequence[int] = (1, 5, 10)
) -> Float[Tensor, "q k"]:
    """Probability that a relevant candidate is among the first k, over random order of ties.

    With g irrelevant candidates above the best relevant score, t irrelevant and m relevant ones
    at it: 0 for k <= g, 1 for k - g > t, else ``1 - C(t, k-g) / C(t+m, k-g)``.

    Example:
        >>> recall_at_k(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]), [2]).item()
        0.5
    """
    _check_scores("recall_at_k", scores, relevant)
    _check_ks("recall_at_k", ks)
    above, tied, hits = _first_relevant(scores, relevant)
    drawn = torch.tensor(list(ks), dtype=torch.float64, device=scores.device) - above[:, None]
    tied, hits = tied[:, None], hits[:, None]
    within = drawn.clamp(min=torch.zeros_like(tied), max=tied)

    def log_factorial(count: Tensor) -> Tensor:
        return torch.lgamma(count + 1)

    missed = (
        log_factorial(tied)
        + log_factorial(tied + hits - within)
        - log_factorial(tied - within)
        - log_factorial(tied + hits)
    ).exp()
    missed = torch.where(hits == 1, 1 - within / (tied + 1), missed)  # the same without rounding
    return torch.where(drawn > tied, 1.0, 1 - missed).clamp(0, 1)


def expected_rank(
    scores: Float[Tensor, "q c"], relevant: Bool[Tensor, "q c"]
) -> Float[Tensor, " q"]:
    """Expected rank of the first relevant candidate, from 1, over random order of ties.

    Returns:
        ``g + (t + m + 1) / (m + 1)`` in the terms of `recall_at_k`, fp64.
    """
    _check_scores("expected_rank", scores, relevant)
    above, tied, hits = _first_relevant(scores, relevant)
    return above + (tied + hits + 1) / (hits + 1)


def _first_relevant(scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    at_best = scores == best
    hits = (at_best & relevant).sum(1).double()
    return (scores > best).sum(1).double(), at_best.sum(1).double() - hits, hits


def _average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Average precision over the first R ranks, R relevant items, by expectation over ties."""
    counts = relevant.sum(1)
    depth = int(counts.max())
    falling = scores.topk(depth, dim=1).values
    wanted = scores.masked_fill(~relevant, -torch.inf).topk(depth, dim=1).values
    ranked, hits = (-falling).contiguous(), (-wanted).contiguous()
    above = torch.searchsorted(ranked, ranked)
    last = falling[:, -1:]
    upto = torch.where(
        falling == last,
        (scores >= last).sum(1, keepdim=True),
        torch.searchsorted(ranked, ranked, right=True),
    )
    hits_above = torch.searchsorted(hits, ranked).double()
    hits_tied = torch.searchsorted(hits, ranked, right=True) - hits_above
    tied = (upto - above).double()
    position = torch.arange(depth, device=scores.device)
    before = (position - above) * (hits_tied - 1) / (tied - 1).clamp_min(1)
    precision = (hits_above + 1 + before) / (position + 1)
    within = position < counts[:, None]
    return (hits_tied / tied * precision * within).sum(1) / counts


def _direction(
    rows: Tensor, columns: Tensor, relevance: Callable[[slice], Tensor], ks: Sequence[int]
) -> RetrievalDirection:
    candidates = columns.shape[0]
    reachable = [k for k in ks if k <= candidates]
    queries, recalls, precisions, ranks = [], [], [], []
    height = max(1, _BLOCK // candidates)
    for start in range(0, rows.shape[0], height):
        block = slice(start, min(start + height, rows.shape[0]))
        relevant = relevance(block)
        asked = relevant.any(1)
        if not bool(asked.any()):
            continue
        scores, relevant = rows[block][asked] @ columns.T, relevant[asked]
        queries.append(start + torch.nonzero(asked).flatten())
        recalls.append(recall_at_k(scores, relevant, reachable))
        precisions.append(_average_precision(scores, relevant))
        ranks.append(expected_rank(scores, relevant))
    recall_rows, rank = torch.cat(recalls), torch.cat(ranks)
    means = recall_rows.mean(0).tolist()
    return RetrievalDirection(
        recall=dict(zip(reachable, means, strict=True)),
        map_at_r=float(torch.cat(precisions).mean()),
        mean_rank=float(rank.mean()),
        median_rank=float(rank.quantile(0.5)),
        queries=torch.cat(queries),
        recall_rows=recall_rows,
    )


def _relevance(
    x: Tensor, y: Tensor, relevant: Tensor | None
) -> tuple[Callable[[slice], Tensor], Callable[[slice], Tensor]]:
    """For both directions a function from a block of queries to their relevant candidates."""
    n, m = x.shape[0], y.shape[0]
    if relevant is None:
        if n != m:
            found = f"is missing with {n} and {m} rows"
            fix = "name the relevant row of 'y' for each row of 'x'"
            raise ContrastInputError("retrieval", "relevant", found, fix)
        relevant = torch.arange(n, device=x.device)
    if relevant.dtype is torch.bool:
        matrix = relevant
        if matrix.shape != (n, m) or not bool(matrix.any()):
            found = f"has shape {tuple(matrix.shape)} and {int(matrix.sum())} true entries"
            fix = f"pass a matrix of {n} x {m} with at least one true entry"
            raise ContrastInputError("retrieval", "relevant", found, fix)
        return lambda block: matrix[block], lambda block: matrix.T[block]
    check_integers("retrieval", "relevant", relevant, n)
    low, high = int(relevant.min()), int(relevant.max())
    if low < 0 or high >= m:
        found = f"names rows {low} to {high}, 'y' has {m}"
        fix = f"number the rows of 'y' from 0 to {m - 1}"
        raise ContrastInputError("retrieval", "relevant", found, fix)
    index, names = relevant, torch.arange(m, device=x.device)
    return (
        lambda block: index[block, None] == names[None, :],
        lambda block: names[block, None] == index[None, :],
    )


def _check_ks(function: str, ks: Sequence[int]) -> None:
    if not all(k >= 1 for k in ks):
        raise ContrastInputError(function, "ks", f"is {tuple(ks)}", "pass ranks of at least 1")


def _check_scores(function: str, scores: Tensor, relevant: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != relevant.shape or relevant.dtype is not torch.bool:
        found = f"has shape {tuple(relevant.shape)} and dtype {relevant.dtype}, "
        found += f"'scores' has {tuple(scores.shape)}"
        fix = "pass one bool a score, queries in rows and candidates in columns"
        raise ContrastInputError(function, "relevant", found, fix)
    check_finite(function, "scores", scores)
    if not bool(relevant.any(1).all()):
        found, fix = "has a query without a relevant candidate", "leave such queries out"
        raise ContrastInputError(function, "relevant", found, fix)
