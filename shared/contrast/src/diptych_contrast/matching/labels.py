"""Matching by labels: triplets and how they are mined, images and texts that share labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.common import Common, LossResult, Options, TemperatureLike, read_options
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice, check_least, readable
from diptych_contrast.kernel import log_sums, products, unit_rows
from diptych_contrast.rowwise import LOCAL, by_rows


def triplet(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    margin: float = 0.2,
    mining: Literal["all", "hard", "semi_hard", "easy_positive"] = "all",
    distance: Literal["euclid", "squared", "cosine"] = "euclid",
    soft: bool = False,
    **common: Unpack[Common],
) -> LossResult:
    """Triplet loss (Schroff et al., 2015; Hermans et al., 2017; Xuan et al., 2020).

    ``[margin + d_ap - d_an]_+``, averaged over triplets (a, p, n), p of the class of a, n not:
    ``all`` active ones; the farthest p and nearest n of every a (``hard``); the nearest p and
    nearest n (``easy_positive``); for every pair (a, p) the nearest n with
    ``d_ap < d_an < d_ap + margin``, else the farthest with ``d_an <= d_ap``, else none and a loss
    of 0 (``semi_hard``). Among equal distances the lowest row wins. The root's slope at 0 is 0.

    Args:
        distance: ``euclid``, its square, or one minus the cosine.
        soft: ``softplus(d_ap - d_an)`` instead of the hinge, so that every triplet is active.

    Example:
        >>> z = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
        >>> round(triplet(z, torch.tensor([0, 0, 1]), 0.5).item(), 4)
        1.2071
    """
    options = read_options("triplet", common, *LOCAL)
    points = options.embeddings(z=z)[0]
    labels = options.labels("labels", labels, points, lowest=0)
    check_choice("triplet", "mining", mining, "all", "hard", "semi_hard", "easy_positive")
    check_choice("triplet", "distance", distance, "euclid", "squared", "cosine")
    check_least("triplet", 0, margin=margin)
    if readable(labels) and not bool((labels != labels[0]).any()):
        fix = "pass rows of two classes: one has no negative"
        raise ContrastInputError("triplet", "labels", "holds a single class", fix)
    if distance == "cosine" and not options.normalize:
        points = unit_rows(points)
    mine = _MINE[mining, soft if mining == "all" else None]
    index = torch.arange(len(points), device=points.device)
    largest = int(labels.bincount().max()) if mine is _all_soft else 4

    def block(x: Tensor, label: Tensor, row: Tensor, y: Tensor) -> Tensor:
        d = _distances(x, y, distance)
        same = label[:, None] == labels
        positive = same & (row[:, None] != index)
        total, count = mine(d, positive, ~same, margin, soft)
        valid = positive.any(1) & ~same.all(1)
        return torch.stack([total.masked_fill(~valid, 0.0), count * valid, valid], 1)

    table = by_rows(block, (points, labels, index), (points,), len(points) * largest, options)
    total, counts, valid = table[:, 0], table[:, 1].detach(), table[:, 2] > 0
    if options.reduction == "none":
        total = total / counts.clamp_min(1)
    elif options.reduction == "mean":
        counted = len(total) if options.empty == "zero" else valid.sum()
        total = total * (counted / counts.sum().clamp_min(1))
    return options.reduce(total, valid)


def _distances(x: Tensor, y: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1.0 - products(x, y.t())
    # Differences, not products: equal rows are at distance 0, and ties stay ties.
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return d if distance == "euclid" else d.square()


def _cost(gap: Tensor, margin: float, soft: bool) -> Tensor:
    return F.softplus(gap, threshold=40) if soft else (gap + margin).relu()


def _extremes(farthest: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def mine(
        d: Tensor, positive: Tensor, negative: Tensor, margin: float, soft: bool
    ) -> tuple[Tensor, Tensor]:
        if farthest:
            chosen = d.detach().masked_fill(~positive, -math.inf).argmax(1)
        else:
            chosen = d.detach().masked_fill(~positive, math.inf).argmin(1)
        nearest = d.detach().masked_fill(~negative, math.inf).argmin(1)
        gap = d.gather(1, chosen[:, None]) - d.gather(1, nearest[:, None])
        return _cost(gap[:, 0], margin, soft), torch.ones_like(d[:, 0])

    return mine


def _all_hinge(
    d: Tensor, positive: Tensor, negative: Tensor, margin: float, soft: bool
) -> tuple[Tensor, Tensor]:
    """Sum over active triplets: piecewise linear, so counting them by two sorts is enough."""
    with torch.no_grad():
        reach = d + margin
        sorted_negatives = d.masked_fill(~negative, math.inf).sort(1).values
        closer = torch.searchsorted(sorted_negatives, reach) * positive
        sorted_reach = reach.masked_fill(~positive, -math.inf).sort(1).values
        farther = (d.shape[1] - torch.searchsorted(sorted_reach, d, right=True)) * negative
        count = closer.sum(1)
    # Large sums nearly cancel.
    total = ((closer - farther) * d.double()).sum(1) + margin * count.double()
    return total.to(d.dtype), count


def _all_soft(
    d: Tensor, positive: Tensor, negative: Tensor, margin: float, soft: bool
) -> tuple[Tensor, Tensor]:
    most = max(1, int(positive.sum(1).max()))
    there, chosen = positive.float().topk(most, 1)
    gaps = d.gather(1, chosen)[:, :, None] - d[:, None, :]
    counts = there.bool()[:, :, None] & negative[:, None, :]
    return _cost(gaps, margin, True).masked_fill(~counts, 0.0).sum((1, 2)), counts.sum((1, 2))


def _semi_hard(
    d: Tensor, positive: Tensor, negative: Tensor, margin: float, soft: bool
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        values, order = torch.sort(d.masked_fill(~negative, math.inf), dim=1, stable=True)
        beyond = torch.searchsorted(values, d.detach(), right=True)
        inside = values.gather(1, beyond.clamp_max(d.shape[1] - 1)) < d + margin
        inside &= beyond < d.shape[1]
        rank = torch.where(inside, beyond, beyond - 1)
        found = rank >= 0
        # The first of equal values, as everywhere.
        first = torch.searchsorted(values, values.gather(1, rank.clamp_min(0)))
        chosen = order.gather(1, first)
    costs = _cost(d - d.gather(1, chosen), margin, soft)
    return costs.masked_fill(~(positive & found), 0.0).sum(1), positive.sum(1)


_MINE: dict[tuple[str, bool | None], Callable[..., tuple[Tensor, Tensor]]] = {
    ("all", False): _all_hinge,
    ("all", True): _all_soft,
    ("hard", None): _extremes(farthest=True),
    ("easy_positive", None): _extremes(farthest=False),
    ("semi_hard", None): _semi_hard,
}


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

    ``log sum_j exp(s_ij / t) - sum_j w_ij s_ij / t / sum_j w_ij``, w 1 for equal labels,
    or the Jaccard index of two label sets. ``inter`` weighs the mean of both directions between the
    modalities, where the own pair always has w = 1, ``intra`` the mean of both modalities against
    themselves.

    Args:
        labels: Class of each sample, -1: unlabelled; or its label set, zeros and ones (n, c).
        real: Real images where ``img`` are generated ones: these, without gradient and with the
            own pair, are then the columns of the only term within.

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
    x, y, *others = options.embeddings(**named).unbind(0)
    if labels.dim() == 2:
        if len(labels) != len(x) or (readable(labels) and bool((labels * (1 - labels)).any())):
            found = f"has shape {tuple(labels.shape)}, or values beside 0 and 1"
            fix = f"pass zeros and ones of shape ({len(x)}, classes)"
            raise ContrastInputError("label_guided", "labels", found, fix)
        labels = labels.to(x.dtype)
    else:
        labels = options.labels("labels", labels, x, lowest=-1)
    scale = options.scale(temperature, x)
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
            loss = loss + weight * options.reduce(losses, valid)
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
            both = products(label, labels.t())
            either = label.sum(1, keepdim=True) + labels.sum(1) - both
            weights = both / either.clamp_min(1.0)
        weights = weights.masked_fill(row[:, None] == index, float(own))
        return torch.stack([(x * products(weights, y)).sum(1), weights.sum(1)], 1)

    score, total = by_rows(block, (rows, labels, index), (columns,), len(rows), options).unbind(1)
    valid = total > 0
    return score / total.where(valid, 1.0), valid
