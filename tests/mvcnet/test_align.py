import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power

from diptych.errors import UsageError
from diptych_mvcnet.align import (
    OnlineAlignment,
    align_block,
    align_test,
    align_training,
    apply_alignment,
    covariances,
    fit_alignment,
    online_alignment,
    prior_reference,
    training_reference,
    training_references,
)
from diptych_mvcnet.config import MVCNetConfig


def mixture_of(rng, channels):
    """Invertible, with singular values between 1/2 and 2."""
    left, right = (np.linalg.qr(rng.normal(size=(channels, channels)))[0] for _ in range(2))
    return (left * rng.uniform(0.5, 2.0, size=channels)) @ right


def trials_of(n=12, channels=5, times=80, seed=0, scale=10.0):
    rng = np.random.default_rng(seed)
    mixing = mixture_of(rng, channels)
    return scale * mixing @ rng.normal(size=(n, channels, times)) + rng.normal(
        size=(n, channels, 1)
    )


def reference_by_loop(x):
    return np.mean([np.cov(trial) for trial in x], axis=0)


def config_of(**sections):
    return MVCNetConfig.model_validate(sections)


def test_covariances_are_those_of_numpy():
    x = trials_of()
    np.testing.assert_allclose(covariances(x), [np.cov(trial) for trial in x], rtol=1e-12)


def test_the_whitener_is_the_inverse_square_root_of_the_mean_covariance():
    x = trials_of()
    fitted = fit_alignment(x)
    np.testing.assert_allclose(
        fitted.whitener, fractional_matrix_power(reference_by_loop(x), -0.5), rtol=1e-8
    )
    assert (fitted.rank, fitted.n_trials) == (5, 12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), channels=st.integers(1, 6), n=st.integers(1, 8))
def test_mean_covariance_of_aligned_trials_is_the_identity(seed, channels, n):
    x = trials_of(n, channels, 40, seed)
    np.testing.assert_allclose(
        reference_by_loop(align_block(x)).reshape(channels, channels), np.eye(channels), atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_an_invertible_mixture_changes_aligned_trials_by_a_rotation_only(seed):
    rng = np.random.default_rng(seed)
    mixture = mixture_of(rng, 5)
    x = trials_of(seed=seed)
    plain, mixed = align_block(x), align_block(mixture @ x)
    flat = plain.transpose(1, 0, 2).reshape(5, -1)
    rotation = mixed.transpose(1, 0, 2).reshape(5, -1) @ np.linalg.pinv(flat)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(rotation @ plain, mixed, atol=1e-6)


def test_average_referenced_data_have_a_null_space_of_one():
    x = trials_of(30, 21, 200).astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    fitted = fit_alignment(x)
    aligned = apply_alignment(x, fitted)
    values = np.linalg.eigvalsh(reference_by_loop(aligned.astype(np.float64)))
    assert fitted.rank == 20
    assert np.isfinite(aligned).all()
    assert aligned.dtype == np.float32
    assert abs(values[0]) < 1e-6
    np.testing.assert_allclose(values[1:], 1.0, atol=1e-5)


def test_shrinkage_moves_the_reference_towards_the_scaled_identity():
    x = trials_of()
    reference = reference_by_loop(x)
    shrunk = 0.7 * reference + 0.3 * np.trace(reference) / 5 * np.eye(5)
    np.testing.assert_allclose(
        fit_alignment(x, shrinkage=0.3).whitener, fractional_matrix_power(shrunk, -0.5), rtol=1e-8
    )


def test_a_trial_without_signal_has_no_weight():
    x = trials_of()
    x[3] = 0.0
    np.testing.assert_allclose(
        fit_alignment(x).reference, reference_by_loop(np.delete(x, 3, axis=0)), rtol=1e-12
    )
    assert not fit_alignment(np.zeros((2, 3, 10))).whitener.any()


def test_no_trials_are_refused():
    with pytest.raises(ValueError, match=r"\(0, 3, 9\)"):
        fit_alignment(np.zeros((0, 3, 9)))


def test_online_alignment_ends_at_the_block_reference():
    x = trials_of()
    online = OnlineAlignment()
    for trial in x:
        online.push(trial)
    np.testing.assert_allclose(online.reference, reference_by_loop(x), rtol=1e-10)


def test_online_alignment_follows_the_formula():
    x, prior = trials_of(6), np.diag([1.0, 2.0, 3.0, 4.0, 5.0])
    online = OnlineAlignment(prior, 5.0)
    for count, trial in enumerate(x, start=1):
        aligned = online.push(trial)
        reference = (5 * prior + count * reference_by_loop(x[:count])) / (5 + count)
        np.testing.assert_allclose(
            aligned, fractional_matrix_power(reference, -0.5) @ trial, rtol=1e-7
        )


@pytest.mark.parametrize("include_current", [True, False])
def test_later_trials_never_change_earlier_ones(include_current):
    x = trials_of()
    changed = x.copy()
    changed[7:] *= 100
    first, second = (
        np.stack([online.push(trial) for trial in data])
        for online, data in (
            (OnlineAlignment(np.eye(5), 5.0, 0.01, include_current), x),
            (OnlineAlignment(np.eye(5), 5.0, 0.01, include_current), changed),
        )
    )
    np.testing.assert_array_equal(first[:7], second[:7])
    assert not np.allclose(first[8:], second[8:])


def test_without_the_current_trial_the_reference_is_that_of_the_trials_before():
    x = trials_of()
    online = OnlineAlignment(include_current=False)
    aligned = [online.push(trial) for trial in x]
    expected = fractional_matrix_power(reference_by_loop(x[:4]), -0.5) @ x[4]
    np.testing.assert_allclose(aligned[4], expected, rtol=1e-7)


def test_a_flagged_trial_teaches_nothing():
    x = trials_of()
    online = OnlineAlignment(np.eye(5), 2.0)
    online.push(x[0])
    before = online.reference
    online.push(1000 * x[1], update=False)
    online.push(np.zeros_like(x[1]))
    np.testing.assert_array_equal(online.reference, before)
    assert online.n_trials == 1


def test_a_foreign_prior_takes_the_amplitude_of_the_first_trial_that_counts():
    x = trials_of()
    online = OnlineAlignment(np.eye(5), 5.0, rescale_prior=True)
    online.push(1000 * x[0], update=False)
    online.push(x[1])
    online.push(x[2])
    assert np.trace(online.prior) == pytest.approx(np.trace(np.cov(x[1])))


def test_an_interrupted_session_goes_on_where_it_stopped():
    x = trials_of()
    whole, first = (OnlineAlignment(np.eye(5), 5.0, rescale_prior=True) for _ in range(2))
    expected = [whole.push(trial) for trial in x]
    for trial in x[:5]:
        first.push(trial)
    kept = json.loads(json.dumps(first.state_dict(), default=np.ndarray.tolist))
    second = OnlineAlignment()
    second.load_state_dict(kept)
    np.testing.assert_array_equal([second.push(trial) for trial in x[5:]], expected[5:])


def two_people():
    x = np.concatenate([trials_of(6, seed=1), trials_of(8, seed=2, scale=3.0)])
    return x, ["S-a"] * 6 + ["S-b"] * 8, ["1"] * 3 + ["2"] * 3 + ["1"] * 8


def test_training_trials_are_aligned_by_subject_and_session():
    x, subjects, sessions = two_people()
    settings_ = config_of(align={"shrinkage": 0.0}).align
    references = training_references(x, subjects, sessions)
    aligned = align_training(x, subjects, sessions, references, settings_)
    for part in (slice(0, 3), slice(3, 6), slice(6, 14)):
        np.testing.assert_allclose(reference_by_loop(aligned[part]), np.eye(5), atol=1e-9)
    off = config_of(align={"train": False}).align
    assert align_training(x, subjects, sessions, references, off) is x


def test_the_reference_of_a_session_is_preferred_to_that_of_its_subject():
    references = training_references(*two_people())
    x = two_people()[0]
    np.testing.assert_allclose(
        training_reference(references, "S-a", "2"), reference_by_loop(x[3:6])
    )
    np.testing.assert_allclose(training_reference(references, "S-a", "9"), reference_by_loop(x[:6]))
    assert training_reference(references, "S-c", "1") is None
    np.testing.assert_allclose(
        prior_reference(references), (reference_by_loop(x[:6]) + reference_by_loop(x[6:])) / 2
    )


@pytest.mark.parametrize("mode", ["train", "block", "online", "none"])
def test_every_mode_of_test_alignment_is_what_it_says(mode):
    x, subjects, sessions = two_people()
    references = training_references(x, subjects, sessions)
    config = config_of(align={"test": mode, "shrinkage": 0.0, "online_prior": 3.0})
    test = trials_of(5, seed=9)
    online = OnlineAlignment(reference_by_loop(x[:3]), 3.0)
    expected = {
        "train": fractional_matrix_power(reference_by_loop(x[:3]), -0.5) @ test,
        "block": fractional_matrix_power(reference_by_loop(test), -0.5) @ test,
        "online": np.stack([online.push(trial) for trial in test]),
        "none": test,
    }[mode]
    aligned = align_test(test, "S-a", "1", references, config)
    np.testing.assert_allclose(aligned, expected, rtol=1e-6, atol=1e-9)


def test_the_official_double_alignment_is_block_then_online():
    x, subjects, sessions = two_people()
    references = training_references(x, subjects, sessions)
    config = config_of(align={"parity_double": True, "shrinkage": 0.0, "online_prior": 0.0})
    test, online = trials_of(5, seed=9), OnlineAlignment()
    expected = np.stack([online.push(trial) for trial in align_block(test)])
    np.testing.assert_allclose(align_test(test, "S-a", "1", references, config), expected)


def test_the_reference_of_training_trials_is_refused_for_a_person_never_seen():
    references = training_references(*two_people())
    with pytest.raises(UsageError, match=r"align\.test=online"):
        align_test(trials_of(2), "S-c", "1", references, config_of(align={"test": "train"}))


def test_a_person_never_seen_starts_from_the_mean_of_the_others_at_its_own_amplitude():
    references = training_references(*two_people())
    online = online_alignment(references, None, "1", config_of().align)
    trial = 50 * trials_of(1, seed=3)[0]
    online.push(trial)
    assert np.trace(online.reference) == pytest.approx(np.trace(np.cov(trial)))
