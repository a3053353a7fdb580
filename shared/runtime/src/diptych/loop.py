"""The training loop: one fit from its first step, or from its last checkpoint, to its end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric

from diptych import artifacts, checkpoint, distributed, resuming
from diptych.checkpoint import Checkpoint
from diptych.config import RunSection, TrainSection
from diptych.contract import Artifact, Facts, FitResult, Schedule, Task
from diptych.distributed import is_first_process, launch
from diptych.errors import InterruptedRun, TrainingError
from diptych.guards import (
    caught_signals,
    check_settings,
    memory_advice,
    named_metric,
    nan_checks,
    nondeterminism_said,
)
from diptych.loading import Source, loaded, require_items, to_device
from diptych.progress import Bar, progress, quiet
from diptych.randomness import Draw, isolated_globals, seed_globals
from diptych.resuming import State, Writer
from diptych.stepping import (
    EpochContext,
    Group,
    Machinery,
    RunningMeans,
    StepContext,
    evaluation_mode,
)
from diptych.track import Tracker, open_trackers

__all__ = ["EpochContext", "Settings", "StepContext", "fit", "is_first_process", "launch"]

logger = logging.getLogger(__name__)

_SKIPS_TO_STOP = 3  # steps in a row that are not finite


@dataclass(frozen=True)
class Settings:
    """How a fit is trained.

    Args:
        train: The config's ``train`` section.
        run: The config's ``run`` section.
        seed: Seed of every draw.
        stage: Stage of the fit; equal seed and stage mean equal draws.
        label: Words for the progress bar and for trackers.
        facts: JSON that is saved with the weights.
        better: Which direction of ``train.metric`` is better; needed where one is named.
        validate_first: Whether the weights are validated before the first step, as those of a
            fit that starts from another are.
    """

    train: TrainSection
    run: RunSection
    seed: int
    stage: str = "train"
    label: str = ""
    facts: Facts = field(default_factory=dict)
    better: Literal["higher", "lower"] | None = None
    validate_first: bool = False


def fit(
    task: Task, settings: Settings, folder: Path | None = None, fabric: Fabric | None = None
) -> FitResult:
    """Train a task to its end, going on from its checkpoints where there are any.

    Afterwards the task's modules hold the best weights, as ``finish`` left them.

    Args:
        task: What to train.
        settings: How.
        folder: ``fits/<name>`` of a run: receives ``checkpoints/``, ``artifacts/``,
            ``metrics.csv`` and ``log.txt``. None trains in memory: silent, without checkpoints,
            and the global generators are as before afterwards.
        fabric: What :func:`launch` gave; None launches.

    Returns:
        Best epoch (epochs done when the best weights were reached), last epoch, best metric,
        artifacts.

    Raises:
        InterruptedRun: SIGTERM or SIGINT came; the state is saved. Only with a folder.
        TrainingError: Three steps in a row were not finite, or memory ran out.
        UsageError: The settings do not fit the task.

    Example:
        ``fit(task, Settings(TrainSection(epochs=3), RunSection(), seed=1))``
    """
    if folder is None:
        with isolated_globals(), quiet():
            return _Fitting(task, settings, None, fabric or launch(settings.run)).run()
    return _Fitting(task, settings, folder, fabric or launch(settings.run)).run()


class _Fitting:
    """One call of :func:`fit`."""

    def __init__(self, task: Task, settings: Settings, folder: Path | None, fabric: Fabric) -> None:
        self.task, self.settings, self.folder, self.fabric = task, settings, folder, fabric
        self.label = settings.label or "training"
        self.epochs = task.epochs()
        self.schedules: Mapping[str, Schedule] = getattr(task, "schedules", {})
        check_settings(settings.train, settings.better, getattr(task, "accumulates", True))
        for module in task.modules.values():
            module.to(fabric.device)
        self.machinery = Machinery(
            fabric, task.modules, task.optimizers, settings.train.clip, settings.run.precision
        )
        self.draw = Draw(settings.seed, settings.stage)
        self.state = State()
        self.means = RunningMeans()
        self.trackers: list[Tracker] = []
        self.signals: list[int] = []
        self.best_weights: checkpoint.Tensors = {}
        self.bar: Bar[Any] | None = None
        self.writes = folder is not None and fabric.is_global_zero
        if self.writes and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.saved_at = time.monotonic()
        self.writer = Writer()

    def run(self) -> FitResult:
        found = self.find()
        if found is not None and "result" in found.state:
            return self.reopen(found)
        if found is not None:
            self.resume(found)
        self.machinery.broadcast()
        self.machinery.keep_buffers()
        with ExitStack() as stack:
            self.signals = stack.enter_context(caught_signals(self.folder is not None))
            stack.enter_context(nondeterminism_said(self.settings.run.deterministic, self.say))
            if self.settings.run.debug:
                stack.enter_context(nan_checks(self.task.modules))
            if self.writes and self.folder is not None:
                self.trackers = open_trackers(
                    self.settings.run.track, self.folder, self.settings.label, self.state.epoch
                )
                for tracker in self.trackers:
                    stack.callback(tracker.close)
            stack.enter_context(self.writer)
            if found is None and (self.settings.validate_first or self.epochs == 0):
                self.end_epoch()
            while self.state.epoch < self.epochs and not self.state.ended:
                self.train_epoch(stack)
                self.state.epoch, self.state.batch = self.state.epoch + 1, 0
                self.end_epoch()
            result = self.finish()
            if distributed.any_process([bool(self.signals)], self.fabric)[0]:
                raise InterruptedRun("interrupted at the end of a fit: go on with --resume")
        return result

    def find(self) -> Checkpoint | None:
        if self.folder is None:
            return None
        found, skipped = resuming.read(self.folder, self.fabric)
        for line in skipped:
            self.say(f"{line}; going on from the checkpoint before it")
        return found

    def resume(self, found: Checkpoint) -> None:
        assert self.folder is not None
        self.state = resuming.restore(
            found, self.task.modules, self.machinery, self.schedules, self.means, self.fabric
        )
        now = resuming.environment(self.fabric, self.settings.run.precision)
        for line in resuming.changes(found.state["environment"], now):
            self.say(line)
        self.log(f"resumed at step {self.state.step} of epoch {self.state.epoch}")
        best, problem = self.state.best_name or found.name, ""
        if self.writes:
            problem = checkpoint.damage(self.folder / "checkpoints" / best)
        if self.fabric.broadcast(problem):
            self.say(f"best checkpoint {best} is damaged ({problem}): {found.name} takes its place")
            self.state.best_name, self.state.best_metric = found.name, None
            self.state.best_epoch = self.state.epoch
        if self.writes:
            checkpoint.point(self.folder, "last", found.name)
            checkpoint.point(self.folder, "best", self.state.best_name or found.name)

    def reopen(self, found: Checkpoint) -> FitResult:
        """The result of a fit that had ended before."""
        assert self.folder is not None
        if self.fabric.is_global_zero:
            checkpoint.load_tensors(self.task.modules, found.tensors, f"checkpoint {found.name}")
            checkpoint.point(self.folder, "best", found.name)
            checkpoint.finalize(self.folder)
        self.machinery.broadcast()
        stored = artifacts.load(self.folder / "artifacts")
        return FitResult(**found.state["result"], artifacts=stored)

    def train_epoch(self, stack: ExitStack) -> None:
        state, settings = self.state, self.settings
        draw = self.draw.at(state.epoch)
        seed_globals(settings.seed, settings.stage, state.step - state.batch, purpose="batches")
        batches = self.task.batches(state.epoch, draw)
        require_items(batches, state.epoch, self.fabric.world_size)
        if self.bar is None:
            total = state.step + len(batches) * (self.epochs - state.epoch) - state.batch
            self.bar = stack.enter_context(progress(total, self.label, done=state.step))
        source = Source(
            self.task,
            batches,
            draw,
            first_step=state.step - state.batch,
            rank=self.fabric.global_rank,
            processes=self.fabric.world_size,
        )
        if settings.run.workers:
            self.writer.wait()  # a fork while another thread holds a lock would never get it
        pin = self.fabric.device.type == "cuda"
        stream = loaded(source, state.batch, settings.run.workers, pin)
        accumulate = settings.train.accumulate
        while state.batch < len(batches):
            indices = range(state.batch, min(state.batch + accumulate, len(batches)))
            self.train_group(source, indices, stream)
            self.bar.advance(len(indices))
            self.save_if_due(epoch_goes_on=state.batch < len(batches))

    def train_group(self, source: Source, indices: range, stream: Iterator[Any]) -> None:
        """One optimizer step: one batch, or several with ``train.accumulate``."""
        state, settings, machinery = self.state, self.settings, self.machinery
        counts = [len(source.items(index)) for index in indices]
        total = sum(len(source.batches[index]) for index in indices)
        group = Group(total)
        logged: list[tuple[str, Any, int]] = []
        machinery.clear_gradients()
        for index, items in zip(indices, counts, strict=True):
            batch = to_device(next(stream), self.fabric.device)
            done = (state.epoch + index / len(source.batches)) / self.epochs
            ctx = StepContext(
                machinery,
                group,
                source.draw,
                step_index=state.step,
                progress=done,
                items=items,
                batch_items=len(source.batches[index]),
                first=index == indices[0],
                last=index == indices[-1],
            )
            seed_globals(settings.seed, settings.stage, state.step, self.fabric.global_rank)
            with memory_advice(len(source.batches[index])), self.fabric.autocast():
                values = self.task.train_step(batch, ctx)
            logged += [(name, value, items) for name, value in (*values.items(), *ctx.logged)]
            state.step, state.batch = state.step + 1, state.batch + 1
        if machinery.scaler is not None and group.scaled:
            machinery.scaler.update()
        if group.skipped:
            finite = {name: math.isfinite(_plain(value)) for name, value, _ in logged}
            items_of_step = [item for index in indices for item in source.batches[index]]
            self.skip(items_of_step, [name for name, good in finite.items() if not good])
            return
        state.skipped_in_a_row = 0
        for name, value, items in logged:
            self.means.add(name, value, items)
        if group.stepped:
            for schedule in self.schedules.values():
                if schedule.every == "step":
                    schedule.scheduler.step()
        machinery.keep_buffers()

    def skip(self, items: Sequence[int], broken: Sequence[str]) -> None:
        """Count a step that was not finite and undo what it did to batch statistics.

        Args:
            items: Of the step.
            broken: Logged values that are not finite; none where only the gradients are not.

        Raises:
            TrainingError: It is the third in a row.
        """
        state = self.state
        self.machinery.restore_buffers()
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        names = ", ".join(str(item) for item in items)
        terms = f" ({', '.join(broken)})" if broken else ""
        self.log(
            f"step {state.step} of epoch {state.epoch} was skipped: loss or gradient norm "
            f"not finite{terms}; items {names}"
        )
        if state.skipped_in_a_row < _SKIPS_TO_STOP:
            return
        self.writer.wait()
        kept = "no checkpoint had been written"
        if self.writes and self.folder is not None and (self.folder / "checkpoints/last").is_file():
            kept = f"the last good checkpoint is {checkpoint.best(self.folder, 'last').name}"
        raise TrainingError(
            f"{self.label}: {_SKIPS_TO_STOP} steps in a row without a finite loss or gradient "
            f"norm{terms} (up to step {state.step}, epoch {state.epoch}; {kept}): lower optim.lr, "
            "set train.clip, or look at the items named in log.txt"
        )

    def save_if_due(self, *, epoch_goes_on: bool, saved: bool = False) -> None:
        """Save after so many minutes, and at a signal.

        Raises:
            InterruptedRun: A signal came.
        """
        if self.folder is None:
            return
        minutes = (time.monotonic() - self.saved_at) / 60
        due = self.fabric.is_global_zero and minutes >= self.settings.train.checkpoint_minutes
        stop, due = distributed.any_process([bool(self.signals), due], self.fabric)
        if (stop and not saved) or (due and epoch_goes_on):
            self.save()
        if stop:
            self.writer.wait()
            self.log(f"interrupted after step {self.state.step}")
            raise InterruptedRun(
                f"{self.label}: interrupted; the state after step "
                f"{self.state.step} is saved: go on with --resume"
            )

    def end_epoch(self) -> None:
        """Validate, step the schedules, write the row, judge, save."""
        state, train = self.state, self.settings.train
        rates = {
            f"learning_rate/{name}": float(optimizer.param_groups[0]["lr"])
            for name, optimizer in self.task.optimizers.items()
        }
        metrics = self.validate()
        metric = named_metric(train.metric, metrics, "train.metric")
        if state.epoch:
            for name, schedule in self.schedules.items():
                self.step_epoch_schedule(name, schedule, metrics)
        improved = state.improves(metric, self.settings.better)
        if improved:
            state.best_epoch = state.epoch
            state.best_metric = metric if metric is not None and math.isfinite(metric) else None
            if self.folder is None:
                self.best_weights = self.weights()
        state.stale = 0 if improved and metric == state.best_metric else state.stale + 1
        state.ended = train.patience is not None and bool(metrics) and state.stale >= train.patience
        row = {**self.epoch_row(metrics), **rates} if state.epoch or metrics else {}
        self.save(best=improved, row=row)
        if self.bar is not None and metric is not None:
            self.bar.advance(0, epoch=state.epoch, **{str(train.metric): metric})
        if self.folder is not None:
            self.save_if_due(epoch_goes_on=False, saved=True)

    def step_epoch_schedule(
        self, name: str, schedule: Schedule, metrics: Mapping[str, float]
    ) -> None:
        if schedule.every != "epoch":
            return
        if schedule.metric is None:
            schedule.scheduler.step()
            return
        value = named_metric(schedule.metric, metrics, f"metric of schedule '{name}'")
        if value is not None:
            schedule.scheduler.step(value)

    def validate(self) -> dict[str, float]:
        """The task's metrics, those of the first process on all of them."""
        validate = getattr(self.task, "validate", None)
        if validate is None:
            return {}
        ctx = self.epoch_context("validate")
        with evaluation_mode(self.task.modules), torch.no_grad(), self.fabric.autocast():
            metrics = dict(validate(ctx))
        values = {name: float(value) for name, value in {**ctx.logged, **metrics}.items()}
        shared: dict[str, float] = self.fabric.broadcast(values)
        return shared

    def epoch_context(self, purpose: str) -> EpochContext:
        state, settings = self.state, self.settings
        seed_globals(
            settings.seed, settings.stage, state.step, self.fabric.global_rank, purpose=purpose
        )
        return EpochContext(self.fabric, self.draw.at(state.epoch).of(purpose))

    def epoch_row(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means of the epoch over all processes, and the metrics; the means start anew."""
        total = RunningMeans()
        for share in distributed.gather_objects(self.means.stored(), self.fabric):
            total.restore(share)
        self.means = RunningMeans()
        values = {f"train/{name}": value for name, value in total.means().items()}
        return values | {f"validation/{name}": value for name, value in metrics.items()}

    def weights(self) -> checkpoint.Tensors:
        """A copy of all parameters and buffers."""
        modules = self.task.modules
        found: checkpoint.Tensors = checkpoint.snapshot(
            {name: module.state_dict() for name, module in modules.items()}
        )
        return found

    def save(self, best: bool = False, row: Mapping[str, float] | None = None) -> None:
        """Write the curves and a checkpoint while training goes on.

        All processes take part in collecting, the first one writes.
        """
        self.saved_at = time.monotonic()
        folder, state = self.folder, self.state
        if folder is None:
            return
        name = checkpoint.name_of(state.step)
        if best:
            state.best_name = name
        content = self.content()
        if not self.writes:
            return
        tensors = self.weights()
        optim = checkpoint.snapshot(resuming.optimizers_of(self.machinery, self.schedules))
        epoch, step, best_name = state.epoch, state.step, state.best_name

        def write() -> None:
            for tracker in self.trackers if row else ():
                tracker.log(epoch, step, row or {})
            checkpoint.save(folder, name, tensors, optim, content)
            if best:
                checkpoint.point(folder, "best", name)
            checkpoint.prune(folder, best_name)

        self.writer.submit(write)

    def content(self) -> dict[str, Any]:
        return resuming.content(
            self.state,
            self.means,
            self.fabric,
            label=self.settings.label,
            seed=self.settings.seed,
            stage=self.settings.stage,
            facts=dict(self.settings.facts),
            environment=resuming.environment(self.fabric, self.settings.run.precision),
        )

    def finish(self) -> FitResult:
        """Take the best weights, let the task finish on them, and keep only that."""
        state, modules = self.state, self.task.modules
        self.writer.wait()
        if self.folder is None:
            checkpoint.load_tensors(modules, self.best_weights, "best weights")
        elif self.writes:
            checkpoint.load_modules(self.folder, modules)
        self.machinery.broadcast()
        self.machinery.clear_gradients()
        finish = getattr(self.task, "finish", None)
        if finish is not None:
            with evaluation_mode(modules):
                finish(self.epoch_context("finish"))
            self.machinery.broadcast()
        left = getattr(self.task, "artifacts", None)
        kept: Mapping[str, Artifact] = left() if left is not None else {}
        result = {
            "best_epoch": state.best_epoch,
            "last_epoch": state.epoch,
            "best_metric": state.best_metric,
        }
        content = self.content()
        if self.writes and self.folder is not None:
            artifacts.save(kept, self.folder / "artifacts")
            name = checkpoint.name_of(state.step, finished=True)
            checkpoint.save(self.folder, name, self.weights(), {}, {**content, "result": result})
            checkpoint.point(self.folder, "best", name)
            checkpoint.finalize(self.folder)
            self.log(f"finished after {state.epoch} epochs, best after {state.best_epoch}")
        return FitResult(**result, artifacts=kept)  # type: ignore[arg-type]

    def say(self, line: str) -> None:
        """A note for the user's terminal and for ``log.txt``."""
        self.log(line)
        logger.info("%s: %s", self.label, line)

    def log(self, line: str) -> None:
        if self.writes and self.folder is not None:
            with (self.folder / "log.txt").open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


def _plain(value: torch.Tensor | float) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)
