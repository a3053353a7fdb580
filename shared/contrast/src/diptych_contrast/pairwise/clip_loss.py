"""CLIP: two modalities, each against all of the other."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    TemperatureLike,
    check_several,
    read_embeddings,
    read_options,
    read_scale,
    reduce_rows,
)
from diptych_contrast.dist import gather_with_grad
from diptych_contrast.kernel import log_sums
from diptych_contrast.statistics import (
    moments_between,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)


def clip_loss(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.07,
    **common: Unpack[Common],
) -> LossResult:
    """Symmetric cross-entropy between two modalities (Radford et al., 2021, CLIP).

    Half the sum of row and column cross-entropy: the mean over pairs i of
    ``(log sum_j exp(s_ij / t) + log sum_j exp(s_ji / t)) / 2 - s_ii / t``, s the cosine
    similarity of ``x_i`` and ``y_j``. One sweep gives both sums.

    Args:
        x: First modality, shape (n, d), n >= 2.
        y: Second modality of the same samples, shape (n, d).
        temperature: t > 0; number, 0-dim tensor, or `Temperature(0.07, learnable=True)` as in the
            paper.
        **common: See `Common`.

    Returns:
        Shape (), or (n,) with ``reduction="none"``; with ``return_info`` also `PairInfo`.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a single pair.

    Example:
        >>> round(clip_loss(torch.ones(4, 8), torch.ones(4, 8)).exp().item())
        4
    """
    options = read_options("clip_loss", common)
    first, second = read_embeddings(options, x=x, y=y).unbind(0)
    check_several(options, "x", x)
    scale = read_scale(options, temperature, first)
    score = (first * second).sum(1)
    positive = score * scale
    lse, peak = both_sums(options, first, second, scale)
    loss = reduce_rows(options, lse.view(2, -1).mean(0) - positive, None)
    if not options.return_info:
        return loss
    doubled, positives = positive.detach().repeat(2), moments_of(score)
    info = pair_info(
        rows=len(first),
        valid=None,
        zero_rows=(x == 0).all(1).sum() + (y == 0).all(1).sum(),
        positives=positives,
        negatives=moments_between(first, second) - positives,
        # Every negative pair stands in one row and in one column.
        negative_lse=subtract_exp(lse, doubled) - math.log(2.0),
        hits=reaches(doubled, peak).view(2, -1).all(0),
        peak=peak,
        scale=scale,
    )
    return loss, info


def both_sums(options: Options, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of rows, then of columns, shape (2n,), and the largest scores alike."""
    peak = options.return_info
    if options.group is None:
        lse, top = log_sums(x, y, scale, ("any",), both=True, peak=peak, engine=options.engine)
        return lse.flatten(), top.flatten()
    sides = []
    for rows, others in ((x, y), (y, x)):
        columns = others if options.ring else gather_with_grad(others, options.group)
        sides.append(log_sums(rows, columns, scale, ("any",), peak=peak, engine=options.engine))
    (lse, top), (other, other_top) = sides
    return torch.cat([lse[0], other[0]]), torch.cat([top.flatten(), other_top.flatten()])
