"""Batches of one process: its share of every global batch, loaded here or in workers."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diptych.contract import Batch, Task
from diptych.errors import DiptychError, TrainingError, UsageError
from diptych.randomness import Draw, seed_globals


@dataclass(frozen=True)
class Source:
    """Where the batches of one epoch come from.

    Args:
        task: Loads them.
        batches: Global batches of the epoch.
        draw: The fit's draws in this epoch.
        first_step: Steps of the fit before this epoch.
        rank: Rank of this process.
        processes: Number of processes.
    """

    task: Task
    batches: Sequence[Sequence[int]]
    draw: Draw
    first_step: int
    rank: int
    processes: int

    def items(self, index: int) -> Sequence[int]:
        """This process's part of a global batch, in the batch's order."""
        batch = self.batches[index]
        return batch[slice(*share(len(batch), self.rank, self.processes))]

    def load(self, index: int) -> Batch:
        """This process's part of a global batch, loaded."""
        place = self.draw.seed, self.draw.stage, self.first_step + index, self.rank
        seed_globals(*place, purpose="load")
        return self.task.load(self.items(index), self.draw.epoch, self.draw)


def share(count: int, rank: int, processes: int) -> tuple[int, int]:
    """First and last plus one of the consecutive items that a process takes of ``count``."""
    each, rest = divmod(count, processes)
    start = rank * each + min(rank, rest)
    return start, start + each + (rank < rest)


def require_items(batches: Sequence[Sequence[int]], epoch: int, processes: int) -> None:
    """Refuse batches that leave a process without an item.

    Raises:
        UsageError: A batch is smaller than the number of processes.
    """
    for index, batch in enumerate(batches):
        if len(batch) < processes:
            raise UsageError(
                f"batch {index} of epoch {epoch} has {len(batch)} items for {processes} "
                "process(es): change train.batch so that the rest is larger, or lower run.devices"
            )


def loaded(source: Source, start: int, workers: int, pin: bool) -> Iterator[Batch]:
    """The loaded batches of an epoch from one index on.

    Args:
        source: Where they come from.
        start: Index of the first batch.
        workers: Processes that load; the values do not depend on it.
        pin: Whether to pin memory for a faster way to a CUDA device.

    Raises:
        TrainingError: A worker ended without a word.
    """
    indices = range(start, len(source.batches))
    if workers == 0:
        yield from map(source.load, indices)
        return
    loader: DataLoader[Any] = DataLoader(
        _Batches(source, start),
        batch_size=None,
        shuffle=False,
        num_workers=min(workers, max(1, len(indices))),
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin,
    )
    try:
        for batch in loader:
            if isinstance(batch, DiptychError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
            raise
        raise TrainingError(
            f"a process that loads batches was ended, perhaps for lack of memory: lower "
            f"run.workers (now {workers}) ({error})"
        ) from error


class _Batches(Dataset[Any]):
    """What a worker indexes; errors for the user travel as values, without a worker's trace."""

    def __init__(self, source: Source, start: int) -> None:
        self._source = source
        self._start = start

    def __len__(self) -> int:
        return len(self._source.batches) - self._start

    def __getitem__(self, index: int) -> Batch:
        try:
            return self._source.load(self._start + index)
        except DiptychError as error:
            return error


def _unchanged(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the parent must still get its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in tuples, lists, mappings and dataclasses to a device.

    Args:
        batch: What ``Task.load`` returned.
        device: Where its tensors go.

    Returns:
        The same structure; the batch itself where nothing has to move.
    """
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple | list):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        moved = {name: to_device(getattr(batch, name), device) for name in names}
        return dataclasses.replace(batch, **moved)
    return batch
