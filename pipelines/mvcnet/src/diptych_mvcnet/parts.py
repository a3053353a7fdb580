"""The aligned trials of a fit's parts, session by session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Float

from diptych.contract import Facts, Fit
from diptych_mvcnet.align import References, align_training, training_references
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.task import aligned_test_trials

if TYPE_CHECKING:
    from diptych.prepared import Prepared


def training_part(
    config: MVCNetConfig, index: pl.DataFrame, fit: Fit, x: Float[np.ndarray, "n c t"]
) -> tuple[Float[np.ndarray, "n c t"], References]:
    """Training trials aligned as the network's were, and the references of their sessions.

    Args:
        config: The configuration.
        index: Rows of the data.
        fit: Whose training part it is.
        x: Its trials, in the order of ``fit.split.train``.

    Returns:
        Aligned trials in the same order, and the references.
    """
    chosen = index[list(fit.split.train)]
    subjects, sessions = chosen["subject"].to_list(), chosen["session"].to_list()
    references = training_references(x, subjects, sessions)
    return align_training(x, subjects, sessions, references, config.align), references


def testing_part(
    config: MVCNetConfig,
    index: pl.DataFrame,
    fit: Fit,
    x: Float[np.ndarray, "n c t"],
    references: References,
) -> Float[np.ndarray, "n c t"]:
    """Test trials of a fit, aligned session by session in their order.

    Args:
        config: The configuration.
        index: Rows of the data.
        fit: Whose test part it is.
        x: Its trials, in the order of ``fit.split.test``.
        references: Of the fit's training part.

    Returns:
        Aligned trials in the same order.
    """
    if not fit.split.train:
        config = for_strangers(config)
    index = index[list(fit.split.test)].with_columns(row=pl.int_range(len(x)))
    return aligned_test_trials(x, index, references, config).x.numpy()


def for_strangers(config: MVCNetConfig) -> MVCNetConfig:
    """The configuration for people and sessions without training trials: "auto" means online.

    Args:
        config: The run's configuration, whatever its protocol.

    Returns:
        The same with ``align.test`` decided and without the official double alignment.
    """
    mode = "online" if config.align.test == "auto" else config.align.test
    align = config.align.model_copy(update={"test": mode, "parity_double": False})
    return config.model_copy(update={"align": align})


def scored_fits(fits: Sequence[Fit], index: pl.DataFrame) -> list[Fit]:
    """The fits that have something to test, without rejected trials in their test parts.

    Args:
        fits: Finished fits.
        index: Rows of the data.

    Returns:
        Fits in the same order.
    """
    rejected = index["rejected"].to_numpy() if "rejected" in index.columns else None
    kept = []
    for fit in fits:
        test = fit.split.test
        if rejected is not None:
            test = tuple(row for row in test if not rejected[row])
        if test:
            kept.append(replace(fit, split=replace(fit.split, test=test)))
    return kept


def trials(prepared: Prepared, rows: Sequence[int]) -> Float[np.ndarray, "n c t"]:
    """Trials of the prepared data, in memory."""
    return np.asarray(prepared.array("epochs")[list(rows)])


def labels(prepared: Prepared, rows: Sequence[int]) -> np.ndarray:
    """Class numbers of rows."""
    return prepared.index["y"].to_numpy()[list(rows)]


def about(facts: Facts) -> dict[str, Any]:
    """What a closed-form baseline must know of the data."""
    return {
        "sfreq": float(facts["sfreq"]),
        "ch_names": list(facts["ch_names"]),
        "classes": list(facts["classes"]),
    }
