from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from pyriemann.estimation import Covariances
from tests.mvcnet.files import real_data

from diptych.config import load
from diptych.contract import Fit
from diptych.errors import UsageError
from diptych.prepared import Prepared
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
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.evaluate import evaluate_baseline
from diptych_mvcnet.plan import splits_of
from diptych_mvcnet.prepare import prepare

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


@dataclass(frozen=True)
class Fits:
    fits: list[Fit]
    final: str = "final"

    def artifacts(self, name: str) -> dict[str, object]:
        return {}


def published() -> dict[str, list[list[float]]]:
    """Reference accuracies of the shipped recordings, by subject, column and mode."""
    readme = (real_data() / "README.md").read_text()
    rows = [line.strip("| \n").split("|") for line in readme.splitlines() if "| S0" in line]
    return {
        row[0].strip(): [[float(one) for one in cell.split("/")] for cell in row[1:]]
        for row in rows
        if len(row) == 9
    }


def accuracies(prepared: Prepared, name: str, kind: str, sets: list[str], fold: int = 0):
    config = load(MVCNetConfig, sets=[f"split.kind={kind}", *sets])
    splits = splits_of(config, prepared.index)
    fits = [Fit(f"{n}", s, 1) for n, s in enumerate(splits) if fold in (0, s.fold)]
    rows = evaluate_baseline(name, config, prepared, Fits(fits)).rows
    rows = rows.filter(pl.col("metric") == "accuracy")
    found: dict[str, dict[str, float]] = {}
    for condition, subject, value in rows.select("condition", "subject", "value").rows():
        found.setdefault(condition, {})[subject] = value
    return found


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    sets = ["data.pattern=S{subject:03d}R{run:02d}.edf", "data.resample_hz=null"]
    config = load(MVCNetConfig, sets=sets)
    return prepare(config, real_data() / "eegmmidb", tmp_path_factory.mktemp("eeg") / "prepared")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("place", "name"), [(0, "csp_lda"), (1, "tangent_lr")])
def test_real_recordings_give_the_reference_accuracies(
    shipped: Prepared, place: int, name: str
) -> None:
    plain = ["align.test=none", "align.train=false"]
    bare = ["align.shrinkage=0", "align.online_prior=0"]
    block = accuracies(shipped, name, "loso", [*bare, "align.test=block"])
    found = {
        (place, 0): (accuracies(shipped, name, "within_cv", plain)[""], 45),
        (2 + place, 0): (accuracies(shipped, name, "co", plain)[""], 9),
        (4 + place, 0): (accuracies(shipped, name, "cross_run", plain, fold=3)[""], 15),
        (6 + place, 0): (block["no alignment"], 45),
        (6 + place, 1): (block[""], 45),
        (6 + place, 2): (
            accuracies(shipped, name, "loso", [*bare, "align.test=online"])[""],
            45,
        ),
    }
    expected = published()
    subjects = shipped.index["subject"].unique(maintain_order=True).to_list()
    for (column, mode), (measured, trials) in found.items():
        wanted = [expected[own][column][mode] for own in sorted(expected)]
        got = [measured[subject] for subject in subjects]
        assert np.abs(np.subtract(got, wanted)).max() <= 1.01 / trials
        assert abs(np.mean(got) - np.mean(wanted)) <= 0.01
