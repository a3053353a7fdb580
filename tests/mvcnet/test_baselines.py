import numpy as np
import pytest
from pyriemann.estimation import Covariances

from diptych.errors import UsageError
from diptych_mvcnet.align import apply_alignment, fit_alignment
from diptych_mvcnet.baselines import (
    band_pass,
    fit_baseline,
    make_baseline,
    oas_covariances,
    probabilities,
    restore,
    state_of,
)

NAMES = ("majority", "logvar_lda", "csp_lda", "fbcsp_lda", "tangent_lr", "mdm", "fgmdm")
CLASSES = ("left_hand", "right_hand")


def two_rhythms(n: int, channels: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = draw.standard_normal((n, channels, 200))
    rhythm = band_pass(draw.standard_normal((n, 200)), (9.0, 13.0), 100.0)
    x[:, 0] += np.where(y == 0, 6.0, 2.0)[:, None] * rhythm
    return x.astype(np.float32), y


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_baseline_predicts_as_the_fitted_one(name: str) -> None:
    x, y = two_rhythms(40)
    new, truth = two_rhythms(30, seed=1)
    about = {"sfreq": 100.0, "ch_names": ["C3", "Cz", "C4", "Pz"], "classes": CLASSES}
    fitted = fit_baseline(name, x, y, **about)
    proba = probabilities(fitted, new, 2)
    again = probabilities(restore(name, state_of(fitted), **about), new, 2)
    assert np.array_equal(proba, again)
    np.testing.assert_allclose(proba.sum(1), 1.0)
    accuracy = (proba.argmax(1) == truth).mean()
    assert accuracy == 0.5 if name == "majority" else accuracy > 0.75


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_one_to_three_channels_are_enough(channels: int) -> None:
    x, y = two_rhythms(40, channels)
    for name in NAMES:
        fitted = fit_baseline(
            name, x, y, sfreq=100.0, ch_names=["C3", "Cz", "C4"][:channels], classes=CLASSES
        )
        assert np.isfinite(probabilities(fitted, x, 2)).all()


def test_shrunk_covariances_are_those_of_pyriemann_and_white_trials_stay_white() -> None:
    x, _ = two_rhythms(12)
    expected = Covariances("oas").transform(x.astype(float))
    np.testing.assert_allclose(oas_covariances(x.astype(float)), expected, rtol=1e-10)
    white = np.stack([apply_alignment(trial, fit_alignment(trial[None])) for trial in x])
    for kind in (np.float32, np.float64):
        values = np.linalg.eigvalsh(oas_covariances(white.astype(kind).astype(float)))
        np.testing.assert_allclose(values, values.mean(), rtol=1e-5)


def test_the_filter_bank_needs_a_rate_above_80_hz() -> None:
    with pytest.raises(UsageError, match="resample_hz"):
        make_baseline("fbcsp_lda", sfreq=80.0, ch_names=["C3"], classes=CLASSES)


def test_an_unknown_baseline_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="tangent_lr"):
        make_baseline("tangent", sfreq=100.0, ch_names=["C3"], classes=CLASSES)


def test_a_class_that_training_never_saw_gets_probability_zero() -> None:
    x, y = two_rhythms(40)
    fitted = fit_baseline(
        "tangent_lr", x, y, sfreq=100.0, ch_names=["C3", "Cz", "C4", "Pz"], classes=CLASSES
    )
    assert (probabilities(fitted, x, 3)[:, 2] == 0).all()
