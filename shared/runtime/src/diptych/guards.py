"""What can interrupt or spoil a training, caught and put into words."""

from __future__ import annotations

import difflib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from diptych.config import TrainSection
from diptych.errors import InterruptedRun, TrainingError, UsageError


@contextmanager
def caught_signals(active: bool) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that the loop can save before it ends.

    Args:
        active: False leaves the signals alone, as does any thread but the main one.

    Yields:
        The numbers of the signals that came; a second one ends the training at once.

    Raises:
        InterruptedRun: A second signal came.
    """
    received: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise InterruptedRun("interrupted twice: go on from the last checkpoint with --resume")
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def nondeterminism_said(active: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Turn torch's warnings about operations without a deterministic form into notes."""
    show = warnings.showwarning

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "deterministic" in str(message):
            say(f"not deterministic: {str(message).splitlines()[0]}")
        else:
            show(message, category, filename, lineno, file, line)

    if not active:
        yield
        return
    warnings.showwarning = note
    try:
        yield
    finally:
        warnings.showwarning = show


@contextmanager
def memory_advice(items: int) -> Iterator[None]:
    """Say what helps when the device's memory runs out.

    Raises:
        TrainingError: It did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device's memory ran out on a batch of {items} items: lower train.batch, or use "
            f"run.precision=bf16-mixed ({str(error).splitlines()[0]})"
        ) from error


def check_settings(train: TrainSection, better: str | None, accumulates: bool) -> None:
    """Refuse settings that contradict each other or the task.

    Args:
        train: The config's ``train`` section.
        better: Which direction of ``train.metric`` is better, where it is known.
        accumulates: Whether the task's loss allows ``train.accumulate``.

    Raises:
        UsageError: They do.
    """
    if train.accumulate > 1 and not accumulates:
        raise UsageError(
            f"train.accumulate: is {train.accumulate}, but this objective couples the items of a "
            "batch or takes several steps: set it to 1 and choose train.batch"
        )
    if train.metric is not None and better is None:
        raise UsageError(
            f"train.metric: it is not known whether a higher '{train.metric}' is better: name a "
            "metric of the pipeline, or pass Settings(better=...)"
        )
    if train.patience is not None and train.metric is None:
        raise UsageError("train.patience: needs train.metric: name the validation metric to watch")


def named_metric(name: str | None, metrics: Mapping[str, float], what: str) -> float | None:
    """A metric by its name; None where none is named or nothing was validated.

    Raises:
        UsageError: Validation gives no metric of this name.
    """
    if name is None or not metrics:
        return None
    if name not in metrics:
        near = difflib.get_close_matches(name, metrics, 1)
        hint = f"; nearest: '{near[0]}'" if near else ""
        raise UsageError(
            f"{what}: validation gives no '{name}' (there are: {', '.join(metrics)}{hint})"
        )
    return metrics[name]


@contextmanager
def nan_checks(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Stop at the first NaN that a module or a backward pass gives, and name where it came from.

    Raises:
        TrainingError: There is one.
    """
    hooks = [
        part.register_forward_hook(_refuse_nan(f"{name}.{path}".rstrip(".")))
        for name, module in modules.items()
        for path, part in module.named_modules()
    ]
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            yield
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        raise TrainingError(f"run.debug: in the backward pass: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_nan(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else (output,)
        for part in parts:
            if isinstance(part, Tensor) and part.isnan().any():
                raise TrainingError(
                    f"run.debug: NaN in the output of {name} ({type(module).__name__}): look at "
                    "its inputs and weights"
                )

    return hook
