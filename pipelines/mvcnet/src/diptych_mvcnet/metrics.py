"""Metrics of one subject's trials, and what chance alone gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binom, rankdata

METRICS = ("accuracy", "balanced_accuracy", "kappa", "auc", "nll", "ece", "itr")
_LEAST_PROBABILITY = 1e-7
_CALIBRATION_BINS = 15


def trial_metrics(
    y: np.ndarray | Sequence[Any],
    proba: Float[np.ndarray, "n k"],
    classes: Sequence[str],
    *,
    trial_s: float | None = None,
) -> dict[str, Any]:
    """All metrics of one subject's test trials.

    Args:
        y: Labels 0..K-1, or class names.
        proba: Class probabilities in the order of ``classes``.
        classes: Class names.
        trial_s: Seconds that one decision takes, for the information transfer rate.

    Returns:
        ``accuracy``, ``balanced_accuracy`` (mean recall over the classes that occur), ``kappa``
        (Cohen; 0 where chance agreement is 1), ``auc`` (K = 2; macro one-against-rest for more;
        ties count one half), ``nll`` (nats), ``ece`` (15 equal bins of the top probability),
        ``itr`` (bit/min; None without ``trial_s``); None where a metric is undefined; and
        ``notes``, sentences on what was absent.

    Raises:
        ValueError: Lengths disagree, or there are no trials.

    Example:
        >>> trial_metrics([0, 1], np.array([[0.9, 0.1], [0.2, 0.8]]), ["a", "b"])["accuracy"]
        1.0
    """
    truth = _labels(y, classes)
    proba = np.asarray(proba, dtype=np.float64)
    if proba.shape != (len(truth), len(classes)) or not len(truth):
        raise ValueError(
            f"{len(truth)} labels, probabilities of shape {proba.shape}, {len(classes)} classes"
        )
    # argmax takes the first of equals: ties go to the lowest class.
    predicted = proba.argmax(axis=1)
    right = predicted == truth
    present = np.unique(truth)
    accuracy = float(right.mean())
    notes = []
    if len(present) < len(classes):
        absent = [name for number, name in enumerate(classes) if number not in present]
        notes.append(f"no test trial of class {', '.join(absent)}")
    kappa, kappa_note = _kappa(truth, predicted, len(classes))
    return {
        "accuracy": accuracy,
        "balanced_accuracy": float(np.mean([right[truth == label].mean() for label in present])),
        "kappa": kappa,
        "auc": _auc(truth, proba),
        "nll": float(-np.log(_clipped(proba[np.arange(len(truth)), truth])).mean()),
        "ece": calibration_error(proba.max(axis=1), right),
        "itr": None if trial_s is None else transfer_rate(accuracy, len(classes), trial_s),
        "notes": tuple(notes + kappa_note),
    }


def chance_bound(n: int, n_classes: int) -> float:
    """The accuracy that guessing exceeds in at most 2.5 % of repetitions.

    Args:
        n: Number of trials, at least 1.
        n_classes: Number of equally likely classes.

    Returns:
        ``binom.ppf(0.975, n, 1 / K) / n``, in [0, 1].

    Example:
        >>> round(chance_bound(15, 2), 3)
        0.733
    """
    return float(binom.ppf(0.975, n, 1 / n_classes) / n)


def above_chance(correct: Sequence[int], n: Sequence[int], n_classes: int) -> np.ndarray:
    """Holm-adjusted one-sided binomial p values of each subject's accuracy.

    Args:
        correct: Correct trials of each subject.
        n: Trials of each subject.
        n_classes: Number of equally likely classes.

    Returns:
        One adjusted p value a subject.
    """
    p = binom.sf(np.asarray(correct) - 1, np.asarray(n), 1 / n_classes)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return np.asarray(adjusted)


def transfer_rate(accuracy: float, n_classes: int, trial_s: float) -> float:
    """Information transfer rate in bit/min (Wolpaw 1998); 0 at or below chance.

    Args:
        accuracy: In [0, 1].
        n_classes: Number of classes.
        trial_s: Seconds that one decision takes.

    Returns:
        Bits a minute.
    """
    if accuracy <= 1 / n_classes:
        return 0.0
    bits = math.log2(n_classes) + accuracy * math.log2(accuracy)
    if accuracy < 1:
        bits += (1 - accuracy) * math.log2((1 - accuracy) / (n_classes - 1))
    return bits * 60 / trial_s


def calibration_error(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    """Expected calibration error of the top probability over 15 bins of equal width.

    Args:
        confidence: Largest probability of each trial.
        right: Whether the decision was right.

    Returns:
        Mean distance of confidence and accuracy over the bins, weighted by their trials.
    """
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=confidence - right, minlength=_CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _labels(y: np.ndarray | Sequence[Any], classes: Sequence[str]) -> np.ndarray:
    labels = np.asarray(y)
    if labels.dtype.kind in "iub":
        return np.asarray(labels, dtype=int)
    names = [str(label) for label in labels]
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"labels {unknown} are not among the classes {list(classes)}")
    return np.array([list(classes).index(name) for name in names], dtype=int)


def _clipped(p: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(p, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY))


def _kappa(truth: np.ndarray, predicted: np.ndarray, k: int) -> tuple[float, list[str]]:
    share_true = np.bincount(truth, minlength=k) / len(truth)
    share_predicted = np.bincount(predicted, minlength=k) / len(truth)
    expected = float(share_true @ share_predicted)
    if expected >= 1:
        return 0.0, ["kappa is 0: truth and predictions hold one class only"]
    return float(((truth == predicted).mean() - expected) / (1 - expected)), []


def _auc(truth: np.ndarray, proba: np.ndarray) -> float | None:
    n_classes = proba.shape[1]
    targets = [1] if n_classes == 2 else range(n_classes)
    values = []
    for label in targets:
        positive = truth == label
        n_positive, n_negative = int(positive.sum()), int((~positive).sum())
        if n_positive and n_negative:
            # Mann-Whitney: mid-ranks count ties one half.
            ranks = rankdata(proba[:, label])[positive].sum()
            values.append((ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
    return float(np.mean(values)) if values else None
