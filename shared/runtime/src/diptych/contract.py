"""What a pipeline hands to the runtime and what it gets back: plain data and functions.

A pipeline is one :class:`Pipeline` value. The runtime calls its functions in the order of the
data's way (check, prepare, plan, modules, build, evaluate, predict) and owns everything else:
configuration files, folders, checkpoints, processes, statistics, the report. This module imports
no torch, so that ``diptych list`` and every ``--help`` answer at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

from diptych.findings import Findings
from diptych.split import Split

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from diptych.loop import EpochContext, StepContext
    from diptych.prepared import Prepared
    from diptych.randomness import Draw

JSON = Any  # what json.dumps takes: None, bool, int, float, str, lists and string-keyed mappings
Config = Any  # the pipeline's own pydantic model, resolved and frozen
Facts = Mapping[str, JSON]
Batch = Any  # whatever ``Task.load`` returns: tensors in tuples, lists, mappings or dataclasses
Artifact = Any  # a polars DataFrame, an ndarray, a mapping of ndarrays, or JSON
SubjectWeights = Mapping[str, float]

if TYPE_CHECKING:
    Modules = Mapping[str, nn.Module]
    Payload = Mapping[str, np.ndarray]
else:
    Modules = Mapping
    Payload = Mapping


@dataclass(frozen=True)
class Fit:
    """One training: a split, a seed, a stage, a method, and perhaps an earlier fit to start from.

    Args:
        name: Unique in the run and its folder below ``fits/``: "final", "seed-1/fold-3".
        split: Rows of the index for training, validation and test.
        seed: Seed of initialisation, shuffling and every draw of this fit.
        stage: Key of the config's ``stages`` section whose values override the config.
        method: Row in the result tables; "" is the pipeline's own name.
        overrides: Config values of this fit alone, dotted keys, validated by the runtime.
        starts_from: Name of an earlier fit of the run whose best weights are the start.
        carries: Modules copied strictly from there; empty means all names that both have.
    """

    name: str
    split: Split
    seed: int
    stage: str = "train"
    method: str = ""
    overrides: Mapping[str, JSON] = field(default_factory=dict)
    starts_from: str | None = None
    carries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """How a metric is called, read and compared.

    Args:
        title: Words for tables.
        unit: Unit, "" where there is none; "%" metrics are stored as fractions.
        better: Which direction is better.
        headline: Whether differences to the baselines are tested and it may head the report.
        margin: Differences up to this size count as equal in ``compare``.
        pooled: For metrics that are no mean over subjects: payload and subject weights to a value.
    """

    title: str
    unit: str
    better: Literal["higher", "lower"]
    headline: bool = False
    margin: float = 0.0
    pooled: Callable[[Payload, SubjectWeights], float] | None = None


@dataclass(frozen=True)
class FitResult:
    """What a finished fit tells the fits after it."""

    best_epoch: int
    last_epoch: int
    best_metric: float | None
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)


Earlier = Mapping[str, FitResult]


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule that the loop steps.

    Args:
        scheduler: A ``torch.optim.lr_scheduler`` object.
        every: Whether it is stepped after each optimizer step or after each epoch.
        metric: Name of the validation metric that ``step`` takes (plateau schedules).
    """

    scheduler: Any
    every: Literal["step", "epoch"] = "epoch"
    metric: str | None = None


class Task(Protocol):
    """Model, objective, optimizers and data order of one fit.

    The loop reads ``schedules`` ({}), ``accumulates`` (True), ``validate``, ``finish`` and
    ``artifacts`` too where a task has them; without them it takes the empty defaults. Their
    forms are in :class:`FullTask`.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]

    def epochs(self) -> int:
        """Number of epochs; 0 is allowed (probes, frozen or published models)."""
        ...

    def batches(self, epoch: int, draw: Draw) -> Sequence[Sequence[int]]:
        """Global batches of items in their order; the loop shards each over the processes."""
        ...

    def load(self, items: Sequence[int], epoch: int, draw: Draw) -> Batch:
        """Items to tensors, augmented; parameters of augmentations are drawn by item id."""
        ...

    def train_step(self, batch: Batch, ctx: StepContext) -> Mapping[str, Tensor]:
        """Losses, ``ctx.backward`` and ``ctx.step`` in any order; returns values to log."""
        ...


class FullTask(Task, Protocol):
    """A task with every optional member."""

    schedules: Mapping[str, Schedule]
    accumulates: bool

    def validate(self, ctx: EpochContext) -> Mapping[str, float]:
        """Metrics on the validation part; never sees test subjects."""
        ...

    def finish(self, ctx: EpochContext) -> None:
        """After the last epoch: probe weights, thresholds, statistics of the training part."""
        ...

    def artifacts(self) -> Mapping[str, Artifact]:
        """Tables, arrays and JSON fitted on training data, saved with the fit."""
        ...


class Trained(Protocol):
    """The finished fits of a run."""

    @property
    def fits(self) -> Sequence[Fit]:
        """Finished fits in order, with their splits."""
        ...

    @property
    def final(self) -> str:
        """Name of the fit that predicts."""
        ...

    def modules(self, fit: str) -> Mapping[str, nn.Module]:
        """The best modules of a fit, in evaluation mode on the run's device."""
        ...

    def facts(self, fit: str) -> Facts:
        """The facts that the fit was trained with."""
        ...

    def artifacts(self, fit: str) -> Mapping[str, Artifact]:
        """What the fit's task left; for ``method/fit`` also a baseline's artifacts."""
        ...


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure for the report."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of units, and what pooled metrics, pictures and the report need beside them.

    Args:
        rows: Columns table, condition, subject, unit, method, metric (strings), value (float,
            null where undefined), fit (string). Table "" and condition "" are the headline.
            Within a subject the runtime averages units first, then fits (seeds).
        payload: Arrays keyed by (table, condition, method); axis 0 aligned with "subject".
        artifacts: Fitted baselines: method -> fit -> artifacts.
        files: Tables and JSON written to ``evaluation/`` under these names.
        notes: Sentences and ``KEY=VALUE`` strings that go under the verdict.
        findings: Head the report; an error among them makes ``demo`` exit with 4.
    """

    rows: pl.DataFrame
    payload: Mapping[tuple[str, str, str], Payload] = field(default_factory=dict)
    artifacts: Mapping[str, Mapping[str, Mapping[str, Artifact]]] = field(default_factory=dict)
    files: Mapping[str, Artifact] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class Exportable:
    """One graph that can be exported.

    Args:
        module: In evaluation mode; positional tensor inputs.
        examples: Example inputs, by input name, in the order of ``forward``.
        outputs: Names of the outputs.
        dynamic_axes: Input name -> axes that may vary -> their names.
        formats: Formats that this graph supports.
        tolerance: Largest relative difference to PyTorch that is accepted.
    """

    module: nn.Module
    examples: Mapping[str, Tensor]
    outputs: tuple[str, ...] = ("output",)
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    formats: tuple[str, ...] = ("onnx", "pt2")
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Weights:
    """A published checkpoint: config overrides, facts, and tensors by module name."""

    overrides: Mapping[str, JSON]
    facts: Facts
    tensors: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Verb:
    """A domain verb beside the common ones; the fields of ``options`` become flags."""

    help: str
    takes: Literal["run", "data", "nothing"]
    run: Callable[[Config, Trained | Path | None, Any], Findings]
    options: type[BaseModel]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline as the runtime sees it. Callables that a wheel does not offer are None.

    Args:
        name: Word of the command line and of the result tables.
        title: One line for ``diptych list``.
        subject: The domain's word for the independent source: "patient", "participant".
        config: Pydantic model of the whole config.
        metrics: Metrics by name, in the order of the tables.
        check: (config, data) -> findings, before anything expensive.
        prepare: (config, data, target) -> prepared folder.
        plan: (config, prepared) -> the run's fits in order; pure.
        modules: (config, facts, fit) -> fresh modules, from facts alone.
        build: (config, prepared, fit, modules, earlier) -> task.
        evaluate: (config, prepared, trained) -> evaluation of the model and of trained baselines.
        sample: (folder, seed) writes the embedded sample.
        baselines: Method -> evaluation of a baseline without a training loop, over all fits.
        predict: (config, trained, input, output) -> findings.
        weights: (config, file) -> published weights.
        pictures: (config, prepared, evaluation) -> figures for the report.
        export: (config, trained, prepared or None) -> exportable graphs by part name.
        verbs: Domain verbs.
    """

    name: str
    title: str
    subject: str
    config: type[BaseModel]
    metrics: Mapping[str, Metric]
    check: Callable[[Config, Path], Findings]
    prepare: Callable[[Config, Path, Path], Prepared]
    plan: Callable[[Config, Prepared], Sequence[Fit]]
    modules: Callable[[Config, Facts, Fit], Mapping[str, nn.Module]]
    build: Callable[[Config, Prepared, Fit, Modules, Earlier], Task]
    evaluate: Callable[[Config, Prepared, Trained], Evaluation]
    sample: Callable[[Path, int], None]
    baselines: Mapping[str, Callable[[Config, Prepared, Trained], Evaluation]] = field(
        default_factory=dict
    )
    predict: Callable[[Config, Trained, Path, Path], Findings] | None = None
    weights: Callable[[Config, Path], Weights] | None = None
    pictures: Callable[[Config, Prepared, Evaluation], Sequence[Picture]] | None = None
    export: Callable[[Config, Trained, Prepared | None], Mapping[str, Exportable]] | None = None
    verbs: Mapping[str, Verb] = field(default_factory=dict)


def lazy(target: str) -> Callable[..., Any]:
    """A function that imports ``module:name`` when it is first called.

    Args:
        target: "package.module:function".

    Returns:
        A callable that passes everything on.
    """
    module, name = target.split(":")

    def call(*args: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **keywords)

    call.__name__ = name
    call.__qualname__ = name
    return call
