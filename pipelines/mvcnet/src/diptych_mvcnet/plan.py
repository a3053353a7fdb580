"""The fits of a run: a network for each split, seed and trained baseline, then those that predict.

Names: ``seed-1/S-0a1b2c3d`` (the tested subject), ``seed-1/S-0a1b2c3d/fold-2`` where it has several
folds, ``seed-1/fold-2`` where a fold tests several subjects, ``.../ifnet`` for a trained baseline,
``.../inner`` for the fit that chooses its number of epochs; ``final`` and ``final-<subject>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diptych.contract import Fit
from diptych.split import Split
from diptych_mvcnet.config import CLOSED_FORM_BASELINES, MVCNetConfig
from diptych_mvcnet.split import PER_SUBJECT, ProtocolSplit, inner_validation, make_splits

if TYPE_CHECKING:
    import polars as pl

    from diptych.prepared import Prepared

INNER_STAGE = "inner"


def plan(config: MVCNetConfig, prepared: Prepared) -> list[Fit]:
    """All fits of a run in their order.

    Args:
        config: The run's configuration.
        prepared: Its data; only the index is read.

    Returns:
        Fits that choose epochs (``train.inner_validation``), fits that are scored, and the fits
        that predict. The trained baselines see the same splits.
    """
    splits = splits_of(config, prepared.index)
    finals = _finals(config, prepared.index, splits)
    scored = [
        Fit(_name(config, split, splits, seed), _plain(split), seed)
        for seed in config.run.seeds
        for split in splits
    ]
    networks = [name for name in config.evaluate.baselines if name not in CLOSED_FORM_BASELINES]
    fits = scored + finals
    fits += [
        replace(fit, name=f"{fit.name}/{method.replace(':', '-')}", method=method)
        for method in networks
        for fit in fits
        if fit.split.test
    ]
    if not config.train.inner_validation:
        return fits
    inner = [
        replace(
            fit,
            name=f"{fit.name}/{INNER_STAGE}",
            stage=INNER_STAGE,
            split=inner_validation(prepared.index, fit.split.train),
        )
        for fit in fits
        if fit.split.test  # the others train as long as these did in the median
    ]
    return inner + fits


def splits_of(config: MVCNetConfig, index: pl.DataFrame) -> list[ProtocolSplit]:
    """The splits that section ``split`` means.

    Args:
        config: The run's configuration.
        index: Rows of the prepared data.

    Returns:
        As :func:`diptych_mvcnet.split.make_splits`.
    """
    return make_splits(
        index,
        config.split.kind,
        folds=config.split.folds,
        train_fraction=config.split.fractions[0],
        gap_trials=config.split.gap_trials,
        parity_class_sorted=config.split.parity_class_sorted,
    )


def _name(
    config: MVCNetConfig, split: ProtocolSplit, splits: Sequence[ProtocolSplit], seed: int
) -> str:
    if len(splits) == 1 and not split.subject:
        return "final" if seed == config.run.seeds[0] else f"seed-{seed}/hold-out"
    several = any(other.fold > 1 and other.subject == split.subject for other in splits)
    parts = [f"seed-{seed}", split.subject]
    if several or not split.subject:
        parts.append(f"fold-{split.fold}")
    return "/".join(part for part in parts if part)


def _finals(
    config: MVCNetConfig, index: pl.DataFrame, splits: Sequence[ProtocolSplit]
) -> list[Fit]:
    """The fits that ``predict`` uses, on all trials; a user's own hold-out split has its own."""
    if len(splits) == 1 and not splits[0].subject:
        return []
    seed = config.run.seeds[0]
    usable = index.with_row_index("_row")
    if "rejected" in usable.columns:
        usable = usable.filter(~usable["rejected"])
    fits = [Fit("final", Split(train=tuple(usable["_row"].to_list())), seed)]
    if config.split.kind in PER_SUBJECT:
        epochs = min(config.train.epochs, config.train.group_epochs)
        fits = [replace(fits[0], overrides={"train.epochs": epochs})]
        for subject in usable["subject"].unique(maintain_order=True):
            rows = usable.filter(usable["subject"] == subject)["_row"].to_list()
            fits.append(Fit(f"final-{subject}", Split(train=tuple(rows)), seed))
    return fits


def _plain(split: ProtocolSplit) -> Split:
    return Split(split.train, split.validation, split.test, split.disjoint_by)
