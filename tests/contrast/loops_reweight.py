"""Reweighting losses as loops over pairs in float64, written from the papers.

Inputs are unit rows; every function gives its value, mean over rows included.
"""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def weighted(costs: Tensor, logits: Tensor, freeze: bool) -> Tensor:
    weights = logits.softmax(0)
    return ((weights.detach() if freeze else weights) * costs).sum()


def distances(x: Tensor, others: list[Tensor]) -> Tensor:
    return (x - torch.stack(others)).square().sum(1)


def cacr(views, t_pos, t_neg, *, alpha=1.0, beta=1.0, kernel="euclid", freeze=True, queue=(),
         tau_plus=0.0):  # fmt: skip
    v, n = len(views), len(views[0])
    pulls, pushes = [], []
    for a in range(v):
        for i in range(n):
            x = views[a][i]
            pull = distances(x, [views[b][i] for b in range(v) if b != a])
            others = [views[b][j] for b in range(v) for j in range(n) if j != i]
            push = distances(x, [*others, *queue])
            pulls.append(weighted(pull, t_pos * pull, freeze))
            costs = torch.exp(-2 * push) if kernel == "rbf" else -push
            row = weighted(costs, -t_neg * push, freeze)
            pushes.append((row + tau_plus * pull.mean()) / (1 - tau_plus))
    push = torch.stack(pushes).mean()
    return alpha * torch.stack(pulls).mean() + beta * (push.log() if kernel == "rbf" else push)


def official_cacr(views, t_pos, t_neg, *, kernel="euclid", tau_plus=0.0):
    """The authors' small-scale form: pairs of views x < y, in one direction."""
    v, n = len(views), len(views[0])
    pull = []
    for a in range(v):
        for i in range(n):
            near = distances(views[a][i], [views[b][i] for b in range(v) if b != a])
            pull.append(weighted(near, t_pos * near, False))
    push = []
    for a in range(v):
        for b in range(a + 1, v):
            rows = []
            for i in range(n):
                far = distances(views[a][i], [views[b][j] for j in range(n) if j != i])
                costs = torch.exp(-2 * far) if kernel == "rbf" else -far
                row = weighted(costs, -t_neg * far, False)
                own = distances(views[a][i], [views[b][i]])[0]
                near = 0.0 if kernel == "rbf" else tau_plus * own
                rows.append((row - near) / (1 - tau_plus))
            mean = torch.stack(rows).mean()
            push.append(mean.log() if kernel == "rbf" else mean)
    return torch.stack(pull).mean() + torch.stack(push).mean()


def amcl(heads_a, heads_b, net, reg):
    total, priors, dim = 0.0, [], heads_a.shape[-1]
    for c in range(len(heads_a)):
        z = torch.cat([heads_a[c], heads_b[c]])
        for i in range(len(z)):
            others = torch.stack([z[j] for j in range(len(z)) if j != i])
            logits = logit(net, c, z[i], others)
            t = net.low + (net.high - net.low) * logits.sigmoid()
            priors += [*(dim / 2 * t.log() + 1 / t)]
            terms = (others @ z[i]) / t
            partner = (i + len(z) // 2) % len(z)
            positive = terms[partner - (partner > i)]
            total = total + (terms.logsumexp(0) - positive) / len(z)
    return total + reg * torch.stack(priors).mean()


def logit(net, c, x, others):
    """Logits of one row with each of the others, as the network on the concatenation."""
    if net.kind == "bilinear":
        return (others @ net.left[c].double().t()) @ (net.left[c].double() @ x) + net.bias[c]
    first = torch.cat([net.left[c], net.right[c]], 1).double()
    joined = torch.cat([x.expand_as(others), others], 1)
    hidden = (joined @ first.t() + net.offset[c]).relu()
    return hidden @ net.out[c].double() + net.bias[c]


def arbitrary_pairs(z, k, labels, partners, gates, t, *, pool="rows", cosine=False, official=False):
    rows, pairs = [], []
    for i in range(len(z)):
        scores = []
        for j in range(len(k)):
            x, y = z[i] * gates[i], k[j] * gates[i]
            scores.append((unit(x) @ unit(y) if cosine else x @ y) / t)
        others = [s for j, s in enumerate(scores) if labels[j] not in (labels[i], partners[i])]
        own = [j for j in range(len(k)) if labels[j] == partners[i] and (official or j != i)]
        terms = [
            torch.stack([scores[p], *others]).logsumexp(0) - scores[p]
            for p in own
            if others or official
        ]
        pairs += terms
        if terms or official:
            rows.append(torch.stack(terms).mean() if terms else z.new_zeros(()))
    every = pairs if pool == "pairs" else rows
    return torch.stack(every).mean() if every else z.sum() * math.nan
