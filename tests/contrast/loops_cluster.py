"""Clustering losses as loops in float64, written from the papers, not from the code."""

import math

import numpy as np
import torch
from tests.contrast.references import cosine, info_nce, log_sum
from torch import Tensor


def sinkhorn(scores: Tensor, epsilon: float, n_iter: int) -> Tensor:
    """Scaling of exponentials, prototypes as rows, as the paper has it."""
    plan = torch.exp(scores.double().t() / epsilon)
    k, b = plan.shape
    plan = plan / plan.sum()
    for _ in range(n_iter):
        for row in range(k):
            plan[row] /= plan[row].sum() * k
        for column in range(b):
            plan[:, column] /= plan[:, column].sum() * b
    return (plan * b).t()


def swav(
    scores: list[Tensor],
    assign: tuple[int, ...],
    t: float,
    epsilon: float,
    queue: list[Tensor] | None = None,
    assignments: list[Tensor] | None = None,
    n_iter: int = 3,
) -> list[Tensor]:
    n, k = scores[0].shape
    losses = []
    for i in range(n):
        views = []
        for number, a in enumerate(assign):
            whole = scores[a].detach()
            if queue is not None:
                whole = torch.cat([queue[number], whole])
            shares = (
                sinkhorn(whole, epsilon, n_iter)[-n:]
                if assignments is None
                else assignments[number]
            )
            for v in range(len(scores)):
                if v != a:
                    row = [scores[v][i, j] / t for j in range(k)]
                    total = log_sum(row)
                    views.append(sum(shares[i, j] * (total - row[j]) for j in range(k)))
        losses.append(torch.stack(views).mean())
    return losses


def proto_nce(
    q: Tensor,
    k: Tensor,
    centroids: list[Tensor],
    assignments: list[Tensor],
    densities: list[Tensor],
    t: float,
    queue: Tensor | None = None,
) -> list[Tensor]:
    losses = info_nce(q, k, t, in_batch=queue is None, queue=queue)
    for i in range(len(q)):
        terms = []
        for centres, own, phi in zip(centroids, assignments, densities, strict=True):
            row = [cosine(q[i], c) / p for c, p in zip(centres, phi, strict=True)]
            terms.append(log_sum(row) - row[int(own[i])])
        losses[i] = losses[i] + torch.stack(terms).mean()
    return losses


def density(x: Tensor, centroids: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Equation 12 with the clipping and scaling of the authors' code, in numpy."""
    x, centroids = (
        z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True) for z in (x, centroids)
    )
    values = np.zeros(len(centroids))
    for c in range(len(centroids)):
        apart = [math.dist(x[i], centroids[c]) for i in range(len(x)) if int(own[i]) == c]
        if len(apart) > 1:
            values[c] = np.mean(apart) / math.log(len(apart) + 10)
    for c in range(len(centroids)):
        if int((own == c).sum()) <= 1:
            values[c] = values.max()
    values = values.clip(np.percentile(values, 10), np.percentile(values, 90))
    return torch.from_numpy(temperature * values / values.mean())
