"""The common sections of every pipeline's configuration, and how a configuration is read.

Precedence: defaults < recipe < ``--config`` file < ``--set`` < a stage's < a fit's overrides.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.fields import FieldInfo

from diptych.configfile import (
    STAGES,
    Settings,
    build,
    default_values,
    dotted,
    leaves,
    read_file,
    read_mapping,
    read_option,
    value_field,
    values_of,
)

if TYPE_CHECKING:
    from diptych.contract import Fit

Model = TypeVar("Model", bound=BaseModel)
AT_PREDICT: dict[str, JsonValue] = {"at_predict": True}  # may change once a model is trained


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """Which input files are used."""

    exclude: tuple[str, ...] = Field(
        (), description="Glob patterns of files to leave out.", json_schema_extra=AT_PREDICT
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="What a file-level error does: stop, or leave the file out (predict always "
        "goes on).",
        json_schema_extra=AT_PREDICT,
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
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate over epochs."
    )


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
    parallel_fits: PositiveInt | Literal["auto"] = Field(
        1, description="Independent fits side by side; auto: one a CPU core, at most 8."
    )
    pseudonym_key: Path | None = Field(None, description="File that keeps pseudonyms stable.")
    debug: bool = Field(False, description="Check every tensor for values that are not finite.")
    track: tuple[Literal["csv", "tensorboard", "mlflow", "wandb"], ...] = Field(
        ("csv",), description="Where the training curves go."
    )


Stages = dict[str, dict[str, Any]]  # the ``stages`` section: stage -> values of that stage's fits


class EvaluateSection(Section):
    """What is scored beside the model."""

    baselines: tuple[str, ...] | None = Field(
        None, description="Baselines printed beside the model; null: all."
    )


class PipelineConfig(Section):
    """The sections that every pipeline has; a pipeline replaces those it extends."""

    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    split: SplitSection = SplitSection()
    evaluate: EvaluateSection = EvaluateSection()
    predict: PredictSection = PredictSection()
    run: RunSection = RunSection()
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Values of single stages, by dotted key."
    )


def recipes_folder(model: type[BaseModel]) -> Path:
    """Where the recipes of a pipeline lie: ``recipes/`` beside its ``config.py``."""
    return Path(str(sys.modules[model.__module__].__file__)).parent / "recipes"


def list_recipes(folder: Path) -> dict[str, str]:
    """The recipes of a folder by name, each with its first comment line."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = next((line for line in lines if line.startswith("#")), "")
        found[path.stem] = comment.lstrip("# ").removeprefix(f"{path.stem}:").strip()
    return found


def default_recipe(model: type[BaseModel], wanted: str = "fast") -> str | None:
    """The wanted recipe where the pipeline has it, else "fast", else None: the defaults."""
    known = list_recipes(recipes_folder(model))
    return next((name for name in (wanted, "fast") if name in known), None)


def load(
    model: type[Model],
    *,
    recipe: str | None = None,
    recipes: Path | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
) -> Model:
    """Read a configuration: defaults, then recipe, then file, then single values.

    Args:
        model: The pipeline's configuration model.
        recipe: Name of a recipe; None for the defaults alone.
        recipes: Folder of the recipes; None for the one beside the model's module.
        file: A YAML file of the user's own.
        sets: ``KEY=VALUE`` with dotted keys; values are YAML scalars or lists.

    Raises:
        UsageError: Every problem at once, a line each.

    Example:
        ``load(MVCNetConfig, recipe="fast", sets=["train.epochs=10"])``
    """
    settings = Settings()
    if recipe is not None:
        _read_recipe(recipe, recipes or recipes_folder(model), model, settings)
    if file is not None:
        read_file(file, model, settings)
    for option in sets:
        read_option(option, model, settings)
    return build(model, default_values(model), settings)


def _read_recipe(name: str, folder: Path, model: type[BaseModel], settings: Settings) -> None:
    known = list(list_recipes(folder))
    if name in known:
        read_file(folder / f"{name}.yaml", model, settings, f"recipe {name}")
        return
    from diptych.configwords import nearest

    problem = f"unknown recipe; {nearest(name, known)} (a file of your own goes to --config)"
    settings.problems.append(f"--recipe {name}: {problem}")


def load_yaml(model: type[Model], path: Path) -> Model:
    """Read a configuration from one file, as a run folder keeps it.

    Raises:
        UsageError: The file cannot be read or has wrong values; every problem at once.
    """
    return load(model, file=path)


def dump_yaml(config: BaseModel, header: str = "") -> str:
    """A configuration as commented YAML: every field with meaning, unit, allowed and default.

    Args:
        config: What is written; :func:`load_yaml` gives an equal configuration back.
        header: Words for the first comment lines.
    """
    from diptych.configwords import commented

    return commented(config, header)


def merge(config: Model, overrides: Mapping[str, Any], origin: str = "overrides") -> Model:
    """A configuration with some values changed, validated.

    Args:
        config: Any configuration; it stays as it is.
        overrides: Values by dotted key.
        origin: Where the values stand, for messages.

    Raises:
        UsageError: Every wrong key or value at once.

    Example:
        ``merge(config, {"train.epochs": 3, "model.width": 16})``
    """
    settings = Settings()
    read_mapping(overrides, origin, type(config), settings)
    return build(type(config), values_of(config), settings)


def resolve(config: Model, fit: Fit) -> Model:
    """The configuration of one fit: its stage's values, then the fit's own, laid over it.

    Args:
        config: The run's configuration.
        fit: The fit; ``stages[fit.stage]`` and ``fit.overrides`` apply in this order.
    """
    settings = Settings()
    stage = getattr(config, STAGES, {}).get(fit.stage, {})
    read_mapping(stage, f"{STAGES}.{fit.stage}", type(config), settings)
    read_mapping(fit.overrides, f"fit {fit.name}", type(config), settings)
    return build(type(config), values_of(config), settings)


def override(config: Model, sets: Sequence[str], section: str) -> Model:
    """A trained model's configuration with ``--set`` values that may change after training.

    Args:
        config: The run's configuration.
        sets: ``KEY=VALUE`` with dotted keys.
        section: The verb's own section: "evaluate", "predict" or "export". Allowed are its
            keys, those of ``run``, and fields marked with
            ``json_schema_extra={"at_predict": True}``.

    Raises:
        UsageError: Every wrong or fixed key and every wrong value at once.
    """
    model = type(config)
    settings = Settings()
    for option in sets:
        read_option(option, model, settings)
    marked = [dotted(keys) for keys, info in leaves(model) if extra(info, "at_predict")]
    for setting in settings.items:
        name = dotted(setting.path)
        free = setting.path[0] in (section, "run") or any(
            name == mark or name.startswith(f"{mark}.") for mark in marked
        )
        if not free and value_field(model, tuple(name.split("."))) is not None:
            allowed = ", ".join([f"{section}.*", "run.*", *marked])
            settings.problems.append(
                f"{setting.origin}: {name} is fixed once a model is trained; allowed: {allowed}"
            )
    return build(model, values_of(config), settings)


def extra(info: FieldInfo, key: str) -> Any:
    """What a field declares for the command line: "at_predict", "option", "verbs"; or None."""
    declared = info.json_schema_extra
    return declared.get(key) if isinstance(declared, Mapping) else None


def digest(config: BaseModel) -> str:
    """A hash of everything that decides the results: all sections but ``run``, and its seeds.

    Returns:
        64 hexadecimal digits; equal for equal values.
    """
    kept = values_of(config)
    run = kept.pop("run", {})
    kept["run.seeds"] = run.get("seeds")
    text = json.dumps(kept, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
