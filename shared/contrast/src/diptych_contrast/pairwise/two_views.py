"""Two views of a sample against all other embeddings: NT-Xent, decoupled, with hard negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    Parity,
    TemperatureLike,
    read_options,
)
from diptych_contrast.dist import gather_sizes, gather_with_grad
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice, check_least, check_positive, check_share
from diptych_contrast.kernel import log_sums
from diptych_contrast.kernel.call import call
from diptych_contrast.kernel.tiles import SAFE_EXPONENT
from diptych_contrast.pairwise.small import SmallViews, is_small, small_info
from diptych_contrast.statistics import (
    PairInfo,
    moments_between,
    moments_matching,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)

Directions = Literal["mean", "sum"]
Weight = Float[Tensor, " n"] | Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]


def nt_xent(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.5,
    *,
    ids: Int[Tensor, " n"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Normalised temperature-scaled cross-entropy (Chen et al., 2020, SimCLR).

    ``log sum_{j != i} exp(s_ij / t) - s_ii' / t`` for all 2n embeddings i, i' the other view of i.

    Args:
        ids: Rows of equal id (windows of one trial, scans of one patient) are no negatives of each
            other, shape (n,).
        labels: The same for rows of equal label.

    Example:
        >>> z = torch.ones(4, 8)
        >>> round(nt_xent(z, z).exp().item())
        7
    """
    options = read_options("nt_xent", common)
    views = _read(options, z1, z2, temperature, ids, labels)
    lse = views.lse
    if views.valid is not None:
        lse = torch.logaddexp(lse.masked_fill(~views.valid, 0.0), views.positive)
    loss = options.reduce(lse - views.positive, views.valid)
    return (loss, _tell(options, views)) if options.return_info else loss


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
    """Decoupled contrastive loss (Yeh et al., 2022, equation 6, DCL).

    ``log sum_{j not in {i, i'}} exp(s_ij / t) - w_i s_ii' / t`` for all 2n embeddings i, i' the
    other view of i, j over both views.

    Args:
        weight: w of each sample, or a function of the scores s_ii'.
        ids: Rows of equal id are no negatives of each other.
        reduction_directions: ``sum`` adds the two directions instead of averaging them.
        parity: The authors do not normalise, add the directions, and let the pair itself in at
            ``log(1e-45)``.

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
    """`dcl` that weighs close positives down (Yeh et al., 2022, equation 7, DCLW).

    `dcl` with ``w_i = 2 - exp(s_ii' / sigma) / mean_l exp(s_ll' / sigma)``.
    The weights are constants with ``detach_weights``, but not in the authors' code.
    """
    check_positive("dclw", sigma=sigma)
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
    # The authors' code takes embeddings as they are.
    given: Common = {**common, "normalize": False} if parity else common
    options = read_options(function, given, parity=parity)
    views = _read(options, z1, z2, temperature, ids, None, decoupled=True)
    lse, pull, valid = views.lse, views.positive, views.valid
    if valid is not None:
        lse = lse.masked_fill(~valid, 0.0)
    if parity == "official":
        own = views.z.square().sum(1).view_as(lse) * views.scale
        hidden = torch.stack([own, pull.expand_as(lse)]) + math.log(1e-45)
        lse = torch.logsumexp(torch.cat([lse[None], hidden]), 0)
    if weight is not None:
        weights = weight if isinstance(weight, Tensor) else weight(pull / views.scale)
        if weights.shape != pull.shape:
            found = f"has shape {tuple(weights.shape)} for {len(pull)} samples"
            raise ContrastInputError(function, "weight", found, "give one weight for each sample")
        pull = pull * weights.to(pull.dtype)
    loss = options.reduce(lse - pull, valid)
    loss = loss * 2 if parity == "official" or reduction_directions == "sum" else loss
    return (loss, _tell(options, views)) if options.return_info else loss


class _Views(NamedTuple):
    """Both views against all embeddings.

    Attributes:
        lse: Log-sum-exp over the denominators, shape (2, n), minus infinity where there are none.
        positive: Score of a sample's views times the scale, shape (n,).
        valid: Rows with a negative, shape (2, n); None where all have.
        z: Prepared embeddings, shape (2n, d).
        scale: ``1/temperature``.
        apart: Keys of rows that are no negatives of each other, shape (2n,).
        own: Whether the denominators hold the positive.
        peak: Largest scores over the denominators times the scale, 2n values, where told.
        norm: Length of all base-2 exponents as one vector, where one tile holds them all.
    """

    lse: Tensor
    positive: Tensor
    valid: Tensor | None
    z: Tensor
    scale: Tensor
    apart: list[Tensor]
    own: bool
    peak: Tensor
    norm: Tensor | None = None


def _read_small(options: Options, z1: Tensor, z2: Tensor, scale: Tensor, decoupled: bool) -> _Views:
    def again(x: Tensor, y: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        tiled = replace(options, backend="tiled")
        return _read(tiled, x, y, beta.reciprocal(), None, None, decoupled=decoupled)[:2]

    told = options.return_info
    lse, positive, z, peak, norm = call(SmallViews, z1, z2, scale, decoupled, told, again)
    return _Views(lse, positive, None, z, scale, [], not decoupled, peak, norm)


def _read(
    options: Options,
    z1: Tensor,
    z2: Tensor,
    temperature: TemperatureLike,
    ids: Tensor | None,
    labels: Tensor | None,
    *,
    decoupled: bool = False,
) -> _Views:
    if ids is None and labels is None and is_small(options, z1, z2):
        options.check(2, z1=z1, z2=z2)
        scale = options.scale(temperature, z1)
        if scale.item() + math.log(2 * len(z1)) <= SAFE_EXPONENT[z1.dtype]:
            return _read_small(options, z1, z2, scale, decoupled)
    stacked = options.embeddings(2, z1=z1, z2=z2)
    scale = options.scale(temperature, stacked)
    if ids is not None:
        ids = options.labels("ids", ids, z1, lowest=None).repeat(2)
    if labels is not None:
        labels = options.labels("labels", labels, z1, lowest=0).repeat(2)
    apart = [key for key in (ids, labels) if key is not None]
    first, second = stacked.unbind(0)
    z = stacked.flatten(0, 1)
    words = ["~same_id"] if decoupled or ids is not None else []
    words += ["~same_label"] if labels is not None else []
    columns, keys = None, None
    if words or options.group is not None:
        own = options.sample_ids(z1).repeat(2) if words else options.sample_ids(z)
        columns, keys = options.columns(z, own if ids is None else ids, label=labels)
    mask = " & ".join(words) or "not_self"
    peak, engine = options.return_info, options.engine
    lse, top = log_sums(z, columns, scale, (mask,), keys=keys, peak=peak, engine=engine)
    lse = lse.view(2, -1)
    valid = lse != -torch.inf if apart else None
    positive = (first * second).sum(1) * scale
    return _Views(lse, positive, valid, z, scale, apart, not words, top)


def _tell(options: Options, views: _Views) -> PairInfo:
    """Statistics of the rows of this process against the columns of all."""
    if views.norm is not None:
        return small_info(*views[:2], views.z, views.scale, views.own, views.peak, views.norm)
    z, n = views.z.detach(), len(views.positive)
    lse, positive = views.lse.detach(), views.positive.detach()
    every, positives = options.of_all(z), 2 * moments_of(positive / views.scale.detach())
    negatives = moments_between(z, every)
    if not views.apart:
        negatives = negatives - moments_of(z.square().sum(1)) - positives
    keys = [*views.apart, torch.stack(views.apart, 1)] if len(views.apart) == 2 else views.apart
    for key, sign in zip(keys, (-1, -1, 1), strict=False):  # what both take away comes back once
        negatives = negatives + sign * moments_matching(z, key, every, options.of_all(key))
    peak = torch.maximum(views.peak.view(2, n), positive)
    return pair_info(
        embeddings=(z,),
        valid=views.valid,
        positives=positives,
        negatives=negatives,
        negative_lse=subtract_exp(lse, positive) if views.own else lse,
        hits=reaches(positive, peak),
        peak=peak,
        scale=views.scale,
    )


def hcl(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    **common: Unpack[Common],
) -> LossResult:
    """Contrast with hard negatives weighed up (Robinson et al., 2021, HCL).

    ``-log(exp(p) / (exp(p) + G))`` for all 2n embeddings, with ``p = s_pos / t``, over the
    m = 2n - 2 embeddings j of other samples
    ``G = max((sum_j w_j exp(s_j / t) - m tau_plus exp(p)) / (1 - tau_plus), m exp(-1 / t))``,
    ``w_j = m exp(beta s_j / t) / sum_l exp(beta s_l / t)``.
    Beta, >= 0, says how much close negatives count (0: `debiased`), tau_plus, in [0, 1), which
    share of the negatives is of the same class.
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
    options = read_options(function, common, "return_info")
    check_least(function, 0, beta=beta)
    check_share(function, "tau_plus", tau_plus)
    stacked = options.embeddings(2, z1=z1, z2=z2)
    scale = options.scale(temperature, stacked)
    positive = (stacked[0] * stacked[1]).sum(1).mul(scale).repeat(2)
    z = stacked.flatten(0, 1)
    columns, keys = options.columns(z, options.sample_ids(z1).repeat(2))
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
    return options.reduce(torch.logaddexp(positive, negatives.maximum(floor)) - positive, None)
