import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from tests.mvcnet.files import real_data

from diptych.config import load
from diptych_mvcnet import MVCNetClassifier
from diptych_mvcnet.baselines import band_pass, fit_baseline
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.plan import splits_of
from diptych_mvcnet.prepare import prepare
from diptych_mvcnet.sample import CHANNELS, generate_sample

SMALL = {"train.epochs": 4, "model.cnn.filters": 8, "model.transformer.embed_dim": 16}


@pytest.fixture(scope="module")
def trials() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    made = generate_sample(0, n_subjects=2, n_sessions=1, n_per_session=32)
    x = band_pass(made.x, (8.0, 30.0), made.sfreq).astype(np.float32)
    return x, np.where(made.y == 0, "left_hand", "right_hand"), made.subject


def classifier(**changes: object) -> MVCNetClassifier:
    return MVCNetClassifier(100.0, CHANNELS, overrides={**SMALL, **changes}, seed=3)


def test_clone_and_parameters_are_scikit_learns() -> None:
    first = classifier()
    again = clone(first)
    assert again.get_params() == first.get_params()
    assert clone(first).set_params(seed=7).seed == 7


def test_an_unfitted_classifier_says_so(trials: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(NotFittedError):
        classifier().predict(trials[0])


def test_probabilities_sum_to_one_and_labels_are_the_users(
    trials: tuple[np.ndarray, ...],
) -> None:
    x, y, _ = trials
    fitted = classifier().fit(x[:32], y[:32])
    proba = fitted.predict_proba(x[:32])
    np.testing.assert_allclose(proba.sum(axis=1), 1.0)
    assert fitted.classes_.tolist() == ["left_hand", "right_hand"]
    assert set(fitted.predict(x[:5])) <= {"left_hand", "right_hand"}
    np.testing.assert_allclose(fitted.predict_proba(x[:1]), proba[:1], atol=1e-6)
    copied = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copied.predict_proba(x[:4]), fitted.predict_proba(x[:4]))


def test_equal_seeds_give_equal_models_and_leave_the_global_generators_alone(
    trials: tuple[np.ndarray, ...],
) -> None:
    x, y, _ = trials
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = classifier().fit(x[:32], y[:32])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = classifier().fit(x[:32], y[:32])
    assert np.array_equal(first.predict_proba(x), second.predict_proba(x))


def test_cross_validation_over_people_aligns_each_by_themselves(
    trials: tuple[np.ndarray, ...],
) -> None:
    x, y, groups = trials
    x = x * np.where(groups == 2, 25.0, 1.0)[:, None, None].astype(np.float32)
    many = classifier(**{"train.epochs": 12, "model.cnn.filters": 16})
    scores = cross_val_score(
        many, x, y, groups=groups, cv=LeaveOneGroupOut(), params={"groups": groups}
    )
    assert len(scores) == 2
    assert scores.mean() > 0.6


def test_numbers_as_labels_and_channels_without_names_work(
    trials: tuple[np.ndarray, ...],
) -> None:
    x, y, _ = trials
    labels = np.where(y == "left_hand", 5, 9)
    fitted = MVCNetClassifier(100.0, overrides=SMALL).fit(x[:20, :2], labels[:20])
    assert set(fitted.predict(x[:6, :2])) <= {5, 9}


def test_bad_input_is_named(trials: tuple[np.ndarray, ...]) -> None:
    x, y, _ = trials
    with pytest.raises(ValueError, match="one label a trial"):
        classifier().fit(x[:8], y[:7])
    with pytest.raises(ValueError, match="5 channels, ch_names 21"):
        classifier().fit(x[:8, :5], y[:8])
    broken = x[:8].copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        classifier().fit(broken, y[:8])
    with pytest.raises(ValueError, match="at least two classes"):
        classifier().fit(x[:4], np.array(["left_hand"] * 4))


def shuffled_accuracy(x: np.ndarray, y: np.ndarray, seed: int, **changes: object) -> float:
    """Accuracy on the last fifth after training on shuffled labels of the rest."""
    cut = len(y) * 4 // 5
    labels = np.random.default_rng(seed).permutation(y[:cut])
    many = classifier(**changes).set_params(seed=seed)
    return float((many.fit(x[:cut], labels).predict(x[cut:]) == y[cut:]).mean())


def test_shuffled_training_labels_teach_nothing(trials: tuple[np.ndarray, ...]) -> None:
    x, y, subject = trials
    found = [shuffled_accuracy(x[subject == 1], y[subject == 1], seed) for seed in range(5)]
    assert 0.2 < np.mean(found) < 0.8
    assert np.std(found) > 0


@pytest.mark.slow
@pytest.mark.data
def test_shuffled_training_labels_of_a_real_subject_give_chance_for_every_model(
    tmp_path: Path,
) -> None:
    sets = [
        "data.pattern=S{subject:03d}R{run:02d}.edf",
        "data.exclude=['S00[1-6]*', 'S01*', 'S02*']",
    ]
    config = load(MVCNetConfig, sets=sets)
    prepared = prepare(config, real_data() / "eegmmidb", tmp_path / "prepared")
    x, y = np.array(prepared.array("epochs")), prepared.index["y"].to_numpy()
    names, classes = prepared.facts["ch_names"], prepared.facts["classes"]
    splits = splits_of(config, prepared.index)
    right: dict[str, list[float]] = {}
    for seed in range(5):
        for split in splits:
            train, test = list(split.train), list(split.test)
            labels = np.random.default_rng((seed, split.fold)).permutation(y[train])
            net = MVCNetClassifier(100.0, names, overrides={"train.epochs": 30}, seed=seed)
            decided = {"mvcnet": net.fit(x[train], labels).predict(x[test])}
            for name in ("logvar_lda", "csp_lda", "tangent_lr", "mdm", "fgmdm"):
                fitted = fit_baseline(
                    name, x[train], labels, sfreq=100.0, ch_names=names, classes=classes
                )
                decided[name] = fitted.predict(x[test].astype(float))
            for name, found in decided.items():
                right.setdefault(name, []).extend(found == y[test])
    for name, found in right.items():
        assert 0.42 <= np.mean(found) <= 0.58, name
