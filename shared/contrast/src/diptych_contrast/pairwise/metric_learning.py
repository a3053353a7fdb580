"""Losses of metric learning: margins, multi-similarity, N-pairs, circle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.common import Common, LossResult, TemperatureLike, read_options
from diptych_contrast.inputs import check_choice, check_positive
from diptych_contrast.kernel import log_sums, products
from diptych_contrast.rowwise import LOCAL, by_rows

# Losses of rows from their scores (r, n), their squared distances alike, positives and negatives.
_Rows = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def contrastive_margin(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    margin: float = 1.0,
    *,
    distance: Literal["euclid", "cosine"] = "euclid",
    **common: Unpack[Common],
) -> LossResult:
    """Contrastive loss with a margin (Hadsell et al., 2006, equation 4, without the halves).

    ``mean_p d_ip^2 + mean_n relu(margin - d_in)^2`` over the positives p, the other rows of the
    label, and the negatives n; d is ``|z_i - z_j|`` or ``1 - s_ij``.

    Example:
        >>> contrastive_margin(torch.eye(4), torch.tensor([0, 0, 1, 1])).item()
        2.0
    """
    check_positive("contrastive_margin", margin=margin)
    check_choice("contrastive_margin", "distance", distance, "euclid", "cosine")

    def rows(s: Tensor, square: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if distance == "euclid":
            # The root has no derivative at 0; equal rows get the gradient 0.
            apart = square > 8 * torch.finfo(square.dtype).eps
            d = square.masked_fill(~apart, 1.0).sqrt().masked_fill(~apart, 0.0)
        else:
            d = 1.0 - s
        pull = (square if distance == "euclid" else d.square()).masked_fill(~positive, 0.0)
        push = (margin - d).relu().square().masked_fill(~negative, 0.0)
        counts = [mask.sum(1).clamp_min(1) for mask in (positive, negative)]
        return pull.sum(1) / counts[0] + push.sum(1) / counts[1]

    return _labelled("contrastive_margin", z, labels, rows, common)


def multi_similarity(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    eps: float = 0.1,
    **common: Unpack[Common],
) -> LossResult:
    """Multi-similarity loss (Wang et al., 2019, equations 11 to 13).

    ``log(1 + sum_p exp(-alpha (s_ip - base))) / alpha +
    log(1 + sum_n exp(beta (s_in - base))) / beta`` over the negatives with
    ``s_in > min_p s_ip - eps`` and the positives with ``s_ip < max_n s_in + eps``.
    alpha and beta, > 0, are the sharpness of positives and negatives, base the score that parts
    them, eps the slack of the choice (infinity keeps all).
    """
    check_positive("multi_similarity", alpha=alpha, beta=beta)

    def rows(s: Tensor, _: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        fixed = s.detach()
        easiest = fixed.masked_fill(~positive, torch.inf).amin(1, keepdim=True) - eps
        hardest = fixed.masked_fill(~negative, -torch.inf).amax(1, keepdim=True) + eps
        # "not at least" instead of "less": a score that is no number is kept, and shows
        pull = _log_one_plus(-alpha * (s - base), positive & ~(fixed >= hardest))
        push = _log_one_plus(beta * (s - base), negative & ~(fixed <= easiest))
        return pull / alpha + push / beta

    return _labelled("multi_similarity", z, labels, rows, common)


def circle(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    m: float = 0.25,
    gamma: float = 256.0,
    **common: Unpack[Common],
) -> LossResult:
    """Circle loss (Sun et al., 2020, equations 4 to 8).

    ``log(1 + sum_n exp(gamma a_n (s_n - m)) sum_p exp(-gamma a_p (s_p - 1 + m)))`` with the
    constant weights ``a_p = relu(1 + m - s_p)`` and ``a_n = relu(s_n + m)``. m relaxes: positives
    aim at ``1 - m``, negatives at m; gamma, > 0, is the scale.
    """
    check_positive("circle", gamma=gamma)

    def rows(s: Tensor, _: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        fixed = s.detach()
        pull = -gamma * (1 + m - fixed).relu() * (s - (1 - m))
        push = gamma * (fixed + m).relu() * (s - m)
        return F.softplus(_log_sum(pull, positive) + _log_sum(push, negative), threshold=40)

    return _labelled("circle", z, labels, rows, common)


def n_pairs(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 1.0,
    *,
    labels: Int[Tensor, " n"] | None = None,
    l2: float = 0.0,
    **common: Unpack[Common],
) -> LossResult:
    """N-pairs loss (Sohn, 2016, equations 4 and 7).

    ``log(1 + sum_j exp((s_ij - s_ii) / t))`` for an anchor i, over the positives j of the other
    samples, those of equal label left out. The paper's form is ``normalize=False, l2=0.02``, l2 the
    weight of the mean squared length of anchor and positive.

    Example:
        >>> round(n_pairs(torch.ones(4, 8), torch.ones(4, 8)).exp().item())
        4
    """
    options = read_options("n_pairs", common, "return_info")
    first, second = options.embeddings(2, z1=z1, z2=z2).unbind(0)
    scale = options.scale(temperature, first)
    keys = options.sample_ids(z1)
    if labels is not None:
        keys = options.labels("labels", labels, z1, lowest=0)
    columns, mask = options.columns(second, keys)
    if columns is None:
        columns, mask = second, replace(mask, col_id=keys)
    lse, _ = log_sums(first, columns, scale, ("~same_id",), keys=mask, engine=options.engine)
    valid = lse[0] != -torch.inf
    gap = lse[0].masked_fill(~valid, 0.0) - (first * second).sum(1) * scale
    rows = F.softplus(gap, threshold=40)
    if l2:
        rows = rows + l2 * (first.square().sum(1) + second.square().sum(1)) / 2
    return options.reduce(rows, None if labels is None else valid)


def _labelled(function: str, z: Tensor, labels: Tensor, rows: _Rows, common: Common) -> Tensor:
    """Reduce a loss of rows against all others, block by block."""
    options = read_options(function, common, *LOCAL)
    unit = options.embeddings(z=z)[0]
    labels = options.labels("labels", labels, unit, lowest=0)
    position = torch.arange(len(unit), device=unit.device)
    length = unit.square().sum(1)

    def block(part: Tensor, long: Tensor, own: Tensor, at: Tensor, *columns: Tensor) -> Tensor:
        s = products(part, columns[0].t())
        square = (long[:, None] + columns[1] - 2.0 * s).clamp_min(0.0)
        same = own[:, None] == labels
        positive = same & (at[:, None] != position)
        valid = positive.any(1) & ~same.all(1)
        return torch.stack([rows(s, square, positive, ~same), valid.to(s.dtype)], 1)

    keyed = (unit, length, labels, position)
    losses, valid = by_rows(block, keyed, (unit, length), 8 * len(unit), options).unbind(1)
    return options.reduce(losses, valid > 0)


def _log_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the pairs of a mask; rows without any stay finite."""
    none = ~mask.any(1, keepdim=True)
    return exponents.masked_fill(~mask & ~none, -torch.inf).masked_fill(none, 0.0).logsumexp(1)


def _log_one_plus(exponents: Tensor, mask: Tensor) -> Tensor:
    hidden = exponents.masked_fill(~mask, -torch.inf)
    return torch.cat([hidden, torch.zeros_like(hidden[:, :1])], 1).logsumexp(1)
