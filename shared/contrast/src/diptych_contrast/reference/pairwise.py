"""Pairwise losses, dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.reference import log_sum, unit


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.5,
    ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """`diptych_contrast.nt_xent`, dense."""
    n = len(z1)
    z = torch.cat([unit(z1), unit(z2)])
    scores = z @ z.t() / temperature
    partner = torch.arange(2 * n).roll(n)
    mask = ~torch.eye(2 * n, dtype=torch.bool)
    for key in (ids, labels):
        if key is not None:
            mask &= key.repeat(2)[:, None] != key.repeat(2)
    valid = mask.any(1)
    mask[torch.arange(2 * n), partner] = True
    rows = log_sum(scores, mask) - scores[torch.arange(2 * n), partner]
    return rows[valid].mean()


def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float = 0.07,
    negatives: str | tuple[str, ...] = "in_batch",
    queue: Tensor | None = None,
    row_negatives: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """`diptych_contrast.info_nce`, dense; the queue is a tensor."""
    if symmetric:
        return clip_loss(q, k, temperature)
    q, k = unit(q), unit(k)
    positive = (q * k).sum(1, keepdim=True)
    columns = [positive]
    if "in_batch" in negatives:
        columns = [q @ k.t()]
    if queue is not None:
        columns.append(q @ unit(queue).t())
    if row_negatives is not None:
        columns.append(torch.einsum("nd,ncd->nc", q, unit(row_negatives)))
    scores = torch.cat(columns, 1) / temperature
    return (scores.logsumexp(1) - positive[:, 0] / temperature).mean()


def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float = 0.07,
    ids: Tensor | None = None,
    mode: str = "out",
    base_temperature: float | None = None,
) -> Tensor:
    """`diptych_contrast.sup_con`, dense; z of shape (v, n, d) or (n, d)."""
    views = z if z.dim() == 3 else z[None]
    rows = unit(views.flatten(0, 1))
    keys = torch.arange(views.shape[1]) if ids is None else ids
    keys, labels = keys.repeat(len(views)), labels.repeat(len(views))
    scores = rows @ rows.t() / temperature
    other = ~torch.eye(len(rows), dtype=torch.bool)
    same = torch.where((labels >= 0)[:, None], labels[:, None] == labels, keys[:, None] == keys) & (
        other & ((labels >= 0)[:, None] == (labels >= 0))
    )
    count, valid = same.sum(1), same.any(1)
    scores, same, other, count = scores[valid], same[valid], other[valid], count[valid]
    if mode == "in":
        losses = log_sum(scores, other) - log_sum(scores, same) + count.log()
    else:
        losses = log_sum(scores, other) - (scores * same).sum(1) / count
    return losses.mean() * (1.0 if base_temperature is None else temperature / base_temperature)


def soft_sup_con(
    z: Tensor,
    soft_labels: Tensor | None = None,
    temperature: float = 0.07,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`diptych_contrast.soft_sup_con`, dense; z of shape (v, n, d) or (n, d)."""
    views = z if z.dim() == 3 else z[None]
    count, n = views.shape[:2]
    rows = unit(views.flatten(0, 1))
    if weights is None:
        assert soft_labels is not None
        weights = (soft_labels, soft_labels)
    u, v = (part.double().repeat(count, 1) for part in weights)
    sample = torch.arange(n).repeat(count)
    other = ~torch.eye(len(rows), dtype=torch.bool)
    pairs = torch.where(sample[:, None] == sample, 1.0, u @ v.t()) * other
    valid = pairs.sum(1) > 0
    scores = rows @ rows.t() / temperature
    losses = log_sum(scores, other) - (pairs * scores).sum(1) / pairs.sum(1)
    return losses[valid].mean()


def clip_loss(x: Tensor, y: Tensor, temperature: float = 0.07) -> Tensor:
    """`diptych_contrast.clip_loss`, dense."""
    scores = unit(x) @ unit(y).t() / temperature
    target = torch.arange(len(x))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def siglip(
    x: Tensor,
    y: Tensor,
    log_scale: float = math.log(10.0),
    bias: float = -10.0,
    positives: Tensor | None = None,
) -> Tensor:
    """`diptych_contrast.siglip`, dense."""
    scores = math.exp(log_scale) * unit(x) @ unit(y).t() + bias
    share = torch.eye(len(x)).double() if positives is None else positives.double()
    return -(share * F.logsigmoid(scores) + (1 - share) * F.logsigmoid(-scores)).sum(1).mean()
