"""Dense references of `diptych_contrast.reweight`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.reference import unit
from diptych_contrast.reweight import PairTemperature


def cacr(
    views: Tensor,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    kernel: str = "euclid",
    detach_weights: bool = True,
    queue: Tensor | None = None,
    tau_plus: float = 0.0,
    parity: str | None = None,
) -> Tensor:
    """`diptych_contrast.cacr`, dense."""
    v, n = len(views), len(views[0])
    z = unit(torch.cat(list(views)))
    sample = torch.arange(n).repeat(v)
    columns = z if queue is None else torch.cat([z, unit(queue)])
    owner = F.pad(sample, (0, len(columns) - len(z)), value=-1)
    freeze = detach_weights and parity is None

    def mean(d2: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        weights = logits.masked_fill(~mask, -math.inf).softmax(1)
        return ((weights.detach() if freeze else weights) * d2).sum(1)

    d2 = (z[:, None] - columns).square().sum(2)
    sibling = (sample[:, None] == sample) & ~torch.eye(v * n, dtype=torch.bool)
    pulled = mean(d2[:, : v * n], t_pos * d2[:, : v * n], sibling).mean()
    near = (d2[:, : v * n] * sibling).sum(1) / (v - 1)
    blocks = [(d2, sample[:, None] != owner, near)]
    if parity == "official":
        own = torch.eye(n, dtype=torch.bool)
        parts = [d2[x * n : x * n + n, y * n : y * n + n] for x, y in combinations(range(v), 2)]
        blocks = [(part, ~own, -part.diagonal()) for part in parts]
    pushed = []
    for part, mask, positive in blocks:
        if kernel == "rbf":
            pushed.append(mean((-2.0 * part).exp(), -t_neg * part, mask).mean().log())
        else:
            rows = -mean(part, -t_neg * part, mask)
            pushed.append(((rows + tau_plus * positive) / (1 - tau_plus)).mean())
    return alpha * pulled + beta * torch.stack(pushed).mean()


def amcl(heads_a: Tensor, heads_b: Tensor, net: PairTemperature, reg: float = 0.1) -> Tensor:
    """`diptych_contrast.amcl`, dense."""
    loss, priors = [], []
    for head, (a, b) in enumerate(zip(heads_a, heads_b, strict=True)):
        z = unit(torch.cat([a, b]))
        own = torch.eye(len(z), dtype=torch.bool)
        t = net(head, z, z)
        scores = ((z @ z.t()) / t).masked_fill(own, -math.inf)
        loss.append(F.cross_entropy(scores, torch.arange(len(z)).roll(len(a))))
        priors.append((z.shape[1] / 2 * t.log() + 1 / t)[~own].mean())
    return torch.stack(loss).sum() + reg * torch.stack(priors).mean()


def arbitrary_pairs(
    z: Tensor,
    k: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    gate: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 0.1,
    *,
    pool: str = "rows",
    subspace_cosine: bool = False,
    penalty: float = 0.0,
    parity: str | None = None,
) -> Tensor:
    """`diptych_contrast.arbitrary_pairs`, dense."""
    g = gate(labels, partner_labels).double()
    x, y = unit(z)[:, None] * g[:, None], unit(k)[None] * g[:, None]
    scores = F.cosine_similarity(x, y, 2) if subspace_cosine else (x * y).sum(2)
    scores = scores / temperature
    positive = partner_labels[:, None] == labels
    negative = ~positive & (labels[:, None] != labels)
    if parity is None:
        positive = positive & ~torch.eye(len(z), dtype=torch.bool) & negative.any(1)[:, None]
    others = (scores.exp() * negative).sum(1, keepdim=True)
    terms = ((scores.exp() + others).log() - scores) * positive
    counts = positive.sum(1)
    if pool == "pairs":
        loss = terms.sum() / counts.sum()
    else:
        rows = terms.sum(1) / counts.clamp_min(1)
        loss = rows.mean() if parity else rows.sum() / (counts > 0).sum()
    return loss + penalty * (g * (1 - g)).mean()
