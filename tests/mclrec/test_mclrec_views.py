"""Crops, masks and shuffles keep what they promise, one by one and in batches."""

from collections import Counter

import numpy as np
import pytest

from diptych.randomness import Draw
from diptych_mclrec.views import crop, mask, reorder, two_views

DRAW = Draw(5).at(2)


def histories(lengths, width=50) -> np.ndarray:
    rows = np.zeros((len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        rows[row, :length] = np.arange(1, length + 1)
    return rows


@pytest.mark.parametrize("n", range(1, 51))
def test_views_hold_the_right_steps_in_the_right_number(n):
    lengths = np.full(40, n)
    rows = histories(lengths)
    first, n1, second, n2 = two_views(rows, lengths, DRAW, ids=range(40))
    for view, view_lengths in ((first, n1), (second, n2)):
        assert view.shape == rows.shape
        for row in range(40):
            found, length = view[row], view_lengths[row]
            assert not found[length:].any()
            if length < n:
                assert length == max(1, n - int(np.ceil(n / 2)))
                assert np.array_equal(found[:length], found[0] + np.arange(length))
            elif (found[:n] == 0).any():
                assert (found[:n] == 0).sum() == n // 2
                shown = found[:n] > 0
                assert np.array_equal(found[:n][shown], rows[row, :n][shown])
            else:
                assert sorted(found[:n]) == list(range(1, n + 1))
                moved = np.flatnonzero(found[:n] != rows[row, :n])
                assert not len(moved) or moved[-1] - moved[0] < int(0.8 * n)


def test_one_step_is_both_its_views():
    rows, lengths = histories([1, 1], 4), np.ones(2, int)
    first, n1, second, n2 = two_views(rows, lengths, DRAW, ids=[0, 1])
    assert np.array_equal(first, rows)
    assert np.array_equal(second, rows)
    assert n1.tolist() == n2.tolist() == [1, 1]


def test_the_six_ordered_pairs_of_operations_are_equally_likely_and_never_equal():
    count, n = 60_000, 10
    rows, lengths = histories(np.full(count, n), n), np.full(count, n)
    first, n1, second, n2 = two_views(rows, lengths, np.random.default_rng(1))
    codes = []
    for view, view_lengths in ((first, n1), (second, n2)):
        cropped = view_lengths < n
        masked = ~cropped & (view == 0).any(1)
        codes.append(np.where(cropped, 0, np.where(masked, 1, 2)))
    assert not (codes[0] == codes[1]).any()
    found = np.bincount(codes[0] * 3 + codes[1], minlength=9)[[1, 2, 3, 5, 6, 7]]
    assert np.abs(found - count / 6).max() < 3 * np.sqrt(count * 5 / 36)


def test_a_view_does_not_depend_on_the_batch_it_is_drawn_in():
    lengths = np.array([7, 3, 12, 50])
    rows = histories(lengths)
    every = two_views(rows, lengths, DRAW, ids=[4, 9, 2, 7])
    alone = two_views(rows[2:3], lengths[2:3], DRAW, ids=[2])
    assert all(np.array_equal(one[2:3], other) for one, other in zip(every, alone, strict=True))
    later = two_views(rows, lengths, DRAW.at(3), ids=[4, 9, 2, 7])
    assert not all(np.array_equal(one, other) for one, other in zip(every, later, strict=True))


@pytest.mark.parametrize("row", range(5))
def test_a_view_does_not_depend_on_the_columns_of_its_batch(row):
    lengths = np.array([10, 11, 3, 26, 1])  # on both sides of the widths that are drawn together
    ids = [4, 9, 2, 7, 1]
    first, n1, second, n2 = two_views(histories(lengths), lengths, DRAW, ids=ids)
    own = lengths[row]
    narrow = two_views(histories([own], own), lengths[[row]], DRAW, ids=[ids[row]])
    for whole, alone in zip((first, second), narrow[::2], strict=True):
        assert np.array_equal(whole[row, :own], alone[0])
        assert not whole[row, own:].any()
    assert (n1[row], n2[row]) == (narrow[1][0], narrow[3][0])


def test_baskets_are_moved_and_hidden_whole():
    lengths = np.array([6, 8, 9])
    rows = histories(lengths, 9)
    baskets = np.stack([rows, np.where(rows > 0, rows + 100, 0)], 2)
    flat, whole = (two_views(x, lengths, DRAW, ids=[1, 2, 3]) for x in (rows, baskets))
    for view, basket in ((flat[0], whole[0]), (flat[2], whole[2])):
        assert np.array_equal(basket[..., 0], view)
        assert np.array_equal(basket[..., 1], np.where(view > 0, view + 100, 0))


@pytest.mark.parametrize("single", [crop, mask, reorder])
def test_a_batch_draws_from_the_distribution_of_the_single_functions(single):
    name, n, count = single.__name__, 4, 30_000
    ratios = {"crop": 0.5, "mask": 0.5, "reorder": 0.8}
    rng = np.random.default_rng(0)
    rows, lengths = histories(np.full(count, n), n), np.full(count, n)
    first, n1, _, _ = two_views(rows, lengths, rng, ratios)
    kinds = np.where(n1 < n, "crop", np.where((first == 0).any(1), "mask", "reorder"))
    chosen = zip(first[kinds == name], n1[kinds == name], strict=True)
    batched = Counter(tuple(view[:length]) for view, length in chosen)
    one_by_one = Counter(tuple(single(rows[0], ratios[name], rng)) for _ in range(count // 3))
    assert batched.keys() == one_by_one.keys()
    total = sum(batched.values()), sum(one_by_one.values())
    for view, seen in batched.items():
        shares = seen / total[0], one_by_one[view] / total[1]
        spread = np.sqrt(shares[0] * (1 - shares[0]) * (1 / total[0] + 1 / total[1]))
        assert abs(shares[0] - shares[1]) < 5 * spread


def test_a_crop_keeps_at_least_one_step_and_a_ratio_is_not_lost_in_its_last_bit():
    rng = np.random.default_rng(0)
    assert len(crop(np.arange(1, 4), 0.99, rng)) == 1
    assert (mask(np.arange(1, 101), 0.29, rng) == 0).sum() == 29


def test_a_keyed_draw_without_ids_is_refused():
    with pytest.raises(ValueError, match="needs ids"):
        two_views(histories([3]), np.array([3]), DRAW)
