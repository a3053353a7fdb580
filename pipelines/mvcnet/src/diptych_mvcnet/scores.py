"""Predictions of several fits -> one value a subject, seed and metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Float

from diptych.contract import Evaluation, Facts
from diptych_mvcnet.metrics import METRICS, above_chance, chance_bound, trial_metrics

if TYPE_CHECKING:
    from diptych.prepared import Prepared


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of a fit on rows of the index."""

    rows: tuple[int, ...]
    proba: Float[np.ndarray, "n k"]
    seed: int


def score(
    method: str, predictions: Sequence[Predictions], prepared: Prepared, *, condition: str = ""
) -> Evaluation:
    """Metrics of every subject and seed, the folds of a seed pooled first.

    Args:
        method: Row in the tables; "" is the pipeline.
        predictions: Of all folds and seeds.
        prepared: Its index holds subjects and labels.
        condition: State under which the method was scored.

    Returns:
        Rows, the payload of the method, and the file ``subjects-<method>``: accuracy of each
        subject, its chance bound and the Holm-adjusted p of being above chance.
    """
    classes = list(prepared.facts["classes"])
    rows = np.concatenate([np.array(part.rows, dtype=int) for part in predictions])
    proba = np.concatenate([part.proba for part in predictions])
    seed = np.concatenate([np.full(len(part.rows), part.seed) for part in predictions])
    y = prepared.index["y"].to_numpy()[rows]
    subject = prepared.index["subject"].to_numpy()[rows].astype(str)
    measured = []
    for name in dict.fromkeys(subject.tolist()):
        for one_seed in np.unique(seed):
            chosen = (subject == name) & (seed == one_seed)
            values = trial_metrics(
                y[chosen], proba[chosen], classes, trial_s=decision_seconds(prepared.facts)
            )
            measured.append(
                {"subject": name, "fit": f"seed-{one_seed}", "n": int(chosen.sum()), **values}
            )
    table = [_row("", condition, entry, method, metric) for entry in measured for metric in METRICS]
    table += _lesion_rows(prepared, condition, measured, method)
    payload = {
        "subject": subject,
        "y": y,
        "probability": proba,
        "fit": np.char.add("seed-", seed.astype(str)),
        "row": rows,
    }
    files = {f"subjects-{method or 'mvcnet'}".replace(":", "-"): _subjects(measured, len(classes))}
    return Evaluation(
        rows=pl.DataFrame(table, schema=_SCHEMA),
        payload={("", condition, method): payload},
        files={} if condition else files,
    )


_SCHEMA = {
    **dict.fromkeys(("table", "condition", "subject", "unit", "method", "metric"), pl.String),
    "value": pl.Float64,
    "fit": pl.String,
}


def _row(
    table: str, condition: str, entry: Mapping[str, Any], method: str, metric: str
) -> dict[str, Any]:
    return {
        "table": table,
        "condition": condition,
        "subject": entry["subject"],
        "unit": "",
        "method": method,
        "metric": metric,
        "value": entry[metric],
        "fit": entry["fit"],
    }


def _lesion_rows(
    prepared: Prepared, condition: str, measured: Iterable[Mapping[str, Any]], method: str
) -> list[dict[str, Any]]:
    """The same values once more by the side of the lesion, where it is known."""
    if "lesion_side" not in prepared.index.columns or condition:
        return []
    known = prepared.index.select("subject", "lesion_side").unique().drop_nulls()
    known = known.filter(pl.col("lesion_side") != "")
    side = dict(known.rows())
    return [
        _row("lesion side", str(side[entry["subject"]]), entry, method, metric)
        for entry in measured
        if entry["subject"] in side
        for metric in METRICS
    ]


def _subjects(measured: Sequence[Mapping[str, Any]], n_classes: int) -> pl.DataFrame:
    columns = ("subject", "fit", "n", "accuracy")
    table = pl.DataFrame([{key: entry[key] for key in columns} for entry in measured])
    return pl.concat(
        of_seed.with_columns(
            chance_bound=pl.Series([chance_bound(n, n_classes) for n in of_seed["n"]]),
            p_above_chance=pl.Series(
                above_chance(
                    [round(a * n) for a, n in of_seed.select("accuracy", "n").rows()],
                    of_seed["n"].to_list(),
                    n_classes,
                )
            ),
        )
        for of_seed in table.partition_by("fit", maintain_order=True)
    )


def decision_seconds(facts: Facts) -> float:
    """Seconds from the cue to a decision: the end of the window, or its length if epoched."""
    window = facts.get("window")
    length = facts["n_times"] / facts["sfreq"]
    return float(max(window[1], length) if window else length)
