"""What a loss tells about its pairs, from sums, so that it needs no tile of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.kernel.call import products

Moments = Float[Tensor, "3"]  # number of pairs, sum and sum of squares of their scores, float64


@dataclass(frozen=True)
class PairInfo:
    """Detached statistics of the rows of this process; scores are before the temperature.

    Attributes:
        n_rows: Rows that ask for their positives.
        n_valid: Rows that have at least one positive and one other column.
        n_positive_pairs: Pairs of a row and a positive.
        n_zero_rows: Embeddings that are exactly zero.
        pos_mean: Mean score of the positives.
        pos_var: Their variance.
        neg_mean: Mean score of the negatives.
        neg_var: Their variance.
        exp_neg_mean: Mean of ``exp(score / temperature)`` over the negatives.
        top1: Fraction of valid rows whose best-scored column is a positive.
        logit_max: Largest score over the temperature.
        temperature: The temperature.
    """

    n_rows: int
    n_valid: Tensor
    n_positive_pairs: Tensor
    n_zero_rows: Tensor
    pos_mean: Tensor
    pos_var: Tensor
    neg_mean: Tensor
    neg_var: Tensor
    exp_neg_mean: Tensor
    top1: Tensor
    logit_max: Tensor
    temperature: Tensor


@torch.no_grad()
def moments_of(scores: Tensor) -> Moments:
    """Moments of explicit scores of any shape."""
    wide = scores.double().flatten()
    return torch.stack([wide.new_tensor(len(wide)), wide.sum(), torch.dot(wide, wide)])


@torch.no_grad()
def moments_between(x: Tensor, y: Tensor) -> Moments:
    """Moments of all products of rows of x (n, d) and y (m, d), in O((n + m) d^2)."""
    spread = products(x.t(), x)
    other = spread if y is x else products(y.t(), y)
    total = torch.dot(x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64))
    squares = torch.dot(spread.double().flatten(), other.double().flatten())
    return torch.stack([total.new_tensor(len(x) * len(y)), total, squares])


@torch.no_grad()
def moments_matching(x: Tensor, x_key: Tensor, y: Tensor, y_key: Tensor) -> Moments:
    """Moments of the products of rows of x and y with equal key; a key is a number or a row."""
    _, key = torch.unique(torch.cat([x_key, y_key]), dim=0, return_inverse=True)
    sides = []
    for z, own in ((x, key[: len(x)]), (y, key[len(x) :])):
        sizes = own.bincount(minlength=int(key.max()) + 1)
        sides.append(torch.split(z[own.argsort(stable=True)], sizes.tolist()))
    total = moments_of(x[:0])
    for a, b in zip(*sides, strict=True):
        if len(a) and len(b):
            total = total + moments_between(a, b)
    return total


@torch.no_grad()
def pair_info(
    *,
    embeddings: tuple[Tensor, ...],
    valid: Tensor | None,
    positives: Moments,
    negatives: Moments,
    negative_lse: Tensor,
    hits: Tensor,
    peak: Tensor,
    scale: Tensor,
) -> PairInfo:
    """Assemble what a loss tells about its pairs.

    Each row of the first embeddings may meet positives and negatives (`Moments`); ``negative_lse``
    is the log-sum-exp over the negatives, ``hits`` whether the best column is a positive, ``peak``
    the largest score times the scale, ``valid`` which rows count, None where all do.
    """
    hits = hits if valid is None else hits & valid
    rows = len(embeddings[0])
    n_valid = scale.new_tensor(rows, dtype=torch.int64) if valid is None else valid.sum()
    moments = torch.stack([positives, negatives])
    means = moments / moments[:, :1].clamp_min(1.0)
    mean, square = means[:, 1], means[:, 2]
    variance = torch.addcmul(square, mean, mean, value=-1.0).clamp_min_(0.0)
    return PairInfo(
        n_rows=rows,
        n_valid=n_valid,
        n_positive_pairs=positives[0].long(),
        n_zero_rows=torch.stack([(~x.any(1)).sum() for x in embeddings]).sum(),
        pos_mean=mean[0],
        pos_var=variance[0],
        neg_mean=mean[1],
        neg_var=variance[1],
        exp_neg_mean=negative_lse.double().exp().sum() / negatives[0].clamp_min(1.0),
        top1=hits.sum() / n_valid.clamp_min(1),
        logit_max=peak.amax(),
        temperature=scale.detach().reciprocal(),
    )


def subtract_exp(whole: Tensor, part: Tensor) -> Tensor:
    """Return ``log(exp(whole) - exp(part))`` for part <= whole up to rounding."""
    return whole + torch.log1p(-(part - whole).exp().clamp_max(1.0))


def reaches(score: Tensor, peak: Tensor) -> Tensor:
    """Tell where a score is the peak, up to the rounding of two ways to compute it."""
    return score >= torch.sub(peak, peak.abs(), alpha=1e-5) - 1e-5
