from __future__ import annotations

from datetime import datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import DataError
from diptych_mclrec.events import fit_catalogue, k_core, order_events, repeat_share
from diptych_mclrec.sequences import EVENT_SCHEMA, Catalogue, EventTable, Kind, Sequences

Row = tuple[str, str, int | None, int | None]


def table(rows: list[Row], kind: Kind = "interactions") -> EventTable:
    day = datetime(2020, 1, 1)
    frame = pl.DataFrame(
        {
            "subject": [row[0] for row in rows],
            "item": [row[1] for row in rows],
            "time": [None if row[2] is None else day.replace(day=row[2]) for row in rows],
            "basket": [row[3] for row in rows],
            "row": list(range(1, len(rows) + 1)),
            "source": [0] * len(rows),
        },
        schema=EVENT_SCHEMA,
    )
    return EventTable(frame, kind)


def told(events: EventTable, **how: object) -> list[tuple[str, list[str]]]:
    ordered = order_events(events, **how)  # type: ignore[arg-type]
    sequences = ordered.sequences
    return [
        (str(name), ordered.catalogue.decode(sequences[row]))
        for row, name in enumerate(sequences.subjects)
    ]


def test_ties_stay_in_the_order_of_the_source_and_never_follow_the_item() -> None:
    events = table(
        [("b", "z", 2, None), ("a", "y", 1, None), ("b", "a", 2, None), ("b", "m", 1, None)]
    )
    assert told(events) == [("b", ["m", "z", "a"]), ("a", ["y"])]


def test_undated_events_keep_the_order_of_the_source_and_all_repeats() -> None:
    events = table([("b", "z", None, None), ("a", "y", None, None), ("b", "z", None, None)])
    assert told(events) == [("b", ["z", "z"]), ("a", ["y"])]


def test_events_that_are_partly_dated_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 events have no time"):
        order_events(table([("a", "x", 1, None), ("a", "y", None, None)]))


def test_ids_count_from_the_first_appearance_in_the_order_of_time() -> None:
    events = table([("a", "late", 3, None), ("a", "early", 1, None), ("b", "other", 1, None)])
    ordered = order_events(events)
    assert ordered.catalogue.names == ("early", "late", "other")
    assert ordered.sequences.items.tolist() == [1, 2, 3]


def test_only_equal_subject_item_and_time_is_a_duplicate() -> None:
    rows: list[Row] = [("a", "x", 1, None), ("a", "y", 1, None), ("a", "x", 1, None)]
    rows += [("b", "x", 1, None), ("a", "x", 2, None)]
    ordered = order_events(table(rows))
    assert ordered.duplicates == 1
    assert told(table(rows)) == [("a", ["x", "y", "x"]), ("b", ["x"])]
    kept = order_events(table(rows), drop_duplicates=False)
    assert (kept.duplicates, len(kept.sequences.items)) == (1, 5)


def test_the_tie_share_counts_events_that_share_their_time() -> None:
    rows: list[Row] = [("a", "x", 1, None), ("a", "y", 1, None), ("a", "z", 2, None)]
    assert order_events(table([*rows, ("b", "x", 1, None)])).tie_share == 0.5


def test_random_ties_follow_the_seed_and_the_subject_alone() -> None:
    rows: list[Row] = [("a", f"i{number:02d}", 1, None) for number in range(20)]
    one = told(table(rows), ties="random", seed=1)
    assert one == told(table([("b", "x", 1, None), *rows]), ties="random", seed=1)[1:]
    assert one != told(table(rows), ties="random", seed=2)
    assert one != told(table(rows))
    assert sorted(one[0][1]) == [item for _, item, _, _ in rows]


def test_a_basket_stands_where_its_first_event_does_and_holds_an_item_once() -> None:
    rows: list[Row] = [("a", "x", 1, 7), ("a", "y", 2, 8), ("a", "z", 3, 7), ("a", "x", 4, 7)]
    ordered = order_events(table(rows), baskets=True)
    assert ordered.catalogue.decode(ordered.sequences.items) == ["x", "z", "y"]
    assert ordered.sequences.baskets is not None
    assert ordered.sequences.baskets.tolist() == [0, 0, 1]
    assert (ordered.duplicates, ordered.events) == (0, 4)


def test_without_basket_keys_equal_times_are_a_basket() -> None:
    rows: list[Row] = [("a", "x", 1, None), ("a", "y", 1, None), ("a", "z", 2, None)]
    ordered = order_events(table([*rows, ("b", "x", 2, None)]), baskets=True)
    assert ordered.sequences.baskets is not None
    assert ordered.sequences.baskets.tolist() == [0, 0, 1, 0]


def test_events_without_a_key_beside_others_join_by_time() -> None:
    rows: list[Row] = [("a", "x", 1, 5), ("a", "y", 2, None), ("a", "z", 2, None), ("a", "w", 3, 5)]
    ordered = order_events(table(rows), baskets=True)
    assert ordered.catalogue.decode(ordered.sequences.items) == ["x", "w", "y", "z"]
    assert ordered.sequences.baskets is not None
    assert ordered.sequences.baskets.tolist() == [0, 0, 1, 1]


def straight_core(lists: list[list[int]], min_subject: int, min_item: int) -> dict[int, list[int]]:
    """Remove rare items, then short subjects, by loops over lists."""
    kept = dict(enumerate(lists))
    while True:
        flat = [item for one in kept.values() for item in one]
        smaller = {
            row: [item for item in one if flat.count(item) >= min_item] for row, one in kept.items()
        }
        smaller = {row: one for row, one in smaller.items() if len(one) >= min_subject}
        if smaller == kept:
            return kept
        kept = smaller


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_filtering_equals_the_loop_over_lists(
    lists: list[list[int]], min_subject: int, min_item: int
) -> None:
    expected = straight_core(lists, min_subject, min_item)
    sequences = Sequences.from_lists(lists)
    known = Catalogue(tuple("abcdef"), (0,) * 6)
    if not expected:
        with pytest.raises(DataError, match="no event is left"):
            k_core(sequences, 6, min_subject=min_subject, min_item=min_item)
        return
    core = k_core(sequences, 6, min_subject=min_subject, min_item=min_item)
    catalogue, left = fit_catalogue(sequences, known, core=core)
    items = [catalogue.decode(left[row]) for row in range(len(left))]
    assert items == [known.decode(one) for one in expected.values()]
    assert left.subjects.tolist() == [str(row) for row in expected]
    assert core.rounds[-1]["events"] == sum(map(len, expected.values()))
    flat = [name for one in items for name in one]
    assert list(catalogue.names) == list(dict.fromkeys(flat))
    assert list(catalogue.counts) == [flat.count(name) for name in catalogue.names]


def test_held_out_subjects_decide_nothing_and_their_unknown_items_are_misses() -> None:
    sequences = Sequences.from_lists([[1, 2, 1, 2], [2, 1, 2, 3], [3, 3, 3, 2]])
    fitted = np.array([True, True, False])
    known = Catalogue(("a", "b", "c"), (3, 4, 4))
    core = k_core(sequences, 3, min_subject=2, min_item=2, fitted=fitted)
    events = fitted[sequences.rows]
    catalogue, left = fit_catalogue(sequences, known, core=core, fitted=events)
    assert catalogue.names == ("a", "b")
    assert catalogue.counts == (3, 4)
    assert [left[row].tolist() for row in range(3)] == [[1, 2, 1, 2], [2, 1, 2], [0, 0, 0, 2]]


def test_a_repeat_inside_one_basket_is_none() -> None:
    basket = np.array([0, 0, 1, 1, 2], np.int32)
    items = np.array([1, 2, 2, 3, 1], np.int32)
    sequences = Sequences(np.array(["a"]), np.array([0, 5]), items, None, basket)
    share, targets = repeat_share(sequences)
    assert (round(share * 3, 9), targets) == (2, 3)
