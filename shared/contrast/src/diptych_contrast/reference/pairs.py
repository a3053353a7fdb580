"""Losses over pairs of embeddings, of two views or more, dense."""

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
    scores = math.exp(log_scale) * unit(x) @ unit(y).t() + bias
    share = torch.eye(len(x)).double() if positives is None else positives.double()
    return -(share * F.logsigmoid(scores) + (1 - share) * F.logsigmoid(-scores)).sum(1).mean()


def dcl(z1: Tensor, z2: Tensor, temperature: float = 0.1, weight: Tensor | None = None) -> Tensor:
    z, n = torch.cat([unit(z1), unit(z2)]), len(z1)
    scores = z @ z.t() / temperature
    other = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
    pull = scores.diagonal(n) if weight is None else scores.diagonal(n) * weight
    return log_sum(scores, other).mean() - pull.mean()


def dclw(z1: Tensor, z2: Tensor, temperature: float = 0.1, sigma: float = 0.5) -> Tensor:
    near = ((unit(z1) * unit(z2)).sum(1) / sigma).exp()
    return dcl(z1, z2, temperature, 2 - near / near.mean())


def hcl(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, beta: float = 1.0, tau_plus: float = 0.1
) -> Tensor:
    z, n = torch.cat([unit(z1), unit(z2)]), len(z1)
    m = 2 * n - 2
    scores = z @ z.t() / temperature
    positive = scores.diagonal(n).repeat(2).exp()
    other = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
    weights = (beta * scores).masked_fill(~other, -math.inf).softmax(1) * m
    total = (weights * scores.exp()).sum(1) - m * tau_plus * positive
    rest = (total / (1 - tau_plus)).clamp_min(m * math.exp(-1 / temperature))
    return -(positive / (positive + rest)).log().mean()


def debiased(z1: Tensor, z2: Tensor, temperature: float = 0.5, tau_plus: float = 0.1) -> Tensor:
    return hcl(z1, z2, temperature, 0.0, tau_plus)


def _classes(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, positives and negatives of the rows that have both."""
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(z), dtype=torch.bool)
    valid = positive.any(1) & ~same.all(1)
    return (unit(z) @ unit(z).t())[valid], positive[valid], ~same[valid]


def contrastive_margin(
    z: Tensor, labels: Tensor, margin: float = 1.0, distance: str = "euclid"
) -> Tensor:
    scores, positive, negative = _classes(z, labels)
    d = 1 - scores if distance == "cosine" else (2 - 2 * scores).clamp_min(0).sqrt()
    pull = (d.square() * positive).sum(1) / positive.sum(1)
    push = ((margin - d).relu().square() * negative).sum(1) / negative.sum(1)
    return (pull + push).mean()


def multi_similarity(
    z: Tensor,
    labels: Tensor,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    eps: float = 0.1,
) -> Tensor:
    s, positive, negative = _classes(z, labels)
    easiest = s.masked_fill(~positive, math.inf).amin(1, keepdim=True)
    hardest = s.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    pull = ((-alpha * (s - base)).exp() * (positive & (s < hardest + eps))).sum(1)
    push = ((beta * (s - base)).exp() * (negative & (s > easiest - eps))).sum(1)
    return (pull.log1p() / alpha + push.log1p() / beta).mean()


def n_pairs(
    z1: Tensor, z2: Tensor, temperature: float = 1.0, labels: Tensor | None = None, l2: float = 0.0
) -> Tensor:
    scores = unit(z1) @ unit(z2).t() / temperature
    keys = torch.arange(len(z1)) if labels is None else labels
    other = keys[:, None] != keys
    gaps = ((scores - scores.diagonal()[:, None]).exp() * other).sum(1)
    return gaps.log1p()[other.any(1)].mean() + l2


def circle(z: Tensor, labels: Tensor, m: float = 0.25, gamma: float = 256.0) -> Tensor:
    s, positive, negative = _classes(z, labels)
    pull = -gamma * (1 + m - s).relu().detach() * (s - 1 + m)
    push = gamma * (s + m).relu().detach() * (s - m)
    return F.softplus(log_sum(pull, positive) + log_sum(push, negative), threshold=40).mean()


def nt_xent_multi(views: Tensor, temperature: float = 0.5) -> Tensor:
    return sup_con(views, torch.arange(views.shape[1]), temperature)


def mv_info_nce(
    views: Tensor, temperature: float = 0.5, same_view_negatives: bool = False
) -> Tensor:
    scores, view, sample = _scores(views, temperature)
    other = view[:, None] != view
    pairs = ~torch.eye(len(view), dtype=torch.bool) if same_view_negatives else other
    sums = [log_sum(scores, mask) for mask in (pairs, other & (sample[:, None] == sample))]
    every, positive = (rows.view(len(views), -1).logsumexp(0) for rows in sums)
    return (every - positive).mean()


def mv_dhel(views: Tensor, temperature: float = 0.5) -> Tensor:
    scores, view, sample = _scores(views, temperature)
    same_view, same_sample = view[:, None] == view, sample[:, None] == sample
    negative = log_sum(scores, same_view & ~same_sample).view(len(views), -1).sum(0)
    positive = log_sum(scores, same_sample & ~same_view).view(len(views), -1).logsumexp(0)
    return (negative - positive).mean()


def poly_view(views: Tensor, temperature: float = 0.5, aggregate: str = "geometric") -> Tensor:
    scores, view, sample = _scores(views, temperature)
    same_sample = sample[:, None] == sample
    negative = log_sum(scores, ~same_sample)[:, None]
    positive = scores[same_sample & (view[:, None] != view)].view(len(view), -1)
    if aggregate == "sufficient":
        positive = positive.mean(1, keepdim=True)
    losses = torch.logaddexp(positive, negative) - positive
    if aggregate == "arithmetic":
        return (math.log(losses.shape[1]) - (-losses).logsumexp(1)).mean()
    return losses.mean()


def _scores(views: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    count, n = views.shape[:2]
    rows = unit(views.flatten(0, 1))
    view, sample = torch.arange(count).repeat_interleave(n), torch.arange(n).repeat(count)
    return rows @ rows.t() / temperature, view, sample


def soft_con(
    features: Tensor,
    probs: Tensor,
    temperature: float = 0.07,
    *,
    labels: Tensor | None = None,
    labelled: str = "one_hot",
) -> Tensor:
    if labels is not None and labelled == "one_hot":
        probs = probs.clone()
        probs[labels >= 0] = torch.eye(probs.shape[1]).to(probs)[labels[labels >= 0]]
    return soft_sup_con(features, probs, temperature)


def self_distillation(
    student: Tensor,
    epoch: int,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.07, 0.04),
    warmup: int = 30,
) -> Tensor:
    t = torch.linspace(*teacher_temperature, warmup, dtype=torch.float64)[min(epoch, warmup - 1)]
    logits = student.double()
    pairs = [(a, b) for a in range(len(logits)) for b in range(len(logits)) if a != b]
    terms = [
        (logits[a].detach() / t).softmax(1) * (logits[b] / student_temperature).log_softmax(1)
        for a, b in pairs
    ]
    return -torch.stack(terms).sum(2).mean()
