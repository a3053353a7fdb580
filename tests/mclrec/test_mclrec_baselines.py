"""Counting baselines against loops over their definitions, on items and on baskets."""

from itertools import pairwise

import numpy as np
import pytest

from diptych_mclrec.baselines import (
    Blend,
    Frequency,
    ItemKNN,
    Markov1,
    MarkovRepeat,
    Popularity,
    Recency,
    baseline_counts,
)
from diptych_mclrec.metrics import ranking_metrics
from diptych_mclrec.sample import make_demo
from diptych_mclrec.sequences import Sequences

ITEMS = 9
TRAIN = [[1, 2, 3, 2], [2, 3, 1], [4, 2, 2, 3, 5], [6], [3, 2, 3]]
HISTORIES = [[2, 3, 2], [5], [4, 1, 7, 2, 3], []]


def baskets(*subjects) -> Sequences:
    """Sequences of baskets from lists of lists of items."""
    flat = Sequences.from_lists([[i for basket in one for i in basket] for one in subjects])
    numbers = [n for one in subjects for n, basket in enumerate(one) for _ in basket]
    return Sequences(
        flat.subjects, flat.offsets, flat.items, None, np.array(numbers, dtype=np.int32)
    )


def popularity(train) -> np.ndarray:
    counts = np.zeros(ITEMS + 1)
    for one in train:
        for item in one:
            counts[item] += 1
    return counts


def order(scores: np.ndarray) -> list[int]:
    """Items by score, ties by id."""
    return sorted(range(1, ITEMS + 1), key=lambda item: (-scores[item], item))


def fitted(baseline, train=None):
    train = Sequences.from_lists(TRAIN) if train is None else train
    return baseline.fit(train, n_items=ITEMS)


def test_popularity_counts_training_events():
    found = fitted(Popularity()).scores(HISTORIES)
    assert np.array_equal(found, np.tile(popularity(TRAIN), (4, 1)))


def test_recency_puts_the_history_first_and_the_rest_by_popularity():
    rest = popularity(TRAIN)
    for history, scores in zip(HISTORIES, fitted(Recency()).scores(HISTORIES), strict=True):
        own = list(dict.fromkeys(reversed(history)))
        others = sorted(set(range(1, ITEMS + 1)) - set(own), key=lambda i: (-rest[i], i))
        assert order(scores) == own + others


def test_frequency_breaks_ties_by_recency():
    scores = fitted(Frequency()).scores([[5, 7, 7, 6, 5, 8], [9, 9, 9, 4, 1]])
    assert order(scores[0])[:4] == [5, 7, 8, 6]
    assert order(scores[1])[:4] == [9, 1, 4, 2]


def test_markov_scores_are_the_shares_of_what_followed():
    followed = np.zeros((ITEMS + 1, ITEMS + 1))
    for one in TRAIN:
        for item, after in pairwise(one):
            followed[item, after] += 1
    share = popularity(TRAIN) / sum(map(len, TRAIN))
    found = fitted(Markov1()).scores(HISTORIES)
    for history, scores in zip(HISTORIES, found, strict=True):
        expected = 1e-6 * share
        if history and followed[history[-1]].sum():
            expected = expected + followed[history[-1]] / followed[history[-1]].sum()
        assert np.allclose(scores, expected, atol=1e-14)


def test_markov_shares_a_pair_of_baskets_over_the_members_of_the_first():
    train = baskets([[1, 2], [3]], [[1], [4, 5]], [[6], [7]])
    rows = fitted(Markov1(), train)
    of_1 = np.zeros(ITEMS + 1)
    of_1[[3, 4, 5]] = np.array([0.5, 1, 1]) / 2.5
    of_6 = np.eye(ITEMS + 1)[7]
    found = rows.scores(baskets([[9], [1, 6]], [[6, 1], [6]]))
    share = rows.counts / rows.counts.sum()
    assert np.allclose(found[0], (of_1 + of_6) / 2 + 1e-6 * share, atol=1e-14)
    assert np.allclose(found[1], of_6 + 1e-6 * share, atol=1e-14)


def test_no_transition_leads_over_an_unknown_item_or_into_another_subject():
    rows = fitted(Markov1(), Sequences.from_lists([[1, 0, 2], [3]])).transitions
    assert rows.nnz == 0


def test_itemknn_sums_decayed_cosines_of_the_last_events():
    members = np.zeros((len(TRAIN), ITEMS + 1))
    for row, one in enumerate(TRAIN):
        members[row, one] = 1
    share = popularity(TRAIN) / sum(map(len, TRAIN))
    found = fitted(ItemKNN(decay=0.6, last=3)).scores(HISTORIES)
    for history, scores in zip(HISTORIES, found, strict=True):
        expected = 1e-6 * share
        for age, item in enumerate(reversed(history[-3:])):
            for other in range(1, ITEMS + 1):
                both = (members[:, item] * members[:, other]).sum()
                if other != item and both:
                    norm = np.sqrt(members[:, item].sum() * members[:, other].sum())
                    expected[other] += 0.6**age * both / norm
        assert np.allclose(scores, expected, atol=1e-12)


def test_markov_with_repeats_adds_the_weighted_share_of_the_history():
    both = fitted(MarkovRepeat(weight=0.3))
    plain = fitted(Markov1()).scores([[2, 2, 5, 2]])
    share = np.bincount([2, 2, 5, 2], minlength=ITEMS + 1) / 4
    assert np.allclose(both.scores([[2, 2, 5, 2]]), plain + 0.3 * share)


def test_a_blend_takes_the_weight_that_ranks_validation_best():
    histories, targets = Sequences.from_lists([[2], [3], [1]]), np.array([3, 2, 2])

    def uninformed(sequences: Sequences) -> np.ndarray:
        return np.zeros((len(sequences), ITEMS + 1))

    def certain(sequences: Sequences) -> np.ndarray:
        return 50.0 * np.eye(ITEMS + 1)[targets[: len(sequences)]]

    blend = fitted(Blend(uninformed)).choose(histories, targets)
    assert blend.weight > 0
    assert fitted(Blend(certain)).choose(histories, targets).weight == 0
    blend.weight = 0.25
    expected = 0.75 / ITEMS + 0.25 * blend.markov.scores(histories)[:, 1:]
    assert np.allclose(blend.scores(histories)[:, 1:], expected)


def test_ranks_do_not_depend_on_the_batches_they_are_counted_in():
    histories, targets = Sequences.from_lists(HISTORIES), np.array([4, 2, 9, 1])
    for masked in (False, True):
        whole = baseline_counts(fitted(Recency()), histories, targets, mask_seen=masked)
        parts = baseline_counts(fitted(Recency()), histories, targets, mask_seen=masked, batch=3)
        assert np.array_equal(whole.ranks(), parts.ranks())
    assert whole.ranks()[0] == 4  # item 1 is more popular, 5 and 6 as popular, 2 and 3 masked


def test_histories_of_another_catalogue_are_refused():
    with pytest.raises(ValueError, match="fitted for 1 to 9"):
        fitted(Recency()).scores([[10]])
    with pytest.raises(ValueError, match="n_items is 2"):
        Popularity().fit(Sequences.from_lists(TRAIN), n_items=2)


def test_figures_on_the_sample_are_those_measured():
    demo = make_demo(seed=7)
    given = demo.sequences
    steps_left = given.lengths[given.rows] - given.steps
    train, histories = given.keep(steps_left > 2), given.keep(steps_left > 1)
    wanted = given.items[given.offsets[1:] - 1].astype(np.int64)
    expected = {
        Popularity: (0.0220, 0.0927, 0.1753, 0.0826, 0.0821),
        Recency: (0.0753, 0.3407, 0.4007, 0.2287, 0.1936),
        Markov1: (0.1627, 0.4953, 0.7000, 0.3974, 0.3183),
        ItemKNN: (0.0687, 0.2087, 0.3260, 0.1776, 0.1566),
    }
    for baseline, figures in expected.items():
        fitted = baseline().fit(train, n_items=80)
        found = ranking_metrics(baseline_counts(fitted, histories, wanted).ranks(), ks=(1, 5, 10))
        names = ("hr@1", "hr@5", "hr@10", "ndcg@10", "mrr")
        assert [found[name] for name in names] == pytest.approx(figures, abs=1e-4)
