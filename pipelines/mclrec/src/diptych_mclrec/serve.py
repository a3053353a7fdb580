"""A trained model in use: rankings, vectors, sessions, and what a ranking hangs on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from diptych.contract import Trained
from diptych.errors import DataError
from diptych.prepared import Prepared
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import Fitted, from_artifacts
from diptych_mclrec.histories import Given, Histories, read_histories
from diptych_mclrec.metrics import History, row_item_pairs
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.store import load
from diptych_mclrec.windows import StepTable, encode_histories

Seen = Literal["auto", "keep", "mask"]
BATCH = 1024  # histories at a time
SCHEMA = pl.Schema(
    {
        "subject": pl.String(),
        "rank": pl.Int64(),
        "item": pl.String(),
        "score": pl.Float64(),
        "probability": pl.Float64(),
        "fallback": pl.Boolean(),
    }
)


@dataclass(frozen=True, eq=False)
class Recommender:
    """A trained encoder with what its fit learned beside weights.

    It knows no table of people: every history is read as it is given.

    Args:
        encoder: In evaluation mode.
        fitted: Catalogue, counts and policy of the fit.
        config: The run's configuration.
        known: Histories that can be asked for by their subject's name, in catalogue ids.

    Raises:
        DataError: The encoder knows fewer items than the catalogue.

    Example:
        ``open_recommender(config, trained).recommend([["tea", "rice"]], k=5)``
    """

    encoder: SequenceEncoder
    fitted: Fitted
    config: MCLRecConfig
    known: Sequences | None = None

    def __post_init__(self) -> None:
        if self.encoder.n_items < self.fitted.catalogue.size:
            raise DataError(
                f"the encoder knows {self.encoder.n_items} items, the catalogue "
                f"{self.fitted.catalogue.hash} has {self.fitted.catalogue.size}: they belong to "
                "different fits"
            )

    def recommend(
        self,
        histories: Given,
        k: int = 10,
        seen: Seen = "auto",
        exclude: Iterable[str] | None = None,
        batch_size: int = BATCH,
    ) -> pl.DataFrame:
        """The k best next items of each history, best first.

        Args:
            histories: As :func:`diptych_mclrec.histories.read_histories` takes them, or names of
                subjects in ``known``.
            k: Items of a list, at least 1; fewer where fewer are left.
            seen: "mask" leaves out what the history holds; "auto" as in the fit's evaluation.
            exclude: Items that no list shall have.
            batch_size: Histories at a time.

        Returns:
            subject (its place where histories come as lists), rank from 1, item, score (logit),
            probability (softmax over all items), fallback: a history without a known item gets
            the popularity of the training part. Equal scores stand in the order of the catalogue.

        Raises:
            DataError: A table has errors.
            ValueError: ``k`` is below 1, or a history is no list of names.
        """
        return self.rank(self.read(histories).sequences, k, seen, exclude, batch_size)

    def read(self, histories: Given) -> Histories:
        """Histories in the catalogue's ids; a warning counts the events that it does not hold."""
        found = self._read(histories)
        unknown = int(found.unknown.sum())
        if unknown:
            rows = int((found.unknown > 0).sum())
            warnings.warn(
                f"{unknown} events of {rows} of {len(found)} histories are of items that the "
                "model does not know: they are left out",
                stacklevel=3,
            )
        return found

    def rank(
        self,
        sequences: Sequences,
        k: int = 10,
        seen: Seen = "auto",
        exclude: Iterable[str] | None = None,
        batch_size: int = BATCH,
    ) -> pl.DataFrame:
        """As :meth:`recommend`, of histories in catalogue ids."""
        if k < 1:
            raise ValueError(f"k is {k}: ask for at least one item")
        masked = self.fitted.policy(seen) == "mask"
        unwanted = self.fitted.catalogue.encode(exclude or ())
        blocks = [
            self._ranked(sequences.select(np.arange(start, stop)), k, masked, unwanted)
            for start, stop in _blocks(len(sequences), batch_size)
        ]
        return pl.concat(blocks) if blocks else pl.DataFrame(schema=SCHEMA)

    def embed(self, histories: Given) -> Float[np.ndarray, "S H"]:
        """The vector of each history; NaN for one without a known item.

        Args:
            histories: As :meth:`recommend` takes them.
        """
        sequences = self.read(histories).sequences
        found: NDArray[Any] = self.vectors(sequences).cpu().numpy()
        found[sequences.step_counts == 0] = np.nan
        return found

    def scores(self, histories: Given) -> Float[np.ndarray, "S items"]:
        """Logits of all items, column = id, column 0 minus infinity; many histories need memory.

        Args:
            histories: As :meth:`recommend` takes them. One without a known item gets the logarithm
                of the items' share in training.
        """
        sequences = self.read(histories).sequences
        logits: NDArray[Any] = (self.vectors(sequences) @ self.weight().t()).cpu().numpy()
        logits[:, 0] = -np.inf
        logits[sequences.step_counts == 0] = self.popularity().cpu().numpy()
        return logits

    def explain(self, history: Sequence[Any] | str, item: str) -> pl.DataFrame:
        """How an item's score would change without each event of a history.

        Args:
            history: One history, a list of names or of baskets; or a subject's name in ``known``.
            item: The item that is scored.

        Returns:
            step (0 is the oldest of the window), item, and change: the score (logit) of ``item``
            minus its score without this event. Null where no other event is left.

        Raises:
            ValueError: The item is not in the catalogue.
        """
        wanted = int(self.fitted.catalogue.encode([item])[0])
        if not wanted:
            raise ValueError(f"item {item!r} is not in the catalogue of the model")
        whole = self.read([history]).sequences
        seen = whole.keep(whole.steps >= whole.step_counts[0] - self.encoder.max_len)
        events = len(seen.items)
        left = np.r_[np.ones(events, bool), ~np.eye(events, dtype=bool).ravel()]
        copies = Sequences(
            np.arange(events + 1).astype(np.str_),
            np.arange(events + 2) * events,
            np.tile(seen.items, events + 1),
            None,
            None if seen.baskets is None else np.tile(seen.baskets, events + 1),
        ).keep(left)
        scores = self.vectors(copies) @ self.weight()[wanted]
        change = (scores[0] - scores[1:]).double().cpu().numpy()
        names = self.fitted.catalogue.decode(seen.items)
        column = pl.Series("change", change if events > 1 else [None] * events, dtype=pl.Float64)
        return pl.DataFrame({"step": seen.steps, "item": names}).with_columns(column)

    def open(self, history: Sequence[Any] | str = ()) -> Session:
        """A session that grows event by event.

        Args:
            history: Names or baskets of names, oldest first; or a subject's name in ``known``.
        """
        return Session(self, history)

    def weight(self) -> Float[Tensor, "items H"]:
        """The item vectors, row = id of the catalogue."""
        return self.encoder.item_weight()[: self.fitted.catalogue.size + 1].detach()

    def popularity(self) -> Float[Tensor, " items"]:
        """Logarithm of each item's share of the training events."""
        counts = torch.as_tensor(self.fitted.counts.astype(np.float32))
        counts[0] = 0
        return (counts / counts.sum()).log()

    def vectors(self, sequences: Sequences) -> Float[Tensor, "S H"]:
        """The vector of each history in catalogue ids; zeros for an empty one."""
        table = self.encoder.item_embedding.weight
        found = table.new_zeros(len(sequences), table.shape[1])
        rows, ends = np.flatnonzero(sequences.step_counts), sequences.step_counts
        if len(rows):
            steps = StepTable.of(sequences)
            found[torch.from_numpy(rows)] = encode_histories(self.encoder, steps, rows, ends[rows])
        return found

    def _read(self, histories: Given) -> Histories:
        given = [histories] if isinstance(histories, str) else histories
        named = isinstance(given, Sequence) and bool(len(given)) and _are_names(given)
        if named and self.known is not None:
            place = {name: row for row, name in enumerate(self.known.subjects.tolist())}
            missing = [name for name in given if name not in place]
            if missing:
                raise ValueError(f"subjects {missing[:5]} are not known: give their histories")
            rows = np.array([place[name] for name in given])
            return Histories(self.known.select(rows), np.zeros(len(rows), np.int64))
        if named:
            raise ValueError("no subject is known by name: give histories, lists of item names")
        catalogue, baskets = self.fitted.catalogue, self.fitted.baskets
        return read_histories(histories, catalogue, self.config, baskets=baskets)

    @torch.no_grad()
    def _ranked(
        self, sequences: Sequences, k: int, masked: bool, unwanted: NDArray[np.integer]
    ) -> pl.DataFrame:
        """The lists of one block of histories."""
        weight, empty = self.weight(), torch.as_tensor(sequences.step_counts == 0)
        queries = self.vectors(sequences)
        exclude = [
            np.append(sequences[row], unwanted) if masked else unwanted
            for row in range(len(sequences))
        ]
        tile = self.config.evaluate.tile
        ids, scores, total = tiled_top_items(queries, weight, k, exclude=exclude, tile=tile)
        if bool(empty.any()):
            share = self.popularity()[:, None].to(queries)
            one = torch.ones_like(share[:1])
            ids[empty], scores[empty], total[empty] = tiled_top_items(
                one, share, k, exclude=[unwanted]
            )
        logs = scores - total[:, None]
        held = (ids > 0).cpu().numpy()
        counts = held.sum(1)
        names = self.fitted.catalogue.names
        return pl.DataFrame(
            {
                "subject": sequences.subjects.repeat(counts),
                "rank": np.nonzero(held)[1] + 1,
                "item": [names[number - 1] for number in ids.cpu().numpy()[held].tolist()],
                "score": scores.double().cpu().numpy()[held],
                "probability": logs.double().exp().cpu().numpy()[held],
                "fallback": empty.numpy().repeat(counts),
            },
            schema=SCHEMA,
        )


class Session:
    """One history that grows; each call encodes its window anew.

    Args:
        recommender: The model.
        history: As :meth:`Recommender.open` takes it.

    Example:
        ``recommender.open(["tea"]).push("rice").top(5)``
    """

    def __init__(self, recommender: Recommender, history: Sequence[Any] | str) -> None:
        self.recommender = recommender
        self._history = recommender.read([history]).sequences

    def push(self, item: str | Sequence[str]) -> Self:
        """Append a step.

        Args:
            item: A name, or the names of a basket.
        """
        step = self.recommender.read([[item]]).sequences
        old = self._history
        baskets = None
        if old.baskets is not None and step.baskets is not None:
            baskets = np.append(old.baskets, step.baskets + np.int32(old.step_counts[0]))
        items = np.append(old.items, step.items)
        self._history = Sequences(old.subjects, np.array([0, len(items)]), items, None, baskets)
        return self

    def top(
        self, k: int = 10, seen: Seen = "auto", exclude: Iterable[str] | None = None
    ) -> pl.DataFrame:
        """The k best next items, as :meth:`Recommender.recommend` gives them."""
        return self.recommender.rank(self._history, k, seen, exclude)


def open_recommender(
    config: MCLRecConfig, trained: Trained, *, known: Sequences | None = None
) -> Recommender:
    """The model of a run that predicts.

    Args:
        config: The run's configuration with the values of this call.
        trained: The run's fits.
        known: As :class:`Recommender` takes it.

    Raises:
        DataError: The weights come without their catalogue, as published ones do.
    """
    encoder = trained.modules(trained.final)["encoder"]
    assert isinstance(encoder, SequenceEncoder)
    return Recommender(encoder, from_artifacts(trained.artifacts(trained.final)), config, known)


def stored_histories(fitted: Fitted, prepared: Prepared) -> Sequences:
    """All subjects of a prepared folder, by pseudonym, with the events whose item is known.

    Args:
        fitted: Whose catalogue counts.
        prepared: The opened folder.
    """
    events = load(prepared)
    ids = np.append(np.int32(0), fitted.catalogue.encode(events.codes.names))
    known = events.sequences.with_items(ids[events.sequences.items])
    return known.keep(known.items > 0)


def _blocks(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _are_names(given: Sequence[Any]) -> bool:
    return all(isinstance(one, str) for one in given)


@torch.no_grad()
def tiled_top_items(
    queries: Float[Tensor, "S H"],
    weight: Float[Tensor, "items H"],
    k: int,
    *,
    exclude: Sequence[History] | None = None,
    tile: int = 8192,
) -> tuple[Int[Tensor, "S k"], Float[Tensor, "S k"], Float[Tensor, " S"]]:
    """The k items of highest score of each row; among equal scores the lower id comes first.

    Args:
        queries: Vectors of histories.
        weight: Item vectors, I + 1 rows; row 0 is no item.
        k: Items wanted, at least 1.
        exclude: Items of each row that are not wanted, ids 0..I.
        tile: Items at a time.

    Returns:
        Ids and scores, best first, id 0 and minus infinity where fewer than k items are left; and
        the logarithm of the sum of exponentials of the scores of all items, excluded or not.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least one item")
    queries, weight = queries.detach(), weight.detach()
    rows, items = row_item_pairs(exclude, len(queries))
    order = np.argsort(items, kind="stable")
    rows, items = rows[order], items[order]
    ids = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    best = torch.full((len(queries), k), -torch.inf, dtype=queries.dtype, device=queries.device)
    total = best.new_full((len(queries),), -torch.inf)
    for first in range(0, len(weight), tile):
        scores = queries @ weight[first : first + tile].t()
        if first == 0:
            scores[:, 0] = -torch.inf
        total = torch.logaddexp(total, scores.logsumexp(1))
        part = slice(*np.searchsorted(items, [first, first + scores.shape[1]]))
        scores[torch.as_tensor(rows[part]), torch.as_tensor(items[part] - first)] = -torch.inf
        columns, values = _top_columns(scores, min(k, scores.shape[1]))
        # ids of earlier tiles are lower and stand first, so that a stable sort keeps them first
        merged, values = torch.cat([ids, columns + first], 1), torch.cat([best, values], 1)
        best, places = values.sort(dim=1, descending=True, stable=True)
        best, ids = best[:, :k], merged.gather(1, places[:, :k])
    return ids.masked_fill(best == -torch.inf, 0), best, total


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores by column."""
    values, columns = scores.topk(k, dim=1)
    # which of several columns that equal the k-th topk gives is up to the back end
    crowded = ((scores >= values[:, -1:]).sum(1) > k).nonzero()[:, 0]
    if len(crowded):
        ordered, order = scores[crowded].sort(dim=1, descending=True, stable=True)
        values[crowded], columns[crowded] = ordered[:, :k], order[:, :k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values
