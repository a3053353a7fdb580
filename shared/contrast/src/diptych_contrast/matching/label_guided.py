"""Label guidance: samples that share labels are positives, between modalities and within."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    TemperatureLike,
    read_embeddings,
    read_labels,
    read_options,
    read_scale,
    reduce_rows,
)
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import readable
from diptych_contrast.kernel import log_sums
from diptych_contrast.rowwise import LOCAL, by_rows


def label_guided(
    img: Float[Tensor, "n d"],
    txt: Float[Tensor, "n d"],
    labels: Shaped[Tensor, "n ..."],
    inter: float = 1.0,
    intra: float = 1.0,
    temperature: TemperatureLike = 0.1,
    *,
    real: Float[Tensor, "n d"] | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Label-guided contrast of images and texts (arXiv 2412.03957, our reading).

    ``log sum_j exp(s_ij / t) - sum_j w_ij s_ij / t / sum_j w_ij``, w 1 for equal
    labels, or the Jaccard index of two label sets. ``inter`` weighs the mean of both directions
    between the modalities, where the own pair always has w = 1, ``intra`` the mean of both
    modalities against themselves.

    Args:
        img: Images, shape (n, d).
        txt: Texts of the same samples, shape (n, d).
        labels: Class of each sample, shape (n,), -1: unlabelled; or its label set, shape (n, c),
            of zeros and ones.
        inter: Weight between the modalities.
        intra: Weight within.
        temperature: t > 0.
        real: Real images where ``img`` are generated ones: these, without gradient and with the
            own pair, are then the columns of the only term within.
        **common: See `Common`.

    Example:
        >>> z = torch.ones(4, 8)
        >>> round(label_guided(z, z, torch.tensor([0, 0, 1, 1]), intra=0.0).exp().item())
        4
    """
    options = read_options("label_guided", common, *LOCAL)
    named = (
        {"img": img, "txt": txt}
        if real is None
        else {"img": img, "txt": txt, "real": real.detach()}
    )
    x, y, *others = read_embeddings(options, **named).unbind(0)
    if labels.dim() == 2:
        if len(labels) != len(x) or (readable(labels) and bool((labels * (1 - labels)).any())):
            found = f"has shape {tuple(labels.shape)}, or values beside 0 and 1"
            fix = f"pass zeros and ones of shape ({len(x)}, classes)"
            raise ContrastInputError("label_guided", "labels", found, fix)
        labels = labels.to(x.dtype)
    else:
        labels = read_labels(options, "labels", labels, x, lowest=-1)
    scale = read_scale(options, temperature, x)
    between, _ = log_sums(x, y, scale, ("any",), both=True, engine=options.engine)
    terms = [
        (inter / 2, lse, a, b, True)
        for lse, a, b in zip(between[0].view(2, -1), (x, y), (y, x), strict=True)
    ]
    if others:
        lse, _ = log_sums(x, others[0], scale, ("any",), engine=options.engine)
        terms.append((intra, lse[0], x, others[0], True))
    else:
        for rows in (x, y):
            lse, _ = log_sums(rows, None, scale, ("not_self",), engine=options.engine)
            terms.append((intra / 2, lse[0], rows, rows, False))
    loss = x.new_zeros(())
    for weight, lse, rows, columns, own in terms:
        if weight:
            score, valid = _shared_score(options, rows, columns, labels, own)
            losses = lse.masked_fill(~valid, 0.0) - scale * score
            loss = loss + weight * reduce_rows(options, losses, valid)
    return loss


def _shared_score(
    options: Options, rows: Tensor, columns: Tensor, labels: Tensor, own: bool
) -> tuple[Tensor, Tensor]:
    """Mean score of every row, weighted by what labels share, and whether it shares any."""
    index = torch.arange(len(rows), device=rows.device)

    def block(x: Tensor, label: Tensor, row: Tensor, y: Tensor) -> Tensor:
        if label.dim() == 1:
            weights = ((label[:, None] == labels) & (labels >= 0)).to(x.dtype)
        else:
            both = label @ labels.t()
            either = label.sum(1, keepdim=True) + labels.sum(1) - both
            weights = both / either.clamp_min(1.0)
        weights = weights.masked_fill(row[:, None] == index, float(own))
        return torch.stack([(x * (weights @ y)).sum(1), weights.sum(1)], 1)

    score, total = by_rows(block, (rows, labels, index), (columns,), len(rows), options).unbind(1)
    valid = total > 0
    return score / total.where(valid, 1.0), valid
