"""Progress on standard error: bars on a terminal, plain lines elsewhere, nothing for short work."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress, TaskID

T = TypeVar("T")

SHOW_AFTER = 2.0  # seconds; shorter work stays silent
LINE_EVERY = 10.0  # seconds between plain lines, so that a log file stays readable
REFRESH_EVERY = 0.1  # seconds between updates of a bar

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_terminal: ContextVar[_Terminal | None] = ContextVar("terminal", default=None)


def is_silent() -> bool:
    """Whether this process shows nothing: inside :func:`quiet`, or not the first of a launch."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return _quiet.get() or rank != "0"


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Show no progress inside this context: the way of estimators and notebooks."""
    before = _quiet.get()
    _quiet.set(True)
    try:
        yield
    finally:
        _quiet.set(before)


@overload
def progress(work: int | None, label: str, done: int = 0) -> Bar[None]: ...
@overload
def progress(work: Iterable[T], label: str, done: int = 0) -> Bar[T]: ...
def progress(work: Iterable[T] | int | None, label: str, done: int = 0) -> Bar[Any]:
    """Show how far a piece of work is, once it has taken two seconds.

    Args:
        work: What is iterated over, or the number of steps, or None where it is unknown.
        label: Words beside the bar.
        done: Steps that were done before, as in a resumed run.

    Returns:
        A bar to iterate over, or a context whose ``advance`` is called after each step.

    Example:
        ``for file in progress(files, "Reading"): ...`` or
        ``with progress(len(files), "Reading") as bar: bar.advance(loss=0.3)``
    """
    return Bar(work, label, done)


class Bar(Generic[T]):
    """One piece of work in progress; made by :func:`progress`."""

    def __init__(self, work: Iterable[T] | int | None, label: str, done: int) -> None:
        self._work: Iterable[T] | None = None if isinstance(work, int) else work
        self._total = _count(work)
        self._label = label
        self._done = self._done_before = done
        self._values: dict[str, Any] = {}
        self._display: _Terminal | _Lines | None = None
        self._outermost = False

    def __enter__(self) -> Bar[T]:
        self._started = self._refreshed = time.monotonic()
        self._shown = False
        if is_silent():
            return self
        self._display = _terminal.get()
        if self._display is None:
            self._outermost = True
            if _is_terminal():
                self._display = _Terminal()
                _terminal.set(self._display)
            else:
                self._display = _Lines()
        self._timer = threading.Timer(SHOW_AFTER, self._show)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._display is None:
            return
        self._timer.cancel()
        self._timer.join()  # a bar that is being drawn must not appear after its end
        if self._shown:
            self._display.update(self, finished=True)
        if self._outermost and isinstance(self._display, _Terminal):
            self._display.stop()
            _terminal.set(None)
        self._display = None

    def __iter__(self) -> Iterator[T]:
        if self._work is None:
            raise TypeError(f"progress {self._label!r} counts steps: call advance() inside `with`")
        with self:
            for item in self._work:
                yield item
                self.advance()

    def advance(self, n: int = 1, **values: Any) -> None:
        """Count steps as done.

        Args:
            n: Number of steps.
            values: Numbers or words to show beside the bar, such as ``loss=0.31``.
        """
        self._done += n
        self._values.update(values)
        if self._display is None or not self._shown:
            return
        now = time.monotonic()
        if now - self._refreshed >= self._display.every:
            self._refreshed = now
            self._display.update(self)

    def _show(self) -> None:
        if self._display is not None:
            self._display.update(self)
            self._shown = True

    def describe(self) -> str:
        """The values beside the bar, as words."""
        return " ".join(f"{name} {_number(value)}" for name, value in self._values.items())

    def line(self) -> str:
        """The state as one plain line."""
        elapsed = time.monotonic() - self._started
        parts = [f"{self._done}" if self._total is None else f"{self._done}/{self._total}"]
        parts.append(f"{_clock(elapsed)} elapsed")
        steps = self._done - self._done_before
        if self._total is not None and steps > 0 and self._done < self._total:
            parts.append(f"{_clock(elapsed / steps * (self._total - self._done))} left")
        if self._values:
            parts.append(self.describe())
        return f"{self._label}: {', '.join(parts)}"


class _Lines:
    every = LINE_EVERY

    def __init__(self) -> None:
        self._said = -1

    def update(self, bar: Bar[Any], finished: bool = False) -> None:
        if not (finished and self._said == bar._done):
            print(bar.line(), file=sys.stderr, flush=True)
        self._said = bar._done


class _Terminal:
    """One display that nested bars share, because a terminal can hold only one."""

    every = REFRESH_EVERY

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def update(self, bar: Bar[Any], finished: bool = False) -> None:
        with self._lock:
            if self._progress is None:
                self._progress = _rich_progress()
                self._progress.start()
            task = self._tasks.get(id(bar))
            if task is None:
                task = self._progress.add_task(bar._label, total=bar._total, values="")
                self._tasks[id(bar)] = task
                since = time.monotonic() - bar._started
                self._progress.tasks[-1].start_time = self._progress.get_time() - since
            self._progress.update(task, completed=bar._done, values=bar.describe())
            if finished and not bar._outermost:
                self._progress.remove_task(self._tasks.pop(id(bar)))

    def stop(self) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress.stop()


def _rich_progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        console=Console(stderr=True),
    )


def _count(work: object) -> int | None:
    if isinstance(work, int):
        return work
    return len(work) if isinstance(work, Sized) else None


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _number(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
