"""Dense references of `diptych_contrast.matching`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.reference import log_sum, unit


def triplet(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    mining: str = "all",
    distance: str = "euclid",
    soft: bool = False,
) -> Tensor:
    """`diptych_contrast.triplet`, dense."""
    x = unit(z)
    d = 1.0 - x @ x.t() if distance == "cosine" else torch.cdist(x, x, p=2.0)
    d = d.square() if distance == "squared" else d
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(z), dtype=torch.bool)
    # Axes: anchor, positive, negative.
    gaps = d[:, :, None] - d[:, None, :]
    counts = positive[:, :, None] & ~same[:, None, :]
    if mining == "semi_hard":
        window = counts & (gaps < 0) & (gaps + margin > 0)
        below = counts & (gaps >= 0)
        nearest = gaps.masked_fill(~window, -math.inf).argmax(2)
        farthest = gaps.masked_fill(~below, math.inf).argmin(2)
        chosen = torch.where(window.any(2), nearest, farthest)[:, :, None]
        found = (window.any(2) | below.any(2))[:, :, None]
        counts = counts.any(2, keepdim=True)
        gaps = gaps.gather(2, chosen).where(found, torch.tensor(-math.inf).double())
    elif mining != "all":
        sign = 1.0 if mining == "hard" else -1.0
        chosen = (sign * d).masked_fill(~positive, -math.inf).argmax(1)
        nearest = d.masked_fill(same, math.inf).argmin(1)
        counts = positive.any(1) & ~same.all(1)
        gaps = (d.gather(1, chosen[:, None]) - d.gather(1, nearest[:, None]))[:, 0]
    costs = F.softplus(gaps, threshold=40) if soft else (gaps + margin).relu()
    if mining == "all" and not soft:
        counts = counts & (costs > 0)
    return (costs * counts).sum() / counts.sum().clamp_min(1)


def _scores(given: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return given.double() if isinstance(given, Tensor) else unit(given[0]) @ unit(given[1]).t()


def _mask(scores: Tensor, negatives: Tensor | None) -> Tensor:
    off = ~torch.eye(len(scores), dtype=torch.bool)
    return off if negatives is None else off & negatives


def _total(rows: Tensor, mask: Tensor | None, parity: str | None) -> Tensor:
    count = len(rows) if mask is None else (mask.any(0) | mask.any(1)).sum()
    return rows.sum() if parity else rows.sum() / count


def birank(
    S: Tensor,
    margin: float = 0.2,
    hardest: bool = True,
    *,
    negatives: Tensor | None = None,
    parity: str | None = None,
) -> Tensor:
    """`diptych_contrast.birank`, dense."""
    s = _scores(S)
    mask = _mask(s, negatives)
    sides = [(margin + side - side.diagonal()[:, None]).relu() for side in (s, s.t())]
    costs = [cost * on for cost, on in zip(sides, (mask, mask.t()), strict=True)]
    rows = sum((c.amax(1) if hardest else c.sum(1) for c in costs), torch.zeros(()))
    return _total(rows, mask, parity)


def boost_abs(
    S: Tensor,
    S_anchor: Tensor,
    margin: float = 0.2,
    beta: float = 1.0,
    gamma: float = 0.5,
    *,
    negatives: Tensor | None = None,
    parity: str | None = None,
) -> Tensor:
    """`diptych_contrast.boost_abs`, dense."""
    gain = _scores(S) - _scores(S_anchor).detach()
    costs = ((1 - gamma) * beta * margin + gain).relu() * _mask(gain, negatives)
    own = (gamma * beta * margin - gain.diagonal()).relu()
    return _total(2 * own + costs.amax(1) + costs.amax(0), None, parity)


def boost_rel(
    S: Tensor,
    S_anchor: Tensor,
    margin: float = 0.2,
    beta: float = 1.0,
    *,
    negatives: Tensor | None = None,
    parity: str | None = None,
) -> Tensor:
    """`diptych_contrast.boost_rel`, dense."""
    gain = _scores(S) - _scores(S_anchor).detach()
    return birank(gain, margin * beta, negatives=negatives, parity=parity)


def boost_kl(S: Tensor, S_anchor: Tensor, *, negatives: Tensor | None = None) -> Tensor:
    """`diptych_contrast.boost_kl`, dense."""
    s, a = _scores(S), _scores(S_anchor).detach()
    mask = _mask(s, negatives)
    own = mask | torch.eye(len(s), dtype=torch.bool)
    rows = torch.zeros(len(s)).double()
    for x, y, on in ((s, a, own), (s.t(), a.t(), own.t())):
        p, q = ((10 * part).exp() * on for part in (y, x))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        rows = rows + torch.where(on, p * (p / q).log(), 0.0).sum(1)
    return _total(rows, mask, None)


def boost_pro(S: Tensor, S_anchor: Tensor, *, negatives: Tensor | None = None) -> Tensor:
    """`diptych_contrast.boost_pro`, dense."""
    gain = 10 * (_scores(S) - _scores(S_anchor).detach())
    mask = _mask(gain, negatives)
    own = mask | torch.eye(len(gain), dtype=torch.bool)
    rows = log_sum(gain, own) + log_sum(gain.t(), own.t()) - 2 * gain.diagonal()
    return _total(rows, mask, None)


def label_guided(
    img: Tensor,
    txt: Tensor,
    labels: Tensor,
    inter: float = 1.0,
    intra: float = 1.0,
    temperature: float = 0.1,
    *,
    real: Tensor | None = None,
) -> Tensor:
    """`diptych_contrast.label_guided`, dense."""
    x, y = unit(img), unit(txt)
    eye = torch.eye(len(x), dtype=torch.bool)
    if labels.dim() == 1:
        share = ((labels[:, None] == labels) & (labels >= 0)).double()
    else:
        both = labels.double() @ labels.double().t()
        share = both / (labels.sum(1)[:, None] + labels.sum(1) - both).clamp_min(1)

    def term(a: Tensor, b: Tensor, own: bool) -> Tensor:
        scores = a @ b.t() / temperature
        weights = share.masked_fill(eye, float(own))
        rows = log_sum(scores, torch.ones_like(eye) if own else ~eye)
        valid = weights.sum(1) > 0
        means = (weights * scores).sum(1)[valid] / weights.sum(1)[valid]
        return (rows[valid] - means).mean()

    if real is not None:
        within = term(x, unit(real).detach(), True)
    else:
        within = (term(x, x, False) + term(y, y, False)) / 2
    return inter * (term(x, y, True) + term(y, x, True)) / 2 + intra * within
