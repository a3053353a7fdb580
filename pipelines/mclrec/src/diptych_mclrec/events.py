"""Order, ties, baskets and filtering: an event table to sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from diptych.errors import DataError
from diptych.randomness import Draw
from diptych_mclrec.sequences import UNKNOWN, Catalogue, EventTable, Sequences, number_runs

TieRule = Literal["source", "random"]
BLOCK = 1 << 20  # events that are looked at together


@dataclass(frozen=True)
class Ordered:
    """Events in the order of subjects and time, names replaced by numbers.

    Args:
        sequences: Item ids 1..C of ``catalogue``; subjects by their own names, in the order in
            which the source names them first.
        catalogue: Every code of the source, by first appearance in this order.
        sources: For each subject, the positions of its files in the table's sources.
        events: Events of the source.
        duplicates: Events of the source whose subject, item and time another one has before them.
        tie_share: Share of dated events whose time another event of the subject has.
    """

    sequences: Sequences
    catalogue: Catalogue
    sources: tuple[tuple[int, ...], ...]
    events: int
    duplicates: int
    tie_share: float


def order_events(
    table: EventTable,
    *,
    ties: TieRule = "source",
    baskets: bool = False,
    drop_duplicates: bool = True,
    seed: int = 0,
) -> Ordered:
    """Sort events by subject and time; events of equal time stay in the order of the source.

    Items never decide an order: sorting ties by item id makes patterns that are not there.

    Args:
        table: The events; all dated, or none.
        ties: "random" puts events of equal time in a keyed random order instead.
        baskets: Join the events of a basket key, else of an equal time, to one step. A basket
            stands where its first event does, and holds an item once.
        drop_duplicates: Leave out dated events whose subject, item and time are all the same.
        seed: Of the random order.

    Returns:
        The ordered events.

    Raises:
        DataError: Some events are dated and others are not.
    """
    names, subject = _numbers(table.frame["subject"])
    codes, item = _numbers(table.frame["item"])
    time = _microseconds(table.frame["time"])
    if time is None:
        order = np.argsort(subject, kind="stable")
    elif bool(((subject[1:] > subject[:-1]) | _same(subject) & (time[1:] >= time[:-1])).all()):
        order = np.arange(len(subject))
    else:
        order = np.lexsort((time, subject))
    duplicates = 0
    if time is not None:
        once = _first_of_equals(subject[order], time[order], item[order])
        duplicates = int((~once).sum())
        order = order[once] if drop_duplicates else order
    tied = _tied(subject[order], time[order]) if time is not None else np.zeros(len(order), bool)
    if ties == "random" and tied.any() and time is not None:
        draws = _tie_draws(names, subject[order], seed)
        order = order[np.lexsort((draws, time[order], subject[order]))]
    basket = None
    if baskets:
        order, basket = _baskets(table.frame["basket"], subject, time, item, order)
    present, place = _by_appearance(item[order], len(codes))
    items = place[item[order]] + np.int32(1)
    offsets = np.zeros(len(names) + 1, np.int64)
    np.cumsum(np.bincount(subject[order], minlength=len(names)), out=offsets[1:])
    kept = [codes[code] for code in present]
    counts = np.bincount(items, minlength=len(kept) + 1)[1:]
    times = None if time is None else time[order]
    return Ordered(
        Sequences(np.asarray(names, dtype=np.str_), offsets, items, times, basket),
        Catalogue(tuple(kept), tuple(counts.tolist()), _described(kept, table.descriptions)),
        _sources(table, names),
        table.frame.height,
        duplicates,
        float(tied.mean()) if len(tied) else 0.0,
    )


def _described(names: Sequence[str], words: Mapping[str, str]) -> dict[str, str]:
    return {name: words[name] for name in names if name in words} if words else {}


def _numbers(column: pl.Series) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    """Distinct names by first appearance, and the position of each row's name among them."""
    codes = column.cast(pl.Categorical).to_physical().to_numpy()
    present, place = _by_appearance(codes, int(codes.max()) + 1)
    numbers = place[codes]
    rows = np.empty(len(present), np.int64)
    rows[numbers[::-1]] = np.arange(len(numbers) - 1, -1, -1)
    return column.gather(rows).to_list(), numbers


def _by_appearance(
    codes: NDArray[np.integer], size: int
) -> tuple[Int[np.ndarray, " present"], Int[np.ndarray, " size"]]:
    """The codes that occur, by first appearance, and the place of each code among them."""
    first = np.full(size, len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # the earliest is written last
    present = np.flatnonzero(first < len(codes))
    present = present[np.argsort(first[present], kind="stable")]
    place = np.full(size, -1, np.int32)
    place[present] = np.arange(len(present), dtype=np.int32)
    return present, place


def _sources(table: EventTable, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The files of each subject."""
    frame = table.frame
    if frame["source"].min() == frame["source"].max():
        return ((int(frame["source"][0]),),) * len(names)
    files = frame.lazy().select("subject", "source").unique().sort("subject", "source")
    held = dict(files.group_by("subject").agg("source").collect().rows())
    return tuple(tuple(held[name]) for name in names)


def _microseconds(times: pl.Series) -> Int[np.ndarray, " rows"] | None:
    empty = times.null_count()
    if empty == len(times):
        return None
    if empty:
        raise DataError(
            f"{empty} of {len(times)} events have no time: give all of them one, or none"
        )
    return times.cast(pl.Int64).to_numpy()


def _same(values: NDArray[np.integer]) -> Bool[np.ndarray, " rows_but_one"]:
    return np.asarray(values[1:] == values[:-1])


def _tied(subject: NDArray[np.integer], time: NDArray[np.integer]) -> Bool[np.ndarray, " rows"]:
    """Events whose time a neighbour of the same subject has; rows are sorted by both."""
    same = _same(subject) & _same(time)
    return np.asarray(np.r_[False, same] | np.r_[same, False])


def _first_of_equals(
    subject: NDArray[np.integer], time: NDArray[np.integer], item: NDArray[np.integer]
) -> Bool[np.ndarray, " rows"]:
    """False for the second and later of equal events; only tied events can be equal."""
    keep = np.ones(len(subject), bool)
    tied = np.flatnonzero(_tied(subject, time))
    if len(tied):
        rows = pl.DataFrame({"s": subject[tied], "t": time[tied], "i": item[tied]})
        keep[tied] = (
            rows.select(pl.struct("s", "t", "i").is_first_distinct()).to_series().to_numpy()
        )
    return keep


def _first_distinct(rows: pl.DataFrame) -> Bool[np.ndarray, " rows"]:
    """Which rows occur for the first time."""
    whole = pl.struct(rows.columns).is_first_distinct()
    return rows.select(whole).to_series().to_numpy()


def _tie_draws(
    names: Sequence[str], subject: NDArray[np.integer], seed: int
) -> NDArray[np.float64]:
    """A number for each event from the seed, its subject's name and its place in the source."""
    keys = np.array(
        [
            int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
            for name in names
        ],
        np.int64,
    )
    starts = np.searchsorted(subject, np.arange(len(names)))
    place = np.arange(len(subject)) - starts[subject]
    return Draw(seed, "data").of("ties").uniform(keys[subject] + place)[:, 0]


def _baskets(
    key: pl.Series,
    subject: NDArray[np.integer],
    time: NDArray[np.integer] | None,
    item: NDArray[np.integer],
    order: NDArray[np.integer],
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Order with baskets together, each item once, and the number of each event's basket."""
    if key.null_count() == len(key):
        runs = time if time is not None else np.arange(len(subject))
        number = number_runs(subject[order], runs[order])
    else:
        own = pl.DataFrame({"key": key, "at": runs_of(time, len(key))})[order]
        frame = pl.DataFrame({"subject": subject[order], "order": order, "item": item[order]})
        frame = pl.concat([frame, own], how="horizontal").with_columns(
            named=pl.col("key").is_not_null(), key=pl.coalesce("key", "at")
        )
        frame = frame.with_row_index("place").with_columns(
            first=pl.col("place").min().over("subject", "named", "key")
        )
        frame = frame.sort("subject", "first", "place")
        order, number = (
            frame["order"].to_numpy(),
            number_runs(frame["subject"].to_numpy(), frame["first"].to_numpy()),
        )
    rows = pl.DataFrame({"s": subject[order], "b": number, "i": item[order]})
    once = _first_distinct(rows)
    return order[once], number[once]


def runs_of(time: NDArray[np.integer] | None, events: int) -> Int[np.ndarray, " events"]:
    """What tells events without a basket key apart: their time, else their place."""
    return np.arange(events) if time is None else time


@dataclass(frozen=True)
class Core:
    """What is left of sequences when rare items and short subjects are gone.

    Args:
        subjects: Positions of the subjects that stay.
        items: Which ids of the old catalogue stay, index 0 unused, (C + 1,).
        steps: Steps that each of these subjects keeps.
        rounds: For each round: subjects, items and events left, from the first to the last.
    """

    subjects: Int[np.ndarray, " kept"]
    items: Bool[np.ndarray, " items_and_one"]
    steps: Int[np.ndarray, " kept"]
    rounds: tuple[Mapping[str, int], ...]


def k_core(
    sequences: Sequences,
    size: int,
    *,
    min_subject: int = 5,
    min_item: int = 5,
    fitted: Bool[np.ndarray, " subjects"] | None = None,
) -> Core:
    """Leave out rare items, then short subjects, until nothing changes.

    Args:
        sequences: Ids 1..size.
        size: Items of the catalogue.
        min_subject: Steps that a subject needs.
        min_item: Events that an item needs.
        fitted: The training subjects of a split by subject: they alone decide, and the others
            stay whole, so that nothing is learnt from them. None: all decide.

    Returns:
        What stays.

    Raises:
        DataError: Nothing stays.
    """
    decides = np.ones(len(sequences), bool) if fitted is None else np.asarray(fitted, bool)
    stays = decides.copy()
    items = np.ones(size + 1, bool)
    items[UNKNOWN] = False
    rows, rounds = sequences.rows, []
    while True:
        events = stays[rows] & items[sequences.items]
        counts = np.bincount(sequences.items[events], minlength=size + 1)
        items &= counts >= min_item
        events &= items[sequences.items]
        steps = _steps_left(sequences, rows, events)
        stays &= steps >= min_subject
        left = events & stays[rows]
        rounds.append(
            {"subjects": int(stays.sum()), "items": int(items.sum()), "events": int(left.sum())}
        )
        if len(rounds) > 1 and rounds[-1] == rounds[-2]:
            break
    if not rounds[-1]["events"]:
        raise DataError(
            f"no event is left when items need {min_item} events and subjects {min_subject} steps: "
            "set data.min_item_events and data.min_subject_events lower, or give more data"
        )
    kept = np.flatnonzero(stays | ~decides)
    steps = np.where(decides, steps, sequences.step_counts)[kept]
    return Core(kept, items, steps, tuple(rounds[:-1]))


def _steps_left(
    sequences: Sequences, rows: NDArray[np.integer], events: Bool[np.ndarray, " events"]
) -> Int[np.ndarray, " subjects"]:
    if sequences.baskets is None:
        return np.bincount(rows[events], minlength=len(sequences))
    kept, basket = rows[events], sequences.baskets[events]
    starts = np.r_[True, ~(_same(kept) & _same(basket))][: len(kept)]
    return np.bincount(kept[starts], minlength=len(sequences))


def fit_catalogue(
    sequences: Sequences,
    known: Catalogue,
    *,
    core: Core | None = None,
    fitted: Bool[np.ndarray, " events"] | None = None,
) -> tuple[Catalogue, Sequences]:
    """The candidates of a ranking, and the sequences in their ids.

    Args:
        sequences: Ids of ``known``.
        known: Every code of the source.
        core: Subjects and items that stay; None: all.
        fitted: Events that the catalogue is made of: for a split by subject or by time the
            training events. None: all, as the literature does for leave-one-out.

    Returns:
        Ids by first appearance among the fitted events; and the sequences of the subjects that
        stay. Events of items that the core left out are gone. With ``fitted``, events outside it
        whose item is not in the catalogue stay with id 0: as targets they are misses.
    """
    chosen = np.ones(len(sequences.items), bool) if fitted is None else np.asarray(fitted, bool)
    subjects = np.zeros(len(sequences), bool)
    subjects[core.subjects if core is not None else slice(None)] = True
    allowed = core.items if core is not None else np.arange(known.size + 1) > 0
    inside = allowed[sequences.items] & chosen & subjects[sequences.rows]
    present, first = np.unique(sequences.items[inside], return_index=True)
    present = present[np.argsort(first, kind="stable")]
    ids = np.zeros(known.size + 1, np.int32)
    ids[present] = np.arange(1, len(present) + 1, dtype=np.int32)
    counts = np.bincount(ids[sequences.items[inside]], minlength=len(present) + 1)[1:]
    names = known.decode(present)
    catalogue = Catalogue(
        tuple(names), tuple(counts.tolist()), _described(names, known.descriptions)
    )
    encoded = sequences.with_items(ids[sequences.items])
    stays = (encoded.items > 0) | ~chosen
    shorter = encoded.keep(stays & subjects[sequences.rows])
    return catalogue, shorter.select(np.flatnonzero(subjects))


def repeat_share(sequences: Sequences) -> tuple[float, int]:
    """Share of targets that are already in the history.

    Returns:
        The share of events after a subject's first step whose item was in an earlier step,
        between 0 and 1; and how many such events there are.
    """
    repeats = targets = 0
    step = max(1, len(sequences) * BLOCK // max(1, len(sequences.items)))
    for start in range(0, len(sequences), step):  # a part at a time: tables may be long
        part = sequences.select(np.arange(start, min(start + step, len(sequences))))
        later = part.steps > 0
        frame = pl.DataFrame({"s": part.rows, "i": part.items})
        repeats += int((~_first_distinct(frame) & later).sum())
        targets += int(later.sum())
    return (repeats / targets if targets else 0.0), targets
