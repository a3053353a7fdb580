"""NT-Xent: two views of a sample against all other embeddings of the batch."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.common import (
    Common,
    Keys,
    LossResult,
    Options,
    TemperatureLike,
    check_several,
    meet_columns,
    read_embeddings,
    read_labels,
    read_options,
    read_scale,
    reduce_rows,
    sample_ids,
)
from diptych_contrast.kernel import log_sums
from diptych_contrast.statistics import (
    Moments,
    moments_between,
    moments_of,
    moments_within,
    pair_info,
    reaches,
    subtract_exp,
)


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

    The mean over all 2n embeddings i, with i' the other view of i, of
    ``log sum_{j != i} exp(s_ij / t) - s_ii' / t``, s the cosine similarity.

    Args:
        z1: First view, shape (n, d), n >= 2.
        z2: Second view of the same samples in the same order, shape (n, d).
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        ids: Rows of equal id (windows of one trial, scans of one patient) are no negatives of each
            other, shape (n,).
        labels: Rows of equal label are no negatives of each other, shape (n,).
        **common: See `Common`.

    Returns:
        Shape (), or (2n,) view-major with ``reduction="none"``; with ``return_info`` also
        `PairInfo`.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a single sample.

    Example:
        >>> z = torch.ones(4, 8)
        >>> round(nt_xent(z, z).exp().item())
        7
    """
    options = read_options("nt_xent", common)
    stacked = read_embeddings(options, z1=z1, z2=z2)
    check_several(options, "z1", z1)
    scale = read_scale(options, temperature, stacked)
    if ids is not None:
        ids = read_labels(options, "ids", ids, z1, lowest=None)
    if labels is not None:
        labels = read_labels(options, "labels", labels, z1, lowest=0)
    first, second = stacked.unbind(0)
    z = stacked.flatten(0, 1)
    score = (first * second).sum(1)
    positive = score * scale
    lse, peak = denominators(options, z, scale, ids, labels)
    valid: Tensor | None = None
    if ids is not None or labels is not None:
        negatives, valid = lse, lse > -torch.inf
        lse = torch.logaddexp(lse.masked_fill(~valid, 0.0), positive.repeat(2))
    loss = reduce_rows(options, (lse.view(2, -1) - positive).flatten(), valid)
    if not options.return_info:
        return loss
    doubled = positive.detach().repeat(2)
    peak = torch.maximum(peak, doubled)
    info = pair_info(
        rows=len(z),
        valid=valid,
        zero_rows=(z == 0).all(1).sum(),
        positives=2 * moments_of(score),
        negatives=negative_moments(z, score, ids, labels),
        negative_lse=subtract_exp(lse, doubled) if valid is None else negatives,
        hits=reaches(doubled, peak),
        peak=peak,
        scale=scale,
    )
    return loss, info


def denominators(
    options: Options, z: Tensor, scale: Tensor, ids: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    words = [f"~same_{word}" for word, key in (("id", ids), ("label", labels)) if key is not None]
    mask = " & ".join(words) or "not_self"
    columns, keys = None, None
    if options.group is not None or words:
        sample = sample_ids(options, z) if ids is None else ids.repeat(2)
        label = None if labels is None else labels.repeat(2)
        columns, keys = meet_columns(options, z, Keys(sample, label=label))
    peak, engine = options.return_info, options.engine
    lse, top = log_sums(z, columns, scale, (mask,), keys=keys, peak=peak, engine=engine)
    return lse[0], top.flatten()


@torch.no_grad()
def negative_moments(
    z: Tensor, score: Tensor, ids: Tensor | None, labels: Tensor | None
) -> Moments:
    """Moments over the negatives of this process: all pairs without those of one sample."""
    every = moments_between(z, z)
    keys = [key.repeat(2) for key in (ids, labels) if key is not None]
    if not keys:
        return every - moments_of(z.square().sum(1)) - 2 * moments_of(score)
    for key in keys:
        every = every - moments_within(z, key)
    if len(keys) == 2:
        both = torch.unique(torch.stack(keys, 1), dim=0, return_inverse=True)[1]
        every = every + moments_within(z, both)
    return every
