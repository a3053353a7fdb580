import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych_contrast.diagnostics import (
    alignment,
    alpha_req,
    collapse_report,
    effective_rank,
    gradient_balance,
    modality_gap,
    nesum,
    positive_negative_scores,
    rank_me,
    tolerance,
    uniformity,
)
from diptych_contrast.errors import ContrastInputError, ContrastWarning


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values, rows, seed=0):
    """A centred matrix whose singular values are the ones given."""
    centred = normal(rows, len(values), seed=seed)
    left = torch.linalg.qr(centred - centred.mean(0))[0]
    right = torch.linalg.qr(normal(len(values), len(values), seed=seed + 1))[0]
    return left * torch.as_tensor(values, dtype=torch.float64) @ right.T


class TestAlignment:
    @pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_it_is_the_mean_distance_to_the_power(self, alpha, normalize):
        x, y = normal(7, 3, seed=1), normal(7, 3, seed=2)
        lengths = [np.linalg.norm(each, axis=1) if normalize else np.ones(7) for each in (x, y)]
        apart = x.numpy() / lengths[0][:, None] - y.numpy() / lengths[1][:, None]
        expected = np.mean(np.linalg.norm(apart, axis=1) ** alpha)
        assert alignment(x, y, alpha, normalize=normalize).item() == pytest.approx(expected)

    def test_the_gradient_is_exact_and_zero_at_distance_zero(self):
        x, y = normal(5, 3, seed=1).requires_grad_(), normal(5, 3, seed=2).requires_grad_()
        for alpha in (1.0, 2.0):
            assert torch.autograd.gradcheck(lambda a, b, p=alpha: alignment(a, b, p), (x, y))
            assert torch.autograd.gradgradcheck(lambda a, b, p=alpha: alignment(a, b, p), (x, y))
        same = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(alignment(same, x.detach(), 1.0), same)
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_half_precision_is_computed_in_single_precision(self):
        x, y = normal(5, 3, seed=1).bfloat16(), normal(5, 3, seed=2).bfloat16()
        assert torch.equal(alignment(x, y), alignment(x.float(), y.float()))


class TestUniformity:
    def by_loops(self, x, t, normalize=True):
        rows = [row / np.linalg.norm(row) if normalize else row for row in x.numpy()]
        potentials = [
            math.exp(-t * float(((rows[i] - rows[j]) ** 2).sum()))
            for i in range(len(rows))
            for j in range(i)
        ]
        return math.log(sum(potentials) / len(potentials))

    @pytest.mark.parametrize("rows", [2, 3, 17, 64])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_it_is_the_mean_potential_of_all_pairs(self, rows, normalize):
        x = normal(rows, 3, seed=rows)
        expected = self.by_loops(x, 2.0, normalize)
        assert uniformity(x, normalize=normalize).item() == pytest.approx(expected, abs=1e-10)
        assert uniformity(x.float(), normalize=normalize).item() == pytest.approx(
            expected, abs=1e-5
        )

    @pytest.mark.parametrize("normalize", [True, False])
    def test_the_gradient_is_exact_to_second_order(self, normalize):
        x = normal(6, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: uniformity(z, normalize=normalize), x)
        assert torch.autograd.gradgradcheck(lambda z: uniformity(z, normalize=normalize), x)

    def test_more_even_is_lower(self):
        even, clustered = normal(200, 3), normal(200, 3) + 2
        assert uniformity(even) < uniformity(clustered) < uniformity(torch.ones(9, 3)) + 1e-6


class TestSpectrum:
    @pytest.mark.parametrize("rank", [1, 3, 8])
    @pytest.mark.parametrize(("rows", "dimensions"), [(50, 12), (12, 50)])
    def test_rank_me_of_equal_singular_values_is_their_number(self, rank, rows, dimensions):
        left = torch.linalg.qr(normal(rows, rank, seed=1))[0]
        right = torch.linalg.qr(normal(dimensions, rank, seed=2))[0]
        for dtype in (torch.float64, torch.float32):
            z = (7 * left @ right.T).to(dtype)
            assert rank_me(z) == pytest.approx(rank, abs=1e-3)

    def test_rank_me_is_the_published_formula(self):
        z = normal(40, 6) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
        sigma = np.linalg.svd(z.numpy(), compute_uv=False)
        share = sigma / sigma.sum() + 1e-7
        assert rank_me(z) == pytest.approx(math.exp(-(share * np.log(share)).sum()), abs=1e-6)

    def test_effective_rank_does_not_count_a_common_mean(self):
        z = with_spectrum([2.0, 2.0, 2.0, 0.0], rows=30)
        assert effective_rank(z + 100) == pytest.approx(3, abs=1e-6)
        assert rank_me(z + 100) < 1.2
        assert effective_rank(torch.ones(5, 3)) == rank_me(torch.zeros(5, 3)) == 1.0

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
    def test_alpha_req_recovers_the_exponent(self, alpha):
        eigenvalues = np.arange(1, 41) ** -alpha
        eigenvalues[:4] *= 3  # outside the range of the fit
        eigenvalues[20:] = 1e-9
        assert alpha_req(with_spectrum(np.sqrt(eigenvalues), rows=80)) == pytest.approx(alpha)

    def test_alpha_req_of_a_spectrum_that_ends_is_infinite(self):
        assert alpha_req(with_spectrum([1.0] * 5 + [0.0] * 15, rows=40)) == math.inf

    def test_nesum_is_the_spectrum_over_its_largest(self):
        assert nesum(with_spectrum([2.0, 1.0, 1.0], rows=20)) == pytest.approx(1.5)
        assert nesum(normal(40_000, 5)) == pytest.approx(5, abs=0.2)
        assert nesum(torch.ones(4, 3)) == 0.0


class TestPairs:
    def test_tolerance_is_the_mean_cosine_within_classes(self):
        z, labels = normal(12, 4), torch.tensor([5, 5, 5, 5, 9, 9, 9, 1, 1, 2, 3, 4])
        unit = F.normalize(z).numpy()
        cosines = [
            unit[i] @ unit[j]
            for i in range(12)
            for j in range(12)
            if i != j and labels[i] == labels[j]
        ]
        assert tolerance(z, labels) == pytest.approx(np.mean(cosines))

    def test_tolerance_without_a_pair_warns(self):
        with pytest.warns(ContrastWarning, match="no two equal"):
            assert tolerance(torch.eye(3), torch.arange(3)) == 0.0

    def test_modality_gap_is_the_distance_of_the_means(self):
        x, y = torch.tensor([[2.0, 0.0]] * 3), torch.tensor([[0.0, 5.0], [0.0, 1.0]])
        assert modality_gap(x, y) == pytest.approx(math.sqrt(2))
        assert modality_gap(x, x[:1]) == 0.0

    @pytest.mark.parametrize("rows", [40, 1100])
    def test_scores_are_counted_by_kind(self, rows):
        x, y = normal(rows, 5, seed=1), normal(rows, 5, seed=2)
        ids = torch.arange(rows) // 2
        found = positive_negative_scores(x, y, ids=ids)
        scores = (F.normalize(x) @ F.normalize(y).T).numpy()
        same = (ids[:, None] == ids[None, :]).numpy()
        for kind, mask in (("positive", same), ("negative", ~same)):
            histogram = getattr(found, f"{kind}_histogram")
            assert getattr(found, f"{kind}_mean") == pytest.approx(scores[mask].mean())
            assert getattr(found, f"{kind}_variance") == pytest.approx(scores[mask].var())
            expected = np.histogram(scores[mask], 64, (-1, 1))[0]
            np.testing.assert_array_equal(histogram, expected)
        np.testing.assert_allclose(found.edges, np.linspace(-1, 1, 65))

    def test_by_default_the_own_other_view_is_the_positive(self):
        found = positive_negative_scores(torch.eye(3), torch.eye(3), bins=2)
        assert (found.positive_mean, found.negative_mean) == (1.0, 0.0)
        assert found.positive_histogram.tolist() == [0, 3]
        assert found.negative_histogram.tolist() == [0, 6]

    def test_the_gradient_parts_add_up_to_the_gradient_of_info_nce(self):
        q, k = F.normalize(normal(9, 4, seed=1)), F.normalize(normal(9, 4, seed=2))
        q.requires_grad_()
        found = gradient_balance(q, k, 0.2)
        loss = F.cross_entropy(q @ k.T / 0.2, torch.arange(9), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, q)
        pull = -torch.from_numpy(found.positive)[:, None] * k
        np.testing.assert_allclose(
            (gradient - pull).norm(dim=1).detach(), found.negative, rtol=1e-9
        )
        assert found.positive_mean == pytest.approx(found.positive.mean())
        assert found.negative_mean == pytest.approx(found.negative.mean())

    def test_an_easy_batch_starves_both_parts(self):
        found = gradient_balance(torch.eye(6), torch.eye(6), 0.05)
        assert found.positive_mean < 1e-6
        assert 0 < found.negative_mean < 1e-6


class TestCollapse:
    def test_it_finds_a_dead_dimension_a_constant_row_and_a_duplicate(self):
        z = normal(20, 6).float()
        z[:, 3] = 0.25
        z[4] = 0.25
        z[11] = z[2]
        z[17] = z[2]
        report = collapse_report(z)
        assert report.dead_dimensions == (3,)
        assert report.constant_rows == (4,)
        assert report.duplicate_rows == (11, 17)
        assert (report.n_rows, report.n_dimensions) == (20, 6)
        assert report.rank_me == pytest.approx(rank_me(z))
        assert not report.collapsed

    def test_rows_that_are_not_finite_are_listed_and_left_out(self):
        z = normal(10, 3)
        z[2, 0], z[7, 1] = math.nan, math.inf
        z[8] = z[1]
        report = collapse_report(z)
        assert report.non_finite_rows == (2, 7)
        assert report.duplicate_rows == (8,)
        assert math.isfinite(report.rank_me)

    def test_one_direction_or_many_dead_dimensions_count_as_collapse(self):
        assert collapse_report(normal(20, 1) @ normal(1, 8, seed=1)).collapsed
        mostly_dead = torch.cat([normal(30, 6), torch.zeros(30, 7)], dim=1)
        assert collapse_report(mostly_dead).collapsed
        assert not collapse_report(mostly_dead[:, :12]).collapsed
        assert collapse_report(torch.ones(5, 4)).collapsed

    def test_nothing_finite_is_a_report_too(self):
        report = collapse_report(torch.full((2, 3), math.nan))
        assert report.collapsed
        assert report.non_finite_rows == (0, 1)

    def test_a_single_dimension_makes_no_row_constant(self):
        assert collapse_report(normal(5, 1)).constant_rows == ()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x: alignment(x, x[:2]), "y"),
        (lambda x: alignment(x, x[:, :2]), "y"),
        (lambda x: alignment(x, x, 0.0), "alpha"),
        (lambda x: uniformity(x[:1]), "x"),
        (lambda x: uniformity(x, t=-1.0), "t"),
        (lambda x: uniformity(x.long()), "x"),
        (lambda x: uniformity(x[0]), "x"),
        (lambda x: rank_me(x[:0]), "z"),
        (lambda x: rank_me(x * math.nan), "z"),
        (alpha_req, "z"),
        (lambda x: tolerance(x, torch.arange(2)), "labels"),
        (lambda x: tolerance(x, torch.rand(4)), "labels"),
        (lambda x: modality_gap(x, x[:, :1]), "y"),
        (lambda x: positive_negative_scores(x, x, ids=torch.zeros(4).long()), "ids"),
        (lambda x: gradient_balance(x[:1], x[:1]), "q"),
        (lambda x: gradient_balance(x, x[:3]), "k"),
        (lambda x: gradient_balance(x, x, 0.0), "temperature"),
        (lambda x: collapse_report(x[0]), "z"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(call, argument):
    with pytest.raises(ContrastInputError) as caught:
        call(torch.eye(4))
    assert caught.value.argument == argument
