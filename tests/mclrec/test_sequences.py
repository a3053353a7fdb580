from __future__ import annotations

import numpy as np
import pytest

from diptych_mclrec.sequences import Catalogue, Sequences, number_runs


def baskets() -> Sequences:
    return Sequences(
        np.array(["a", "b"]),
        np.array([0, 4, 6]),
        np.array([1, 2, 3, 1, 2, 4], np.int32),
        np.array([10, 10, 20, 30, 5, 5]),
        np.array([0, 0, 1, 2, 0, 0], np.int32),
    )


def test_lists_come_back_as_they_went_in() -> None:
    sequences = Sequences.from_lists([[5, 1], [], [2]], ["x", "y", "z"])
    assert [sequences[row].tolist() for row in range(3)] == [[5, 1], [], [2]]
    assert sequences.rows.tolist() == [0, 0, 2]
    assert sequences.steps.tolist() == [0, 1, 0]
    assert sequences.step_counts.tolist() == [2, 0, 1]


def test_no_list_at_all_is_no_error() -> None:
    assert len(Sequences.from_lists([])) == 0


def test_a_basket_is_one_step() -> None:
    assert baskets().steps.tolist() == [0, 0, 1, 2, 0, 0]
    assert baskets().step_counts.tolist() == [3, 1]


def test_baskets_are_numbered_without_gaps_after_a_filter() -> None:
    kept = baskets().keep(np.array([False, False, True, True, False, True]))
    assert kept.baskets is not None
    assert kept.baskets.tolist() == [0, 1, 0]
    assert kept.items.tolist() == [3, 1, 4]
    assert kept.offsets.tolist() == [0, 2, 3]


def test_selected_subjects_keep_all_that_is_theirs() -> None:
    chosen = baskets().select(np.array([1, 0]))
    expected = Sequences(
        np.array(["b", "a"]),
        np.array([0, 2, 6]),
        np.array([2, 4, 1, 2, 3, 1], np.int32),
        np.array([5, 5, 10, 10, 20, 30]),
        np.array([0, 0, 0, 0, 1, 2], np.int32),
    )
    assert chosen.equals(expected)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="offsets must rise from 0 to the 3 events"):
        Sequences(np.array(["a"]), np.array([0, 2]), np.arange(3, dtype=np.int32))
    with pytest.raises(ValueError, match="times has 1 entries for 2 events"):
        Sequences(np.array(["a"]), np.array([0, 2]), np.ones(2, np.int32), np.array([1]))


def test_a_run_ends_where_the_subject_does() -> None:
    rows, keys = np.array([0, 0, 0, 1, 1]), np.array([7, 7, 8, 8, 7])
    assert number_runs(rows, keys).tolist() == [0, 0, 1, 0, 1]


def test_an_item_outside_the_catalogue_is_never_another_item() -> None:
    catalogue = Catalogue(("b", "a"), (2, 1), {"a": "apple"})
    assert catalogue.encode(["a", "new", "b"]).tolist() == [2, 0, 1]
    assert catalogue.decode([2, 1]) == ["a", "b"]
    with pytest.raises(ValueError, match=r"\[0, 3\] are not in 1..2"):
        catalogue.decode([0, 3])


def test_the_hash_follows_the_order_of_ids_and_survives_a_table() -> None:
    catalogue = Catalogue(("b", "a"), (2, 1), {"a": "apple"})
    assert catalogue.hash != Catalogue(("a", "b"), (2, 1)).hash
    assert Catalogue.from_table(catalogue.to_table()) == catalogue
