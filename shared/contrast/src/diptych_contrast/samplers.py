"""Which samples meet in a batch: batch samplers for `torch.utils.data.DataLoader`.

Both are keyed by (seed, epoch), never by global random state, and go on in the middle of an epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from diptych_contrast.errors import ContrastInputError


class _Resumable(Sampler[list[int]]):
    """Batches of an epoch from (seed, epoch); a state is the place in an epoch."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch, self.position = seed, 0, 0

    @abstractmethod
    def batches(self, draw: np.random.Generator) -> list[list[int]]:
        """All batches of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch from its first batch."""
        self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rest of this epoch, then move on to the next."""
        batches = self.batches(np.random.default_rng([self.seed, self.epoch]))
        while self.position < len(batches):
            self.position += 1
            yield batches[self.position - 1]
        self.set_epoch(self.epoch + 1)

    def __len__(self) -> int:
        """Number of batches of this epoch."""
        return len(self.batches(np.random.default_rng([self.seed, self.epoch])))

    def state_dict(self) -> dict[str, int]:
        """The place in the epoch, as `load_state_dict` takes it."""
        return {"version": 1, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a sampler of the same seed stood."""
        for name, own in (("version", 1), ("seed", self.seed)):
            if state[name] != own:
                function = f"{type(self).__name__}.load_state_dict"
                found = f"has {name} {state[name]}, this sampler {own}"
                raise ContrastInputError(function, "state", found, f"build it with the same {name}")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class ClassBalancedSampler(_Resumable):
    """Batches of P classes with K samples of each (Hermans et al., 2017, "P x K").

    An epoch has as many batches as fit into the data. Classes come in turns, and so do the samples
    of a class, so that small classes come as often as large ones. Samples of a negative label are
    never drawn; a class of fewer than K samples repeats them.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.labels = np.asarray(labels)
        self.classes = np.unique(self.labels[self.labels >= 0])
        self.per_batch, self.per_class = classes_per_batch, samples_per_class
        name = "ClassBalancedSampler"
        if samples_per_class < 1:
            found = f"is {samples_per_class}"
            raise ContrastInputError(name, "samples_per_class", found, "pass at least 1")
        if not 1 <= classes_per_batch <= len(self.classes):
            found = f"is {classes_per_batch}, the labels have {len(self.classes)} classes"
            raise ContrastInputError(name, "classes_per_batch", found, "pass 1 to that number")

    def batches(self, draw: np.random.Generator) -> list[list[int]]:
        """All batches of an epoch."""
        members = {c: _turns(np.flatnonzero(self.labels == c), draw) for c in self.classes}
        turns = _turns(self.classes, draw)
        count = max(int((self.labels >= 0).sum()) // (self.per_batch * self.per_class), 1)
        batches = []
        for _ in range(count):
            chosen: list[int] = []
            while len(chosen) < self.per_batch:  # a new turn may begin with a class of this batch
                candidate = next(turns)
                if candidate not in chosen:
                    chosen.append(candidate)
            batches.append([next(members[c]) for c in chosen for _ in range(self.per_class)])
        return batches


class SubjectSampler(_Resumable):
    """Batches in which no two samples come from one subject, so that none is a false negative.

    Every batch takes a sample of those subjects that have most samples left, which gives the
    largest number of full batches. What fills no batch at the end sits out this epoch.
    """

    def __init__(self, groups: Sequence[Any] | Tensor, batch_size: int, seed: int = 0) -> None:
        super().__init__(seed)
        names, self.groups = np.unique(np.asarray(groups), return_inverse=True)
        self.batch_size = batch_size
        if not 1 <= batch_size <= len(names):
            found = f"is {batch_size}, there are {len(names)} subjects"
            raise ContrastInputError("SubjectSampler", "batch_size", found, "pass 1 to that number")

    def batches(self, draw: np.random.Generator) -> list[list[int]]:
        """All batches of an epoch."""
        order = draw.permutation(len(self.groups))
        members = [order[self.groups[order] == g].tolist() for g in range(self.groups.max() + 1)]
        left = np.array([len(rows) for rows in members])
        batches = []
        while (left > 0).sum() >= self.batch_size:
            ties = draw.random(len(left))
            chosen = np.lexsort((ties, -left))[: self.batch_size]
            batches.append([members[group].pop() for group in chosen])
            left[chosen] -= 1
        # the first batches hold the largest subjects only
        return [batches[index] for index in draw.permutation(len(batches))]


def _turns(values: np.ndarray, draw: np.random.Generator) -> Iterator[int]:
    while True:
        yield from draw.permutation(values).tolist()
