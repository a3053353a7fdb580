"""The closed-form baselines: scikit-learn estimators over aligned trials, and their stored form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.signal import butter, sosfiltfilt
from sklearn.base import BaseEstimator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.feature_selection import SelectKBest, mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from diptych.errors import UsageError

FILTER_BANK_HZ = tuple((float(low), float(low + 4)) for low in range(4, 40, 4))


def make_baseline(
    name: str, *, sfreq: float, ch_names: Sequence[str], classes: Sequence[str], seed: int = 0
) -> Pipeline:
    """A baseline that has not been fitted.

    Args:
        name: ``majority``, ``logvar_lda``, ``csp_lda``, ``fbcsp_lda`` (needs trials that hold
            4-40 Hz), ``tangent_lr``, ``mdm`` or ``fgmdm``.
        sfreq: Sampling rate of the trials in hertz.
        ch_names: Channels of the trials.
        classes: Class names; labels are their positions.
        seed: Of the mutual information that selects the features of ``fbcsp_lda``.

    Returns:
        A scikit-learn pipeline from trials (N, C, T) in microvolt to class probabilities.

    Raises:
        UsageError: The name is no closed-form baseline, or the sampling rate is too low for the
            filter bank.

    Example:
        >>> make_baseline("csp_lda", sfreq=100, ch_names=["C3", "C4"], classes=["left", "right"])
        Pipeline(...)
    """
    builders: Mapping[str, Callable[[], Pipeline]] = {
        "majority": lambda: make_pipeline(FunctionTransformer(), DummyClassifier(strategy="prior")),
        "logvar_lda": lambda: make_pipeline(FunctionTransformer(log_variance), _shrinkage_lda()),
        "csp_lda": lambda: make_pipeline(_csp(min(6, len(ch_names))), LinearDiscriminantAnalysis()),
        "fbcsp_lda": lambda: _filter_bank_csp(sfreq, len(ch_names), seed),
        "tangent_lr": lambda: _riemannian(_tangent_space(), LogisticRegression(C=1.0)),
        "mdm": lambda: _riemannian(_minimum_distance("MDM")),
        "fgmdm": lambda: _riemannian(_minimum_distance("FgMDM")),
    }
    if name not in builders:
        raise UsageError(f"{name!r} is no closed-form baseline; one of {', '.join(builders)}")
    return builders[name]()


def fit_baseline(
    name: str,
    x: Float[np.ndarray, "n c t"],
    y: np.ndarray,
    *,
    sfreq: float,
    ch_names: Sequence[str],
    classes: Sequence[str],
    seed: int = 0,
) -> Pipeline:
    """A baseline fitted on trials.

    Args:
        name: As in :func:`make_baseline`.
        x: Trials in microvolt, filtered and aligned.
        y: Labels 0..K-1.
        sfreq: Sampling rate in hertz.
        ch_names: Channels.
        classes: Class names.
        seed: As in :func:`make_baseline`.

    Returns:
        The fitted pipeline.
    """
    import mne

    estimator = make_baseline(name, sfreq=sfreq, ch_names=ch_names, classes=classes, seed=seed)
    with mne.utils.use_log_level("ERROR"):
        return estimator.fit(np.asarray(x, dtype=np.float64), y)


def probabilities(
    estimator: Any, x: Float[np.ndarray, "n c t"], n_classes: int
) -> Float[np.ndarray, "n k"]:
    """Class probabilities over all classes; one that training never saw gets 0.

    They are rounded to single precision: eigenvectors differ in their last bits with the place of
    an array in memory, and a repeated evaluation has to give the same table.

    Args:
        estimator: A fitted classifier.
        x: Trials, treated as the training trials were.
        n_classes: Number of classes.

    Returns:
        Rows that sum to 1.
    """
    proba = np.zeros((len(x), n_classes))
    if len(x):
        proba[:, np.asarray(estimator.classes_, dtype=int)] = estimator.predict_proba(
            np.asarray(x, dtype=np.float64)
        )
    return proba.astype(np.float32).astype(np.float64)


def state_of(estimator: Any) -> dict[str, np.ndarray]:
    """The fitted arrays of an estimator and of those inside it, by dotted path.

    Args:
        estimator: A fitted baseline.

    Returns:
        Numeric arrays that :func:`restore` takes.
    """
    return {
        ".".join((*path, key)): value
        for path, inner in _estimators(estimator)
        for key, value in vars(inner).items()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    }


def restore(
    name: str,
    state: Mapping[str, np.ndarray],
    *,
    sfreq: float,
    ch_names: Sequence[str],
    classes: Sequence[str],
) -> Pipeline:
    """A fitted baseline from its stored arrays.

    Args:
        name: As in :func:`make_baseline`.
        state: From :func:`state_of`.
        sfreq: Sampling rate in hertz.
        ch_names: Channels.
        classes: Class names.

    Returns:
        A pipeline that predicts as the stored one did.
    """
    # Fitting on noise leaves the private fields that the libraries set beside the arrays (names of
    # metrics, inner estimators); every number of that fit is then replaced.
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(classes)), 8)
    noise = draw.standard_normal((len(labels), len(ch_names), 4 * len(ch_names) + 64))
    estimator = fit_baseline(name, noise, labels, sfreq=sfreq, ch_names=ch_names, classes=classes)
    inner = {".".join(path): found for path, found in _estimators(estimator)}
    for key, value in state.items():
        path, _, attribute = key.rpartition(".")
        setattr(inner[path], attribute, value)
    return estimator


def log_variance(x: Float[np.ndarray, "n c t"]) -> Float[np.ndarray, "n c"]:
    """Log band power of each channel; a flat channel counts as 1e-12 square microvolt.

    Args:
        x: Trials in microvolt.

    Returns:
        Natural logarithms of the variances over time.
    """
    return np.asarray(np.log(np.maximum(x.var(axis=-1), 1e-12)))


def _estimators(estimator: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """An estimator and all estimators inside it, with the path of their names."""
    found = [(path, estimator)]
    for key, value in vars(estimator).items():
        if isinstance(value, BaseEstimator):
            found += _estimators(value, (*path, key))
        elif key in {"steps", "transformer_list"}:
            for name, step in value:
                found += _estimators(step, (*path, name))
    return found


def _csp(n_components: int) -> Any:
    from mne.decoding import CSP

    return CSP(n_components=n_components, reg="ledoit_wolf", log=True, norm_trace=False)


def _shrinkage_lda() -> LinearDiscriminantAnalysis:
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _filter_bank_csp(sfreq: float, n_channels: int, seed: int) -> Pipeline:
    highest = FILTER_BANK_HZ[-1][1]
    if sfreq <= 2 * highest:
        raise UsageError(
            f"fbcsp_lda filters up to {highest:g} Hz, the trials have {sfreq:g} Hz: "
            f"set data.resample_hz above {2 * highest:g}"
        )
    bands = [
        (
            f"{low:g}-{high:g} Hz",
            make_pipeline(
                FunctionTransformer(band_pass, kw_args={"band": (low, high), "sfreq": sfreq}),
                _csp(min(4, n_channels)),
            ),
        )
        for low, high in FILTER_BANK_HZ
    ]
    select = SelectKBest(partial(mutual_info_classif, random_state=seed), k=8)
    return make_pipeline(FeatureUnion(bands), select, _shrinkage_lda())


def band_pass(
    x: Float[np.ndarray, "n c t"], band: tuple[float, float], sfreq: float
) -> Float[np.ndarray, "n c t"]:
    """Zero-phase Butterworth band-pass of order 4 within each trial.

    Args:
        x: Trials.
        band: Corner frequencies in hertz.
        sfreq: Sampling rate in hertz.

    Returns:
        Filtered trials of the same shape.
    """
    sections = butter(4, band, btype="bandpass", fs=sfreq, output="sos")
    return np.asarray(sosfiltfilt(sections, x, axis=-1))


def oas_covariances(x: Float[np.ndarray, "n c t"]) -> Float[np.ndarray, "n c c"]:
    """Covariance of each trial with oracle approximating shrinkage (Chen et al. 2010, eq. 23).

    Equal to ``pyriemann.estimation.Covariances("oas")``, except that the shrinkage of a trial that
    is exactly white is 1: there numerator and denominator vanish, and their rounding errors can
    give a shrinkage far outside [0, 1] and a matrix that is no covariance.

    Args:
        x: Trials.

    Returns:
        Positive definite matrices.
    """
    n_channels, n_times = x.shape[1:]
    centred = x - x.mean(axis=-1, keepdims=True)
    covariance = centred @ centred.swapaxes(-1, -2) / n_times
    power = (covariance**2).mean(axis=(-1, -2))
    mean = np.trace(covariance, axis1=-2, axis2=-1) / n_channels
    excess = power - mean**2 / n_channels
    white = excess <= 1e-9 * power
    shrinkage = np.minimum((power + mean**2) / np.where(white, 1, (n_times + 1) * excess), 1)
    shrinkage = np.where(white, 1.0, shrinkage)[:, None, None]
    identity = mean[:, None, None] * np.eye(n_channels)
    return np.asarray((1 - shrinkage) * covariance + shrinkage * identity)


def _riemannian(*steps: Any) -> Pipeline:
    return make_pipeline(FunctionTransformer(oas_covariances), *steps)


def _tangent_space() -> Any:
    from pyriemann.tangentspace import TangentSpace

    return TangentSpace()


def _minimum_distance(kind: str) -> Any:
    from pyriemann import classification

    return getattr(classification, kind)()
