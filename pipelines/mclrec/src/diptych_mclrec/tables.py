"""Ranks of one method -> rows of the evaluation, and the tables beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from diptych_mclrec.fitting import Fitted, Policy
from diptych_mclrec.metrics import step_metrics
from diptych_mclrec.queries import DAY, Queries
from diptych_mclrec.scores import HEAD, Ranked

ALL_STEPS, COLD = "all steps", "subjects that training has not seen"
SAMPLED = "{} random items (misleading)"
GAPS = ((7.0, "gap up to 7 days"), (30.0, "8 to 30 days"), (365.0, "31 to 365 days"))
LONGER = "more than 365 days"
LENGTHS = ((5, "up to 5"), (10, "6 to 10"), (20, "11 to 20"))
BINS = 15
EXAMPLES, EXAMPLE_EVENTS, EXAMPLE_TOP = 20, 20, 5
RARE = "rare code"
SUFFIX = {"keep": "_kept", "mask": "_masked"}
SCHEMA = {
    **dict.fromkeys(("table", "condition", "subject", "unit", "method", "metric"), pl.String),
    "value": pl.Float64,
    "fit": pl.String,
}
NAMES = pl.List(pl.String)
EXAMPLE_SCHEMA = pl.Schema(
    {
        "subject": pl.String(),
        "history": NAMES,
        "days": pl.List(pl.Float64),
        "target": NAMES,
        "top": NAMES,
        "rank": pl.Float64(),
    }
)


@dataclass(frozen=True, eq=False)
class Scored:
    """One method's ranks of the steps of one fit.

    Args:
        method: Row in the tables, "" for the model.
        seed: Of the fit.
        queries: The steps.
        ranked: Their ranks.
        fitted: Of the fit.
        policy: Of the headline.
        ks: Cut-offs below the number of items.
        cold: Steps of subjects that training holds nothing of; None where all or none are.
    """

    method: str
    seed: int
    queries: Queries
    ranked: Ranked
    fitted: Fitted
    policy: Policy
    ks: tuple[int, ...]
    cold: Bool[np.ndarray, " Q"] | None = None


def rows(scored: Scored, *, clinical: bool = False, sampled: int = 0) -> pl.DataFrame:
    """Subject means of every table that a method has a row in.

    Args:
        scored: The method's ranks.
        clinical: Whether steps are divided by the time since the step before.
        sampled: Random items of sampled metrics; 0: none.

    Returns:
        The columns of the contract; the unit is the subject.
    """
    queries, ranked = scored.queries, scored.ranked
    last, every = queries.is_last, np.ones(len(queries), bool)
    parts = _block(scored, last, "")
    if not last.all():
        parts += _block(scored, every, ALL_STEPS)
    if clinical and queries.gap is not None:
        for name, inside in gap_groups(queries.gap):
            ranks = ranked.under(scored.policy)
            parts.append(_means(scored, ranks, inside, ALL_STEPS, name))
    if scored.cold is not None and scored.cold.any():
        parts += _block(scored, last & scored.cold, COLD)
    if ranked.sampled is not None:
        parts.append(_means(scored, ranked.sampled, last, SAMPLED.format(sampled)))
    return pl.concat([part for part in parts if part.height] or [_empty()])


def whole_set(scored: Scored, *, is_network: bool) -> pl.DataFrame:
    """Coverage, popularity and novelty of the lists, and calibration: values of the whole set.

    Args:
        scored: The method's ranks.
        is_network: Whether a softmax of the scores is meant as probabilities.
    """
    head = scored.ranked.head[scored.queries.is_last]
    counts = scored.fitted.counts[1:]
    known = head > 0
    share = _below(counts)
    values = {
        f"coverage@{HEAD}": len(np.unique(head[known])) / len(counts),
        f"popularity@{HEAD}": float(share[head[known] - 1].mean()) if known.any() else np.nan,
        f"repeats@{HEAD}": _repeats(scored),
    }
    if is_network:
        bins = calibration(scored)
        weights = bins["steps"].to_numpy()
        error = np.abs(bins["confidence"].to_numpy() - bins["hits"].to_numpy())
        values["ece"] = float((error * weights).sum() / max(weights.sum(), 1))
    names = list(values)
    frame = pl.DataFrame({"metric": names, "value": list(values.values())})
    return _labelled(frame.with_columns(subject=pl.lit("")), scored, "", "")


def strata(scored: Scored) -> list[dict[str, Any]]:
    """HR@10 and NDCG@10 by length of the history and by frequency of the target.

    Args:
        scored: The method's ranks.

    Returns:
        One row a stratum: by, stratum, method, steps, subjects, hr@10, ndcg@10.
    """
    queries = scored.queries
    ranks = scored.ranked.under(scored.policy)
    found = []
    for by, stratum, inside in _strata_masks(queries, scored.fitted):
        chosen = np.where(inside & queries.is_last[:, None], ranks, np.nan)
        steps = int((~np.isnan(chosen)).any(1).sum())
        if not steps:
            continue
        subjects, values = _subject_values(chosen, queries.subject, (HEAD,), scored.fitted.baskets)
        means = {name: float(values[name].mean()) for name in (f"hr@{HEAD}", f"ndcg@{HEAD}")}
        row = {"by": by, "stratum": stratum, "method": scored.method, "fit": scored.seed}
        found.append({**row, "steps": steps, "subjects": len(subjects), **means})
    return found


def calibration(scored: Scored) -> pl.DataFrame:
    """How often the first item is right, by the probability that it is given, in 15 bins.

    Args:
        scored: A network's ranks.

    Returns:
        Columns method, fit, low, high, steps, confidence (mean), hits (share).
    """
    chosen = scored.queries.is_last
    confidence = scored.ranked.confidence[chosen]
    first = scored.ranked.head[chosen, :1]
    right = ((first == scored.queries.targets[chosen]) & (first > 0)).any(1)
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    steps = np.bincount(place, minlength=BINS)
    divisor = np.maximum(steps, 1)
    return pl.DataFrame(
        {
            "method": [scored.method] * BINS,
            "fit": [scored.seed] * BINS,
            "low": np.arange(BINS) / BINS,
            "high": np.arange(1, BINS + 1) / BINS,
            "steps": steps,
            "confidence": np.bincount(place, confidence, BINS) / divisor,
            "hits": np.bincount(place, right, BINS) / divisor,
        }
    )


def shown_names(fitted: Fitted, min_count: int) -> list[str]:
    """Names of items by id as a report may show them; index 0 is nothing.

    Args:
        fitted: Catalogue and kind.
        min_count: Subjects that a clinical code needs to be named.
    """
    rare = (fitted.holders < min_count) & (fitted.kind == "clinical")
    names = ("", *fitted.catalogue.names)
    return [RARE if hidden else name for name, hidden in zip(names, rare, strict=True)]


def neighbours(
    vectors: Float[np.ndarray, "items H"], fitted: Fitted, min_count: int
) -> pl.DataFrame:
    """The items whose vectors lie nearest to those of the most frequent items, by cosine.

    Args:
        vectors: Item vectors, I + 1 rows.
        fitted: Of the fit.
        min_count: As in :func:`shown_names`.

    Returns:
        Columns item, neighbours (names, nearest first), cosine; 20 rows at most.
    """
    names = shown_names(fitted, min_count)
    frequent = 1 + np.argsort(-fitted.counts[1:], kind="stable")[:EXAMPLES]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = unit[frequent] @ unit.T
    cosine[np.arange(len(frequent)), frequent] = cosine[:, 0] = -np.inf
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : min(EXAMPLE_TOP, len(vectors) - 2)]
    return pl.DataFrame(
        {
            "item": [names[item] for item in frequent],
            "neighbours": [[names[item] for item in row] for row in nearest],
            "cosine": np.take_along_axis(cosine, nearest, 1).astype(np.float64).tolist(),
        },
        schema={"item": pl.String, "neighbours": pl.List(pl.String), "cosine": pl.List(pl.Float64)},
    )


def examples(scored: Scored, min_count: int) -> pl.DataFrame:
    """Some histories with what followed and what was expected, by the names of the items.

    Args:
        scored: The model's ranks.
        min_count: As in :func:`shown_names`.

    Returns:
        Columns subject, history (the last items, oldest first), days (how long before the target
        each was, null without times), target, top (the best five), rank (of the best target).
    """
    queries = scored.queries
    last = np.flatnonzero(queries.is_last & (queries.ends > 0))
    spread = np.linspace(0, len(last) - 1, min(EXAMPLES, len(last))).astype(np.int64)
    part = queries.select(last[spread])
    histories, names = part.histories(), shown_names(scored.fitted, min_count)
    ranks = scored.ranked.under(scored.policy)[last[spread]]
    table = part.table
    found = []
    for row, target in enumerate(part.targets):
        first = table.steps[part.subject[row]]
        stop = table.events[first + part.ends[row]]
        start = max(table.events[first], stop - EXAMPLE_EVENTS)
        days = None
        if part.known.times is not None and part.gap is not None:
            before = (part.known.times[stop - 1] - part.known.times[start:stop]) / DAY
            days = [round(float(day + part.gap[row]), 1) for day in before]
        known = ranks[row][~np.isnan(ranks[row])]
        found.append(
            {
                "subject": str(part.known.subjects[part.subject[row]]),
                "history": [names[item] for item in histories[row][start - stop :]],
                "days": days,
                "target": [names[item] for item in target if item > 0],
                "top": [names[i] for i in scored.ranked.head[last[spread[row]]][:EXAMPLE_TOP]],
                "rank": float(known.min()) if len(known) else None,
            }
        )
    return pl.DataFrame(found, schema=EXAMPLE_SCHEMA)


def gap_groups(gap: Float[np.ndarray, " Q"]) -> Iterator[tuple[str, Bool[np.ndarray, " Q"]]]:
    """Steps by the days since the step before."""
    low = -np.inf
    for high, name in (*GAPS, (np.inf, LONGER)):
        yield name, (gap > low) & (gap <= high)
        low = high


def _block(scored: Scored, chosen: NDArray[np.bool_], table: str) -> list[pl.DataFrame]:
    """A table's metrics: under the policy, under the other one, and of repeated and new targets."""
    ranked = scored.ranked
    other: Policy = "keep" if scored.policy == "mask" else "mask"
    found = [
        _means(scored, ranked.under(scored.policy), chosen, table),
        _means(scored, ranked.under(other), chosen, table, suffix=SUFFIX[other]),
    ]
    if scored.policy == "keep" and ranked.repeated[chosen].any():
        old = np.where(ranked.repeated, ranked.kept, np.nan)
        new = np.where(ranked.repeated, np.nan, ranked.kept)
        found.append(_means(scored, old, chosen, table, suffix="_repeat"))
        found.append(_means(scored, new, chosen, table, suffix="_novel"))
    return found


def _means(
    scored: Scored,
    ranks: Float[np.ndarray, "Q G"],
    chosen: NDArray[np.bool_],
    table: str,
    condition: str = "",
    suffix: str = "",
) -> pl.DataFrame:
    """Means over the steps of each subject, one row a subject and metric."""
    part = np.where(chosen[:, None], ranks, np.nan)
    ks = scored.ks if not suffix else tuple(k for k in scored.ks if k == HEAD) or scored.ks[:1]
    subjects, values = _subject_values(part, scored.queries.subject, ks, scored.fitted.baskets)
    if not len(subjects):
        return _empty()
    names = scored.queries.known.subjects[subjects]
    shown = {name: value for name, value in values.items() if name not in _left_out(scored.ks)}
    frame = pl.DataFrame({"subject": names, **shown})
    long = frame.unpivot(index="subject", variable_name="metric", value_name="value")
    return _labelled(long.with_columns(pl.col("metric") + suffix), scored, table, condition)


def _left_out(ks: Sequence[int]) -> set[str]:
    """Metrics that say little beside the others."""
    return {f"{name}@{k}" for name in ("mrr", "recall_all") for k in ks if k != HEAD}


def _labelled(frame: pl.DataFrame, scored: Scored, table: str, condition: str) -> pl.DataFrame:
    return frame.with_columns(
        table=pl.lit(table),
        condition=pl.lit(condition),
        unit=pl.col("subject"),
        method=pl.lit(scored.method),
        fit=pl.lit(f"seed-{scored.seed}"),
    ).select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())


def _empty() -> pl.DataFrame:
    return pl.DataFrame(schema=SCHEMA)


def _subject_values(
    ranks: Float[np.ndarray, "Q G"],
    subject: Int[np.ndarray, " Q"],
    ks: Sequence[int],
    baskets: bool,
) -> tuple[Int[np.ndarray, " S"], Mapping[str, Float[np.ndarray, " S"]]]:
    """The subjects that have a rank, and the mean of each metric over their steps."""
    left = ~np.isnan(ranks).all(1)
    values = step_metrics(ranks[left] if baskets else ranks[left, 0], ks)
    subjects, number = np.unique(subject[left], return_inverse=True)
    sizes = np.bincount(number)
    return subjects, {
        name: np.bincount(number, weights=value) / sizes for name, value in values.items()
    }


def _strata_masks(
    queries: Queries, fitted: Fitted
) -> Iterator[tuple[str, str, Bool[np.ndarray, "Q G"]]]:
    low = -1
    for high, name in (*LENGTHS, (np.iinfo(np.int64).max, "more than 20")):
        inside = (queries.ends > low) & (queries.ends <= high)
        yield "length of the history", name, np.repeat(inside[:, None], queries.targets.shape[1], 1)
        low = high
    third = np.zeros(fitted.catalogue.size + 1, np.int64)
    order = np.argsort(-fitted.counts[1:], kind="stable")
    third[1 + order] = np.arange(fitted.catalogue.size) * 3 // fitted.catalogue.size
    own = third[np.maximum(queries.targets, 0)]
    for number, name in enumerate(("most frequent third", "middle third", "rarest third")):
        yield "frequency of the target", name, (queries.targets > 0) & (own == number)


def _below(counts: NDArray[np.integer]) -> Float[np.ndarray, " items"]:
    """Share of items that are rarer than each."""
    return np.searchsorted(np.sort(counts), counts) / len(counts)


def _repeats(scored: Scored) -> float:
    """Share of the lists that is in the history."""
    part = scored.queries.select(scored.queries.is_last)
    histories = part.histories()
    head = scored.ranked.head[scored.queries.is_last]
    size = scored.fitted.catalogue.size + 1
    keys = np.arange(len(part))[:, None] * size + head
    inside = np.isin(keys, histories.rows * size + histories.items)
    return float(inside[head > 0].mean()) if (head > 0).any() else float("nan")
