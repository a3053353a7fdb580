"""Classification by weighted nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError, warn
from diptych_contrast.inputs import (
    check_dimension,
    check_finite,
    check_integers,
    check_least,
    check_positive,
)
from diptych_contrast.kernel import products, unit_rows

_QUERIES, _BANK = 1024, 4096  # a tile of similarities


@dataclass(frozen=True)
class NeighbourProbe:
    """Votes of the nearest neighbours: one row a query.

    Neighbours are row numbers of the bank, nearest first, with their cosines.
    """

    predictions: Int[Tensor, " q"]
    probabilities: Float[Tensor, "q classes"]
    neighbours: Int[Tensor, "q k"]
    similarities: Float[Tensor, "q k"]


@torch.no_grad()
def knn_probe(
    bank: Float[Tensor, "n d"],
    bank_y: Int[Tensor, " n"],
    query: Float[Tensor, "q d"],
    k: int = 200,
    temperature: float = 0.07,
    classes: int | None = None,
) -> NeighbourProbe:
    """Classify queries by their nearest bank rows (Wu et al., 2018, section 3.4).

    Each of the k rows of highest cosine s votes for its class with weight ``exp(s/temperature)``.
    Equal cosines at the cut: the lower bank row; equal votes: the lower class. Similarities are
    held a tile at a time, in fp32 (fp64 for fp64 input). A k above the bank's size is cut, with a
    `ContrastWarning`.

    Example:
        >>> knn_probe(torch.eye(3), torch.tensor([0, 1, 1]), torch.eye(3), k=1).predictions
        tensor([0, 1, 1])
    """
    check_dimension("knn_probe", bank=bank, query=query)
    classes = _check_labels(bank_y, bank.shape[0], classes)
    check_positive("knn_probe", temperature=temperature)
    check_finite("knn_probe", "bank", bank)
    check_finite("knn_probe", "query", query)
    check_least("knn_probe", 1, k=k)
    if k > bank.shape[0]:
        found, fix = "is larger than the bank", "all rows of the bank vote; pass a smaller k"
        warn("knn_probe", "k", found, fix)
        k = bank.shape[0]
    dtype = torch.promote_types(bank.dtype, query.dtype)
    rows, columns = unit_rows(query.to(dtype)), unit_rows(bank.to(dtype))
    parts = [_nearest(block, columns, k) for block in rows.split_with_sizes(_sizes(len(rows)))]
    similarities, neighbours = (torch.cat(part) for part in zip(*parts, strict=True))
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(rows), classes).scatter_add_(1, bank_y[neighbours], weights)
    # fp32, so that equal votes summed in another order stay equal
    probabilities = (votes / votes.sum(1, keepdim=True)).float()
    return NeighbourProbe(probabilities.argmax(1), probabilities, neighbours, similarities)


def _check_labels(labels: Tensor, count: int, classes: int | None) -> int:
    check_integers("knn_probe", "bank_y", labels, count)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        found = f"has labels from {low} to {high}"
        fix = f"number the classes from 0 to {(classes or high + 1) - 1}"
        raise ContrastInputError("knn_probe", "bank_y", found, fix)
    return classes or high + 1


def _sizes(count: int) -> list[int]:
    full, rest = divmod(count, _QUERIES)
    return [_QUERIES] * full + [rest] * (rest > 0)


def _nearest(rows: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = rows.new_empty(len(rows), 0), bank.new_empty(len(rows), 0, dtype=torch.long)
    width = max(_BANK, 2 * k)
    for start in range(0, len(bank), width):
        scores = products(rows, bank[start : start + width].T)
        tops, positions = _top(scores, min(k, scores.shape[1]))
        values = torch.cat([values, tops], dim=1)
        indices = torch.cat([indices, positions + start], dim=1)
        values, positions = _top(values, min(k, values.shape[1]))
        indices = indices.gather(1, positions)
    return values, indices


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling; equal ones by rising position."""
    tops, positions = scores.topk(k, sorted=False)
    tied = (scores >= tops.amin(1, keepdim=True)).sum(1) > k
    if bool(tied.any()):  # topk takes any of the scores that are equal at the cut
        order = scores[tied].sort(dim=1, descending=True, stable=True).indices
        positions[tied] = order[:, :k]
    positions = positions.sort(dim=1).values
    falling, order = scores.gather(1, positions).sort(dim=1, descending=True, stable=True)
    return falling, positions.gather(1, order)
