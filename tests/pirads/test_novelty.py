"""How far a study lies from the training studies."""

from __future__ import annotations

import numpy as np
import pytest

from diptych_pirads.novelty import fit_novelty, novelty_percentile


def training(n: int, f: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, f)) * np.linspace(1, 5, f)


@pytest.mark.parametrize(("n", "f"), [(200, 4), (30, 64)])
def test_studies_like_those_of_training_spread_over_the_percentiles(n: int, f: int) -> None:
    statistics = fit_novelty(list(training(n, f)))
    again = [novelty_percentile(statistics, row) for row in training(300, f, seed=1)]
    assert 40 < np.mean(again) < 60
    assert np.mean(np.array(again) > 95) < 0.12


def test_a_study_far_from_all_lies_beyond_the_last_percentile() -> None:
    x = training(40, 16)
    assert novelty_percentile(fit_novelty(list(x)), x.mean(axis=0) + 40) == 100
    assert novelty_percentile(fit_novelty(list(x)), x.mean(axis=0)) == 0


def test_distances_of_training_leave_the_study_itself_out() -> None:
    x = training(12, 3)
    statistics = fit_novelty(list(x))
    rest = x[1:]
    weight = max(0.1, 3 / (11 + 3))
    covariance = np.cov(rest.T)
    shrunk = (1 - weight) * covariance + weight * np.trace(covariance) / 3 * np.eye(3)
    apart = x[0] - rest.mean(axis=0)
    expected = np.sqrt(apart @ np.linalg.solve(shrunk, apart))
    assert np.isclose(statistics["distances"], expected).any()


def test_few_studies_give_no_percentile() -> None:
    assert fit_novelty(list(training(7, 3))) == {}
    assert np.isnan(novelty_percentile({}, np.zeros(3)))
