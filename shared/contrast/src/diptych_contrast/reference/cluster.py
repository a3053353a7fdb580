"""Clustering losses, dense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.reference import unit
from diptych_contrast.reference.pairwise import info_nce


def swav_loss(
    scores: Sequence[Tensor],
    assign: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    queue_scores: Sequence[Tensor] | None = None,
    n_iter: int = 3,
) -> Tensor:
    """`diptych_contrast.swav_loss`, with Sinkhorn on exponentials."""
    losses = []
    for number, view in enumerate(assign):
        whole = scores[view].double().detach()
        if queue_scores is not None:
            whole = torch.cat([queue_scores[number].double(), whole])
        shares = (whole / epsilon).exp()
        for _ in range(n_iter):
            shares = shares / shares.sum(0)
            shares = shares / shares.sum(1, keepdim=True)
        shares = shares[-len(scores[view]) :]
        for other in (other for other in range(len(scores)) if other != view):
            losses.append(F.cross_entropy(scores[other].double() / temperature, shares))
    return torch.stack(losses).mean()


def proto_nce(
    q: Tensor,
    k: Tensor,
    centroids: Sequence[Tensor],
    assignments: Sequence[Tensor],
    densities: Sequence[Tensor],
    temperature: float = 0.2,
    queue: Tensor | None = None,
) -> Tensor:
    """`diptych_contrast.proto_nce`, dense; the queue is a tensor."""
    clusterings = zip(centroids, assignments, densities, strict=True)
    prototypes = [
        F.cross_entropy(unit(q) @ unit(centres).t() / density.double(), own)
        for centres, own, density in clusterings
    ]
    negatives = "in_batch" if queue is None else "queue"
    return info_nce(q, k, temperature, negatives, queue) + torch.stack(prototypes).mean()
