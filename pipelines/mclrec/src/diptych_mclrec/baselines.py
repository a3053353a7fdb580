"""Recommenders that only count: the lines any model has to beat.

Each is fitted on :class:`Sequences` and gives scores (S, I + 1) of all items for histories, column
0 for none. Where a history holds baskets, a step is a basket. Items with id 0, which the catalogue
does not hold, are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array

from diptych_mclrec.metrics import Counts, count_ranks, ranking_metrics
from diptych_mclrec.sequences import Sequences

BACK_OFF = 1e-6  # of the popularity share, below any difference of counts
BLEND_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
Scores = Float[np.ndarray, "S items"]
Histories = Sequences | Sequence[Sequence[int]]


class Baseline(Protocol):
    """What every baseline offers."""

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Count; ``n_items`` None takes the largest id."""
        ...

    def scores(self, histories: Histories) -> Scores:
        """Scores of all items for each history."""
        ...


@dataclass
class Popularity:
    """The number of events of each item."""

    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Count the events of each item.

        Args:
            sequences: Training events.
            n_items: Items I; None takes the largest id.
        """
        self.counts = _popularity(sequences, n_items)
        return self

    def scores(self, histories: Histories) -> Scores:
        """The same scores for every history."""
        return np.tile(self.counts, (len(histories), 1))


@dataclass
class Recency:
    """The history's own items, latest first; then the others by popularity."""

    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Count as :class:`Popularity` does."""
        self.counts = _popularity(sequences, n_items)
        return self

    def scores(self, histories: Histories) -> Scores:
        """Number of an item's last step, from 1; below 1 the popularity."""
        events = _Events.read(histories, len(self.counts))
        scores = np.tile(_share(self.counts), (events.subjects, 1))
        np.maximum.at(scores, (events.rows, events.items), events.steps + 1.0)
        return scores


@dataclass
class Frequency:
    """The history's own items, most frequent first, ties by recency; all else by popularity."""

    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Count as :class:`Popularity` does."""
        self.counts = _popularity(sequences, n_items)
        return self

    def scores(self, histories: Histories) -> Scores:
        """An item's number of events, plus a fraction for its last step and its popularity."""
        events = _Events.read(histories, len(self.counts))
        latest = np.zeros((events.subjects, len(self.counts)))
        np.maximum.at(latest, (events.rows, events.items), events.steps + 1.0)
        own = events.table(np.ones(len(events.rows)), len(self.counts)).toarray()
        scores: Scores = own + (latest + _share(self.counts)) / (events.lengths[:, None] + 2.0)
        return scores


@dataclass
class Markov1:
    """P(next item | item), averaged over the last step, backed off to popularity.

    A pair of neighbouring steps counts 1 / (items of the earlier one) for each pair of items.
    """

    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    transitions: csr_array = field(default_factory=lambda: csr_array((1, 1)))

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Count pairs of neighbouring steps.

        Args:
            sequences: Training events.
            n_items: Items I; None takes the largest id.
        """
        self.counts = _popularity(sequences, n_items)
        size = len(self.counts)
        events = _Events.read(sequences, size)
        step = _number_steps(events)
        members = coo_array(
            (np.ones(len(step)), (step, events.items)), shape=(_length(step), size)
        ).tocsr()
        place = np.zeros((_length(step), 2), np.int64)
        place[step] = np.stack([events.rows, events.steps], 1)
        earlier = np.flatnonzero((np.diff(place, axis=0) == [0, 1]).all(1))
        before, after = members[earlier], members[earlier + 1]
        pairs = (_rows_divided(before).T @ after).tocsr()
        self.transitions = _rows_divided(pairs)
        return self

    def scores(self, histories: Histories) -> Scores:
        """Probabilities of the next item, plus a trace of popularity."""
        size = len(self.counts)
        events = _Events.read(histories, size)
        last = events.steps == events.lengths[events.rows] - 1
        weights = _rows_divided(events.table(last.astype(np.float64), size))
        scores: Scores = (weights @ self.transitions).toarray()
        return scores + BACK_OFF * _share(self.counts)


@dataclass
class MarkovRepeat:
    """:class:`Markov1` plus a weight times each item's share of the history.

    Args:
        weight: Of the share.
    """

    weight: float = 0.3
    markov: Markov1 = field(default_factory=Markov1)

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Fit the transitions."""
        self.markov.fit(sequences, n_items=n_items)
        return self

    def scores(self, histories: Histories) -> Scores:
        """Weighted sum of both."""
        size = len(self.markov.counts)
        events = _Events.read(histories, size)
        share = _rows_divided(events.table(np.ones(len(events.rows)), size))
        scores: Scores = self.markov.scores(histories) + self.weight * share.toarray()
        return scores


@dataclass
class ItemKNN:
    """Items that occur with the same subjects as the history's: sum of decay^age cosine.

    Cosine of binary subject-item columns with zero diagonal, backed off to popularity. The age of
    the last step is 0.

    Args:
        decay: Above 0 and at most 1.
        last: Events of the history that are used.
    """

    decay: float = 0.7
    last: int = 50
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    similarity: csr_array = field(default_factory=lambda: csr_array((1, 1)))

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Compute the similarities.

        Args:
            sequences: Training events.
            n_items: Items I; None takes the largest id.
        """
        self.counts = _popularity(sequences, n_items)
        size = len(self.counts)
        events = _Events.read(sequences, size)
        owned = events.table(np.ones(len(events.rows)), size)
        owned.data[:] = 1.0
        together = (owned.T @ owned).tocsr()
        norm = np.sqrt(together.diagonal())
        scale = diags_array(np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0))
        together.setdiag(0.0)
        together.eliminate_zeros()
        self.similarity = (scale @ together @ scale).tocsr()
        return self

    def scores(self, histories: Histories) -> Scores:
        """Sums of similarities, plus a trace of popularity."""
        size = len(self.counts)
        events = _Events.read(histories, size)
        from_end = np.cumsum(np.bincount(events.rows, minlength=events.subjects))[events.rows]
        used = from_end - np.arange(len(events.rows)) <= self.last
        age = events.lengths[events.rows] - 1 - events.steps
        weights = events.table(used * self.decay**age, size)
        scores: Scores = (weights @ self.similarity).toarray()
        return scores + BACK_OFF * _share(self.counts)


@dataclass
class Blend:
    """A model's probabilities mixed with the Markov table's: (1 - w) softmax(model) + w markov.

    Args:
        model: Histories to logits of all items (S, I + 1); column 0 is not read.
        weight: w in [0, 1]; :meth:`choose` sets it.
    """

    model: Callable[[Sequences], Scores]
    weight: float = 0.0
    markov: Markov1 = field(default_factory=Markov1)

    def fit(self, sequences: Sequences, *, n_items: int | None = None) -> Self:
        """Fit the Markov table; the model is trained already."""
        self.markov.fit(sequences, n_items=n_items)
        return self

    def choose(
        self,
        histories: Sequences,
        targets: Int[np.ndarray, " S"] | Int[np.ndarray, "S G"],
        *,
        weights: Sequence[float] = BLEND_WEIGHTS,
        mask_seen: bool = False,
        batch: int = 512,
    ) -> Self:
        """Take the weight of highest NDCG@10, the lowest among equals.

        Args:
            histories: Of validation steps.
            targets: What followed.
            weights: Candidates.
            mask_seen: As in :func:`baseline_counts`.
            batch: Histories at a time.
        """
        ranks: dict[float, list[NDArray[np.float64]]] = {weight: [] for weight in weights}
        for start in range(0, len(histories), batch):
            part = histories.select(np.arange(start, min(start + batch, len(histories))))
            model, counts = self._probabilities(part), self.markov.scores(part)
            seen = [part[row] for row in range(len(part))] if mask_seen else None
            for weight, found in ranks.items():
                mixed = (1 - weight) * model + weight * counts
                wanted = targets[start : start + batch]
                found.append(count_ranks(mixed, wanted, exclude=seen).ranks())
        means = {
            weight: ranking_metrics(np.concatenate(found), ks=(10,))["ndcg@10"]
            for weight, found in ranks.items()
        }
        self.weight = max(means, key=lambda weight: (means[weight], -weight))
        return self

    def scores(self, histories: Histories) -> Scores:
        """The mixture."""
        sequences = _sequences(histories)
        mixed: Scores = (1 - self.weight) * self._probabilities(sequences)
        return mixed + self.weight * self.markov.scores(sequences)

    def _probabilities(self, sequences: Sequences) -> Scores:
        logits = np.array(self.model(sequences), dtype=np.float64)
        logits[:, 0] = -np.inf
        odds = np.exp(logits - logits.max(1, keepdims=True))
        found: Scores = odds / odds.sum(1, keepdims=True)
        return found


def baseline_counts(
    baseline: Baseline,
    histories: Sequences,
    targets: Int[np.ndarray, " S"] | Int[np.ndarray, "S G"],
    *,
    mask_seen: bool = False,
    batch: int = 512,
) -> Counts:
    """How many items score above and like each target, a batch of histories at a time.

    Args:
        baseline: Fitted.
        histories: What is known before each target.
        targets: As in :func:`diptych_mclrec.metrics.rank_of_targets`.
        mask_seen: Leave the history's items out of the candidates; targets must then be new.
        batch: Histories at a time.
    """
    parts = []
    for start in range(0, len(histories), batch):
        part = histories.select(np.arange(start, min(start + batch, len(histories))))
        seen = [part[row] for row in range(len(part))] if mask_seen else None
        parts.append(
            count_ranks(baseline.scores(part), targets[start : start + batch], exclude=seen)
        )
    return Counts(
        np.concatenate([part.greater for part in parts]),
        np.concatenate([part.equal for part in parts]),
    )


@dataclass(frozen=True)
class _Events:
    """Known events of histories: row, item and step of each, and the steps of each row."""

    rows: NDArray[np.int64]
    items: NDArray[np.int64]
    steps: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def read(cls, histories: Histories, size: int) -> _Events:
        sequences = _sequences(histories)
        items = sequences.items.astype(np.int64)
        if items.size and (items.min() < 0 or items.max() >= size):
            raise ValueError(
                f"histories hold ids {items.min()} to {items.max()}, the baseline was fitted for "
                f"1 to {size - 1}: encode them by the same catalogue"
            )
        known = items > 0
        return cls(
            sequences.rows[known], items[known], sequences.steps[known], sequences.step_counts
        )

    @property
    def subjects(self) -> int:
        return len(self.lengths)

    def table(self, values: NDArray[np.float64], size: int) -> csr_array:
        """Sums of one value an event, (subjects, items)."""
        shape = (self.subjects, size)
        return coo_array((values, (self.rows, self.items)), shape=shape).tocsr()


def _sequences(histories: Histories) -> Sequences:
    return histories if isinstance(histories, Sequences) else Sequences.from_lists(histories)


def _popularity(sequences: Sequences, n_items: int | None) -> NDArray[np.float64]:
    known = sequences.items[sequences.items > 0]
    size = int(known.max(initial=0)) if n_items is None else n_items
    counts = np.bincount(known, minlength=size + 1).astype(np.float64)
    if len(counts) > size + 1:
        raise ValueError(f"the events hold id {len(counts) - 1}, n_items is {size}")
    return counts


def _share(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = counts / max(counts.sum(), 1.0)
    return share


def _rows_divided(table: csr_array) -> csr_array:
    """Rows divided by their sums; empty rows stay empty."""
    sums = np.asarray(table.sum(axis=1)).ravel()
    inverse = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
    return (diags_array(inverse) @ table).tocsr()


def _number_steps(events: _Events) -> NDArray[np.int64]:
    """Number of each event's step among those of all subjects that hold a known event."""
    key = events.rows * (int(events.steps.max(initial=0)) + 2) + events.steps
    numbers: NDArray[np.int64] = np.unique(key, return_inverse=True)[1]
    return numbers


def _length(numbers: NDArray[np.int64]) -> int:
    return int(numbers.max(initial=-1)) + 1
