"""Parts of histories as padded matrices, made for each batch: no dense copy of the data exists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from diptych_mclrec.model import SequenceEncoder, encode_in_groups
from diptych_mclrec.sequences import Sequences

TOKENS = 1 << 15  # steps that are encoded at a time when nothing is learnt
GROUPS = 8


@dataclass(frozen=True, eq=False)
class StepTable:
    """Where each step of each subject begins; steps are numbered over all subjects.

    Args:
        items: Ids of the events.
        events: First event of each step, and the number of events, int64 (T + 1,).
        steps: First step of each subject, and the number of steps, int64 (S + 1,).
        baskets: Whether a step may hold several items.
    """

    items: NDArray[np.integer]
    events: Int[np.ndarray, " steps_and_one"]
    steps: Int[np.ndarray, " subjects_and_one"]
    baskets: bool

    @classmethod
    def of(cls, sequences: Sequences) -> StepTable:
        """The table of sequences."""
        steps = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum(sequences.step_counts, out=steps[1:])
        number = steps[sequences.rows] + sequences.steps
        events = np.searchsorted(number, np.arange(steps[-1] + 1))
        return cls(sequences.items, events, steps, sequences.baskets is not None)

    @property
    def subjects(self) -> Int[np.ndarray, " steps"]:
        """Subject of each step."""
        return np.repeat(np.arange(len(self.steps) - 1), np.diff(self.steps))

    def matrix(
        self, first: Int[np.ndarray, " B"], last: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, "B L ..."]:
        """The items of runs of steps, from the left, 0 behind their end.

        Args:
            first: First step of each run.
            last: The step after each run.

        Returns:
            int64 (B, L) with L the longest run, or (B, L, M) with M the largest basket.
        """
        lengths = last - first
        place = np.arange(int(lengths.max(initial=0)))
        inside = place < lengths[:, None]
        step = np.where(inside, first[:, None] + place, 0)
        counts = np.where(inside, self.events[step + 1] - self.events[step], 0)
        if not self.baskets:
            return np.where(inside, self.items[self.events[step]], 0).astype(np.int64)
        member = np.arange(int(counts.max(initial=1)))
        held = member < counts[..., None]
        event = np.where(held, self.events[step][..., None] + member, 0)
        return np.where(held, self.items[event], 0).astype(np.int64)

    def sets(self, steps: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B G"]:
        """The items of single steps, 0 behind their end.

        Args:
            steps: Numbers of steps.

        Returns:
            int64 (B, G) with G the largest basket; (B, 1) without baskets.
        """
        matrix = self.matrix(steps, steps + 1)
        return matrix[:, 0] if self.baskets else matrix


@torch.no_grad()
def encode_histories(
    encoder: SequenceEncoder,
    table: StepTable,
    subjects: Int[np.ndarray, " Q"],
    ends: Int[np.ndarray, " Q"],
) -> Float[torch.Tensor, "Q H"]:
    """The encoder's vectors of what subjects had before given steps, on its device.

    Histories of one subject that fit into the window are encoded in one pass, since a step does
    not see what follows it.

    Args:
        encoder: In evaluation mode.
        table: All histories, ids of the encoder, every step with an item.
        subjects: Subject of each query.
        ends: Steps of its history that are known, at least 1; the last ``max_len`` are read.
    """
    device = encoder.item_embedding.weight.device
    first = table.steps[subjects]
    starts = first + np.maximum(ends - encoder.max_len, 0)
    found = torch.empty(len(ends), encoder.item_weight().shape[1], device=device)
    found = found.to(encoder.item_embedding.weight.dtype)
    # queries with the same first step are steps of one pass
    _, run = np.unique(starts, return_inverse=True)
    stops = np.zeros(int(run.max(initial=-1)) + 1, np.int64)
    np.maximum.at(stops, run, first + ends)
    begins = np.zeros(len(stops), np.int64)
    begins[run] = starts
    order = np.argsort(stops - begins, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    by_run = np.argsort(rank[run], kind="stable")  # queries in the order of the passes
    bounds = np.searchsorted(rank[run][by_run], np.arange(len(order) + 1))
    size = max(1, TOKENS // encoder.max_len)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        items = torch.as_tensor(table.matrix(begins[chosen], stops[chosen]), device=device)
        lengths = torch.as_tensor(stops[chosen] - begins[chosen], device=device)
        queries = by_run[bounds[start] : bounds[min(start + size, len(order))]]
        if len(queries) == len(chosen):
            h = encode_in_groups(encoder, items, lengths, GROUPS, hidden=False)
        else:
            every = encoder(items, lengths, positions="all", hidden=False)
            row = torch.as_tensor(rank[run][queries] - start, device=device)
            place = first[queries] + ends[queries] - 1 - starts[queries]
            h = every[row, torch.as_tensor(place, device=device)]
        found[torch.as_tensor(queries, device=device)] = h
    return found
