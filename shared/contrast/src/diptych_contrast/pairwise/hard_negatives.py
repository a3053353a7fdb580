"""Losses that correct the sum of the negatives: debiased and hard-negative contrast."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.common import (
    Common,
    Keys,
    LossResult,
    TemperatureLike,
    check_several,
    decline,
    meet_columns,
    read_embeddings,
    read_options,
    read_scale,
    reduce_rows,
    sample_ids,
)
from diptych_contrast.dist import gather_sizes
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel import log_sums


def hcl(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    **common: Unpack[Common],
) -> LossResult:
    """Contrast with hard negatives weighed up (Robinson et al., 2021, HCL).

    With ``p = s_pos / t`` and the m = 2n - 2 embeddings j of other samples the mean over all 2n
    embeddings of ``-log(exp(p) / (exp(p) + G))``,
    ``G = max((sum_j w_j exp(s_j / t) - m tau_plus exp(p)) / (1 - tau_plus), m exp(-1 / t))``,
    ``w_j = m exp(beta s_j / t) / sum_l exp(beta s_l / t)``.

    Args:
        z1: First view, shape (n, d), n >= 2.
        z2: Second view of the same samples in the same order, shape (n, d).
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        beta: How much close negatives count, >= 0; 0 is `debiased`.
        tau_plus: Share of the negatives that are of the same class, in [0, 1).
        **common: See `Common`; ``return_info`` is refused.

    Returns:
        Shape (), or (2n,) view-major with ``reduction="none"``.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a single sample.

    Example:
        >>> z = torch.ones(4, 8)
        >>> round(hcl(z, z).exp().item())
        7
    """
    return _corrected("hcl", z1, z2, temperature, beta, tau_plus, common)


def debiased(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.5,
    tau_plus: float = 0.1,
    **common: Unpack[Common],
) -> LossResult:
    """Contrast corrected for negatives of the same class (Chuang et al., 2020, equation 8).

    `hcl` with ``beta = 0``: all negatives count alike.

    Args:
        z1: First view, shape (n, d), n >= 2.
        z2: Second view of the same samples in the same order, shape (n, d).
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        tau_plus: Share of the negatives that are of the same class, in [0, 1).
        **common: See `Common`; ``return_info`` is refused.

    Returns:
        Shape (), or (2n,) view-major with ``reduction="none"``.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a single sample.

    Example:
        >>> z = torch.ones(4, 8)
        >>> round(debiased(z, z).exp().item())
        7
    """
    return _corrected("debiased", z1, z2, temperature, 0.0, tau_plus, common)


def _corrected(
    function: str,
    z1: Tensor,
    z2: Tensor,
    temperature: TemperatureLike,
    beta: float,
    tau_plus: float,
    common: Common,
) -> Tensor:
    options = read_options(function, common)
    decline(options, "return_info")
    if not 0 <= beta < math.inf:
        raise ContrastInputError(function, "beta", f"is {beta}", "pass a finite number from 0 on")
    if not 0 <= tau_plus < 1:
        raise ContrastInputError(
            function, "tau_plus", f"is {tau_plus}", "pass a share from 0 to below 1"
        )
    stacked = read_embeddings(options, z1=z1, z2=z2)
    check_several(options, "z1", z1)
    scale = read_scale(options, temperature, stacked)
    positive = (stacked[0] * stacked[1]).sum(1).mul(scale).repeat(2)
    z = stacked.flatten(0, 1)
    columns, keys = meet_columns(options, z, Keys(sample_ids(options, z1).repeat(2)))
    samples = len(z1) if options.group is None else sum(gather_sizes(z1, options.group))
    log_m = math.log(2 * samples - 2)
    masks = ("~same_id",) * (2 if beta else 1)
    scales = torch.stack([(1 + beta) * scale, beta * scale]) if beta else scale
    lse, _ = log_sums(z, columns, scales, masks, keys=keys, engine=options.engine)
    total = lse[0] - lse[1] + log_m if beta else lse[0]
    negatives = total
    floor = log_m - scale
    if tau_plus:
        gap = positive + (log_m + math.log(tau_plus)) - total
        left = gap < 0
        # Where nothing is left the logarithm is taken of something harmless and thrown away.
        rest = torch.log(-torch.expm1(gap.masked_fill(~left, -1.0)))
        negatives = torch.where(left, total + rest - math.log1p(-tau_plus), floor)
    return reduce_rows(
        options, torch.logaddexp(positive, negatives.maximum(floor)) - positive, None
    )
