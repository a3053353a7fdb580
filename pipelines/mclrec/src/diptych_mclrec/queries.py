"""Steps to predict: what was known before each, and what followed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from diptych_mclrec.sequences import UNKNOWN, Sequences
from diptych_mclrec.split import step_times
from diptych_mclrec.windows import StepTable

MISS = -1  # a target outside the catalogue: no model can rank it
DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True, eq=False)
class Queries:
    """Steps to predict.

    Args:
        known: Subjects with the items that the catalogue holds, nothing else.
        subject: Position of each query's subject, rising, (Q,).
        ends: Steps of ``known`` before the target, (Q,); 0 where nothing is known.
        targets: Ids of what followed, or -1 outside the catalogue; 0 fills up, (Q, G).
        is_last: Whether the target is the subject's last step, (Q,).
        gap: Days from the step before to the target, (Q,); None without times.
    """

    known: Sequences
    subject: Int[np.ndarray, " Q"]
    ends: Int[np.ndarray, " Q"]
    targets: Int[np.ndarray, "Q G"]
    is_last: Bool[np.ndarray, " Q"]
    gap: Float[np.ndarray, " Q"] | None = None

    def __len__(self) -> int:
        return len(self.subject)

    @cached_property
    def table(self) -> StepTable:
        """Where the steps of ``known`` begin."""
        return StepTable.of(self.known)

    def select(self, chosen: NDArray[np.integer] | NDArray[np.bool_]) -> Queries:
        """Some of the queries, in their order."""
        gap = None if self.gap is None else self.gap[chosen]
        return Queries(
            self.known,
            self.subject[chosen],
            self.ends[chosen],
            self.targets[chosen],
            self.is_last[chosen],
            gap,
        )

    def histories(self) -> Sequences:
        """What is known before each query, one row each."""
        table = self.table
        first = table.steps[self.subject]
        start, stop = table.events[first], table.events[first + self.ends]
        lengths = stop - start
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        events = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        baskets = self.known.baskets
        return Sequences(
            self.known.subjects[self.subject],
            offsets,
            self.known.items[events],
            None,
            None if baskets is None else baskets[events],
        )

    def repeated(self, histories: Sequences) -> Bool[np.ndarray, "Q G"]:
        """Which targets are in the history already.

        Args:
            histories: From :meth:`histories`.
        """
        size = int(max(self.targets.max(initial=0), histories.items.max(initial=0))) + 1
        keys = histories.rows * size + histories.items
        wanted = np.arange(len(self))[:, None] * size + np.maximum(self.targets, 0)
        found: NDArray[np.bool_] = np.isin(wanted, keys) & (self.targets > 0)
        return found


def queries_of(
    part: Sequences, start: Int[np.ndarray, " subjects"], steps: Literal["last", "all"] = "last"
) -> Queries:
    """The steps of a part that are predicted.

    Args:
        part: Histories with their targets; id 0 is an item outside the catalogue.
        start: First step of each subject that may be a target, below its number of steps.
        steps: The last step of each subject, or all from ``start`` on.
    """
    table = StepTable.of(part)
    first, last = table.steps[:-1], table.steps[1:]
    if steps == "last":
        chosen = last - 1
    else:
        counts = last - first - start
        chosen = np.repeat(first + start - np.r_[0, np.cumsum(counts)[:-1]], counts)
        chosen = chosen + np.arange(len(chosen))
    subject = table.subjects[chosen] if len(chosen) else np.zeros(0, np.int64)
    is_known = part.items != UNKNOWN
    has_known = np.zeros(len(table.events), np.int64)  # steps with a known item, summed up
    starts = np.minimum(table.events[:-1], max(len(is_known) - 1, 0))
    if len(starts):
        has_known[1:] = np.cumsum(np.maximum.reduceat(is_known, starts))
    unknown = np.where(is_known, part.items, MISS)
    whole = StepTable(unknown, table.events, table.steps, table.baskets)
    gap = None
    if part.times is not None and len(part.items):
        moments = step_times(part)[table.events[:-1]]
        before = np.maximum(chosen - 1, first[subject])
        gap = (moments[chosen] - moments[before]) / DAY
    return Queries(
        part.keep(is_known),
        subject,
        has_known[chosen] - has_known[first[subject]],
        whole.sets(chosen),
        chosen == last[subject] - 1,
        gap,
    )
