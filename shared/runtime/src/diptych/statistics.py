"""Intervals and tests over subjects: the only statistics that reports and comparisons use.

Subjects are the independent source, so subjects are resampled and nothing else. Every draw is
keyed by a fixed seed: the same scores give the same numbers, whatever was computed before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy import stats

if TYPE_CHECKING:
    from diptych.contract import Metric, Payload

RESAMPLES = 10_000
SHARED_RESAMPLES = 2_000  # above MANY_SUBJECTS, and for pooled metrics: one Python call a resample
MANY_SUBJECTS = 2_000
EXACT_SUBJECTS = 12
LEVEL = 0.95
DEFINED_SHARE = 0.95
_SEED = 20_261_122
_CHUNK = 4_000_000  # floats of a resampling matrix that are held at once

ONE_SUBJECT = "one subject: nothing to resample"
UNDEFINED = "undefined for every subject"
RARELY_DEFINED = "undefined in more than 5 % of the resamples"


@dataclass(frozen=True)
class Estimate:
    """A value over subjects with its 95 % interval.

    Args:
        value: Mean over subjects, or the pooled value; None where undefined.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Subjects that entered.
        p: Two-sided p of a paired test, not adjusted; None for anything but differences.
        reason: Why a number is missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None = None
    reason: str | None = None


def mean_intervals(values: Float[np.ndarray, "n m"]) -> list[Estimate]:
    """Mean over subjects and its bootstrap interval, for several columns of scores at once.

    BCa with 10,000 resamples (Efron 1987; ``scipy.stats.bootstrap``), and the percentile interval
    where BCa is undefined; above 2,000 subjects the percentile interval of 2,000 resamples that
    all columns share, as one product of a count matrix with the scores.

    Args:
        values: One row a subject, one column a quantity; NaN where a subject has no value.

    Returns:
        One estimate a column.

    Example:
        >>> mean_intervals(np.array([[0.5], [0.7], [0.9]]))[0].value
        0.7
    """
    n = values.shape[0]
    if n > MANY_SUBJECTS:
        lows, highs = _shared_percentiles(values)
    estimates = []
    for column in range(values.shape[1]):
        present = values[:, column][np.isfinite(values[:, column])]
        if present.size == 0:
            estimates.append(Estimate(None, None, None, 0, reason=UNDEFINED))
            continue
        value = math.fsum(present) / present.size
        if present.size == 1:
            estimates.append(Estimate(value, None, None, 1, reason=ONE_SUBJECT))
            continue
        if n > MANY_SUBJECTS:
            low, high = float(lows[column]), float(highs[column])
        else:
            low, high = _bca_of_mean(present)
        estimates.append(Estimate(value, low, high, int(present.size)))
    return estimates


def _bca_of_mean(present: Float[np.ndarray, " n"]) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # degenerate data are met right below
        result = stats.bootstrap(
            (present,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, _CHUNK // present.size),
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(_SEED),
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    return _percentiles(result.bootstrap_distribution)


def _percentiles(distribution: Float[np.ndarray, " k"]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(distribution, [tail, 1 - tail])
    return float(low), float(high)


def _shared_percentiles(
    values: Float[np.ndarray, "n m"],
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    n, m = values.shape
    present = np.isfinite(values)
    stacked = np.concatenate([np.where(present, values, 0.0), present.astype(float)], axis=1)
    rng = np.random.default_rng(_SEED)
    sums = np.concatenate(
        [
            np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(rows)])
            @ stacked
            for rows in _chunks(SHARED_RESAMPLES, n)
        ]
    )
    with np.errstate(invalid="ignore"):
        means = sums[:, :m] / sums[:, m:]
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail], axis=0)
    return low, high


def _chunks(total: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // max(width, 1))
    while total > 0:
        yield min(size, total)
        total -= size


def paired_differences(
    first: Float[np.ndarray, " n"], others: Float[np.ndarray, "n m"]
) -> list[Estimate]:
    """Mean difference first - other over the subjects that both have, interval and test.

    Args:
        first: Scores of one method, a subject a row, NaN where missing.
        others: Scores of the methods it is compared with, a column each.

    Returns:
        One estimate a column, with ``p`` of :func:`sign_flip_tests`.
    """
    differences = first[:, None] - others
    tests = sign_flip_tests(differences)
    return [
        Estimate(e.value, e.low, e.high, e.n, p, e.reason)
        if e.reason != UNDEFINED
        else Estimate(None, None, None, 0, reason="no subject has both values")
        for e, p in zip(mean_intervals(differences), tests, strict=True)
    ]


def sign_flip_tests(differences: Float[np.ndarray, "n m"]) -> list[float | None]:
    """Two-sided sign-flip permutation test that the mean paired difference is zero.

    Exact over all 2^n signs up to 12 subjects; beyond, 10,000 keyed draws shared by the columns,
    with the observed signs counted in, so that p is never 0 (Phipson and Smyth 2010).

    Args:
        differences: One row a subject, one column a comparison; NaN where a subject lacks one.

    Returns:
        p in (0, 1] a column; None with fewer than two subjects.

    Example:
        >>> sign_flip_tests(np.array([[1.0], [2.0], [3.0]]))
        [0.25]
    """
    filled = np.nan_to_num(differences, nan=0.0)
    counts = np.isfinite(differences).sum(axis=0)
    drawn = _drawn_tests(filled) if (counts > EXACT_SUBJECTS).any() else None
    result: list[float | None] = []
    for column, count in enumerate(counts):
        if count < 2:
            result.append(None)
        elif count <= EXACT_SUBJECTS or drawn is None:
            present = filled[np.isfinite(differences[:, column]), column]
            sums = np.abs(_all_signs(int(count)) @ present)
            result.append(float(np.mean(sums >= _reached(present.sum(), present))))
        else:
            result.append(float(drawn[column]))
    return result


def _all_signs(n: int) -> Float[np.ndarray, "2**n n"]:
    bits = (np.arange(2**n)[:, None] >> np.arange(n)[None, :]) & 1
    return 1.0 - 2.0 * bits


def _reached(observed: float, terms: Float[np.ndarray, " n"]) -> float:
    # equal sums differ by rounding when they are added in another order
    return float(abs(observed) - 1e-12 * np.abs(terms).sum())


def _drawn_tests(filled: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " m"]:
    n, m = filled.shape
    totals = filled.sum(axis=0)
    limits = np.array([_reached(totals[column], filled[:, column]) for column in range(m)])
    rng = np.random.default_rng(_SEED)
    reached = np.ones(m)
    for rows in _chunks(RESAMPLES, n):
        packed = np.frombuffer(rng.bytes(rows * ((n + 7) // 8)), np.uint8).reshape(rows, -1)
        positive = np.unpackbits(packed, axis=1, count=n).astype(float)
        reached += (np.abs(2.0 * (positive @ filled) - totals) >= limits).sum(axis=0)
    result: Float[np.ndarray, " m"] = reached / (RESAMPLES + 1)
    return result


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for testing several hypotheses together (Holm 1979).

    Args:
        p_values: Unadjusted p; None where there was no test, which stays None.

    Returns:
        Adjusted p in [0, 1], in the order given.

    Example:
        >>> holm([0.01, 0.04, None])
        [0.02, 0.04, None]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


def pooled_value(metric: Metric, payload: Payload, weights: dict[str, float]) -> float:
    """A pooled metric under subject weights; where the payload has fits, their mean.

    Args:
        metric: A metric with ``pooled``.
        payload: Arrays aligned with "subject"; an array "fit" separates seeds or draws.
        weights: One weight a subject.

    Returns:
        The value, NaN where it is undefined.
    """
    if metric.pooled is None:
        raise ValueError("a metric without a pooled function was given to pooled_value")
    return float(np.mean([metric.pooled(part, weights) for part in _parts(payload)]))


def _parts(payload: Payload) -> list[Payload]:
    if "fit" not in payload:
        return [payload]
    fits = payload["fit"]
    return [
        {key: array[fits == fit] for key, array in payload.items() if key != "fit"}
        for fit in np.unique(fits)
    ]


def _subjects(payload: Payload) -> list[str]:
    return [str(name) for name in np.unique(payload["subject"])]


def pooled_interval(metric: Metric, payload: Payload) -> Estimate:
    """A pooled metric with its bootstrap interval: subjects are resampled as weights.

    Args:
        metric: A metric with ``pooled``.
        payload: Arrays aligned with "subject".

    Returns:
        The estimate; BCa with 2,000 resamples, percentile above 2,000 subjects.
    """
    subjects = _subjects(payload)
    return _resample_weights(
        subjects, lambda weights: pooled_value(metric, payload, weights), "pooled value"
    )


def pooled_difference(metric: Metric, first: Payload, other: Payload) -> Estimate:
    """Difference first - other of a pooled metric over common subjects, interval and test.

    The test swaps the two methods' predictions subject by subject: under the hypothesis that the
    methods are interchangeable every swap is as likely as the data seen.

    Args:
        metric: A metric with ``pooled``.
        first: Payload of the model.
        other: Payload of the method it is compared with.

    Returns:
        The estimate with ``p``.
    """
    common = sorted(set(_subjects(first)) & set(_subjects(other)))
    if not common:
        return Estimate(None, None, None, 0, reason="no subject has both values")
    first, other = (_only(payload, common) for payload in (first, other))
    estimate = _resample_weights(
        common,
        lambda weights: pooled_value(metric, first, weights) - pooled_value(metric, other, weights),
        "difference",
    )
    if estimate.value is None or len(common) < 2:
        return estimate
    p, reason = _swap_test(metric, first, other, common)
    return Estimate(
        estimate.value, estimate.low, estimate.high, estimate.n, p, estimate.reason or reason
    )


def _only(payload: Payload, subjects: Sequence[str]) -> Payload:
    keep = np.isin(payload["subject"], list(subjects))
    return {key: array[keep] for key, array in payload.items()}


def _resample_weights(
    subjects: Sequence[str], statistic: Callable[[dict[str, float]], float], what: str
) -> Estimate:
    n = len(subjects)
    value = statistic(dict.fromkeys(subjects, 1.0))
    if not math.isfinite(value):
        return Estimate(None, None, None, n, reason=f"the {what} is undefined on these data")
    if n < 2:
        return Estimate(value, None, None, n, reason=ONE_SUBJECT)

    def of_indices(indices: np.ndarray) -> float:
        counts = np.bincount(indices, minlength=n).astype(float)
        return statistic(dict(zip(subjects, counts.tolist(), strict=True)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = stats.bootstrap(
            (np.arange(n),),
            of_indices,
            vectorized=False,
            n_resamples=SHARED_RESAMPLES,
            confidence_level=LEVEL,
            method="BCa" if n <= MANY_SUBJECTS else "percentile",
            rng=np.random.default_rng(_SEED),
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        distribution = result.bootstrap_distribution
        defined = distribution[np.isfinite(distribution)]
        if defined.size < DEFINED_SHARE * distribution.size:
            return Estimate(value, None, None, n, reason=RARELY_DEFINED)
        low, high = _percentiles(defined)
    return Estimate(value, low, high, n)


def _swap_test(
    metric: Metric, first: Payload, other: Payload, subjects: Sequence[str]
) -> tuple[float | None, str | None]:
    if set(map(str, first.get("fit", ()))) != set(map(str, other.get("fit", ()))):
        return None, "the methods were fitted with different seeds"
    try:
        joined = {key: np.concatenate([first[key], other[key]]) for key in first}
    except (KeyError, ValueError):
        return None, "the methods' predictions have different forms and cannot be swapped"
    joined["subject"] = np.concatenate(
        [
            np.char.add(prefix, p["subject"].astype(str))
            for prefix, p in (("0", first), ("1", other))
        ]
    )

    def difference(swapped: np.ndarray) -> float:
        kept = (1.0 - swapped).tolist()
        ones: dict[str, float] = {}
        twos: dict[str, float] = {}
        for subject, keep in zip(subjects, kept, strict=True):
            ones["0" + subject], ones["1" + subject] = keep, 1.0 - keep
            twos["0" + subject], twos["1" + subject] = 1.0 - keep, keep
        return pooled_value(metric, joined, ones) - pooled_value(metric, joined, twos)

    n = len(subjects)
    observed = abs(difference(np.zeros(n)))
    if n <= EXACT_SUBJECTS:
        # swapping everyone only turns the sign: half of the 2^n swaps tell all
        swaps = (1.0 - _all_signs(n)[: 2 ** (n - 1)]) / 2
    else:
        swaps = np.random.default_rng(_SEED).integers(0, 2, (SHARED_RESAMPLES, n)).astype(float)
    values = np.abs([difference(swap) for swap in swaps])
    if np.isfinite(values).mean() < DEFINED_SHARE:
        return None, RARELY_DEFINED
    values = values[np.isfinite(values)]
    reached = int((values >= observed * (1 - 1e-12)).sum())
    if n <= EXACT_SUBJECTS:
        return reached / values.size, None
    return (reached + 1) / (values.size + 1), None
