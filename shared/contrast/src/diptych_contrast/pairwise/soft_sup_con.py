"""Soft SupCon: positives weighted by how much two samples share."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.common import (
    Common,
    Keys,
    LossResult,
    Options,
    TemperatureLike,
    Views,
    check_device,
    meet_columns,
    read_options,
    read_scale,
    read_views,
    readable,
    reduce_rows,
    sample_ids,
    sum_over,
)
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel import log_sums
from diptych_contrast.statistics import (
    Moments,
    moments_between,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)

Factors = tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]


def soft_sup_con(
    z: Views,
    soft_labels: Float[Tensor, "n c"] | None = None,
    temperature: TemperatureLike = 0.07,
    *,
    weights: Factors | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Supervised contrastive loss with weighted positives.

    As `sup_con` in mode ``out``, but row i takes the weighted mean of ``s_ij / t`` with weights
    ``w_ij = u_i.v_j`` (``p_i.p_j`` for soft labels p), 1 for other views of the same sample, 0
    for itself, divided by their sum.

    Args:
        z: Embeddings, shape (n, d), or views of the same samples, shape (v, n, d).
        soft_labels: Non-negative class weights of each sample, shape (n, c), rows with a sum > 0.
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        weights: Non-negative factors (u, v) of the weights instead, each of shape (n, c).
        **common: See `Common`.

    Returns:
        Shape (), or (v n,) view-major with ``reduction="none"``; with ``return_info`` also
        `PairInfo`.

    Raises:
        ContrastInputError: Neither or both of ``soft_labels`` and ``weights``, or negative ones.

    Example:
        >>> z = torch.eye(4)
        >>> soft_sup_con(z, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), 1.0).exp().item()
        3.0
    """
    options = read_options("soft_sup_con", common)
    views = read_views(options, "z", z)
    scale = read_scale(options, temperature, views)
    u, v = _factors(options, soft_labels, weights, views)
    rows = views.flatten(0, 1)
    with torch.autocast(views.device.type, enabled=False):
        positive, valid = _weighted_scores(options, views, u, v)
    positive = positive * scale
    lse, peak = _denominators(options, rows, scale)
    valid = valid & (lse > -torch.inf)
    loss = reduce_rows(options, lse.masked_fill(~valid, 0.0) - positive, valid)
    if not options.return_info:
        return loss
    positives, best, rest = _siblings(views, lse.detach(), scale.detach())
    every = moments_between(rows, rows) - moments_of(rows.square().sum(1))
    info = pair_info(
        rows=len(rows),
        valid=valid,
        zero_rows=(rows == 0).all(1).sum(),
        positives=positives,
        negatives=every - positives,
        negative_lse=rest,
        hits=reaches(best, peak),
        peak=peak,
        scale=scale,
    )
    return loss, info


def _weighted_scores(
    options: Options, views: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean score of every row with its positives, and whether it has any."""
    count, rows = len(views), views.flatten(0, 1)
    sums = torch.cat([v.sum(0)[:, None] * count, v.t() @ views.sum(0)], 1)
    reached = (u @ sum_over(options, sums)).repeat(count, 1)
    own = (u * v).sum(1).repeat(count)
    # Pairs of one sample leave the product of factors and come back with weight 1.
    siblings = ((views.sum(0) - views) * views).sum(2).flatten()
    total = reached[:, 0] - count * own + (count - 1)
    score = (rows * reached[:, 1:]).sum(1) - own * (siblings + rows.square().sum(1)) + siblings
    # A sum of weights that is only rounding is none.
    valid = total > 1e-6 * (1.0 + reached[:, 0])
    return score / torch.where(valid, total, 1.0), valid


def _denominators(options: Options, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    columns, keys = None, None
    if options.group is not None:
        columns, keys = meet_columns(options, z, Keys(sample_ids(options, z)))
    peak, engine = options.return_info, options.engine
    lse, top = log_sums(z, columns, scale, ("not_self",), keys=keys, peak=peak, engine=engine)
    return lse.flatten(), top.flatten()


@torch.no_grad()
def _siblings(views: Tensor, lse: Tensor, scale: Tensor) -> tuple[Moments, Tensor, Tensor]:
    """Scores of the other views: moments, best of each row, and what they leave of the sums."""
    scores = torch.einsum("vnd,wnd->vnw", views, views)
    diagonal = torch.eye(len(views), dtype=torch.bool, device=views.device)[:, None]
    hidden = scores.masked_fill(diagonal, -torch.inf).flatten(0, 1)
    shown = scores[~diagonal.expand_as(scores)]
    best = hidden.amax(1) * scale
    part = torch.logsumexp(hidden * scale, 1)
    return moments_of(shown), best, subtract_exp(lse, part)


def _factors(
    options: Options, soft_labels: Tensor | None, weights: Factors | None, views: Tensor
) -> tuple[Tensor, Tensor]:
    if (soft_labels is None) == (weights is None):
        raise ContrastInputError(
            "soft_sup_con",
            "soft_labels",
            "and 'weights' are both given" if weights else "and 'weights' are both None",
            "pass one of them",
        )
    if weights is None:
        assert soft_labels is not None
        named = {"soft_labels": soft_labels}
    else:
        named = {"weights[0]": weights[0], "weights[1]": weights[1]}
    for name, value in named.items():
        if value.dim() != 2 or len(value) != views.shape[1] or not value.is_floating_point():
            raise ContrastInputError(
                "soft_sup_con",
                name,
                f"has shape {tuple(value.shape)} and dtype {value.dtype}",
                f"pass floating-point weights, one row for each of {views.shape[1]} samples",
            )
        check_device("soft_sup_con", name, value, "z", views)
        if not readable(value):
            continue
        wrong = (value < 0).any(1) | (value.sum(1) <= 0) if weights is None else (value < 0).any(1)
        if bool(wrong.any()):
            raise ContrastInputError(
                "soft_sup_con",
                name,
                f"is negative or sums to 0 in row {int(wrong.nonzero()[0])}",
                "pass non-negative rows with a positive sum",
            )
    factors = [value.to(views.dtype) for value in named.values()]
    return factors[0], factors[-1]
