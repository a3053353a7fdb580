"""The fits of a run: for each seed the stages one after another, and the trained baselines.

Names: ``stage-1`` then ``final`` for the first seed of a hold-out split, ``seed-2/stage-1`` and
``seed-2/final`` for further ones, ``seed-1/fold-3/stage-1`` ... in a cross-validation, whose
``stage-1`` and ``final`` train on everyone. A trained baseline is ``.../final/aniso``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.config import resolve
from diptych.contract import Fit
from diptych.split import Split
from diptych_pirads.config import TRAINED_BASELINES, PiradsConfig
from diptych_pirads.split import everyone, splits_of

if TYPE_CHECKING:
    from diptych.prepared import Prepared

FINAL = "final"


def plan(config: PiradsConfig, prepared: Prepared) -> list[Fit]:
    """All fits of a run in their order.

    Args:
        config: The run's configuration.
        prepared: Its data; only the index is read.

    Returns:
        For each split and seed the stages of `train.stages`, the last of them scored, and one fit
        a trained baseline with as many epochs as the stages together; `final` comes last. After a
        cross-validation it trains its whole schedule, whose last epochs are the best by design:
        half a one-cycle schedule would be another one.
    """
    splits = splits_of(config.split, prepared.index)
    several = len(splits) > 1
    first = config.run.seeds[0]
    fits: list[Fit] = []
    for seed in config.run.seeds:
        for number, split in enumerate(splits, 1):
            own = [f"seed-{seed}"] * (several or seed != first) + [f"fold-{number}"] * several
            fits += _stages(config, "/".join(own), split, seed)
            fits += _trained_baselines(config, "/".join(own), split, seed)
    if several:
        fits += _stages(config, "", everyone(prepared.index), first)
    return sorted(fits, key=lambda fit: fit.name == FINAL)


def is_scored(fit: Fit, config: PiradsConfig) -> bool:
    """Whether a fit's test part is scored: earlier stages' and empty ones are not."""
    return bool(fit.split.test) and fit.stage not in config.train.stages[:-1]


def _stages(config: PiradsConfig, prefix: str, split: Split, seed: int) -> list[Fit]:
    names = [*config.train.stages[:-1], FINAL]
    names = [f"{prefix}/{name}".lstrip("/") for name in names]
    before = [None, *names[:-1]]
    return [
        Fit(name, split, seed, stage=stage, starts_from=earlier)
        for name, stage, earlier in zip(names, config.train.stages, before, strict=True)
    ]


def _trained_baselines(config: PiradsConfig, prefix: str, split: Split, seed: int) -> list[Fit]:
    wanted = config.evaluate.baselines
    stages = [Fit("", split, seed, stage=stage) for stage in config.train.stages]
    epochs = sum(resolve(config, fit).train.epochs for fit in stages)
    return [
        Fit(
            f"{prefix}/{FINAL}/{name}".lstrip("/"),
            split,
            seed,
            method=name,
            overrides={"model.name": name, "train.epochs": epochs},
        )
        for name in TRAINED_BASELINES
        if (wanted is None or name in wanted) and name != config.model.name
    ]
