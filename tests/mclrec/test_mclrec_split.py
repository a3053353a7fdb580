from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import DataError
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.split import split_sequences, subject_parts

LISTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=3, max_size=12)


def dated() -> Sequences:
    return Sequences(
        np.array(["a", "b", "c"]),
        np.array([0, 4, 6, 8]),
        np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32),
        np.array([10, 20, 30, 40, 35, 45, 5, 6]),
    )


@settings(max_examples=50, deadline=None)
@given(LISTS, st.randoms(use_true_random=False))
def test_held_out_events_change_nothing_that_training_sees(
    lists: list[list[int]], draw: Random
) -> None:
    long = [one for one in lists if len(one) >= 3]
    if not long:
        return
    before = split_sequences(Sequences.from_lists(lists), "leave_one_out").train
    ends = [item for one in long for item in one[-2:]]
    draw.shuffle(ends)
    other = [one if len(one) < 3 else [*one[:-2], ends.pop(), ends.pop()] for one in lists]
    after = split_sequences(Sequences.from_lists(other), "leave_one_out").train
    assert before.equals(after)


def test_leave_one_out_tests_the_last_step_and_validates_the_one_before() -> None:
    split = split_sequences(Sequences.from_lists([[1, 2, 3, 4], [5, 6]]), "leave_one_out")
    assert [split.train[row].tolist() for row in range(2)] == [[1, 2], [5, 6]]
    assert (split.valid[0].tolist(), split.valid_start.tolist()) == ([1, 2, 3], [2])
    assert (split.test[0].tolist(), split.test_start.tolist()) == ([1, 2, 3, 4], [3])
    assert not split.cold.any()


def test_leave_one_out_takes_whole_baskets() -> None:
    basket = np.array([0, 0, 1, 2, 2], np.int32)
    items = np.arange(1, 6, dtype=np.int32)
    whole = Sequences(np.array(["a"]), np.array([0, 5]), items, None, basket)
    split = split_sequences(whole, "leave_one_out")
    assert split.train.items.tolist() == [1, 2]
    assert split.valid.items.tolist() == [1, 2, 3]
    assert split.test_start.tolist() == [2]


def test_no_subject_is_in_two_parts_and_none_is_lost() -> None:
    sequences = Sequences.from_lists([[1, 2]] * 200)
    split = split_sequences(sequences, "subject", seed=3)
    names = [set(part.subjects) for part in (split.train, split.valid, split.test)]
    assert sum(map(len, names)) == 200
    assert set.union(*names) == set(sequences.subjects)


def test_a_subject_stays_in_its_part_when_others_come() -> None:
    names = [f"p{number}" for number in range(300)]
    few = subject_parts(names[:50], (0.7, 0.1, 0.2), 0)
    many = subject_parts(names, (0.7, 0.1, 0.2), 0)
    assert many[:50] == few
    assert many != subject_parts(names, (0.7, 0.1, 0.2), 1)
    # three standard deviations of a binomial share
    for part, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(many.count(part) / 300 - share) < 3 * np.sqrt(share * (1 - share) / 300)


def test_given_parts_win_and_the_unnamed_are_left_out() -> None:
    sequences = Sequences.from_lists([[1, 2], [3, 4], [5, 6]])
    split = split_sequences(sequences, "subject", parts=["test", None, "train"])
    assert split.train.subjects.tolist() == ["2"]
    assert split.test.subjects.tolist() == ["0"]
    assert len(split.valid) == 0


def test_training_ends_at_the_first_cut_for_everyone() -> None:
    cuts = ("1970-01-01T00:00:00.000030", "1970-01-01T00:00:00.000040")
    split = split_sequences(dated(), "global_time", cuts=cuts)
    assert split.train.items.tolist() == [1, 2, 7, 8]
    assert split.valid.subjects.tolist() == ["a"]  # b begins there: nothing to predict from
    assert (split.valid[0].tolist(), split.valid_start.tolist()) == ([1, 2, 3], [2])
    assert split.test.subjects.tolist() == ["a", "b"]
    assert split.test_start.tolist() == [3, 1]
    assert split.cold.tolist() == [False, True]


def test_cuts_by_fractions_lie_between_the_events() -> None:
    split = split_sequences(dated(), "global_time", fractions=(0.5, 0.25, 0.25))
    assert split.train.times is not None
    assert split.test.times is not None
    assert split.train.times.max() < split.test.times.max()
    assert len(split.train.items) in (4, 5)


def test_a_split_without_training_or_test_is_refused() -> None:
    with pytest.raises(DataError, match="the test part of 1 subjects is empty"):
        split_sequences(Sequences.from_lists([[1, 2]]), "leave_one_out")
    with pytest.raises(DataError, match="needs times"):
        split_sequences(Sequences.from_lists([[1, 2, 3]]), "global_time")
    with pytest.raises(DataError, match="validation must begin before test"):
        split_sequences(dated(), "global_time", cuts=("2020-01-02", "2020-01-01"))
