"""Clustering, reweighting, matching and contrastive analysis, dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.reference import log_sum, unit
from diptych_contrast.reference.pairs import info_nce
from diptych_contrast.reweight import PairTemperature


def swav_loss(
    scores: Sequence[Tensor],
    assign: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    queue_scores: Sequence[Tensor] | None = None,
    n_iter: int = 3,
) -> Tensor:
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
    clusterings = zip(centroids, assignments, densities, strict=True)
    prototypes = [
        F.cross_entropy(unit(q) @ unit(centres).t() / density.double(), own)
        for centres, own, density in clusterings
    ]
    negatives = "in_batch" if queue is None else "queue"
    return info_nce(q, k, temperature, negatives, queue) + torch.stack(prototypes).mean()


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
) -> Tensor:
    v, n = len(views), len(views[0])
    z = unit(torch.cat(list(views)))
    sample = torch.arange(n).repeat(v)
    columns = z if queue is None else torch.cat([z, unit(queue)])
    owner = F.pad(sample, (0, len(columns) - len(z)), value=-1)

    def mean(d2: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        weights = logits.masked_fill(~mask, -math.inf).softmax(1)
        return ((weights.detach() if detach_weights else weights) * d2).sum(1)

    d2 = (z[:, None] - columns).square().sum(2)
    near, other = d2[:, : v * n], sample[:, None] != owner
    sibling = (sample[:, None] == sample) & ~torch.eye(v * n, dtype=torch.bool)
    pulled = mean(near, t_pos * near, sibling).mean()
    if kernel == "rbf":
        pushed = mean((-2.0 * d2).exp(), -t_neg * d2, other).mean().log()
    else:
        positive = tau_plus * (near * sibling).sum(1) / (v - 1)
        pushed = ((positive - mean(d2, -t_neg * d2, other)) / (1 - tau_plus)).mean()
    return alpha * pulled + beta * pushed


def amcl(heads_a: Tensor, heads_b: Tensor, net: PairTemperature, reg: float = 0.1) -> Tensor:
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
) -> Tensor:
    g = gate(labels, partner_labels).double()
    x, y = unit(z)[:, None] * g[:, None], unit(k)[None] * g[:, None]
    scores = F.cosine_similarity(x, y, 2) if subspace_cosine else (x * y).sum(2)
    scores = scores / temperature
    positive = partner_labels[:, None] == labels
    negative = ~positive & (labels[:, None] != labels)
    positive = positive & ~torch.eye(len(z), dtype=torch.bool) & negative.any(1)[:, None]
    others = (scores.exp() * negative).sum(1, keepdim=True)
    terms = ((scores.exp() + others).log() - scores) * positive
    counts = positive.sum(1)
    mean = terms.sum(1) / counts.clamp_min(1)
    loss = terms.sum() / counts.sum() if pool == "pairs" else mean[counts > 0].mean()
    return loss + penalty * (g * (1 - g)).mean()


def triplet(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    mining: str = "all",
    distance: str = "euclid",
    soft: bool = False,
) -> Tensor:
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


def _mean(rows: Tensor, mask: Tensor) -> Tensor:
    return rows.sum() / (mask.any(0) | mask.any(1)).sum()


def birank(
    S: Tensor, margin: float = 0.2, hardest: bool = True, *, negatives: Tensor | None = None
) -> Tensor:
    s = _scores(S)
    mask = _mask(s, negatives)
    sides = [(margin + side - side.diagonal()[:, None]).relu() for side in (s, s.t())]
    costs = [cost * on for cost, on in zip(sides, (mask, mask.t()), strict=True)]
    rows = sum((c.amax(1) if hardest else c.sum(1) for c in costs), torch.zeros(()))
    return _mean(rows, mask)


def boost_abs(
    S: Tensor,
    S_anchor: Tensor,
    margin: float = 0.2,
    beta: float = 1.0,
    gamma: float = 0.5,
    *,
    negatives: Tensor | None = None,
) -> Tensor:
    gain = _scores(S) - _scores(S_anchor).detach()
    costs = ((1 - gamma) * beta * margin + gain).relu() * _mask(gain, negatives)
    own = (gamma * beta * margin - gain.diagonal()).relu()
    return (2 * own + costs.amax(1) + costs.amax(0)).mean()


def boost_rel(
    S: Tensor,
    S_anchor: Tensor,
    margin: float = 0.2,
    beta: float = 1.0,
    *,
    negatives: Tensor | None = None,
) -> Tensor:
    gain = _scores(S) - _scores(S_anchor).detach()
    return birank(gain, margin * beta, negatives=negatives)


def boost_kl(S: Tensor, S_anchor: Tensor, *, negatives: Tensor | None = None) -> Tensor:
    s, a = _scores(S), _scores(S_anchor).detach()
    mask = _mask(s, negatives)
    own = mask | torch.eye(len(s), dtype=torch.bool)
    rows = torch.zeros(len(s)).double()
    for x, y, on in ((s, a, own), (s.t(), a.t(), own.t())):
        p, q = ((10 * part).exp() * on for part in (y, x))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        rows = rows + torch.where(on, p * (p / q).log(), 0.0).sum(1)
    return _mean(rows, mask)


def boost_pro(S: Tensor, S_anchor: Tensor, *, negatives: Tensor | None = None) -> Tensor:
    gain = 10 * (_scores(S) - _scores(S_anchor).detach())
    mask = _mask(gain, negatives)
    own = mask | torch.eye(len(gain), dtype=torch.bool)
    rows = log_sum(gain, own) + log_sum(gain.t(), own.t()) - 2 * gain.diagonal()
    return _mean(rows, mask)


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


def sep_clr(
    common: Tensor,
    salient: Tensor,
    target: Tensor,
    weights: tuple[float, float, float] = (1.0, 10.0, 10.0),
) -> Tensor:
    c, s, y = unit(common), salient.double(), target.bool()
    kept = s * y[:, None]
    align = (c[0] - c[1]).square().sum(1).mean() + sum(_uniform(x) for x in c)
    attract = (s[0] - s[1])[y].square().sum(1).mean() + sum(_uniform(x) for x in kept)
    lost = s[:, ~y].square().sum(2).mean() if bool((~y).any()) else 0.0
    kernels = [torch.exp(-_squares(a) - _squares(b)) for a, b in zip(c, kept, strict=True)]
    shared = torch.stack([kernel.mean(1).log().mean() for kernel in kernels]).mean()
    return align + weights[0] * attract + weights[1] * lost + weights[2] * shared


def _squares(x: Tensor) -> Tensor:
    return (x[:, None] - x).square().sum(2)


def _uniform(x: Tensor) -> Tensor:
    pairs = torch.triu(torch.ones(len(x), len(x)), diagonal=1).bool()
    return (-_squares(x))[pairs].exp().mean().log()
