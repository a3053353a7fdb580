"""Losses over two or more views of each sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    Parity,
    TemperatureLike,
    Views,
    read_options,
)
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice
from diptych_contrast.kernel import log_sums, products, unit_rows
from diptych_contrast.pairwise.sup_con import class_contrast


def nt_xent_multi(
    views: Views, temperature: TemperatureLike = 0.5, **common: Unpack[Common]
) -> LossResult:
    """NT-Xent for two or more views (Chen et al., 2020; Khosla et al., 2020).

    ``log sum_{a != i} exp(s_ia / t) - mean_p s_ip / t`` for an embedding i, p over the other views
    of the same sample: SupCon with the sample as the class; with two views `nt_xent`.
    """
    options = read_options("nt_xent_multi", common)
    stacked = _several(options, views)
    scale = options.scale(temperature, stacked)
    classes = options.sample_ids(stacked[0]).repeat(len(stacked))
    loss, info = class_contrast(options, stacked.flatten(0, 1), classes, scale, mode="out")
    return loss if info is None else (loss, info)


def mv_info_nce(
    views: Views,
    temperature: TemperatureLike = 0.5,
    *,
    same_view_negatives: bool = False,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """InfoNCE over all pairs of views at once (Koromilas et al., 2025, MV-InfoNCE).

    ``log sum_{l, m != l, j} exp(u_il.u_jm / t) - log sum_{l != m} exp(u_il.u_im / t)`` for a sample
    i, u_il its view l, j over all samples. The authors' code counts pairs within a view as well;
    the paper and our default leave them out.

    Args:
        same_view_negatives: Also contrast samples within a view: all pairs but each with itself.

    Example:
        >>> round(mv_info_nce(torch.ones(3, 4, 8)).exp().item())
        4
    """
    options, stacked, scale = _read("mv_info_nce", views, temperature, common, parity)
    within = same_view_negatives or parity == "official"
    lse = _log_sums(options, stacked, scale, "not_self" if within else "other_view")
    positive = _sibling_scores(stacked, scale).flatten(0, 1).logsumexp(0)
    return options.reduce(lse.logsumexp(0) - positive, None)


def mv_dhel(
    views: Views,
    temperature: TemperatureLike = 0.5,
    *,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Decoupled hyperspherical energy over views (Koromilas et al., 2025, MV-DHEL).

    ``sum_l log sum_{j != i} exp(u_il.u_jl / t) - log sum_{l != m} exp(u_il.u_im / t)`` for a sample
    i: samples repel within each view, views of a sample attract. The authors' code multiplies the v
    sums, which overflows from some 9 views on, and counts each pair of views once, a constant
    log 2; ours adds logarithms, with parity the log 2 too.

    Example:
        >>> round((mv_dhel(torch.ones(2, 4, 8), 1.0) - 1).exp().item(), 3)
        4.5
    """
    options, stacked, scale = _read("mv_dhel", views, temperature, common, parity)
    sweeps = [_log_sums(options, view[None], scale, "not_self") for view in stacked]
    lse = torch.cat(sweeps)
    # Without a second sample in any process nothing repels.
    valid = None if options.group is None else (lse != -torch.inf).all(0)
    rows = lse.sum(0) - _sibling_scores(stacked, scale).flatten(0, 1).logsumexp(0)
    return options.reduce(rows + (math.log(2.0) if parity == "official" else 0.0), valid)


def poly_view(
    views: Views,
    temperature: TemperatureLike = 0.5,
    *,
    aggregate: Literal["geometric", "arithmetic", "sufficient"] = "geometric",
    **common: Unpack[Common],
) -> LossResult:
    """Contrast a view with each other view or with their mean (Shidani et al., 2024, PVC).

    The mean over b of ``l_iab = log(exp(s_ia,ib / t) + sum_{j != i, m} exp(s_ia,jm / t))
    - s_ia,ib / t`` for view a of sample i and its other views b (``geometric``),
    ``-log mean_b exp(-l)`` (``arithmetic``), or l with the mean of the other views' unit vectors as
    the one positive (``sufficient``). With two views all equal `nt_xent`.

    Example:
        >>> round(poly_view(torch.ones(3, 4, 8)).exp().item())
        10
    """
    options, stacked, scale = _read("poly_view", views, temperature, common)
    check_choice("poly_view", "aggregate", aggregate, "geometric", "arithmetic", "sufficient")
    negatives = _log_sums(options, stacked, scale, "~same_id")
    positives = _sibling_scores(stacked, scale)
    if aggregate == "sufficient":
        positives = positives.mean(1, keepdim=True)
    # log(exp(positive) + exp(negatives)) - positive; float64 shows the default threshold of 20.
    pairs = F.softplus(negatives[:, None] - positives, threshold=40)
    if aggregate == "arithmetic":
        rows = math.log(pairs.shape[1]) - (-pairs).logsumexp(1)
    else:
        rows = pairs.mean(1)
    return options.reduce(rows, None)


def pairwise_views(loss: Callable[..., Tensor], views: Views, **arguments: Any) -> Tensor:
    """Mean of a two-view loss, given its arguments, over the v (v - 1) / 2 pairs of views (PWE)."""
    stacked = _several(_outer("pairwise_views", {**arguments, "normalize": False}), views)
    pairs = torch.combinations(torch.arange(len(stacked))).tolist()
    return torch.stack([loss(stacked[a], stacked[b], **arguments) for a, b in pairs]).mean(0)


def average_views(
    loss: Callable[..., Tensor], views: Views, *, parity: Parity = None, **arguments: Any
) -> Tensor:
    """Mean over views of a two-view loss between a view and the mean of the others.

    The mean of the others' unit vectors is brought to length 1 again; the authors of MV-DHEL, who
    compare with this loss, leave it short. For parity the loss has to take ``normalize``.
    """
    options = _outer("average_views", arguments, parity)
    stacked = _several(options, views)
    means = (stacked.sum(0) - stacked) / (len(stacked) - 1)
    if parity == "official":
        arguments = {**arguments, "normalize": False}
    elif options.normalize:
        means = unit_rows(means.flatten(0, 1)).view(stacked.shape)
    pairs = zip(stacked, means, strict=True)
    return torch.stack([loss(view, mean, **arguments) for view, mean in pairs]).mean(0)


def _outer(function: str, arguments: dict[str, Any], parity: Parity = None) -> Options:
    """The two common arguments that a mean of losses reads itself."""
    words = {word: arguments[word] for word in ("normalize", "return_info") if word in arguments}
    return read_options(function, cast(Common, words), "return_info", parity=parity)


def _several(options: Options, views: Views) -> Tensor:
    stacked = options.views("views", views)
    if len(stacked) < 2:
        raise ContrastInputError(options.function, "views", "is one view", "pass two or more")
    return stacked


def _read(
    function: str, views: Views, temperature: TemperatureLike, common: Common, parity: Parity = None
) -> tuple[Options, Tensor, Tensor]:
    options = read_options(function, common, "return_info", parity=parity)
    stacked = _several(options, views)
    if stacked.shape[1] < 2 and options.group is None:
        raise ContrastInputError(function, "views", "has one sample", "pass at least two samples")
    return options, stacked, options.scale(temperature, stacked)


def _log_sums(options: Options, views: Tensor, scale: Tensor, mask: str) -> Tensor:
    """Log-sum-exp of every view of every sample over the pairs of a mask, shape (v, n)."""
    count, n = views.shape[:2]
    rows = views.flatten(0, 1)
    sample = options.sample_ids(views[0]).repeat(count)
    view = torch.arange(count, device=rows.device).repeat_interleave(n)
    columns, keys = options.columns(rows, sample, view)
    plain = columns is None and mask == "not_self"  # positions suffice, and are faster
    used = None if plain else keys
    lse, _ = log_sums(rows, columns, scale, (mask,), keys=used, engine=options.engine)
    return lse.view(count, n)


def _sibling_scores(views: Tensor, scale: Tensor) -> Tensor:
    """Scores of every view with the other views of its sample, shape (v, v - 1, n)."""
    count, n = views.shape[:2]
    samples = views.transpose(0, 1)
    scores = products(samples, samples.transpose(1, 2)) * scale
    # Behind the first, every entry of the diagonal ends a run of v + 1.
    runs = scores.permute(1, 2, 0).reshape(count * count, n)[1:].view(count - 1, count + 1, n)
    return runs[:, :-1].reshape(count, count - 1, n)
