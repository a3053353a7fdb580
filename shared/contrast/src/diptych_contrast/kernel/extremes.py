"""Largest scores and expected costs of every row."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.inputs import check_choice
from diptych_contrast.kernel.api import Engine, check_engine, operands, pair_lse
from diptych_contrast.kernel.call import products
from diptych_contrast.kernel.masks import Masks, PairMask
from diptych_contrast.kernel.tiles import default_tile


def pair_max(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    mask: PairMask,
    largest: bool = True,
    *,
    tile: int | Literal["auto"] = "auto",
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Largest or smallest product of every row among the pairs that count.

    The gradient goes to that one pair. Among equal products the lowest column wins. Rows without
    pairs have the product minus (plus) infinity and the column -1.

    Example:
        >>> pair_max(torch.eye(3), torch.eye(3), PairMask(expr="any"))[1].tolist()
        [0, 1, 2]
    """
    check_engine("pair_max", Engine(tile=tile))
    a, b = operands("pair_max", a, b)
    size = default_tile() if tile == "auto" else tile
    masks = Masks(mask.expr, mask.keys(), (len(a), len(b)), size, a.device)
    sign = 1.0 if largest else -1.0
    with torch.no_grad():
        best = a.new_full((len(a),), -math.inf)
        index = torch.full((len(a),), -1, device=a.device)
        for i in range(0, len(a), size):
            rows = slice(i, min(i + size, len(a)))
            block = a[rows] * sign
            for j in range(0, len(b), size):
                cols = slice(j, min(j + size, len(b)))
                scores = masks.hide(products(block, b[cols].t()), 0, rows, cols, -math.inf)
                top = scores.amax(1)
                first = (scores == top[:, None]).to(torch.uint8).argmax(1)
                better = top > best[rows]
                best[rows] = torch.where(better, top, best[rows])
                index[rows] = torch.where(better, first + j, index[rows])
    value = (a * b[index.clamp_min(0)]).sum(1)
    return value.masked_fill(index < 0, -sign * math.inf), index


def pair_expect(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    beta: float | Tensor,
    kappa: float | Tensor,
    cost: Literal["score", "sqdist"] = "score",
    mask: PairMask | None = None,
    *,
    tile: int | Literal["auto"] = "auto",
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Softmax-weighted mean cost of every row, weights included in the gradient.

    With ``S_ij = beta a_i.b_j``: ``logZ_i = log sum_j mask(i, j) exp(kappa S_ij)`` and
    ``E_i = sum_j softmax_j(kappa S)_ij C_ij``, C the score S or the squared distance
    ``|a_i - b_j|^2``. The mean column is the derivative of ``logZ`` in the row, so one backward
    sweep gives E; both results can be differentiated once.

    Args:
        kappa: Sharpness of the weights, not 0; negative ones weigh low scores.
        mask: Which pairs count; None: all.

    Returns:
        ``logZ``, minus infinity in rows without pairs, and E, there 0.
    """
    check_choice("pair_expect", "cost", cost, "score", "sqdist")
    a, b = operands("pair_expect", a, b)
    mask = PairMask(expr="any") if mask is None else mask
    scale = torch.as_tensor(beta, dtype=a.dtype, device=a.device) * kappa
    with torch.enable_grad():
        # A last coordinate, 0 in the rows, carries the squared length of the columns.
        rows = torch.cat([a, torch.zeros_like(a[:, :1])], 1)
        columns = torch.cat([b, b.square().sum(1, keepdim=True)], 1)
        rows = rows if rows.requires_grad else rows.detach().requires_grad_()
        log_sum = pair_lse(rows, columns, scale, (mask.expr,), mask, tile=tile)[:, 0]
        (slope,) = torch.autograd.grad(log_sum.sum(), rows, create_graph=True)
    mean = slope / scale
    if cost == "score":
        return log_sum, (a * mean[:, :-1]).sum(1) * beta
    counts = log_sum != -math.inf
    expected = a.square().sum(1) + mean[:, -1] - 2.0 * (a * mean[:, :-1]).sum(1)
    return log_sum, expected.masked_fill(~counts, 0.0)
