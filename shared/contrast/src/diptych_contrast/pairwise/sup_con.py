"""SupCon: all samples of a class are positives of each other."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from jaxtyping import Int
from torch import Tensor

from diptych_contrast.common import (
    Common,
    Keys,
    LossResult,
    Options,
    TemperatureLike,
    Views,
    check_choice,
    meet_columns,
    read_labels,
    read_options,
    read_scale,
    read_views,
    readable,
    reduce_rows,
    sample_ids,
    sum_over,
)
from diptych_contrast.dist import gather_no_grad
from diptych_contrast.errors import warn
from diptych_contrast.kernel import PairInfo, log_sums
from diptych_contrast.statistics import (
    moments_between,
    moments_of,
    moments_within,
    pair_info,
)


def sup_con(
    z: Views,
    labels: Int[Tensor, " n"],
    temperature: TemperatureLike = 0.07,
    *,
    ids: Int[Tensor, " n"] | None = None,
    mode: Literal["out", "in"] = "out",
    base_temperature: float | None = None,
    parity: Literal["official"] | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Supervised contrastive loss (Khosla et al., 2020, equations 2 and 3).

    With P(i) the other rows of the label of i and ``D_i = sum_{a != i} exp(s_ia / t)``, mode
    ``out`` is the mean over rows with positives of ``log D_i - mean_{p in P(i)} s_ip / t``, mode
    ``in`` of ``log D_i - log mean_{p in P(i)} exp(s_ip / t)``.

    Args:
        z: Embeddings, shape (n, d), or views of the same samples, shape (v, n, d).
        labels: Class of each sample, shape (n,), from 0; -1: unlabelled, its only positives are
            its own other views.
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        ids: Sample of each row, shape (n,), where rows of one matrix are views of one sample.
        mode: Mean outside or inside the logarithm.
        base_temperature: Multiply the loss by ``temperature / base_temperature``.
        parity: ``official``: as the authors' code, with base temperature 0.07.
        **common: See `Common`.

    Returns:
        Shape (), or (v n,) view-major with ``reduction="none"``; with ``return_info`` also
        `PairInfo`.

    Raises:
        ContrastInputError: Inputs that do not fit together.

    Example:
        >>> sup_con(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0).exp().item()
        3.0
    """
    options = read_options("sup_con", common)
    check_choice("sup_con", "mode", mode, "out", "in")
    check_choice("sup_con", "parity", parity, None, "official")
    views = read_views(options, "z", z)
    scale = read_scale(options, temperature, views)
    classes = _classes(options, views, labels, ids)
    rows = views.flatten(0, 1)
    loss, info = class_contrast(options, rows, classes, scale, mode=mode)
    base = 0.07 if parity == "official" and base_temperature is None else base_temperature
    if base is not None:
        loss = loss / (scale * base)
    return loss if info is None else (loss, info)


def _classes(options: Options, views: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
    """Give every row a key that its positives share; an unlabelled sample has its own."""
    labels = read_labels(options, "labels", labels, views[0], lowest=-1)
    if ids is None:
        ids = sample_ids(options, views[0])
    else:
        ids = read_labels(options, "ids", ids, views[0], lowest=None)
        if len(views) > 1 and readable(ids) and len(torch.unique(ids)) < len(ids):
            warn(
                options.function,
                "ids",
                "holds an id twice in one view, so its positives are ambiguous",
                "give every sample of a view its own id",
            )
    # Even keys are classes, odd ones unlabelled samples.
    return torch.where(labels >= 0, 2 * labels, 2 * ids + 1).repeat(len(views))


def class_contrast(
    options: Options, z: Tensor, classes: Tensor, scale: Tensor, *, mode: str
) -> tuple[Tensor, PairInfo | None]:
    """Contrast rows of equal class against all others; what SupCon and its relatives share.

    Args:
        options: The common arguments.
        z: Prepared embeddings, shape (n, d).
        classes: Key of each row, shape (n,), unique over all processes.
        scale: ``1/temperature``.
        mode: ``out`` or ``in``.

    Returns:
        The reduced loss, and the statistics or None.
    """
    info = options.return_info
    index, counts = _enumerate(options, classes)
    n_positive = counts[index] - 1
    valid = n_positive > 0
    if readable(valid) and not bool(valid.any()):
        warn(
            options.function,
            "labels",
            "has no two rows of one class",
            "the loss is 0: sample several rows of each class, or pass a second view",
        )
    masks = ["not_self"]
    if mode == "in":
        masks.append("same_label & not_self")
    if info:
        masks.append("~same_label")
    if options.group is None and masks == ["not_self"]:
        lse, peak = log_sums(z, None, scale, masks, engine=options.engine)
    else:
        keys = Keys(sample_ids(options, z), label=classes)
        columns, mask = meet_columns(options, z, keys)
        lse, peak = log_sums(z, columns, scale, masks, keys=mask, peak=info, engine=options.engine)
    divisor = n_positive.clamp_min(1).to(z.dtype)
    if mode == "in":
        positive = lse[1].masked_fill(~valid, 0.0) - divisor.log()
    else:
        own = torch.zeros(len(counts), z.shape[1], dtype=z.dtype, device=z.device)
        sums = sum_over(options, own.index_add(0, index, z))
        positive = (z * (sums[index] - z)).sum(1) * scale / divisor
    # A lone row has no denominator.
    loss = reduce_rows(options, lse[0].masked_fill(~valid, 0.0) - positive, valid)
    if not info:
        return loss, None
    same = moments_within(z, classes)
    return loss, pair_info(
        rows=len(z),
        valid=valid,
        zero_rows=(z == 0).all(1).sum(),
        positives=same - moments_of(z.detach().square().sum(1)),
        negatives=moments_between(z, z) - same,
        negative_lse=lse[-1],
        hits=peak[0] > peak[-1],
        peak=peak[0],
        scale=scale,
    )


def _enumerate(options: Options, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Number the classes over all processes; give the number of each row and the class sizes."""
    every = classes if options.group is None else gather_no_grad(classes, options.group)
    # Sorting instead of `unique` keeps all shapes fixed, as compiling needs.
    ordered, order = every.sort()
    steps = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    number = torch.empty_like(steps).scatter(0, order, steps)
    counts = torch.zeros_like(steps).index_add(0, number, torch.ones_like(number))
    if options.group is None:
        return number, counts
    return steps[torch.searchsorted(ordered, classes)], counts[: int(steps[-1]) + 1]
