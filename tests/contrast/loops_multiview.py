"""Multi-view losses as loops over pairs in float64, written from the papers, not from the code.

Views of shape (v, n, d); every function returns one value a row, as a list of scalar tensors.
"""

import math

import torch
from tests.contrast.references import log_sum, scores
from torch import Tensor

Table = list[list[Tensor]]


def table(views: Tensor) -> Table:
    """Cosine similarity of every embedding with every other, view-major."""
    rows = [*views.flatten(0, 1)]
    return scores(rows, rows)


def mv_info_nce(views: Tensor, t: float, same_view: bool) -> list[Tensor]:
    v, n = views.shape[:2]
    s, losses = table(views), []
    for i in range(n):
        every, positive = [], []
        for a in range(v):
            for b in range(v):
                if a != b:
                    positive.append(s[a * n + i][b * n + i] / t)
                for j in range(n):
                    if a != b or (same_view and i != j):
                        every.append(s[a * n + i][b * n + j] / t)
        losses.append(log_sum(every) - log_sum(positive))
    return losses


def mv_dhel(views: Tensor, t: float) -> list[Tensor]:
    v, n = views.shape[:2]
    s, losses = table(views), []
    for i in range(n):
        repulsion = torch.zeros((), dtype=torch.float64)
        positive = []
        for a in range(v):
            within = [s[a * n + i][a * n + j] / t for j in range(n) if j != i]
            repulsion = repulsion + log_sum(within)
            positive += [s[a * n + i][b * n + i] / t for b in range(v) if b != a]
        losses.append(repulsion - log_sum(positive))
    return losses


def poly_view(views: Tensor, t: float, aggregate: str) -> list[Tensor]:
    v, n = views.shape[:2]
    s, losses = table(views), []
    for a in range(v):
        for i in range(n):
            row = s[a * n + i]
            negatives = [row[b * n + j] / t for b in range(v) for j in range(n) if j != i]
            positives = [row[b * n + i] / t for b in range(v) if b != a]
            if aggregate == "sufficient":
                positives = [torch.stack(positives).mean()]
            each = [log_sum([p, *negatives]) - p for p in positives]
            if aggregate == "arithmetic":
                losses.append(math.log(len(each)) - log_sum([-loss for loss in each]))
            else:
                losses.append(torch.stack(each).mean())
    return losses


def official_mv_dhel(views: Tensor, t: float) -> Tensor:
    """The authors' form: products of sums, each pair of views once."""
    z = torch.nn.functional.normalize(views, dim=2)
    v, n = z.shape[:2]
    products = torch.ones(n, dtype=z.dtype)
    for view in z:
        similarity = (view @ view.t() / t).exp()
        products = products * (similarity.sum(1) - similarity.diagonal())
    pairs = [(z[a] * z[b]).sum(1).div(t).exp() for a in range(v) for b in range(a + 1, v)]
    return -(torch.stack(pairs).sum(0) / products).log().mean()


def official_mv_info_nce(views: Tensor, t: float) -> Tensor:
    """The authors' form: all pairs but each embedding with itself."""
    z = torch.nn.functional.normalize(views, dim=2)
    v, n = z.shape[:2]
    rows = z.flatten(0, 1)
    similarity = (rows @ rows.t() / t).exp()
    every = (similarity.sum(1) - similarity.diagonal()).view(v, n).sum(0)
    pairs = [(z[a] * z[b]).sum(1).div(t).exp() for a in range(v) for b in range(a + 1, v)]
    return -(2 * torch.stack(pairs).sum(0) / every).log().mean()
