"""Who, or what, is tested: the last step, other subjects, or later times."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from diptych.errors import DataError
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.times import to_microseconds

Kind = Literal["leave_one_out", "subject", "global_time"]
Cuts = tuple[str | int, str | int]  # ISO 8601 times, or microseconds since 1970
PARTS = ("train", "validation", "test")
LEAST_STEPS = 3  # of a subject that leave-one-out can score: one each to train, validate, test


@dataclass(frozen=True)
class Split:
    """Three sets of sequences; the first never holds an event that is predicted later.

    Args:
        kind: The protocol.
        train: What training sees.
        valid: Subjects of the validation part, with their history.
        test: Subjects of the test part, with their history.
        valid_start: For each subject of ``valid``, its first step that may be a target; steps
            before it are history only.
        test_start: The same for ``test``.
        cold: For each subject of ``test``, whether training holds no event of it at all.
    """

    kind: Kind
    train: Sequences
    valid: Sequences
    test: Sequences
    valid_start: Int[np.ndarray, " valid"]
    test_start: Int[np.ndarray, " test"]
    cold: Bool[np.ndarray, " test"]


def split_sequences(
    sequences: Sequences,
    kind: Kind,
    *,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    cuts: Cuts | None = None,
    seed: int = 0,
    parts: Sequence[str | None] | None = None,
    min_history: int = 1,
) -> Split:
    """Divide sequences into training, validation and test.

    Args:
        sequences: All events.
        kind: "leave_one_out": a subject's last step is tested and the one before validated, so
            that training sees other subjects' future. "subject": no subject in two parts.
            "global_time": training ends at a point in time, for everyone.
        fractions: Parts of the subjects, or of the events in time.
        cuts: ISO 8601 times, or microseconds, where validation and test begin; None: by
            ``fractions``.
        seed: Of the division of subjects.
        parts: "train", "validation", "test" or None (left out) for each subject, in place of the
            division by ``fractions``.
        min_history: Steps that a prediction needs before it.

    Returns:
        The three parts.

    Raises:
        DataError: Training or test would be empty, or events without times are cut by time.

    Example:
        >>> split = split_sequences(Sequences.from_lists([[1, 2, 3, 4]]), "leave_one_out")
        >>> split.train.items.tolist(), split.valid.items.tolist(), split.test.items.tolist()
        ([1, 2], [1, 2, 3], [1, 2, 3, 4])
    """
    if kind == "leave_one_out":
        split = _leave_one_out(sequences, min_history)
    elif kind == "subject":
        chosen = subject_parts(sequences.subjects, fractions, seed) if parts is None else parts
        split = _by_subject(sequences, chosen, min_history)
    else:
        split = _by_time(sequences, time_cuts(sequences, fractions, cuts), min_history)
    for name, part in (("training", split.train), ("test", split.test)):
        if not len(part.items):
            raise DataError(
                f"split.kind {kind}: the {name} part of {len(sequences)} subjects is empty: "
                "set split.fractions, split.cuts or split.seed, or give longer histories"
            )
    return split


def _leave_one_out(sequences: Sequences, min_history: int) -> Split:
    counts = sequences.step_counts
    long = counts >= LEAST_STEPS
    end = np.where(long, counts - 2, counts)
    train = sequences.keep(sequences.steps < end[sequences.rows])
    whole = sequences.select(np.flatnonzero(long))
    last = whole.step_counts - 1
    before = whole.keep(whole.steps < last[whole.rows])
    valid, valid_start = _scored(before, last - 1, min_history)
    test, test_start = _scored(whole, last, min_history)
    return Split(
        "leave_one_out", train, valid, test, valid_start, test_start, np.zeros(len(test), bool)
    )


def subject_parts(
    subjects: Sequence[str] | NDArray[np.str_], fractions: tuple[float, float, float], seed: int
) -> list[str]:
    """The part of each subject, from the seed and its own name alone.

    A subject stays in its part when others are added or removed.

    Args:
        subjects: Names.
        fractions: Parts of training, validation and test, which add up to 1.
        seed: Another seed gives another division.
    """
    digests = b"".join(
        hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in subjects
    )
    uniform = np.frombuffer(digests, "<u8") / 2.0**64
    place = np.searchsorted(np.cumsum(fractions)[:2], uniform, side="right")
    return [PARTS[part] for part in place]


def _by_subject(sequences: Sequences, parts: Sequence[str | None], min_history: int) -> Split:
    names = np.array([part or "" for part in parts])
    train, valid, test = (sequences.select(np.flatnonzero(names == part)) for part in PARTS)
    valid, valid_start = _scored(valid, np.zeros(len(valid), np.int64), min_history)
    test, test_start = _scored(test, np.zeros(len(test), np.int64), min_history)
    return Split("subject", train, valid, test, valid_start, test_start, np.ones(len(test), bool))


def time_cuts(
    sequences: Sequences,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    cuts: Cuts | None = None,
) -> tuple[int, int]:
    """Where validation and test begin, in microseconds.

    Args:
        sequences: All events.
        fractions: Shares of the events before, between and after the cuts.
        cuts: ISO 8601 times, or microseconds, instead.

    Raises:
        DataError: The events have no times, or the cuts do not rise.
    """
    if sequences.times is None:
        raise DataError(
            "split.kind global_time needs times, and the events have none: set data.columns.time, "
            "or split.kind to leave_one_out or subject"
        )
    if cuts is None:
        shares = np.cumsum(fractions)[:2]
        first, second = (int(cut) for cut in np.quantile(sequences.times, shares, method="higher"))
    else:
        first, second = (cut if isinstance(cut, int) else to_microseconds(cut) for cut in cuts)
    if first >= second:
        raise DataError(
            f"split.cuts {list(cuts) if cuts else 'by split.fractions'}: validation must begin "
            "before test: set split.cuts to two rising times"
        )
    return first, second


def _by_time(sequences: Sequences, cuts: tuple[int, int], min_history: int) -> Split:
    when = step_times(sequences)
    rows = sequences.rows
    first, second = cuts
    train = sequences.keep(when < first)

    def steps_before(cut: int) -> NDArray[np.int64]:
        starts = np.zeros(len(sequences), np.int64)
        np.maximum.at(starts, rows[when < cut], sequences.steps[when < cut] + 1)
        return starts

    before = sequences.keep(when < second)
    trained, validated = steps_before(first), steps_before(second)
    valid, valid_start = _scored(before, trained, min_history)
    test, test_start = _scored(sequences, validated, min_history)
    is_cold = dict(zip(sequences.subjects.tolist(), (trained == 0).tolist(), strict=True))
    cold = np.array([is_cold[name] for name in test.subjects.tolist()], bool)
    return Split("global_time", train, valid, test, valid_start, test_start, cold)


def step_times(sequences: Sequences) -> Int[np.ndarray, " events"]:
    """The time of each event's step: of its basket's first event.

    Args:
        sequences: Dated events.
    """
    if sequences.times is None:
        raise ValueError("step_times: the events have no times")
    if sequences.baskets is None or not len(sequences.items):
        return sequences.times
    starts = np.r_[True, (np.diff(sequences.rows) != 0) | (np.diff(sequences.baskets) != 0)]
    return np.asarray(sequences.times[starts][np.cumsum(starts) - 1])


def _scored(
    sequences: Sequences, start: NDArray[np.int64], min_history: int
) -> tuple[Sequences, Int[np.ndarray, " scored"]]:
    """The subjects that have a step to predict, and their first such step."""
    first = np.maximum(start, min_history)
    chosen = np.flatnonzero(sequences.step_counts > first)
    return sequences.select(chosen), first[chosen]
