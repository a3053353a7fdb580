"""Generated embeddings whose truth is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_least, check_positive

_BAYES_DRAWS = 100_000


@dataclass(frozen=True)
class Hypersphere:
    """A draw from a mixture of von Mises-Fisher distributions.

    ``bayes_accuracy`` is the best accuracy any classifier reaches on such points, known to the
    standard error ``bayes_error``.
    """

    points: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    means: Float[Tensor, "classes d"]
    bayes_accuracy: float
    bayes_error: float


def hypersphere(n: int, d: int, classes: int, kappa: float, seed: int) -> Hypersphere:
    """Points on the unit sphere around one mean direction a class, with known Bayes accuracy.

    The density of a class is proportional to ``exp(kappa mean . x)``; classes are equally likely
    and their means orthogonal where ``classes <= d``, else independent. Directions are drawn by
    Wood's rejection (1994). The Bayes accuracy is the mean largest posterior over 100,000
    further points.

    Example:
        >>> hypersphere(10, 8, 4, 50.0, seed=0).bayes_accuracy > 0.99
        True
    """
    check_least("hypersphere", 1, n=n)
    check_least("hypersphere", 2, d=d, classes=classes)
    check_positive("hypersphere", kappa=kappa)
    means_source, points_source, bayes_source = np.random.default_rng(seed).spawn(3)
    means = _directions(means_source, classes, d)
    labels = points_source.integers(classes, size=n)
    points = _von_mises_fisher(points_source, means[labels], kappa)
    further = _von_mises_fisher(
        bayes_source, means[bayes_source.integers(classes, size=_BAYES_DRAWS)], kappa
    )
    scores = kappa * further @ means.T
    largest = 1 / np.exp(scores - scores.max(1, keepdims=True)).sum(1)
    return Hypersphere(
        points=torch.from_numpy(points).float(),
        labels=torch.from_numpy(labels),
        means=torch.from_numpy(means).float(),
        bayes_accuracy=float(largest.mean()),
        bayes_error=float(largest.std() / math.sqrt(_BAYES_DRAWS)),
    )


@dataclass(frozen=True)
class GaussianPairs:
    """Correlated Gaussian vectors and their mutual information in nats."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n d"]
    mutual_information: float


def gaussian_pairs(n: int, d: int, rho: float, seed: int) -> GaussianPairs:
    """Pairs of standard normal vectors, coordinate by coordinate correlated by ``rho``.

    Their mutual information is ``-d/2 log(1 - rho^2)`` (Belghazi et al., 2018).

    Example:
        >>> round(gaussian_pairs(2, 4, 0.5, seed=0).mutual_information, 4)
        0.5754
    """
    check_least("gaussian_pairs", 1, n=n, d=d)
    if not -1 < rho < 1:
        raise ContrastInputError("gaussian_pairs", "rho", f"is {rho}", "pass a number in (-1, 1)")
    x, noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    y = rho * x + math.sqrt(1 - rho**2) * noise
    return GaussianPairs(x, y, -d / 2 * math.log1p(-(rho**2)))


@dataclass(frozen=True)
class Salient:
    """Two views of background and target samples, and the factors they are made of."""

    views: Float[Tensor, "2 n d"]
    target: Int[Tensor, " n"]
    common: Float[Tensor, "n 3"]
    salient: Float[Tensor, " n"]


def salient(n: int, seed: int) -> Salient:
    """Samples with three common factors and, in targets alone, a salient one, mixed linearly.

    Common factors are normal, the salient factor is uniform in (-1, 1); an orthogonal matrix
    spreads them over 24 dimensions, and each view adds noise of deviation 0.1. The salient factor
    of a background is unseen.

    Example:
        >>> salient(4, seed=0).target.tolist()
        [0, 1, 0, 1]
    """
    check_least("salient", 2, n=n)
    source = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(24, 24, generator=source))[0][:4]
    factors, target = torch.randn(n, 3, generator=source), torch.arange(n) % 2
    extra = 2 * torch.rand(n, generator=source) - 1
    clean = torch.cat([factors, (target * extra)[:, None]], 1) @ mixing
    views = clean + 0.1 * torch.randn(2, n, 24, generator=source)
    return Salient(views, target, factors, extra)


def _directions(source: np.random.Generator, count: int, dimension: int) -> npt.NDArray[np.float64]:
    drawn = source.standard_normal((count, dimension))
    if count <= dimension:
        orthogonal: npt.NDArray[np.float64] = np.linalg.qr(drawn.T)[0].T
        return orthogonal
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def _von_mises_fisher(
    source: np.random.Generator, means: npt.NDArray[np.float64], kappa: float
) -> npt.NDArray[np.float64]:
    count, dimension = means.shape
    along = _cosines(source, count, dimension, kappa)[:, None]
    across = source.standard_normal((count, dimension))
    across -= (across * means).sum(1, keepdims=True) * means
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return along * means + np.sqrt(1 - along**2) * across


def _cosines(
    source: np.random.Generator, count: int, dimension: int, kappa: float
) -> npt.NDArray[np.float64]:
    """Cosine to the mean: Wood's rejection from a transformed beta distribution."""
    free = dimension - 1
    b = free / (2 * kappa + math.sqrt(4 * kappa**2 + free**2))
    centre = (1 - b) / (1 + b)
    level = kappa * centre + free * math.log1p(-(centre**2))
    kept: list[npt.NDArray[np.float64]] = []
    missing = count
    while missing > 0:
        beta = source.beta(free / 2, free / 2, size=2 * missing)
        cosine = (1 - (1 + b) * beta) / (1 - (1 - b) * beta)
        ratio = kappa * cosine + free * np.log1p(-centre * cosine) - level
        accepted = cosine[np.log(source.uniform(size=2 * missing)) <= ratio][:missing]
        kept.append(accepted)
        missing -= len(accepted)
    return np.concatenate(kept)
