"""Decoupled, corrected and metric-learning losses as double loops, written from the papers.

Every function returns one value a valid row, as a list of scalar tensors with gradient.
"""

import math

import torch
from tests.contrast.references import log_sum, scores
from torch import Tensor


def dcl(z1: Tensor, z2: Tensor, t: float, weight: list[Tensor] | None = None) -> list[Tensor]:
    n = len(z1)
    z = [*z1, *z2]
    s = scores(z, z)
    losses = []
    for i in range(2 * n):
        others = [s[i][j] / t for j in range(2 * n) if j % n != i % n]
        pull = s[i][(i + n) % (2 * n)] / t
        losses.append(log_sum(others) - (pull if weight is None else weight[i % n] * pull))
    return losses


def dclw(z1: Tensor, z2: Tensor, t: float, sigma: float, detach: bool) -> list[Tensor]:
    s = scores(list(z1), list(z2))
    near = [torch.exp((s[i][i].detach() if detach else s[i][i]) / sigma) for i in range(len(z1))]
    mean = torch.stack(near).mean()
    return dcl(z1, z2, t, [2 - value / mean for value in near])


def hcl(z1: Tensor, z2: Tensor, t: float, beta: float, tau_plus: float) -> list[Tensor]:
    n = len(z1)
    z = [*z1, *z2]
    s = scores(z, z)
    count = 2 * n - 2
    losses = []
    for i in range(2 * n):
        positive = torch.exp(s[i][(i + n) % (2 * n)] / t)
        others = torch.stack([s[i][j] / t for j in range(2 * n) if j % n != i % n])
        partition = torch.exp(beta * others).sum()
        total = (count * torch.exp(beta * others) / partition * torch.exp(others)).sum()
        rest = (total - count * tau_plus * positive) / (1 - tau_plus)
        rest = torch.clamp(rest, min=count * math.exp(-1 / t))
        losses.append(-torch.log(positive / (positive + rest)))
    return losses


def _pairs(z: Tensor, labels: list[int]) -> list[tuple[list[Tensor], list[Tensor]]]:
    s = scores(list(z), list(z))
    rows = []
    for i in range(len(z)):
        positives = [s[i][j] for j in range(len(z)) if j != i and labels[j] == labels[i]]
        negatives = [s[i][j] for j in range(len(z)) if labels[j] != labels[i]]
        if positives and negatives:
            rows.append((positives, negatives))
    return rows


def contrastive_margin(z: Tensor, labels: list[int], margin: float, cosine: bool) -> list[Tensor]:
    def distance(s: Tensor) -> Tensor:
        return 1 - s if cosine else (2 - 2 * s).sqrt()

    return [
        torch.stack([distance(s) ** 2 for s in positives]).mean()
        + torch.stack([torch.relu(margin - distance(s)) ** 2 for s in negatives]).mean()
        for positives, negatives in _pairs(z, labels)
    ]


def multi_similarity(
    z: Tensor, labels: list[int], alpha: float, beta: float, base: float, eps: float
) -> list[Tensor]:
    losses = []
    for positives, negatives in _pairs(z, labels):
        easiest, hardest = min(s.item() for s in positives), max(s.item() for s in negatives)
        near = [torch.exp(-alpha * (s - base)) for s in positives if s.item() < hardest + eps]
        far = [torch.exp(beta * (s - base)) for s in negatives if s.item() > easiest - eps]
        zero = z.sum() * 0
        pull, push = sum(near, start=zero), sum(far, start=zero)
        losses.append(torch.log(1 + pull) / alpha + torch.log(1 + push) / beta)
    return losses


def n_pairs(
    z1: Tensor, z2: Tensor, t: float, labels: list[int], l2: float, normalize: bool
) -> list[Tensor]:
    s = scores(list(z1), list(z2)) if normalize else z1 @ z2.t()
    losses = []
    for i in range(len(z1)):
        others = [j for j in range(len(z2)) if labels[j] != labels[i]]
        if others:
            total = sum(torch.exp((s[i][j] - s[i][i]) / t) for j in others)
            length = (z1[i] @ z1[i] + z2[i] @ z2[i]) / 2 if not normalize else 1.0
            losses.append(torch.log(1 + total) + l2 * length)
    return losses


def circle(z: Tensor, labels: list[int], m: float, gamma: float) -> list[Tensor]:
    losses = []
    for positives, negatives in _pairs(z, labels):
        pull = sum(torch.exp(-gamma * max(1 + m - s.item(), 0) * (s - (1 - m))) for s in positives)
        push = sum(torch.exp(gamma * max(s.item() + m, 0) * (s - m)) for s in negatives)
        losses.append(torch.log(1 + pull * push))
    return losses
