"""Ranks by loops over all items, ties in every policy, tiles of every size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import TrainingError
from diptych_mclrec.metrics import (
    count_ranks,
    rank_of_targets,
    ranking_metrics,
    step_metrics,
    tiled_ranks,
    usable_cutoffs,
)
from diptych_mclrec.serve import tiled_top_items

torch.set_num_threads(1)


def looped_rank(scores, target, excluded, ties) -> float:
    others = [s for i, s in enumerate(scores) if i and i != target and i not in excluded]
    greater = sum(s > scores[target] for s in others)
    equal = sum(s == scores[target] for s in others)
    return 1 + greater + {"pessimistic": 1, "optimistic": 0, "average": 0.5}[ties] * equal


@given(st.integers(0, 2**31), st.sampled_from(["pessimistic", "optimistic", "average"]))
@settings(max_examples=30, deadline=None)
def test_ranks_equal_a_count_over_all_candidates(seed, ties):
    rng = np.random.default_rng(seed)
    rows, items = rng.integers(1, 6), rng.integers(2, 12)
    scores = rng.integers(0, 4, (rows, items + 1)).astype(float)
    targets = rng.integers(1, items + 1, rows)
    excluded = [[i for i in rng.integers(0, items + 1, 4) if i != target] for target in targets]
    found = rank_of_targets(scores, targets, ties=ties, exclude=excluded)
    expected = [looped_rank(*one, ties) for one in zip(scores, targets, excluded, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("tile", [1, 97, 8192, 301])
def test_tiles_of_any_size_give_the_ranks_of_the_whole_matrix(tile):
    rng = np.random.default_rng(0)
    queries = torch.as_tensor(rng.integers(-3, 4, (40, 6))).float()
    weight = torch.as_tensor(rng.integers(-3, 4, (301, 6))).float()
    targets = rng.integers(1, 301, 40)
    seen = [np.setdiff1d(rng.integers(0, 301, 30), [target]) for target in targets]
    for exclude in (None, seen):
        for ties in ("pessimistic", "average"):
            whole = rank_of_targets(queries @ weight.t(), targets, ties=ties, exclude=exclude)
            tiled = tiled_ranks(queries, weight, targets, seen=exclude, ties=ties, tile=tile)
            assert np.array_equal(tiled, whole)


def test_items_of_equal_vectors_tie_in_whatever_tile_they_stand():
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(64, 16, generator=draw)
    weight = torch.randn(50, 16, generator=draw)
    doubled = torch.cat([weight, weight[1:]])
    targets = np.arange(64) % 49 + 1
    once = tiled_ranks(queries, weight, targets, ties="optimistic")
    again = tiled_ranks(queries, doubled, targets, ties="pessimistic", tile=99)
    assert np.array_equal(again, 2 * once)


def test_more_rows_than_a_block_and_several_targets_a_row_are_ranked_alike():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 9, (1100, 20)).astype(float)
    targets = rng.integers(0, 20, (1100, 3))
    found = rank_of_targets(scores, targets)
    for column in range(3):
        known = targets[:, column] > 0
        single = rank_of_targets(scores[known], targets[known, column])
        assert np.array_equal(found[known, column], single)
        assert np.isnan(found[~known, column]).all()


def test_a_model_that_cannot_tell_items_apart_ranks_last_by_default():
    scores, targets = np.zeros((3, 8)), np.array([1, 4, 7])
    assert rank_of_targets(scores, targets).tolist() == [7, 7, 7]
    assert rank_of_targets(scores, targets, ties="optimistic").tolist() == [1, 1, 1]
    assert rank_of_targets(scores, targets, ties="average").tolist() == [4, 4, 4]
    assert count_ranks(scores, targets).equal.tolist() == [6, 6, 6]
    assert rank_of_targets(scores, targets, exclude=[[2, 3]] * 3).tolist() == [5, 5, 5]


def test_padding_is_never_a_candidate_and_is_not_looked_at_twice():
    scores = np.array([[9.0, 1.0, 0.0], [-np.inf, 0.0, 1.0]])
    assert rank_of_targets(scores, np.array([1, 1]), exclude=[[0, 0, 2, 2], []]).tolist() == [1, 2]


def test_scores_are_left_as_they_were():
    scores = np.arange(12.0).reshape(2, 6)
    rank_of_targets(scores, np.array([1, 2]), exclude=[[4], [5]])
    assert np.array_equal(scores, np.arange(12.0).reshape(2, 6))


def test_a_score_that_is_no_number_is_never_ranked():
    scores = np.ones((2, 5))
    scores[1, 3] = np.nan
    with pytest.raises(TrainingError, match="row 1 are not numbers"):
        rank_of_targets(scores, np.array([1, 1]))


def test_a_seen_target_an_unknown_one_and_a_wrong_policy_are_refused():
    scores = np.ones((2, 5))
    with pytest.raises(ValueError, match="row 1 has its target among its seen items"):
        rank_of_targets(scores, np.array([1, 2]), exclude=[[3], [2]])
    with pytest.raises(ValueError, match="outside the catalogue"):
        rank_of_targets(scores, np.array([1, 5]))
    with pytest.raises(ValueError, match="choose one of pessimistic"):
        rank_of_targets(scores, np.array([1, 2]), ties="fair")
    with pytest.raises(ValueError, match="1 lists of excluded items for 2 rows"):
        rank_of_targets(scores, np.array([1, 2]), exclude=[[3]])


def test_metrics_of_one_target_follow_their_formulas():
    found = step_metrics(np.array([1.0, 3.0, 6.0]), ks=(5,))
    assert found["hr@5"].tolist() == [1, 1, 0]
    assert found["ndcg@5"].tolist() == pytest.approx([1, 1 / math.log2(4), 0])
    assert found["mrr@5"].tolist() == pytest.approx([1, 1 / 3, 0])
    assert found["mrr"].tolist() == pytest.approx([1, 1 / 3, 1 / 6])
    assert "recall@5" not in found


def test_metrics_of_a_basket_are_measured_against_what_was_possible():
    ranks = np.array([[1, 2, 9], [4, np.nan, np.nan]])
    found = step_metrics(ranks, ks=(2, 5))
    assert found["recall@2"].tolist() == [1, 0]
    assert found["recall_all@2"].tolist() == pytest.approx([2 / 3, 0])
    assert found["hr@5"].tolist() == [1, 1]
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = [(1 + 1 / math.log2(3)) / ideal, 1 / math.log2(5)]
    assert found["ndcg@5"].tolist() == pytest.approx(expected)
    assert found["mrr"].tolist() == [1, 0.25]
    with pytest.raises(ValueError, match="row 0 has no target"):
        step_metrics(np.array([[np.nan]]))


def test_each_subject_counts_once_however_many_steps_it_has():
    ranks = np.array([1.0, 9.0, 9.0, 9.0])
    assert ranking_metrics(ranks, ks=(5,))["hr@5"] == 0.25
    subjects = np.array([0, 1, 1, 1])
    assert ranking_metrics(ranks, ks=(5,), subjects=subjects)["hr@5"] == 0.5


@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3)])
def test_no_step_has_no_metrics(shape):
    assert all(not len(values) for values in step_metrics(np.zeros(shape)).values())


def test_cutoffs_that_hold_every_item_are_left_out():
    assert usable_cutoffs((5, 10, 20, 50), 20) == (5, 10)


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 64]))
@settings(max_examples=30, deadline=None)
def test_the_best_items_are_those_of_a_sort_with_equal_scores_in_the_order_of_ids(seed, tile):
    rng = np.random.default_rng(seed)
    items, k = rng.integers(1, 12), rng.integers(1, 8)
    queries = torch.as_tensor(rng.integers(-1, 2, (3, 2))).float()
    weight = torch.as_tensor(rng.integers(-1, 2, (items + 1, 2))).float()
    exclude = [rng.integers(0, items + 1, 3).tolist() for _ in range(3)]
    ids, scores, total = tiled_top_items(queries, weight, k, exclude=exclude, tile=tile)
    expected_total = (queries @ weight[1:].t()).logsumexp(1)
    assert total.numpy() == pytest.approx(expected_total.numpy(), abs=1e-5)
    for row in range(3):
        every = (queries[row] @ weight.t()).tolist()
        left = [i for i in range(1, items + 1) if i not in exclude[row]]
        expected = sorted(left, key=lambda i: (-every[i], i))[:k]
        assert ids[row].tolist() == expected + [0] * (k - len(expected))
        assert scores[row, : len(expected)].tolist() == [every[i] for i in expected]
