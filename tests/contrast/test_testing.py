import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.testing import gaussian_pairs, hypersphere


def mean_cosine(d, kappa):
    """Mean resultant length of a von Mises-Fisher distribution, I_{d/2} / I_{d/2-1}."""
    return special.ive(d / 2, kappa) / special.ive(d / 2 - 1, kappa)


@pytest.mark.parametrize(("d", "kappa"), [(2, 1.0), (3, 5.0), (16, 0.3), (64, 40.0)])
def test_points_lie_on_the_sphere_around_the_mean_of_their_class(d, kappa):
    drawn = hypersphere(20_000, d, 2, kappa, seed=1)
    torch.testing.assert_close(drawn.points.norm(dim=1), torch.ones(20_000))
    torch.testing.assert_close(drawn.means @ drawn.means.T, torch.eye(2), atol=1e-6, rtol=0)
    cosine = (drawn.points * drawn.means[drawn.labels]).sum(1)
    assert float(cosine.mean()) == pytest.approx(mean_cosine(d, kappa), abs=0.02)
    assert drawn.labels.bincount().min() > 9_500


def test_the_bayes_accuracy_of_two_classes_is_the_integral():
    """In three dimensions x.(mean_1 - mean_2) has a density in closed form around mean_1."""
    kappa = 3.0

    def density(polar):
        # Rotate so that the difference of the means is the pole; mean_1 is 45 degrees from it.
        weight = special.i0(kappa * math.sin(polar) / math.sqrt(2))
        norm = kappa / (4 * math.pi * math.sinh(kappa))
        along = math.exp(kappa * math.cos(polar) / math.sqrt(2))
        return norm * along * 2 * math.pi * weight * math.sin(polar)

    expected = integrate.quad(density, 0, math.pi / 2)[0]
    drawn = hypersphere(1, 3, 2, kappa, seed=0)
    assert abs(drawn.bayes_accuracy - expected) < 4 * drawn.bayes_error < 0.005


def test_the_rule_of_the_nearest_mean_reaches_the_bayes_accuracy():
    drawn = hypersphere(40_000, 8, 5, 4.0, seed=2)
    reached = ((drawn.points @ drawn.means.T).argmax(1) == drawn.labels).float().mean()
    assert float(reached) == pytest.approx(drawn.bayes_accuracy, abs=0.01)


def test_more_classes_than_dimensions_have_unit_means():
    drawn = hypersphere(10, 3, 7, 1.0, seed=0)
    torch.testing.assert_close(drawn.means.norm(dim=1), torch.ones(7))


def test_one_seed_gives_one_draw():
    first, again, other = (hypersphere(50, 4, 3, 2.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.points, again.points)
    assert first.bayes_accuracy == again.bayes_accuracy
    assert not torch.equal(first.points, other.points)


def test_gaussian_pairs_have_the_correlation_and_information_they_state():
    pairs = gaussian_pairs(50_000, 3, -0.6, seed=0)
    for column in range(3):
        x, y = pairs.x[:, column].numpy(), pairs.y[:, column].numpy()
        assert np.corrcoef(x, y)[0, 1] == pytest.approx(-0.6, abs=0.01)
        assert y.std() == pytest.approx(1, abs=0.02)
    assert pairs.mutual_information == pytest.approx(-1.5 * math.log(1 - 0.36))
    assert torch.equal(pairs.y, gaussian_pairs(50_000, 3, -0.6, seed=0).y)


@pytest.mark.parametrize(
    ("draw", "argument"),
    [
        (lambda: hypersphere(0, 2, 2, 1.0, 0), "n"),
        (lambda: hypersphere(1, 1, 2, 1.0, 0), "d"),
        (lambda: hypersphere(1, 2, 1, 1.0, 0), "classes"),
        (lambda: hypersphere(1, 2, 2, 0.0, 0), "kappa"),
        (lambda: gaussian_pairs(0, 2, 0.5, 0), "n"),
        (lambda: gaussian_pairs(1, 0, 0.5, 0), "d"),
        (lambda: gaussian_pairs(1, 2, 1.0, 0), "rho"),
    ],
)
def test_an_impossible_draw_is_refused(draw, argument):
    with pytest.raises(ContrastInputError) as caught:
        draw()
    assert caught.value.argument == argument
