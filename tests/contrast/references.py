"""Losses as double loops over pairs in float64, written from the papers, not from the code.

Every function returns one value a row, as a list of scalar tensors with gradient.
"""

import math

import torch
from torch import Tensor


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x / x.norm()) @ (y / y.norm())


def scores(rows: list[Tensor], columns: list[Tensor]) -> list[list[Tensor]]:
    left = torch.stack([row / row.norm() for row in rows])
    right = torch.stack([column / column.norm() for column in columns])
    return [list(row.unbind()) for row in left @ right.t()]


def log_sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).logsumexp(0)


def nt_xent(
    z1: Tensor, z2: Tensor, t: float, ids: list[int] | None = None, labels: list[int] | None = None
) -> list[Tensor]:
    n = len(z1)
    z = [*z1, *z2]
    s = scores(z, z)
    losses = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        kept = []
        for j in range(2 * n):
            same_id = ids is not None and ids[i % n] == ids[j % n]
            same_label = labels is not None and labels[i % n] == labels[j % n]
            if j == partner or (j != i and not same_id and not same_label):
                kept.append(s[i][j] / t)
        if len(kept) > 1:
            losses.append(log_sum(kept) - s[i][partner] / t)
    return losses


def info_nce(
    q: Tensor,
    k: Tensor,
    t: float,
    in_batch: bool = True,
    queue: Tensor | None = None,
    own: Tensor | None = None,
) -> list[Tensor]:
    s = scores(list(q), list(k))
    losses = []
    for i in range(len(q)):
        kept = [s[i][i] / t]
        if in_batch:
            kept += [s[i][j] / t for j in range(len(k)) if j != i]
        if queue is not None:
            kept += [cosine(q[i], key) / t for key in queue]
        if own is not None:
            kept += [cosine(q[i], key) / t for key in own[i]]
        losses.append(log_sum(kept) - s[i][i] / t)
    return losses


def clip_loss(x: Tensor, y: Tensor, t: float) -> list[Tensor]:
    forward, backward = info_nce(x, y, t), info_nce(y, x, t)
    return [(a + b) / 2 for a, b in zip(forward, backward, strict=True)]


def sup_con(
    z: list[Tensor], labels: list[int], samples: list[int], t: float, mode: str
) -> list[Tensor]:
    s = scores(z, z)
    losses = []
    for i in range(len(z)):
        positives, every = [], []
        for j in range(len(z)):
            if j == i:
                continue
            every.append(s[i][j] / t)
            same = labels[i] == labels[j] if labels[i] >= 0 else samples[i] == samples[j]
            if same:
                positives.append(s[i][j] / t)
        if not positives:
            continue
        if mode == "out":
            losses.append(log_sum(every) - torch.stack(positives).mean())
        else:
            losses.append(log_sum(every) - log_sum(positives) + math.log(len(positives)))
    return losses


def soft_sup_con(
    z: list[Tensor], u: list[Tensor], v: list[Tensor], samples: list[int], t: float
) -> list[Tensor]:
    s = scores(z, z)
    losses = []
    for i in range(len(z)):
        total, weighted, every = z[0].new_zeros(()), z[0].new_zeros(()), []
        for j in range(len(z)):
            if j == i:
                continue
            weight = z[0].new_ones(()) if samples[i] == samples[j] else u[i] @ v[j]
            total = total + weight
            weighted = weighted + weight * s[i][j] / t
            every.append(s[i][j] / t)
        if float(total) > 0:
            losses.append(log_sum(every) - weighted / total)
    return losses


def siglip(
    x: Tensor, y: Tensor, log_scale: float, bias: float, positives: Tensor | None = None
) -> list[Tensor]:
    s = scores(list(x), list(y))
    losses = []
    for i in range(len(x)):
        total = x.new_zeros(())
        for j in range(len(y)):
            score = math.exp(log_scale) * s[i][j] + bias
            share = float(i == j) if positives is None else float(positives[i, j])
            total = total + share * torch.log1p(torch.exp(-score))
            total = total + (1 - share) * torch.log1p(torch.exp(score))
        losses.append(total)
    return losses
