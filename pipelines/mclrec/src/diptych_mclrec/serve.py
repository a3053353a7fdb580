"""The best k items of many histories, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_mclrec.metrics import History, row_item_pairs


@torch.no_grad()
def tiled_top_items(
    queries: Float[Tensor, "S H"],
    weight: Float[Tensor, "items H"],
    k: int,
    *,
    exclude: Sequence[History] | None = None,
    tile: int = 8192,
) -> tuple[Int[Tensor, "S k"], Float[Tensor, "S k"]]:
    """The k items of highest score of each row; among equal scores the lower id comes first.

    Args:
        queries: Vectors of histories.
        weight: Item vectors, I + 1 rows; row 0 is no item.
        k: Items wanted, at least 1.
        exclude: Items of each row that are not wanted, ids 0..I.
        tile: Items at a time.

    Returns:
        Ids and scores, best first; id 0 and minus infinity where fewer than k items are left.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least one item")
    queries, weight = queries.detach(), weight.detach()
    rows, items = row_item_pairs(exclude, len(queries))
    order = np.argsort(items, kind="stable")
    rows, items = rows[order], items[order]
    ids = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    best = torch.full((len(queries), k), -torch.inf, dtype=queries.dtype, device=queries.device)
    for first in range(0, len(weight), tile):
        scores = queries @ weight[first : first + tile].t()
        part = slice(*np.searchsorted(items, [first, first + scores.shape[1]]))
        scores[torch.as_tensor(rows[part]), torch.as_tensor(items[part] - first)] = -torch.inf
        if first == 0:
            scores[:, 0] = -torch.inf
        columns, values = _top_columns(scores, min(k, scores.shape[1]))
        # ids of earlier tiles are lower and stand first, so that a stable sort keeps them first
        merged, values = torch.cat([ids, columns + first], 1), torch.cat([best, values], 1)
        best, places = values.sort(dim=1, descending=True, stable=True)
        best, ids = best[:, :k], merged.gather(1, places[:, :k])
    return ids.masked_fill(best == -torch.inf, 0), best


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores by column."""
    values, columns = scores.topk(k, dim=1)
    # which of several columns that equal the k-th topk gives is up to the back end
    crowded = ((scores >= values[:, -1:]).sum(1) > k).nonzero()[:, 0]
    if len(crowded):
        ordered, order = scores[crowded].sort(dim=1, descending=True, stable=True)
        values[crowded], columns[crowded] = ordered[:, :k], order[:, :k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values
