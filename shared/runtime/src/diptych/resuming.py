"""What a fit needs, beside its weights, to go on exactly where it stood."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from diptych import checkpoint, distributed
from diptych.checkpoint import Checkpoint
from diptych.contract import JSON, Schedule
from diptych.errors import TrainingError
from diptych.stepping import Machinery, RunningMeans


@dataclass
class State:
    """Where a fit stands.

    Args:
        epoch: Epochs done.
        batch: Batches done of the epoch after them.
        step: Batches done in all.
        best_epoch: Epochs done when the best weights were reached.
        best_metric: Their validation metric; None where nothing was validated.
        best_name: Their checkpoint.
        stale: Epochs since then.
        ended: Whether patience has ended the training.
        skipped: Steps that were skipped because they were not finite.
        skipped_in_a_row: Those of them just now.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_metric: float | None = None
    best_name: str | None = None
    stale: int = 0
    ended: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0

    def improves(self, metric: float | None, better: str | None) -> bool:
        """Whether a metric is better than the best; while there is none, the latest is best."""
        if self.best_metric is None:
            return True
        if metric is None or not math.isfinite(metric):
            return False
        return metric > self.best_metric if better == "higher" else metric < self.best_metric


class Writer:
    """One thread that writes, so that training does not wait for the disk."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def submit(self, write: Callable[[], None]) -> None:
        """Start to write when the last writing has ended well."""
        self.wait()
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            TrainingError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise TrainingError(
                f"the checkpoint cannot be written: {error}: make room or mend the folder's "
                "permissions, then go on with --resume"
            ) from error


def environment(fabric: Fabric, precision: str) -> dict[str, JSON]:
    """Everything that bit-identity of a resumed fit depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "processes": fabric.world_size,
        "device": fabric.device.type,
        "precision": precision,
    }


def changes(before: Mapping[str, JSON], now: Mapping[str, JSON]) -> list[str]:
    """One line for everything that is another than when the checkpoint was written."""
    return [
        f"resumed with {name} {now[name]} instead of {before.get(name)}: the result may differ "
        "in the last digits from that of an uninterrupted fit"
        for name in now
        if now[name] != before.get(name)
    ]


def optimizers_of(machinery: Machinery, schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    """Everything beside the modules that steps change, as :func:`restore` takes it."""
    return {
        "optimizers": {key: value.state_dict() for key, value in machinery.optimizers.items()},
        "schedules": {key: value.scheduler.state_dict() for key, value in schedules.items()},
        "scaler": machinery.scaler.state_dict() if machinery.scaler else None,
    }


def read(folder: Path, fabric: Fabric) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, read by the first process and sent to the others.

    Returns:
        The checkpoint, if any (its tensors only on the first process), and one line for each
        damaged one that was skipped.
    """
    if fabric.global_rank != 0:
        found: Checkpoint | None = fabric.broadcast(None)
        return found, []
    found, skipped = checkpoint.newest_intact(folder)
    slim = None if found is None else Checkpoint(found.name, {}, found.optim, found.state)
    fabric.broadcast(slim)
    return found, skipped


def restore(
    found: Checkpoint,
    modules: Mapping[str, nn.Module],
    machinery: Machinery,
    schedules: Mapping[str, Schedule],
    means: RunningMeans,
    fabric: Fabric,
) -> State:
    """Put a fit back where a checkpoint was written.

    Args:
        found: What :func:`read` gave.
        modules: Overwritten; on the other processes by those of the first.
        machinery: Optimizers and scaler, overwritten.
        schedules: Overwritten.
        means: Receives this process's share of the running means.
        fabric: Launched.

    Returns:
        Where the fit stands.

    Raises:
        DataError: The weights do not fit.
        TrainingError: The optimizers or schedules are others.
    """
    if fabric.global_rank == 0:
        checkpoint.load_tensors(modules, found.tensors, f"checkpoint {found.name}")
    _require_names("optimizers", found.optim["optimizers"], machinery.optimizers)
    _require_names("schedules", found.optim["schedules"], schedules)
    try:
        for name, optimizer in machinery.optimizers.items():
            optimizer.load_state_dict(found.optim["optimizers"][name])
        for name, schedule in schedules.items():
            schedule.scheduler.load_state_dict(found.optim["schedules"][name])
    except (ValueError, KeyError) as error:
        raise TrainingError(
            f"checkpoint {found.name}: its optimizer is another: {error}: train this fit again"
        ) from error
    if machinery.scaler is not None and found.optim["scaler"]:
        machinery.scaler.load_state_dict(found.optim["scaler"])
    shares = found.state["means"]
    same = len(shares) == fabric.world_size
    for rank, share in enumerate(shares):
        if rank == fabric.global_rank if same else fabric.global_rank == 0:
            means.restore(share)
    return State(**found.state["state"])


def content(state: State, means: RunningMeans, fabric: Fabric, **more: JSON) -> dict[str, JSON]:
    """The plain part of a checkpoint; all processes take part.

    Args:
        state: Where the fit stands.
        means: Running means of this process.
        fabric: Launched.
        more: Facts, environment, label.
    """
    shares = distributed.gather_objects(means.stored(), fabric)
    return {"format": 1, "state": asdict(state), "means": shares, **more}


def _require_names(kind: str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if set(stored) != set(own):
        raise TrainingError(
            f"the checkpoint has {kind} {sorted(stored)}, the task has {sorted(own)}: train this "
            "fit again"
        )
