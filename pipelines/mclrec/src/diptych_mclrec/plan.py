"""The fits of a run: for each seed the model, and SASRec beside it.

Names: ``final`` and ``final/sasrec`` for the first seed, ``seed-2/final`` and
``seed-2/final/sasrec`` for further ones. All share one split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.contract import JSON, Fit
from diptych_mclrec.config import FULL_UP_TO, MCLRecConfig
from diptych_mclrec.fitting import divide
from diptych_mclrec.store import load

if TYPE_CHECKING:
    from diptych.prepared import Prepared

FINAL, SASREC = "final", "sasrec"
SASREC_BATCH = 128  # sequences, where the model's batch is one of prefixes


def plan(config: MCLRecConfig, prepared: Prepared) -> list[Fit]:
    """All fits of a run in their order.

    Args:
        config: The run's configuration.
        prepared: Its events, which are filtered and divided to count the items.

    Returns:
        SASRec where ``evaluate.baselines`` has it and anything is trained at all; then the model.
        ``final`` comes last.
    """
    parts = divide(load(prepared), config)
    items = {"model.items": parts.fitted.catalogue.size}
    wanted = config.evaluate.baselines
    beside = (wanted is None or SASREC in wanted) and config.objective.kind != SASREC
    fits = []
    for seed in config.run.seeds:
        name = FINAL if seed == config.run.seeds[0] else f"seed-{seed}/{FINAL}"
        if beside and config.train.epochs:
            own = {**items, **_sasrec(config, items["model.items"])}
            fits.append(Fit(f"{name}/{SASREC}", parts.rows, seed, method=SASREC, overrides=own))
        fits.append(Fit(name, parts.rows, seed, overrides=items))
    return sorted(fits, key=lambda fit: fit.name == FINAL)


def _sasrec(config: MCLRecConfig, items: int) -> dict[str, JSON]:
    """The same encoder on whole sequences with full cross-entropy, as far as that is feasible."""
    overrides: dict[str, JSON] = {
        "objective.kind": SASREC,
        "objective.unit": "sequence",
        "objective.loss": "full" if items <= FULL_UP_TO else "auto",
        "objective.pad_in_softmax": False,
    }
    if config.objective.unit == "prefix":
        overrides["train.batch"] = min(config.train.batch, SASREC_BATCH)
    return overrides
