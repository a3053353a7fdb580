"""NT-Xent without the positive in the denominator: DCL and DCLW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    TemperatureLike,
    check_choice,
    check_several,
    read_embeddings,
    read_labels,
    read_options,
    read_scale,
    reduce_rows,
    sample_ids,
)
from diptych_contrast.dist import gather_with_grad
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_positive
from diptych_contrast.pairwise.nt_xent import denominators, negative_moments
from diptych_contrast.statistics import moments_of, pair_info, reaches

Directions = Literal["mean", "sum"]
Parity = Literal["official"] | None
Weight = Float[Tensor, " n"] | Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]


def dcl(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.1,
    weight: Weight | None = None,
    *,
    ids: Int[Tensor, " n"] | None = None,
    reduction_directions: Directions = "mean",
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Decoupled contrastive loss (Yeh et al., 2022, equation 6).

    The mean over all 2n embeddings i, with i' the other view of i, of
    ``log sum_{j not in {i, i'}} exp(s_ij / t) - w_i s_ii' / t``, j over both views.

    Args:
        z1: First view, shape (n, d), n >= 2.
        z2: Second view of the same samples in the same order, shape (n, d).
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        weight: w of each sample, shape (n,), or a function of the scores s_ii', shape (n,).
        ids: Rows of equal id are no negatives of each other, shape (n,).
        reduction_directions: ``sum`` adds the two directions instead of averaging them.
        parity: ``official``: as the authors' code, without normalisation, directions added, and
            the pair itself let in at ``log(1e-45)``.
        **common: See `Common`.

    Returns:
        Shape (), or (2n,) view-major with ``reduction="none"``; with ``return_info`` also
        `PairInfo`.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a single sample.

    Example:
        >>> z = torch.ones(4, 8)
        >>> round(dcl(z, z).exp().item())
        6
    """
    return _decoupled("dcl", z1, z2, temperature, weight, ids, reduction_directions, parity, common)


def dclw(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.1,
    *,
    ids: Int[Tensor, " n"] | None = None,
    sigma: float = 0.5,
    detach_weights: bool = True,
    reduction_directions: Directions = "mean",
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """`dcl` that weighs close positives down (Yeh et al., 2022, equation 7).

    ``w_i = 2 - exp(s_ii' / sigma) / mean_l exp(s_ll' / sigma)``.

    Args:
        z1: First view, shape (n, d), n >= 2.
        z2: Second view of the same samples in the same order, shape (n, d).
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        ids: As for `dcl`.
        sigma: Sharpness of the weights, > 0.
        detach_weights: Take the weights as constants; the authors' code differentiates them, and
            so does ``parity="official"``.
        reduction_directions: As for `dcl`.
        parity: As for `dcl`.
        **common: See `Common`.

    Returns:
        As `dcl`.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a single sample.

    Example:
        >>> z = torch.ones(4, 8)
        >>> torch.allclose(dclw(z, z), dcl(z, z))
        True
    """
    check_positive("dclw", "sigma", sigma)
    group = common.get("group")

    def weight(score: Tensor) -> Tensor:
        score = (score.detach() if detach_weights and parity is None else score) / sigma
        every = score if group is None else gather_with_grad(score, group)
        return 2.0 - (score - every.logsumexp(0)).exp() * len(every)

    return _decoupled(
        "dclw", z1, z2, temperature, weight, ids, reduction_directions, parity, common
    )


def _decoupled(
    function: str,
    z1: Tensor,
    z2: Tensor,
    temperature: TemperatureLike,
    weight: Weight | None,
    ids: Tensor | None,
    reduction_directions: Directions,
    parity: Parity,
    common: Common,
) -> LossResult:
    check_choice(function, "reduction_directions", reduction_directions, "mean", "sum")
    check_choice(function, "parity", parity, None, "official")
    # The authors' code takes embeddings as they are.
    options = read_options(function, {**common, "normalize": False} if parity else common)
    stacked = read_embeddings(options, z1=z1, z2=z2)
    check_several(options, "z1", z1)
    scale = read_scale(options, temperature, stacked)
    first, second = stacked.unbind(0)
    z = stacked.flatten(0, 1)
    score = (first * second).sum(1)
    positive = (score * scale).repeat(2)
    valid: Tensor | None = None
    if ids is not None:
        ids = read_labels(options, "ids", ids, z1, lowest=None)
    sample = sample_ids(options, z1) if ids is None else ids
    lse, peak = denominators(options, z, scale, sample, None)
    if ids is not None:  # a row may be left without negatives
        valid = lse > -torch.inf
        lse = lse.masked_fill(~valid, 0.0)
    if parity == "official":
        hidden = torch.stack([z.square().sum(1) * scale, positive]) + math.log(1e-45)
        lse = torch.logsumexp(torch.cat([lse[None], hidden]), 0)
    pull = positive if weight is None else positive * _weights(options, weight, score).repeat(2)
    loss = reduce_rows(options, lse - pull, valid)
    loss = loss * 2 if parity == "official" or reduction_directions == "sum" else loss
    if not options.return_info:
        return loss
    peak = torch.maximum(peak, positive)
    info = pair_info(
        rows=len(z),
        valid=valid,
        zero_rows=(z == 0).all(1).sum(),
        positives=2 * moments_of(score),
        negatives=negative_moments(z, score, ids, None),
        negative_lse=lse,
        hits=reaches(positive, peak),
        peak=peak,
        scale=scale,
    )
    return loss, info


def _weights(options: Options, weight: Weight, score: Tensor) -> Tensor:
    weights = weight if isinstance(weight, Tensor) else weight(score)
    if weights.shape != score.shape:
        raise ContrastInputError(
            options.function,
            "weight",
            f"has shape {tuple(weights.shape)} for {len(score)} samples",
            "give one weight for each sample",
        )
    return weights.to(score.dtype)
