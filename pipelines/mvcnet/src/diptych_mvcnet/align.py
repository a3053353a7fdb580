"""Euclidean alignment: every recording session is whitened by its own mean covariance.

He and Wu, "Transfer learning for brain-computer interfaces: a Euclidean space data alignment
approach", IEEE TBME 2020. No label is used anywhere in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from diptych.errors import UsageError
from diptych_mvcnet.config import WITHIN_SUBJECT, AlignSection, MVCNetConfig, align_test_mode

NULL_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Alignment:
    """A fitted alignment.

    Args:
        reference: Mean covariance (C, C) in squared units of the signal, before shrinkage.
        whitener: Its inverse square root (C, C), zero on the null space.
        rank: Dimensions that hold signal; below C after an average reference.
        n_trials: Trials with signal behind the reference.
    """

    reference: Float[np.ndarray, "C C"]
    whitener: Float[np.ndarray, "C C"]
    rank: int
    n_trials: int


def covariances(x: Float[np.ndarray, "N C T"]) -> Float[np.ndarray, "N C C"]:
    """Sample covariance of each trial, in float64.

    Args:
        x: Trials; row means are removed here.

    Returns:
        One symmetric matrix a trial, divided by T - 1.
    """
    centred = np.asarray(x, dtype=np.float64)
    centred = centred - centred.mean(axis=-1, keepdims=True)
    return np.asarray(centred @ centred.swapaxes(-1, -2) / max(centred.shape[-1] - 1, 1))


def mean_covariance(x: Float[np.ndarray, "N C T"]) -> tuple[Float[np.ndarray, "C C"], int]:
    """Mean covariance of the trials that hold any signal, and their number.

    Args:
        x: Trials. One that is zero everywhere has no weight.

    Returns:
        The mean, zero where no trial holds signal, and the number of trials behind it.
    """
    each = covariances(x)
    kept = each[np.trace(each, axis1=-2, axis2=-1) > 0]
    if not len(kept):
        return np.zeros(each.shape[-2:]), 0
    return kept.mean(axis=0), len(kept)


def whitening(
    reference: Float[np.ndarray, "C C"],
    *,
    shrinkage: float = 0.0,
    null_tol: float = NULL_TOLERANCE,
) -> tuple[Float[np.ndarray, "C C"], int]:
    """Inverse square root of a covariance, zero on its null space.

    Args:
        reference: Symmetric, positive semi-definite.
        shrinkage: a in (1 - a) R + a tr(R)/C I, in [0, 1].
        null_tol: Eigenvalues up to this part of the largest are a null space.

    Returns:
        The whitener and the rank of the reference before shrinkage.
    """
    values, vectors = np.linalg.eigh(np.asarray(reference, dtype=np.float64))
    held = values > null_tol * max(values[-1], 0.0)
    shrunk = (1.0 - shrinkage) * values + shrinkage * values.mean()
    scale = np.zeros_like(values)
    scale[held] = 1.0 / np.sqrt(shrunk[held])
    return (vectors * scale) @ vectors.T, int(held.sum())


def alignment_of(
    reference: Float[np.ndarray, "C C"],
    n_trials: int,
    *,
    shrinkage: float = 0.0,
    null_tol: float = NULL_TOLERANCE,
) -> Alignment:
    """The alignment to a known reference."""
    whitener, rank = whitening(reference, shrinkage=shrinkage, null_tol=null_tol)
    return Alignment(reference, whitener, rank, n_trials)


def fit_alignment(
    x: Float[np.ndarray, "N C T"], *, shrinkage: float = 0.0, null_tol: float = NULL_TOLERANCE
) -> Alignment:
    """Fit the alignment of one recording session.

    Args:
        x: Its trials, at least one.
        shrinkage: As in :func:`whitening`.
        null_tol: As in :func:`whitening`.

    Returns:
        Reference, whitener, rank and number of trials.

    Raises:
        ValueError: ``x`` is not (N, C, T) or holds no trial.

    Example:
        >>> fit_alignment(np.random.default_rng(0).normal(size=(9, 4, 50))).rank
        4
    """
    if np.ndim(x) != 3 or not len(x):
        raise ValueError(f"fit_alignment: x has shape {np.shape(x)}: pass (trials, channels, time)")
    reference, n_trials = mean_covariance(x)
    return alignment_of(reference, n_trials, shrinkage=shrinkage, null_tol=null_tol)


def apply_alignment(
    x: Float[np.ndarray, "*trials C T"], alignment: Alignment
) -> Float[np.ndarray, "*trials C T"]:
    """Whiten trials: W x.

    Args:
        x: One trial or many.
        alignment: Fitted by :func:`fit_alignment`.

    Returns:
        Aligned trials without unit, in the floating-point type of ``x``.
    """
    dtype = np.asarray(x).dtype
    return np.asarray(np.matmul(alignment.whitener, x)).astype(dtype, copy=False)


def align_block(
    x: Float[np.ndarray, "N C T"], *, shrinkage: float = 0.0
) -> Float[np.ndarray, "N C T"]:
    """Align trials by their own mean covariance (transductive for test trials).

    Args:
        x: All trials of one recording session.
        shrinkage: As in :func:`whitening`.

    Returns:
        Aligned trials.
    """
    return apply_alignment(x, fit_alignment(x, shrinkage=shrinkage))


class OnlineAlignment:
    """Alignment of a session while it is recorded: trial t sees trials 1..t only.

    R_t = (n0 R_prior + sum_{j <= t} S_j) / (n0 + t). Where nothing else is known yet, a trial is
    its own reference.

    Args:
        prior: Reference before the first trial, or None.
        prior_weight: Trials n0 that the prior counts for.
        shrinkage: As in :func:`whitening`.
        include_current: Whether a trial is part of its own reference.
        rescale_prior: Whether the prior takes the trace of the first trial that updates, for
            priors of other people, whose amplitudes differ.
    """

    def __init__(
        self,
        prior: Float[np.ndarray, "C C"] | None = None,
        prior_weight: float = 0.0,
        shrinkage: float = 0.0,
        include_current: bool = True,
        *,
        rescale_prior: bool = False,
    ) -> None:
        self.prior = None if prior is None else np.array(prior, dtype=np.float64)
        self.prior_weight = 0.0 if prior is None else float(prior_weight)
        self.shrinkage = shrinkage
        self.include_current = include_current
        self.rescale_prior = rescale_prior
        self.n_trials = 0
        self._total: Float[np.ndarray, "C C"] | None = None

    @property
    def reference(self) -> Float[np.ndarray, "C C"] | None:
        """The current reference, None before anything is known."""
        weight = self.prior_weight + self.n_trials
        if weight <= 0:
            return None
        total = np.zeros_like(self.prior) if self._total is None else self._total
        if self.prior is not None:
            total = total + self.prior_weight * self.prior
        return np.asarray(total / weight)

    def push(
        self, trial: Float[np.ndarray, "C T"], *, update: bool = True
    ) -> Float[np.ndarray, "C T"]:
        """Align the next trial.

        Args:
            trial: A complete trial.
            update: False for a flagged trial, from which nothing is learnt.

        Returns:
            The aligned trial, in its floating-point type.
        """
        own = covariances(trial[None])[0]
        trace = float(np.trace(own))
        learns = update and trace > 0
        if trace > 0 and self.rescale_prior and self.prior is not None and self.n_trials == 0:
            prior_trace = float(np.trace(self.prior))
            if prior_trace > 0:
                self.prior = self.prior * (trace / prior_trace)
                self.rescale_prior = not learns
        if learns and self.include_current:
            self._learn(own)
        reference = self.reference
        aligned = apply_alignment(
            trial,
            alignment_of(
                own if reference is None else reference, self.n_trials, shrinkage=self.shrinkage
            ),
        )
        if learns and not self.include_current:
            self._learn(own)
        return aligned

    def state_dict(self) -> dict[str, Any]:
        """What a later session needs to go on: arrays, numbers and a flag."""
        return {
            "total": None if self._total is None else self._total.copy(),
            "n_trials": self.n_trials,
            "prior": None if self.prior is None else self.prior.copy(),
            "prior_weight": self.prior_weight,
            "rescale_prior": self.rescale_prior,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

        def matrix(value: Any) -> Float[np.ndarray, "C C"] | None:
            return None if value is None else np.array(value, dtype=np.float64)

        self._total, self.prior = matrix(state["total"]), matrix(state["prior"])
        self.n_trials = int(state["n_trials"])
        self.prior_weight = float(state["prior_weight"])
        self.rescale_prior = bool(state["rescale_prior"])

    def _learn(self, own: Float[np.ndarray, "C C"]) -> None:
        self._total = own.copy() if self._total is None else self._total + own
        self.n_trials += 1


References = Mapping[str, np.ndarray]  # the artifact "alignment" of a fit


def training_references(
    x: Float[np.ndarray, "N C T"], subjects: Sequence[str], sessions: Sequence[str]
) -> dict[str, np.ndarray]:
    """Mean covariance of the training trials of every subject and session: a fit's artifact.

    Args:
        x: Training trials, not aligned.
        subjects: Pseudonym of each trial.
        sessions: Session of each trial.

    Returns:
        "subject", "session" (text), "reference" (G, C, C) and "n_trials" (those with signal),
        one row a group, sorted.
    """
    groups = sorted(set(zip(subjects, sessions, strict=True)))
    fitted = [mean_covariance(x[_rows(subjects, sessions, group)]) for group in groups]
    return {
        "subject": np.array([subject for subject, _ in groups], dtype=np.str_),
        "session": np.array([session for _, session in groups], dtype=np.str_),
        "reference": np.stack([reference for reference, _ in fitted]),
        "n_trials": np.array([count for _, count in fitted], dtype=np.int64),
    }


def align_training(
    x: Float[np.ndarray, "N C T"],
    subjects: Sequence[str],
    sessions: Sequence[str],
    references: References,
    settings: AlignSection,
) -> Float[np.ndarray, "N C T"]:
    """Align training trials by the reference of their own subject and session.

    Args:
        x: Training trials.
        subjects: Pseudonym of each trial.
        sessions: Session of each trial.
        references: From :func:`training_references`.
        settings: Section ``align``; ``train: false`` returns ``x``.

    Returns:
        Aligned trials, in the order of ``x``.
    """
    if not settings.train:
        return x
    aligned = np.empty_like(x)
    for row, group in enumerate(zip(references["subject"], references["session"], strict=True)):
        rows = _rows(subjects, sessions, (str(group[0]), str(group[1])))
        fitted = alignment_of(
            references["reference"][row],
            int(references["n_trials"][row]),
            shrinkage=settings.shrinkage,
        )
        aligned[rows] = apply_alignment(x[rows], fitted)
    return aligned


def training_reference(
    references: References, subject: str, session: str
) -> Float[np.ndarray, "C C"] | None:
    """The reference of a subject's own training trials.

    Args:
        references: From :func:`training_references`.
        subject: Pseudonym.
        session: Its session is preferred; otherwise the mean over the subject's trials.

    Returns:
        Mean covariance, or None for a subject without training trials.
    """
    own = (references["subject"] == subject) & (references["n_trials"] > 0)
    same = own & (references["session"] == session)
    chosen = same if same.any() else own
    if not chosen.any():
        return None
    weights = references["n_trials"][chosen].astype(np.float64)
    return np.average(references["reference"][chosen], axis=0, weights=weights)


def prior_reference(references: References) -> Float[np.ndarray, "C C"]:
    """Mean over the training subjects of their references, for a person never seen.

    Args:
        references: From :func:`training_references`.

    Returns:
        Mean covariance; every subject has the same weight.
    """
    each = [training_reference(references, str(name), "") for name in set(references["subject"])]
    known = [reference for reference in each if reference is not None]
    return np.mean(known, axis=0) if known else np.zeros(references["reference"].shape[1:])


def online_alignment(
    references: References, subject: str | None, session: str, settings: AlignSection
) -> OnlineAlignment:
    """The online alignment of a session, started from what training knows.

    Args:
        references: The fit's artifact "alignment".
        subject: Pseudonym, or None for a person never seen.
        session: Session name.
        settings: Section ``align``.

    Returns:
        A fresh online alignment; the prior of others takes the amplitude of the first trial.
    """
    own = None if subject is None else training_reference(references, subject, session)
    return OnlineAlignment(
        prior_reference(references) if own is None else own,
        settings.online_prior,
        settings.shrinkage,
        settings.online_include_current,
        rescale_prior=own is None,
    )


def align_test(
    x: Float[np.ndarray, "N C T"],
    subject: str | None,
    session: str,
    references: References,
    config: MVCNetConfig,
) -> Float[np.ndarray, "N C T"]:
    """Align the test trials of one recording session as ``align.test`` says.

    Args:
        x: Trials in the order of recording.
        subject: Pseudonym, or None for a person never seen.
        session: Session name.
        references: The fit's artifact "alignment".
        config: The configuration.

    Returns:
        Aligned trials.

    Raises:
        UsageError: ``align.test`` is "train" and the subject has no training trials.
    """
    settings, mode = config.align, align_test_mode(config)
    if settings.parity_double and config.split.kind in WITHIN_SUBJECT:
        second = OnlineAlignment(
            None, 0.0, settings.shrinkage, include_current=settings.online_include_current
        )
        return _push_all(align_block(x, shrinkage=settings.shrinkage), second)
    if mode == "none":
        return x
    if mode == "block":
        return align_block(x, shrinkage=settings.shrinkage)
    if mode == "online":
        return _push_all(x, online_alignment(references, subject, session, settings))
    own = None if subject is None else training_reference(references, subject, session)
    if own is None:
        raise UsageError(
            "align.test=train needs training trials of the same subject, and there are none: "
            "set align.test=online (each trial uses the trials before it) or align.test=block"
        )
    return apply_alignment(x, alignment_of(own, 0, shrinkage=settings.shrinkage))


def _push_all(x: Float[np.ndarray, "N C T"], online: OnlineAlignment) -> Float[np.ndarray, "N C T"]:
    return np.stack([online.push(trial) for trial in x]) if len(x) else x


def _rows(subjects: Sequence[str], sessions: Sequence[str], group: tuple[str, str]) -> np.ndarray:
    return np.flatnonzero((np.asarray(subjects) == group[0]) & (np.asarray(sessions) == group[1]))
