"""Independent fits side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import joblib

from diptych.errors import InterruptedRun
from diptych.memory import keep_freed_memory
from diptych.progress import Bar, progress, quiet
from diptych.training import Job, train_fit, unfinished_before


def train_side_by_side(job: Job, names: Sequence[str], processes: int) -> None:
    """Train the fits of a group in a few processes.

    Args:
        job: The run; its prepared data must lie in a folder.
        names: Fits that are not finished.
        processes: How many at a time; CPU threads are shared out among them.

    Raises:
        InterruptedRun: A signal arrived; every process saved its state.
    """
    threads = job.config.run.threads or max(1, joblib.cpu_count() // processes)
    assert job.prepared.path is not None
    call = (job.pipeline.name, job.folder.path, job.prepared.path, job.config, threads)
    context = multiprocessing.get_context("spawn")
    waiting = list(names)
    bar: Bar[None] = progress(len(waiting), "fits")
    running: dict[Future[None], str] = {}
    with (
        bar,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
        _ForwardedSignals(pool) as stopped,
    ):
        while running or (waiting and not stopped):
            # No more than can run at once: what waits in a pool can no longer be called back.
            ready = [] if stopped else _ready(job, waiting)
            for name in ready[: processes - len(running)]:
                waiting.remove(name)
                running[pool.submit(_train_in_process, *call, name)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                # a process that a signal meets before its fit starts simply ends
                with suppress(InterruptedRun, BrokenProcessPool) if stopped else nullcontext():
                    future.result()
                    bar.advance(fit=name)
    if stopped:
        raise InterruptedRun(f"{job.folder.path}: stopped, all fits are saved: go on with --resume")


def _ready(job: Job, waiting: Sequence[str]) -> list[str]:
    fits = {fit.name: fit for fit in job.fits}
    return [name for name in waiting if not unfinished_before(job, fits[name])]


class _ForwardedSignals:
    """Passes SIGTERM and SIGINT on to the processes of a pool, so that each saves its state."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool
        self.received: list[int] = []
        self.before: dict[int, Any] = {}

    def __enter__(self) -> list[int]:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._forward)
        return self.received

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        for process in list(self.pool._processes.values()):
            if process.pid is not None:
                os.kill(process.pid, signal.SIGTERM)


def _train_in_process(
    pipeline: str, folder: Path, prepared: Path, config: Any, threads: int, name: str
) -> None:
    """One fit in a worker process; the worker dies with its parent."""
    import torch

    from diptych import loop
    from diptych.installed import load
    from diptych.prepared import Prepared
    from diptych.run import RunFolder

    _die_with(os.getppid())
    keep_freed_memory()
    torch.set_num_threads(threads)
    run = RunFolder(folder)
    job = Job(run, load(pipeline), config, Prepared.open(prepared), tuple(run.fits()))
    fit = next(fit for fit in job.fits if fit.name == name)
    with quiet(), run.lock(name, wait=False):
        train_fit(job, fit, loop.launch(config.run))


def _die_with(parent: int) -> None:
    """End this process when its parent is gone (a killed run must not train on)."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if not any(thread.name == "parent-watch" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
