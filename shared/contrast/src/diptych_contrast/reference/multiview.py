"""Multi-view losses, dense; views of shape (v, n, d)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diptych_contrast.reference import log_sum, unit
from diptych_contrast.reference.pairwise import sup_con


def nt_xent_multi(views: Tensor, temperature: float = 0.5) -> Tensor:
    """`diptych_contrast.nt_xent_multi`, dense."""
    return sup_con(views, torch.arange(views.shape[1]), temperature)


def mv_info_nce(
    views: Tensor, temperature: float = 0.5, same_view_negatives: bool = False
) -> Tensor:
    """`diptych_contrast.mv_info_nce`, dense."""
    scores, view, sample = _scores(views, temperature)
    other = view[:, None] != view
    pairs = ~torch.eye(len(view), dtype=torch.bool) if same_view_negatives else other
    sums = [log_sum(scores, mask) for mask in (pairs, other & (sample[:, None] == sample))]
    every, positive = (rows.view(len(views), -1).logsumexp(0) for rows in sums)
    return (every - positive).mean()


def mv_dhel(views: Tensor, temperature: float = 0.5) -> Tensor:
    """`diptych_contrast.mv_dhel`, dense."""
    scores, view, sample = _scores(views, temperature)
    same_view, same_sample = view[:, None] == view, sample[:, None] == sample
    negative = log_sum(scores, same_view & ~same_sample).view(len(views), -1).sum(0)
    positive = log_sum(scores, same_sample & ~same_view).view(len(views), -1).logsumexp(0)
    return (negative - positive).mean()


def poly_view(views: Tensor, temperature: float = 0.5, aggregate: str = "geometric") -> Tensor:
    """`diptych_contrast.poly_view`, dense."""
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
