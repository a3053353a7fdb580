"""SupCon: samples of a class are positives of each other, wholly or by how much they share."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    Parity,
    TemperatureLike,
    Views,
    read_options,
)
from diptych_contrast.errors import ContrastInputError, warn
from diptych_contrast.inputs import check_choice, check_device, check_shape, readable
from diptych_contrast.kernel import log_sums, products
from diptych_contrast.statistics import (
    Moments,
    PairInfo,
    moments_between,
    moments_matching,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)

Factors = tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]


def sup_con(
    z: Views,
    labels: Int[Tensor, " n"],
    temperature: TemperatureLike = 0.07,
    *,
    ids: Int[Tensor, " n"] | None = None,
    mode: Literal["out", "in"] = "out",
    base_temperature: float | None = None,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Supervised contrastive loss (Khosla et al., 2020, equations 2 and 3, SupCon).

    ``log D_i - mean_p s_ip / t`` (mode ``out``) or ``log D_i - log mean_p exp(s_ip / t)`` (``in``),
    ``D_i = sum_{a != i} exp(s_ia / t)``, p over the other rows of the label of i.

    Args:
        labels: -1 is unlabelled: its only positives are its own other views.
        ids: Sample of each row, where rows of one matrix are views of one sample.
        base_temperature: Multiply the loss by ``temperature / base_temperature``; the authors'
            code does with 0.07.

    Example:
        >>> sup_con(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0).exp().item()
        3.0
    """
    options = read_options("sup_con", common, parity=parity)
    check_choice("sup_con", "mode", mode, "out", "in")
    views = options.views("z", z)
    scale = options.scale(temperature, views)
    classes = _classes(options, views, labels, ids)
    rows = views.flatten(0, 1)
    loss, info = class_contrast(options, rows, classes, scale, mode=mode)
    base = 0.07 if parity == "official" and base_temperature is None else base_temperature
    if base is not None:
        loss = loss / (scale * base)
    return loss if info is None else (loss, info)


def _classes(options: Options, views: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
    """Give every row a key that its positives share; an unlabelled sample has its own."""
    labels = options.labels("labels", labels, views[0], lowest=-1)
    if ids is None:
        ids = options.sample_ids(views[0])
    else:
        ids = options.labels("ids", ids, views[0], lowest=None)
        if len(views) > 1 and readable(ids) and len(torch.unique(ids)) < len(ids):
            found = "holds an id twice in one view, so its positives are ambiguous"
            fix = "give every sample of a view its own id"
            warn(options.function, "ids", found, fix)
    # Even keys are classes, odd ones unlabelled samples.
    return torch.where(labels >= 0, 2 * labels, 2 * ids + 1).repeat(len(views))


def class_contrast(
    options: Options, z: Tensor, classes: Tensor, scale: Tensor, *, mode: str
) -> tuple[Tensor, PairInfo | None]:
    """Contrast rows of equal class, a key over all processes: reduced loss and statistics."""
    info = options.return_info
    index, counts = _enumerate(options, classes)
    n_positive = counts[index] - 1
    valid = n_positive > 0
    if readable(valid) and not bool(valid.any()):
        found = "has no two rows of one class"
        fix = "the loss is 0: sample several rows of each class, or pass a second view"
        warn(options.function, "labels", found, fix)
    masks = ["not_self"]
    if mode == "in":
        masks.append("same_label & not_self")
    if info:
        masks.append("~same_label")
    if options.group is None and masks == ["not_self"]:
        lse, peak = log_sums(z, None, scale, masks, engine=options.engine)
    else:
        columns, mask = options.columns(z, options.sample_ids(z), label=classes)
        lse, peak = log_sums(z, columns, scale, masks, keys=mask, peak=info, engine=options.engine)
    divisor = n_positive.clamp_min(1).to(z.dtype)
    if mode == "in":
        positive = lse[1].masked_fill(~valid, 0.0) - divisor.log()
    else:
        own = torch.zeros(len(counts), z.shape[1], dtype=z.dtype, device=z.device)
        sums = options.total(own.index_add(0, index, z))
        positive = (z * (sums[index] - z)).sum(1) * scale / divisor
    # A lone row has no denominator.
    loss = options.reduce(lse[0].masked_fill(~valid, 0.0) - positive, valid)
    if not info:
        return loss, None
    z = z.detach()
    others = options.of_all(z)
    same = moments_matching(z, classes, others, options.of_all(classes))
    return loss, pair_info(
        embeddings=(z,),
        valid=valid,
        positives=same - moments_of(z.square().sum(1)),
        negatives=moments_between(z, others) - same,
        negative_lse=lse[-1],
        hits=peak[0] > peak[-1],
        peak=peak[0],
        scale=scale,
    )


def _enumerate(options: Options, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Number the classes over all processes; give the number of each row and the class sizes."""
    every = options.of_all(classes)
    # Sorting instead of `unique` keeps all shapes fixed, as compiling needs.
    ordered, order = every.sort()
    steps = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    number = torch.empty_like(steps).scatter(0, order, steps)
    counts = torch.zeros_like(steps).index_add(0, number, torch.ones_like(number))
    if options.group is None:
        return number, counts
    return steps[torch.searchsorted(ordered, classes)], counts[: int(steps[-1]) + 1]


def soft_sup_con(
    z: Views,
    soft_labels: Float[Tensor, "n c"] | None = None,
    temperature: TemperatureLike = 0.07,
    *,
    weights: Factors | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Supervised contrastive loss with weighted positives (Khosla et al., 2020; weights as BaCon).

    ``log sum_{a != i} exp(s_ia / t) - sum_j w_ij s_ij / t / sum_j w_ij``, ``w_ij = u_i.v_j``
    (``p_i.p_j`` for soft labels p), 1 for other views of the same sample, 0 for itself.

    Args:
        soft_labels: Non-negative class weights of each sample, rows with a sum > 0.
        weights: Non-negative factors (u, v) of the weights instead.

    Example:
        >>> z = torch.eye(4)
        >>> soft_sup_con(z, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), 1.0).exp().item()
        3.0
    """
    options = read_options("soft_sup_con", common)
    views = options.views("z", z)
    scale = options.scale(temperature, views)
    u, v = _factors(options, soft_labels, weights, views)
    rows = views.flatten(0, 1)
    positive, valid = _weighted_scores(options, views, u, v)
    positive = positive * scale
    columns, keys = None, None
    if options.group is not None:
        columns, keys = options.columns(rows, options.sample_ids(rows))
    peak, engine = options.return_info, options.engine
    sums, top = log_sums(rows, columns, scale, ("not_self",), keys=keys, peak=peak, engine=engine)
    lse = sums[0]
    valid = valid & (lse != -torch.inf)
    loss = options.reduce(lse.masked_fill(~valid, 0.0) - positive, valid)
    if not options.return_info:
        return loss
    rows = rows.detach()
    positives, best, rest = _siblings(views, lse.detach(), scale.detach())
    every = moments_between(rows, options.of_all(rows)) - moments_of(rows.square().sum(1))
    info = pair_info(
        embeddings=(rows,),
        valid=valid,
        positives=positives,
        negatives=every - positives,
        negative_lse=rest,
        hits=reaches(best, top[0]),
        peak=top[0],
        scale=scale,
    )
    return loss, info


def _weighted_scores(
    options: Options, views: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean score of every row with its positives, and whether it has any."""
    count, rows = len(views), views.flatten(0, 1)
    sums = torch.cat([v.sum(0)[:, None] * count, products(v.t(), views.sum(0))], 1)
    reached = products(u, options.total(sums)).repeat(count, 1)
    own = (u * v).sum(1).repeat(count)
    # Pairs of one sample leave the product of factors and come back with weight 1.
    siblings = ((views.sum(0) - views) * views).sum(2).flatten()
    total = reached[:, 0] - count * own + (count - 1)
    score = (rows * reached[:, 1:]).sum(1) - own * (siblings + rows.square().sum(1)) + siblings
    # A sum of weights that is only rounding is none.
    valid = total > 1e-6 * (1.0 + reached[:, 0])
    return score / torch.where(valid, total, 1.0), valid


@torch.no_grad()
def _siblings(views: Tensor, lse: Tensor, scale: Tensor) -> tuple[Moments, Tensor, Tensor]:
    """Scores of the other views: moments, best of each row, and what they leave of the sums."""
    samples = views.transpose(0, 1)
    scores = products(samples, samples.transpose(1, 2)).transpose(0, 1)
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
        found = f"and 'weights' are both {'given' if weights else 'None'}"
        raise ContrastInputError("soft_sup_con", "soft_labels", found, "pass one of them")
    pairs = zip(("weights[0]", "weights[1]"), weights or (), strict=False)
    named = {"soft_labels": soft_labels} if soft_labels is not None else dict(pairs)
    for name, value in named.items():
        check_shape("soft_sup_con", name, value, (views.shape[1], -1))
        check_device("soft_sup_con", name, value, "z", views)
        wrong = (value < 0).any(1) | ((value.sum(1) <= 0) if weights is None else False)
        if readable(value) and bool(wrong.any()):
            found = f"is negative or sums to 0 in row {int(wrong.nonzero()[0])}"
            fix = "pass non-negative rows with a positive sum"
            raise ContrastInputError("soft_sup_con", name, found, fix)
    factors = [value.to(views.dtype) for value in named.values()]
    return factors[0], factors[-1]
