import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from diptych_contrast.errors import ContrastInputError, ContrastWarning
from diptych_contrast.probes import (
    expected_rank,
    few_label_probe,
    knn_probe,
    linear_probe,
    recall_at_k,
    retrieval,
    ridge_probe,
)
from diptych_contrast.probes.linear import deal_folds
from diptych_contrast.testing import hypersphere


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x / 16).float(), torch.from_numpy(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:900]], y[order[:900]], x[order[900:1400]], y[order[900:1400]]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestNeighbours:
    def brute_force(self, bank, labels, query, k, temperature, classes):
        """Loops over plain floats; ties to the lower row and to the lower class."""
        unit = [row / np.linalg.norm(row) for row in bank.double().numpy()]
        predictions = []
        for row in query.double().numpy():
            scores = [float(row @ other) / np.linalg.norm(row) for other in unit]
            nearest = sorted(range(len(unit)), key=lambda j: (-scores[j], j))[:k]
            votes = [0.0] * classes
            for j in nearest:
                votes[labels[j]] += math.exp(scores[j] / temperature)
            predictions.append(max(range(classes), key=lambda c: (votes[c], -c)))
        return predictions

    @pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (40, 1.0), (150, 0.01)])
    def test_predictions_equal_brute_force(self, k, temperature):
        bank, query = normal(150, 8, seed=1), normal(60, 8, seed=2)
        labels = torch.randint(0, 4, (150,), generator=torch.Generator().manual_seed(3))
        probe = knn_probe(bank, labels, query, k, temperature)
        expected = self.brute_force(bank, labels.tolist(), query, k, temperature, 4)
        assert probe.predictions.tolist() == expected
        torch.testing.assert_close(probe.probabilities.sum(1), torch.ones(60))

    def test_many_tiles_equal_one_sort(self):
        bank, query = normal(9000, 4, seed=1), normal(1100, 4, seed=2)
        probe = knn_probe(bank.double(), torch.zeros(9000).long(), query.double(), k=30)
        cosines = (
            torch.nn.functional.normalize(query.double())
            @ torch.nn.functional.normalize(bank.double()).T
        )
        expected = cosines.sort(dim=1, descending=True)
        assert torch.equal(probe.neighbours, expected.indices[:, :30])
        torch.testing.assert_close(probe.similarities, expected.values[:, :30])

    def test_equal_neighbours_go_by_row_and_equal_votes_by_class(self):
        bank = torch.tensor([[0.0, 1.0]] + [[1.0, 0.0]] * 5000)
        labels = torch.tensor([0] + [3, 1] * 2500)
        probe = knn_probe(bank, labels, torch.tensor([[2.0, 0.0]]), k=4)
        assert probe.neighbours.tolist() == [[1, 2, 3, 4]]
        assert probe.predictions.tolist() == [1]

    def test_a_k_beyond_the_bank_is_cut_with_a_warning(self):
        with pytest.warns(ContrastWarning, match="'k' is larger than the bank"):
            probe = knn_probe(torch.eye(3), torch.arange(3), torch.eye(3), k=9, classes=5)
        assert probe.neighbours.shape == (3, 3)
        assert probe.probabilities.shape == (3, 5)

    @pytest.mark.parametrize(
        ("change", "argument"),
        [
            ({"query": torch.zeros(2, 4)}, "query"),
            ({"bank": torch.zeros(3, 3).long()}, "bank"),
            ({"bank_y": torch.arange(2)}, "bank_y"),
            ({"bank_y": torch.arange(3) - 1}, "bank_y"),
            ({"classes": 2}, "bank_y"),
            ({"k": 0}, "k"),
            ({"temperature": 0.0}, "temperature"),
            ({"bank": torch.full((3, 3), math.nan)}, "bank"),
        ],
    )
    def test_what_cannot_vote_is_refused(self, change, argument):
        arguments = {"bank": torch.eye(3), "bank_y": torch.arange(3), "query": torch.eye(3), "k": 1}
        with pytest.raises(ContrastInputError) as caught:
            knn_probe(**arguments | change)
        assert caught.value.argument == argument


class TestLinear:
    @pytest.mark.parametrize("l2", [1e-1, 1e-3])
    def test_it_equals_scikit_learn_at_equal_penalty(self, digits, l2):
        x, y, test, test_y = digits
        probe = linear_probe(x, y, test, l2, test_y=test_y)
        scaler = StandardScaler().fit(x.double())
        peer = LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000, tol=1e-8)
        peer.fit(scaler.transform(x.double()), y)
        features = scaler.transform(test.double())
        assert probe.accuracy == pytest.approx(peer.score(features, test_y), abs=0.005)
        difference = probe.probabilities.numpy() - peer.predict_proba(features)
        assert np.abs(difference).max() < 5e-3

    def test_more_dimensions_than_rows_give_the_same_fit(self, digits):
        x, y, test, _ = digits
        wide = x[:60] @ normal(64, 200)
        mixed = test @ normal(64, 200)
        probe = linear_probe(wide, y[:60], mixed, 0.1)
        scaler = StandardScaler().fit(wide.double())
        peer = LogisticRegression(C=1 / (0.1 * 60), max_iter=5000, tol=1e-10)
        peer.fit(scaler.transform(wide.double()), y[:60])
        expected = peer.predict_proba(scaler.transform(mixed.double()))
        np.testing.assert_allclose(probe.probabilities.numpy(), expected, atol=1e-4)

    def test_the_chosen_penalty_is_the_one_of_lowest_held_out_loss(self, digits):
        x, y, test, test_y = digits
        probe = linear_probe(x[:300], y[:300], test, test_y=test_y)
        losses = dict(probe.held_out_losses)
        assert probe.l2 == min(losses, key=losses.get)
        assert losses[100.0] > losses[probe.l2] < losses[min(losses)]
        assert probe.accuracy > linear_probe(x[:300], y[:300], test, 1e2, test_y=test_y).accuracy

    def test_grouped_folds_do_not_reward_recognising_the_subject(self):
        """Features that only tell subjects apart: row folds want them, subject folds do not."""
        subjects = torch.arange(20).repeat_interleave(6)
        y = (torch.arange(20) % 2).repeat_interleave(6)
        x = torch.nn.functional.one_hot(subjects).double() + 0.05 * normal(120, 20).double()
        by_row = linear_probe(x, y, x).l2
        by_subject = linear_probe(x, y, x, groups=subjects).l2
        assert by_row < 1e-2 < by_subject

    def test_it_approaches_the_bayes_accuracy_of_generated_data(self):
        drawn = hypersphere(3000, 8, 3, 6.0, seed=1)
        x, y = drawn.points, drawn.labels
        probe = linear_probe(x[:2000], y[:2000], x[2000:], test_y=y[2000:])
        low, high = probe.accuracy_interval
        assert low - 0.01 < drawn.bayes_accuracy < high + 0.02
        assert low < probe.accuracy < high

    def test_scores_are_counted_by_class_with_labels_of_any_kind(self):
        x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
        y = torch.tensor([-7, -7, 40, 40])
        test = torch.tensor([[-1.0], [-1.0], [-1.0], [1.0], [1.0]])
        test_y = torch.tensor([-7, -7, 40, 40, 99])
        probe = linear_probe(x, y, test, 1e-2, test_y=test_y)
        assert probe.predictions.tolist() == [-7, -7, -7, 40, 40]
        assert probe.per_class == {-7: 1.0, 40: 0.5, 99: 0.0}
        assert probe.accuracy == pytest.approx(3 / 5)
        assert probe.balanced_accuracy == pytest.approx(0.5)

    def test_the_interval_resamples_groups_not_rows(self, digits):
        x, y, test, test_y = digits
        by_row = linear_probe(x, y, test, 1e-3, test_y=test_y)
        by_group = linear_probe(
            x, y, test, 1e-3, test_y=test_y, test_groups=torch.arange(500) // 250
        )
        halves = [
            (by_row.predictions[part] == test_y[part]).double().mean().item()
            for part in (slice(0, 250), slice(250, 500))
        ]
        assert by_group.accuracy_interval == pytest.approx((min(halves), max(halves)))
        spread = math.sqrt(by_row.accuracy * (1 - by_row.accuracy) / 500)
        width = by_row.accuracy_interval[1] - by_row.accuracy_interval[0]
        assert width == pytest.approx(2 * 1.96 * spread, rel=0.15)
        low, high = by_row.balanced_accuracy_interval
        assert low < by_row.balanced_accuracy < high

    def test_a_dimension_dead_in_training_says_nothing_at_test_time(self):
        x = torch.tensor([[-1.0, 5.0], [1.0, 5.0]])
        probe = linear_probe(x, torch.tensor([0, 1]), torch.tensor([[-1.0, 900.0]]), 1e-2)
        assert probe.predictions.tolist() == [0]
        assert probe.accuracy is None

    @pytest.mark.parametrize(
        ("change", "argument"),
        [
            ({"y": torch.zeros(4).long()}, "y"),
            ({"y": torch.arange(3)}, "y"),
            ({"y": torch.rand(4)}, "y"),
            ({"l2": -1.0}, "l2"),
            ({"l2": "auto"}, "l2"),
            ({"test": torch.zeros(2, 3)}, "test"),
            ({"test": torch.full((2, 4), math.inf)}, "test"),
            ({"test_y": torch.arange(3)}, "test_y"),
            ({"test_groups": torch.arange(3)}, "test_groups"),
            ({"groups": torch.arange(5)}, "groups"),
            ({"l2": "cv", "groups": torch.zeros(4).long()}, "groups"),
            ({"l2": "cv", "y": torch.arange(4)}, "l2"),
        ],
    )
    def test_what_cannot_be_fitted_is_refused(self, change, argument):
        arguments = {"train": torch.eye(4), "y": torch.arange(4) % 2, "test": torch.eye(4)[:2]}
        with pytest.raises(ContrastInputError) as caught:
            linear_probe(**{**arguments, "l2": 1.0, **change})
        assert caught.value.argument == argument


class TestFewLabels:
    def test_draws_are_balanced_keyed_and_scored(self, digits):
        x, y, test, test_y = digits
        probe = few_label_probe(x, y, test, test_y, n_per_class=4, repeats=2, seed=3, l2=1e-2)
        more = few_label_probe(x, y, test, test_y, n_per_class=4, repeats=3, seed=3, l2=1e-2)
        for rows, same in zip(probe.rows, more.rows, strict=False):
            assert y[rows].bincount().tolist() == [4] * 10
            np.testing.assert_array_equal(rows, same)
        assert more.accuracies[:2] == probe.accuracies
        assert probe.accuracy == pytest.approx(np.mean(probe.accuracies))
        full = linear_probe(x, y, test, 1e-2, test_y=test_y).accuracy
        assert 0.6 < probe.accuracy < full
        assert abs(probe.balanced_accuracy - probe.accuracy) < 0.05

    def test_subjects_give_one_row_each_before_any_gives_two(self):
        subjects = torch.tensor([0] * 10 + [1, 2, 3] + [4] * 5 + [5, 6])
        y = torch.tensor([0] * 13 + [1] * 7)
        x = normal(20, 3)
        probe = few_label_probe(x, y, x, y, 3, 20, l2=1.0, groups=subjects)
        for rows in probe.rows:
            assert len(subjects[rows].unique()) == 6

    def test_a_small_class_gives_all_it_has_with_a_warning(self):
        x, y = normal(12, 3), torch.tensor([0] * 10 + [1] * 2)
        with pytest.warns(ContrastWarning, match="larger than a class"):
            probe = few_label_probe(x, y, x, y, n_per_class=5, repeats=1)
        assert y[probe.rows[0]].bincount().tolist() == [5, 2]

    @pytest.mark.parametrize("argument", ["n_per_class", "repeats"])
    def test_numbers_below_one_are_refused(self, argument):
        x, y = torch.eye(4), torch.arange(4) % 2
        with pytest.raises(ContrastInputError) as caught:
            few_label_probe(x, y, x, y, **{argument: 0})
        assert caught.value.argument == argument


class TestFolds:
    def test_classes_are_spread_evenly_over_folds(self):
        y = torch.arange(103) % 7
        folds = deal_folds("test", y, None)
        for label in range(7):
            counts = folds[y == label].bincount(minlength=5)
            assert counts.max() - counts.min() <= 1

    @hypothesis.given(st.lists(st.integers(0, 8), min_size=12, max_size=40))
    @hypothesis.settings(max_examples=30, deadline=None)
    def test_a_group_is_never_in_two_folds(self, members):
        hypothesis.assume(len(set(members)) > 1)
        groups = torch.tensor(members)
        folds = deal_folds("test", groups % 2, groups)
        for group in groups.unique():
            assert len(folds[groups == group].unique()) == 1
        assert len(folds.unique()) == min(5, len(set(members)))


class TestRidge:
    @pytest.mark.parametrize(("rows", "dimensions"), [(80, 12), (30, 50)])
    def test_it_equals_scikit_learn(self, rows, dimensions):
        x, test = normal(rows, dimensions, seed=1), normal(15, dimensions, seed=2)
        y = x[:, :2] * 3 + normal(rows, 2, seed=3) + 4
        probe = ridge_probe(x, y, test, 0.3)
        scaler = StandardScaler().fit(x.double())
        peer = Ridge(alpha=0.3 * rows).fit(scaler.transform(x.double()), y.double())
        expected = peer.predict(scaler.transform(test.double()))
        np.testing.assert_allclose(probe.predictions.numpy(), expected, atol=1e-9)

    def test_the_penalty_is_chosen_by_held_out_rows(self):
        x, y = normal(60, 40, seed=1), normal(60, seed=2)
        assert ridge_probe(x, y, x).l2 >= 1, "noise wants a strong penalty"
        clean = ridge_probe(x[:, :3], x[:, 0], x[:, :3], test_y=x[:, 0])
        assert clean.l2 == 1e-6
        assert clean.r2[0] > 0.9999

    def test_grouped_folds_see_through_the_subject(self):
        subjects = torch.arange(20).repeat_interleave(6)
        x = torch.nn.functional.one_hot(subjects).double() + 0.05 * normal(120, 20).double()
        y = normal(20, seed=5)[subjects]
        assert ridge_probe(x, y, x).l2 < 0.1 < ridge_probe(x, y, x, groups=subjects).l2

    def test_scores_are_given_by_target_in_its_unit(self):
        x = torch.tensor([[-1.0], [1.0]])
        y = torch.tensor([[-10.0, 3.0], [10.0, 3.0]])
        probe = ridge_probe(x, y, x, 1.0, test_y=y)  # halves the slope
        assert probe.r2 == (pytest.approx(0.75), None)
        assert probe.mean_absolute_error == pytest.approx((5.0, 0.0))
        assert ridge_probe(x, y, x, 1.0).r2 is None

    @pytest.mark.parametrize(
        ("change", "argument"),
        [
            ({"y": torch.zeros(3)}, "y"),
            ({"y": torch.full((4,), math.nan)}, "y"),
            ({"l2": 0.0}, "l2"),
            ({"groups": torch.arange(3)}, "groups"),
            ({"test_y": torch.zeros(4, 2)}, "test_y"),
            ({"l2": "cv", "train": torch.eye(4)[:1], "y": torch.zeros(1)}, "train"),
        ],
    )
    def test_what_cannot_be_fitted_is_refused(self, change, argument):
        arguments = {"train": torch.eye(4), "y": torch.arange(4.0), "test": torch.eye(4)}
        with pytest.raises(ContrastInputError) as caught:
            ridge_probe(**{**arguments, "l2": 1.0, **change})
        assert caught.value.argument == argument


def every_order(scores, relevant):
    """For one query: relevance by rank under each order of tied candidates."""
    orders = []
    for shuffled in itertools.permutations(range(len(scores))):
        ranked = sorted(shuffled, key=lambda j: -scores[j])
        orders.append([relevant[j] for j in ranked])
    return np.array(orders)


class TestRetrieval:
    @pytest.mark.parametrize("seed", range(4))
    def test_ties_are_the_mean_over_every_order(self, seed):
        source = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 3, (5, 6), generator=source).double()
        relevant = torch.rand(5, 6, generator=source) < 0.4
        relevant[:, 0] |= ~relevant.any(1)
        recalls, ranks = recall_at_k(scores, relevant, (1, 2, 5)), expected_rank(scores, relevant)
        for query in range(5):
            orders = every_order(scores[query].tolist(), relevant[query].tolist())
            for position, k in enumerate((1, 2, 5)):
                expected = orders[:, :k].any(1).mean()
                assert recalls[query, position].item() == pytest.approx(expected, abs=1e-12)
            assert ranks[query].item() == pytest.approx((orders.argmax(1) + 1).mean(), abs=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    def test_average_precision_is_the_mean_over_every_order(self, seed):
        """Candidates on three directions, so that a one-hot query ties many of them."""
        source = torch.Generator().manual_seed(seed)
        directions = torch.tensor([[3.0, 4.0, 0.0], [4.0, 0.0, 3.0], [0.0, 3.0, 4.0]])
        candidates = directions[torch.randint(0, 3, (6,), generator=source)]
        queries = torch.eye(3)
        relevant = torch.rand(3, 6, generator=source) < 0.5
        relevant[:, 1] = True
        found = retrieval(queries, candidates, relevant)
        precisions = []
        for query in range(3):
            orders = every_order(candidates[:, query].tolist(), relevant[query].tolist())
            count = int(relevant[query].sum())
            precision = np.cumsum(orders, 1) / np.arange(1, 7) * orders
            precisions.append((precision[:, :count].sum(1) / count).mean())
        assert found.x_to_y.map_at_r == pytest.approx(np.mean(precisions), abs=1e-12)
        assert 10 not in found.x_to_y.recall
        assert found.r_sum is None

    @pytest.mark.parametrize("dimensions", [3, 7, 100])
    def test_a_collapsed_model_scores_chance(self, dimensions):
        constant = normal(1, dimensions).expand(333, dimensions)
        found = retrieval(constant, constant)
        for direction in (found.x_to_y, found.y_to_x):
            for k in (1, 5, 10):
                assert direction.recall[k] == pytest.approx(k / 333, abs=1e-14)
            assert direction.map_at_r == pytest.approx(1 / 333)
            assert direction.mean_rank == pytest.approx(167)
        assert found.r_sum == pytest.approx(2 * 1600 / 333)

    def test_several_texts_an_image_count_in_both_directions(self):
        """Constant scores on 100 images with 5 texts each: the hypergeometric chance."""
        images, texts = torch.ones(100, 4), torch.ones(500, 4)
        found = retrieval(texts, images, torch.arange(500) // 5)
        for k in (1, 5, 10):
            chance = 1 - math.comb(495, k) / math.comb(500, k)
            assert found.y_to_x.recall[k] == pytest.approx(chance, abs=1e-9)
            assert found.x_to_y.recall[k] == pytest.approx(k / 100, abs=1e-14)

    def test_a_matrix_and_an_index_say_the_same(self):
        x, y = normal(40, 5, seed=1), normal(30, 5, seed=2)
        index = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(3))
        matrix = index[:, None] == torch.arange(30)
        by_index, by_matrix = retrieval(x, y, index), retrieval(x, y, matrix)
        assert by_index.r_sum == pytest.approx(by_matrix.r_sum)
        assert by_index.y_to_x.queries.tolist() == sorted(set(index.tolist()))
        assert by_index.y_to_x.recall_rows.shape == (len(set(index.tolist())), 3)
        scores = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
        hits = scores.topk(5).indices == index[:, None]
        assert by_index.x_to_y.recall[5] == pytest.approx(float(hits.any(1).double().mean()))

    def test_blocks_of_queries_are_put_together(self, monkeypatch):
        x, y = normal(50, 5, seed=1), normal(50, 5, seed=2)
        relevant = torch.zeros(50, 50, dtype=torch.bool)
        relevant[30:, 7:9] = True
        whole = retrieval(x, y, relevant)
        monkeypatch.setattr("diptych_contrast.probes.ranking._BLOCK", 500)
        blocks = retrieval(x, y, relevant)
        assert torch.equal(blocks.x_to_y.queries, torch.arange(30, 50))
        assert torch.equal(blocks.x_to_y.recall_rows, whole.x_to_y.recall_rows)
        assert blocks.y_to_x.map_at_r == pytest.approx(whole.y_to_x.map_at_r)

    @pytest.mark.parametrize(
        ("change", "argument"),
        [
            ({"y": torch.eye(3)[:2]}, "relevant"),
            ({"relevant": torch.tensor([0, 1, 3])}, "relevant"),
            ({"relevant": torch.arange(2)}, "relevant"),
            ({"relevant": torch.zeros(3, 3, dtype=torch.bool)}, "relevant"),
            ({"ks": (0,)}, "ks"),
            ({"x": torch.full((3, 3), math.nan)}, "x"),
        ],
    )
    def test_what_cannot_be_ranked_is_refused(self, change, argument):
        arguments = {"x": torch.eye(3), "y": torch.eye(3)}
        with pytest.raises(ContrastInputError) as caught:
            retrieval(**arguments | change)
        assert caught.value.argument == argument

    def test_scores_that_cannot_be_ranked_are_refused(self):
        scores, relevant = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ContrastInputError, match="one bool a score"):
            recall_at_k(scores, relevant[:, :2])
        with pytest.raises(ContrastInputError, match="not finite, first in rows \\[1\\]"):
            recall_at_k(torch.tensor([[0.0] * 3, [math.nan] * 3]), relevant)
        with pytest.raises(ContrastInputError, match="without a relevant candidate"):
            expected_rank(scores, ~relevant)
