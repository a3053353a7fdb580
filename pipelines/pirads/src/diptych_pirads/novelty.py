"""How far a study lies from the training studies: treated glands, endorectal coils, other fields.

The Mahalanobis distance of the network's deepest features says it as a percentile of the training
studies' own distances, each measured without itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

ARTIFACT = "ood"  # name of the statistics among a fit's artifacts
LEAST_STUDIES = 8  # fewer say nothing about a percentile
SHRINKAGE = 0.1  # towards equal variances, at least


def fit_novelty(features: Sequence[Float[ndarray, " f"]]) -> dict[str, ndarray]:
    """Statistics of the training studies.

    Args:
        features: One row a training study, `infer.Segmentation.features`.

    Returns:
        "mean" (f,), "precision" (f, f) and "distances" (n,), sorted leave-one-out Mahalanobis
        distances of the training studies; empty for fewer than eight studies.

    Example:
        >>> sorted(fit_novelty(np.random.default_rng(0).normal(size=(9, 2))))
        ['distances', 'mean', 'precision']
    """
    x = np.asarray(features, dtype=np.float64)
    if len(x) < LEAST_STUDIES:
        return {}
    distances = []
    for n in range(len(x)):
        mean, precision = _gaussian(np.delete(x, n, axis=0))
        distances.append(_distance(x[n], mean, precision))
    mean, precision = _gaussian(x)
    return {"mean": mean, "precision": precision, "distances": np.sort(distances)}


def novelty_percentile(statistics: Mapping[str, ndarray], features: Float[ndarray, " f"]) -> float:
    """Where a study stands among the training studies.

    Args:
        statistics: From `fit_novelty`.
        features: Those of the study.

    Returns:
        Percent of the training studies that lie nearer to the others than this one does, in
        [0, 100]; NaN without statistics.
    """
    if not statistics:
        return float("nan")
    distance = _distance(
        np.asarray(features, dtype=np.float64), statistics["mean"], statistics["precision"]
    )
    return 100 * float(np.mean(statistics["distances"] < distance))


def _gaussian(
    x: Float[ndarray, "n f"],
) -> tuple[Float[ndarray, " f"], Float[ndarray, "f f"]]:
    """Mean and inverse covariance, shrunk the more the fewer studies there are for a feature."""
    n, f = x.shape
    covariance = np.cov(x, rowvar=False).reshape(f, f)
    weight = max(SHRINKAGE, f / (n + f))
    equal = (np.trace(covariance) / f + 1e-12) * np.eye(f)
    return x.mean(axis=0), np.linalg.inv((1 - weight) * covariance + weight * equal)


def _distance(
    row: Float[ndarray, " f"], mean: Float[ndarray, " f"], precision: Float[ndarray, "f f"]
) -> float:
    apart = row - mean
    return float(np.sqrt(max(apart @ precision @ apart, 0.0)))
