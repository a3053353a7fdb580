"""What embeddings look like: spread, rank, spectrum, scores of pairs, signs of collapse.

`alignment` and `uniformity` give tensors with gradient and can be minimised; everything else
gives plain numbers and numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError, warn
from diptych_contrast.inputs import (
    check_dimension,
    check_finite,
    check_integers,
    check_pair,
    check_positive,
    check_rows,
    check_squares,
)
from diptych_contrast.kernel import pair_lse, products, unit_rows

_BLOCK = 1024  # rows of scores held at a time


def alignment(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], alpha: float = 2.0, *, normalize: bool = True
) -> Float[Tensor, ""]:
    """Mean distance between the two views of a sample, to the power of ``alpha``.

    ``mean_i ||x_i - y_i||^alpha`` (Wang and Isola, 2020, equation 2). With unit vectors and
    alpha 2 it lies in [0, 4]; 0 is perfect alignment. Pairs at distance 0 have the gradient 0.

    Example:
        >>> alignment(torch.eye(4), torch.eye(4)).item()
        0.0
    """
    check_pair("alignment", x=x, y=y)
    check_positive("alignment", alpha=alpha)
    rows = (_prepared("alignment", name, z, normalize) for name, z in (("x", x), ("y", y)))
    squared = torch.sub(*rows).square().sum(1)
    if alpha == 2:
        return squared.mean()
    apart = squared > 0  # a root has no derivative at 0
    return torch.where(apart, torch.where(apart, squared, 1).pow(alpha / 2), 0).mean()


def uniformity(
    x: Float[Tensor, "n d"], t: float = 2.0, *, normalize: bool = True
) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential over all pairs of rows.

    ``log mean_{i<j} exp(-t ||x_i - x_j||^2)`` (Wang and Isola, 2020, equation 4): 0 where all
    rows are equal, lower the more evenly they cover the sphere. Memory grows with N x D.
    """
    check_rows("uniformity", "x", x, at_least=2)
    check_positive("uniformity", t=t)
    rows = _prepared("uniformity", "x", x, normalize)
    norms = -t * rows.square().sum(1)
    potentials = pair_lse(rows, None, 2 * t, row_bias=norms, symmetric=True)
    count = rows.shape[0]
    return torch.logsumexp(potentials.flatten(), 0) - math.log(count * (count - 1))


def rank_me(z: Float[Tensor, "n d"]) -> float:
    """Smooth rank of a matrix of embeddings, in [1, min(n, d)] (RankMe, Garrido et al., 2023).

    ``exp(-sum_k p_k log p_k)`` with ``p_k = sigma_k / sum sigma + 1e-7`` and sigma the singular
    values of the matrix as it is, not centred; 1 for a matrix of zeros.
    """
    return _entropy_rank(_spectrum("rank_me", z, centre=False).sqrt(), 1e-7)


def effective_rank(z: Float[Tensor, "n d"]) -> float:
    """Exponential of the entropy of the centred matrix' singular values (Roy, Vetterli, 2007).

    In [1, min(n, d)]; unlike `rank_me`, a mean that all rows share does not count as a direction.
    """
    return _entropy_rank(_spectrum("effective_rank", z, centre=True).sqrt(), 0.0)


def alpha_req(z: Float[Tensor, "n d"]) -> float:
    """Decay of the covariance spectrum: alpha in ``lambda_i ~ i^-alpha`` (Agrawal et al., 2022).

    Least-squares slope of log eigenvalue on log index, indices 5 to d/2. Values near 1 go with
    good features; far above 1 few directions carry everything, far below 1 all carry noise. Needs
    12 dimensions or more; infinite where fewer than two eigenvalues in the range are above
    rounding.
    """
    spectrum = _spectrum("alpha_req", z, centre=True)
    if z.shape[1] < 12:
        found = f"has {z.shape[1]} dimensions"
        fix = "pass at least 12, so that indices 5 to d/2 hold two eigenvalues"
        raise ContrastInputError("alpha_req", "z", found, fix)
    values = spectrum[4 : z.shape[1] // 2].cpu().numpy()
    index = np.arange(5, 5 + len(values))[values > 0]
    if len(index) < 2:
        return math.inf
    return -float(np.polyfit(np.log(index), np.log(values[values > 0]), 1)[0])


def nesum(z: Float[Tensor, "n d"]) -> float:
    """Sum of the covariance eigenvalues over the largest one (NESum, He and Ozay, 2022).

    1 for a single direction, d for whitened features, 0 where all rows are equal.
    """
    spectrum = _spectrum("nesum", z, centre=True)
    largest = float(spectrum[0])
    return float(spectrum.sum()) / largest if largest > 0 else 0.0


def tolerance(z: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """Mean cosine of two rows of one class (Wang and Liu, 2021, equation 10).

    0 with a `ContrastWarning` if no two rows share a label.
    """
    check_rows("tolerance", "z", z)
    check_integers("tolerance", "labels", labels, z.shape[0])
    rows = unit_rows(z.detach()).double()
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, classes, rows)
    pairs = int((counts * (counts - 1)).sum())
    if pairs == 0:
        warn("tolerance", "labels", "has no two equal entries", "pass several rows of a class")
        return 0.0
    return float((sums.square().sum() - rows.square().sum()) / pairs)


def modality_gap(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Distance between the mean unit vectors of two modalities, in [0, 2] (Liang et al., 2022)."""
    check_dimension("modality_gap", x=x, y=y)
    means = [unit_rows(each.detach()).mean(0) for each in (x, y)]
    return float(torch.linalg.vector_norm(means[0] - means[1]))


@dataclass(frozen=True)
class ScoreDistribution:
    """Cosines of positive and of negative pairs: moments, and counts over equal bins of [-1, 1]."""

    positive_mean: float
    positive_variance: float
    negative_mean: float
    negative_variance: float
    positive_histogram: npt.NDArray[np.int64]
    negative_histogram: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]


def positive_negative_scores(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    *,
    ids: Int[Tensor, " n"] | None = None,
    bins: int = 64,
) -> ScoreDistribution:
    """Distribution of the cosines ``x_i . y_j`` of positive and negative pairs (Zhu et al., 2021).

    Rows of equal id, of a sample or a class, are positives; without ``ids`` each is its own.
    """
    check_pair("positive_negative_scores", x=x, y=y)
    count = x.shape[0]
    ids = torch.arange(count, device=x.device) if ids is None else ids
    check_integers("positive_negative_scores", "ids", ids, count)
    n_positive = int(torch.unique(ids, return_counts=True)[1].square().sum())
    if n_positive == count * count:
        found, fix = "makes every pair a positive", "pass at least two samples"
        raise ContrastInputError("positive_negative_scores", "ids", found, fix)
    moments = torch.zeros(2, 2, dtype=torch.float64)
    histograms = torch.zeros(2, bins, dtype=torch.float64)
    for rows, scores in _score_blocks(x, y):
        positive = scores[ids[rows, None] == ids[None, :]]
        for kind, values in enumerate((positive, scores)):
            wide = values.double()
            moments[kind] += torch.stack([wide.sum(), wide.square().sum()]).cpu()
            counts = torch.histc(values.clamp(-1, 1).cpu(), bins, -1, 1)
            histograms[kind] += counts.double()
    moments[1] -= moments[0]
    histograms[1] -= histograms[0]
    mean, square = (moments / torch.tensor([[n_positive], [count * count - n_positive]])).T
    variance = (square - mean.square()).clamp_min(0)
    whole = histograms.round().to(torch.int64).numpy()
    return ScoreDistribution(
        positive_mean=float(mean[0]),
        positive_variance=float(variance[0]),
        negative_mean=float(mean[1]),
        negative_variance=float(variance[1]),
        positive_histogram=whole[0],
        negative_histogram=whole[1],
        edges=np.linspace(-1, 1, bins + 1),
    )


@dataclass(frozen=True)
class GradientBalance:
    """Norms of the two parts of the InfoNCE gradient, row by row, and their means."""

    positive: npt.NDArray[np.float64]
    negative: npt.NDArray[np.float64]
    positive_mean: float
    negative_mean: float


def gradient_balance(
    q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], temperature: float = 0.07
) -> GradientBalance:
    """How hard InfoNCE pulls a query to its key, and pushes it from the other keys.

    With ``p_ij = softmax_j(q_i . k_j / tau)`` the gradient with respect to the unit vector q_i is
    ``(-(1 - p_ii) k_i + sum_{j != i} p_ij k_j) / tau``: the norms of both summands. Both carry the
    factor ``1 - p_ii`` (Yeh et al., 2022, proposition 1), so easy batches starve both.
    """
    check_pair("gradient_balance", 2, q=q, k=k)
    check_positive("gradient_balance", temperature=temperature)
    keys = unit_rows(k.detach())
    pull, push = [], []
    for rows, scores in _score_blocks(q, k):
        weights = torch.softmax(scores / temperature, dim=1)
        own = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        weights = weights.scatter(1, own, 0.0)
        left = weights.sum(1)  # 1 - p_ii, without the cancellation
        pull.append(left * torch.linalg.vector_norm(keys[rows], dim=1) / temperature)
        push.append(torch.linalg.vector_norm(products(weights, keys), dim=1) / temperature)
    positive, negative = (torch.cat(part).double().cpu().numpy() for part in (pull, push))
    return GradientBalance(positive, negative, float(positive.mean()), float(negative.mean()))


@dataclass(frozen=True)
class CollapseReport:
    """Signs of collapse; rows and dimensions are listed by index.

    Duplicates are rows exactly equal to an earlier one. Rows that are not finite are listed and
    left out of everything else; with no others every dimension is dead and the rank is 0.
    """

    n_rows: int
    n_dimensions: int
    dead_dimensions: tuple[int, ...]
    constant_rows: tuple[int, ...]
    duplicate_rows: tuple[int, ...]
    non_finite_rows: tuple[int, ...]
    rank_me: float

    @property
    def collapsed(self) -> bool:
        """Whether the smooth rank is below 2 or more than half of the dimensions are dead."""
        return self.rank_me < 2 or 2 * len(self.dead_dimensions) > self.n_dimensions


def collapse_report(z: Float[Tensor, "n d"], *, threshold: float = 1e-5) -> CollapseReport:
    """Dead dimensions, constant rows, duplicates, rows that are not finite, and the rank.

    Args:
        threshold: A dimension is dead if its standard deviation, a row constant if its range, is
            at most this share of the root mean square of all values.

    Example:
        >>> collapse_report(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).dead_dimensions
        (1,)
    """
    check_rows("collapse_report", "z", z)
    finite = torch.isfinite(z).all(1).cpu()
    kept = torch.nonzero(finite).flatten()
    rows = z.detach().cpu()[kept].double()
    if len(rows) == 0:
        all_rows, all_dimensions = (tuple(range(length)) for length in z.shape)
        return CollapseReport(
            len(all_rows), len(all_dimensions), all_dimensions, (), (), all_rows, rank_me=0.0
        )
    bound = threshold * float(rows.square().mean().sqrt())
    ranges = rows.amax(1) - rows.amin(1) if rows.shape[1] > 1 else rows.new_full((len(rows),), 1e9)
    seen: dict[bytes, int] = {}
    firsts = [seen.setdefault(row.tobytes(), i) for i, row in enumerate((rows + 0.0).numpy())]
    repeated = torch.tensor([first != i for i, first in enumerate(firsts)])
    return CollapseReport(
        n_rows=z.shape[0],
        n_dimensions=z.shape[1],
        dead_dimensions=_where(rows.std(0, correction=0) <= bound),
        constant_rows=tuple(kept[ranges <= bound].tolist()),
        duplicate_rows=tuple(kept[repeated].tolist()),
        non_finite_rows=_where(~finite),
        rank_me=rank_me(rows),
    )


def _where(flags: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(flags).flatten().tolist())


def _prepared(function: str, argument: str, x: Tensor, normalize: bool) -> Tensor:
    if normalize:
        return unit_rows(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    check_squares(function, argument, x)
    return x


def _score_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows, columns = (unit_rows(each.detach()) for each in (x, y))
    for start in range(0, rows.shape[0], _BLOCK):
        block = slice(start, min(start + _BLOCK, rows.shape[0]))
        yield block, products(rows[block], columns.T)


def _spectrum(function: str, z: Tensor, *, centre: bool) -> Tensor:
    """Squared singular values in fp64, falling, those of rounding size set to 0."""
    check_rows(function, "z", z)
    check_finite(function, "z", z)
    wide = z.detach().double()
    if centre:
        wide = wide - wide.mean(0)
    gram = wide.T @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.T
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    rounding = torch.finfo(torch.float64).eps * max(z.shape) * values[0]
    return torch.where(values > rounding, values, 0)


def _entropy_rank(values: Tensor, shift: float) -> float:
    total = float(values.sum())
    if total == 0:
        return 1.0
    shares = values / total + shift
    return float(torch.special.entr(shares).sum().exp())
