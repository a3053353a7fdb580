"""Margins, ranking and label guidance as loops in float64, written from the papers."""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def distance(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - x @ y
    squared = (x - y).square().sum()
    if kind == "squared":
        return squared
    return squared.sqrt() if squared.item() > 0 else 0 * squared


def triplet(z, labels, margin, mining, kind, soft):
    n, costs = len(z), []

    def cost(gap):
        return (1 + gap.exp()).log() if soft else (gap + margin).clamp_min(0)

    for a in range(n):
        d = [distance(z[a], z[j], kind) for j in range(n)]
        near = [d[j] for j in range(n) if j != a and labels[j] == labels[a]]
        far = [d[j] for j in range(n) if labels[j] != labels[a]]
        if not near or not far:
            continue
        if mining == "all":
            every = cost(torch.stack(near)[:, None] - torch.stack(far)).flatten()
            costs += [*(every if soft else every[every > 0])]
        elif mining == "hard":
            costs.append(cost(max(near) - min(far)))
        elif mining == "easy_positive":
            costs.append(cost(min(near) - min(far)))
        else:
            for p in near:
                window = [q for q in far if p < q < p + margin]
                below = [q for q in far if q <= p]
                pick = min(window) if window else max(below) if below else None
                costs.append(0 * p if pick is None else cost(p - pick))
    return torch.stack(costs).mean() if costs else 0 * z.sum()


def hinges(rows, columns, negative, n, hardest):
    """Row i takes the hinges of its row and of its column, of the worst negative or of all."""
    losses = []
    for i in range(n):
        own = [rows(i, j).clamp_min(0) for j in range(n) if negative(i, j)]
        other = [columns(j, i).clamp_min(0) for j in range(n) if negative(j, i)]
        pool = max if hardest else sum
        losses.append(sum(pool(part) for part in (own, other) if part))
    return losses


def birank(s, m, negative, hardest=True):
    return hinges(
        lambda i, j: m + s[i, j] - s[i, i], lambda i, j: m + s[i, j] - s[j, j],
        negative, len(s), hardest,
    )  # fmt: skip


def boost_abs(s, a, m, g, negative):
    gap = lambda i, j: (1 - g) * m + s[i, j] - a[i, j]  # noqa: E731
    rows = hinges(gap, gap, negative, len(s), True)
    return [row + 2 * (g * m + a[i, i] - s[i, i]).clamp_min(0) for i, row in enumerate(rows)]


def boost_rel(s, a, m, negative):
    return hinges(
        lambda i, j: m + (a[i, i] - a[i, j]) - (s[i, i] - s[i, j]),
        lambda i, j: m + (a[j, j] - a[i, j]) - (s[j, j] - s[i, j]),
        negative, len(s), True,
    )  # fmt: skip


def softmax(values: list[Tensor]) -> list[Tensor]:
    weights = [(10 * value).exp() for value in values]
    return [weight / sum(weights) for weight in weights]


def both_ways(s, a, negative, term):
    losses = []
    for i in range(len(s)):
        row = [j for j in range(len(s)) if j == i or negative(i, j)]
        column = [j for j in range(len(s)) if j == i or negative(j, i)]
        losses.append(
            term([s[i, j] for j in row], [a[i, j] for j in row], row.index(i))
            + term([s[j, i] for j in column], [a[j, i] for j in column], column.index(i))
        )
    return losses


def boost_kl(s, a, negative):
    def term(x, y, own):
        return sum(p * (p / q).log() for p, q in zip(softmax(y), softmax(x), strict=True))

    return both_ways(s, a, negative, term)


def boost_pro(s, a, negative):
    def term(x, y, own):
        return -softmax([p - q for p, q in zip(x, y, strict=True)])[own].log()

    return both_ways(s, a, negative, term)


def label_guided(x, y, share, inter, intra, t, real=None):
    def term(rows, columns, own):
        losses = []
        for i in range(len(rows)):
            kept = [j for j in range(len(rows)) if own or j != i]
            weights = [1.0 if j == i else share(i, j) for j in kept]
            scores = [rows[i] @ columns[j] / t for j in kept]
            if sum(weights) > 0:
                mean = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
                losses.append(torch.stack(scores).logsumexp(0) - mean)
        return torch.stack(losses).mean() if losses else math.nan

    within = (
        term(x, real.detach(), True) if real is not None
        else (term(x, x, False) + term(y, y, False)) / 2
    )  # fmt: skip
    return inter * (term(x, y, True) + term(y, x, True)) / 2 + intra * within
