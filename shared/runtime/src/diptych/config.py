"""The common sections of every pipeline's configuration, and how a configuration is read.

Precedence: defaults < recipe < ``--config`` file < ``--set`` < a fit's overrides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """Which input files are used."""

    exclude: tuple[str, ...] = Field((), description="Glob patterns of files to leave out.")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="What a file-level error does: stop, or leave the file out."
    )


class PredictSection(Section):
    """Which model predicts."""

    subject: str | None = Field(None, description="Subject whose own model predicts.")


class TrainSection(Section):
    """The training loop."""

    epochs: NonNegativeInt = Field(60, description="Epochs of training.")
    batch: PositiveInt = Field(64, description="Items in a global batch.")
    accumulate: PositiveInt = Field(1, description="Batches that share an optimizer step.")
    clip: PositiveFloat | None = Field(None, description="Largest gradient norm.")
    patience: PositiveInt | None = Field(
        None, description="Epochs without a better metric before training stops."
    )
    metric: str | None = Field(None, description="Validation metric that chooses the best epoch.")
    checkpoint_minutes: PositiveFloat = Field(5.0, description="Minutes between checkpoints.")
    stages: tuple[str, ...] = Field(("train",), description="Stages to train, in order.")


class OptimSection(Section):
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optimizer.")
    lr: PositiveFloat = Field(1e-3, description="Learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate over epochs.")


class SplitSection(Section):
    """How subjects are divided."""

    kind: str = Field("loso", description="Protocol.")
    folds: PositiveInt = Field(5, description="Folds of a cross-validation.")
    fractions: tuple[float, ...] = Field((0.8,), description="Parts of a hold-out split.")
    file: Path | None = Field(None, description="CSV with subject and fold or split columns.")
    seed: int = Field(0, description="Seed of the split; run.seeds never changes it.")
    allow_leakage: bool = Field(False, description="Go on although parts overlap; said in red.")
    transductive: bool = Field(False, description="Label-free stages may see test subjects.")


class RunSection(Section):
    """Where and how the run computes; changes no result except through seeds and precision."""

    seeds: tuple[int, ...] = Field((1,), min_length=1, description="Seeds; each trains anew.")
    threads: PositiveInt | None = Field(None, description="CPU threads of a process.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Device.")
    devices: PositiveInt = Field(1, description="Processes on this machine.")
    nodes: PositiveInt = Field(1, description="Machines.")
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = Field(
        "32-true", description="Floating-point precision of training."
    )
    workers: NonNegativeInt = Field(0, description="Processes that load batches.")
    deterministic: bool = Field(False, description="Only deterministic operations.")
    parallel_fits: PositiveInt = Field(1, description="Independent fits that run side by side.")
    pseudonym_key: Path | None = Field(None, description="File that keeps pseudonyms stable.")
    debug: bool = Field(False, description="Check every tensor for values that are not finite.")
    track: tuple[Literal["csv", "tensorboard", "mlflow", "wandb"], ...] = Field(
        ("csv",), description="Where the training curves go."
    )


def defaults(config: BaseModel) -> dict[str, Any]:
    """A configuration as plain JSON values, in the order of its fields."""
    return config.model_dump(mode="json")
