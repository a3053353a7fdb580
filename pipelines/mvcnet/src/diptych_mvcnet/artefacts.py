"""Whether eyes or muscles could carry the decision: accuracy from places and bands of their own.

Imagery of a hand shows over the central electrodes below 30 Hz. What can be decoded from frontal
electrodes alone may be eye movement, from temporal ones or above 30 Hz alone may be muscle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from diptych.contract import Fit
from diptych.findings import Finding
from diptych_mvcnet import baselines
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.metrics import chance_bound
from diptych_mvcnet.parts import about, labels, testing_part, training_part, trials

if TYPE_CHECKING:
    from diptych.prepared import Prepared

REGIONS = {
    "central": ("FC", "C", "CP"),
    "frontal": ("FP", "AF", "F"),
    "temporal": ("FT", "T", "TP"),
}
HIGH_BAND_HZ = (30.0, 45.0)
_METHOD = "logvar_lda"


def region_of(ch_name: str) -> str:
    """The region of an electrode by the letters of its name.

    Args:
        ch_name: Such as "C3", "Fp1", "POz".

    Returns:
        "central", "frontal", "temporal" or "other".
    """
    letters = ch_name.rstrip("0123456789hzZ").upper()
    return next((name for name, known in REGIONS.items() if letters in known), "other")


def artefact_table(config: MVCNetConfig, prepared: Prepared, fits: Sequence[Fit]) -> pl.DataFrame:
    """Accuracy of log band power and LDA from each region and from 30-45 Hz, on the same splits.

    Args:
        config: The configuration.
        prepared: The data.
        fits: Fits with training and test rows.

    Returns:
        One row a source: source, channels (number), accuracy over all test trials (null where it
        could not be measured), chance_bound, above_chance, note.
    """
    names = list(prepared.facts["ch_names"])
    region = np.array([region_of(name) for name in names])
    sources = {f"{name} channels alone": np.flatnonzero(region == name) for name in REGIONS}
    rows = [
        _measured(name, config, prepared, fits, chosen, None)
        if len(chosen)
        else _unmeasured(name, "no such channel")
        for name, chosen in sources.items()
    ]
    low, high = HIGH_BAND_HZ
    name = f"{low:g}-{high:g} Hz alone"
    band = prepared.facts["filter"]["band"]
    top = min(band[1] if band else np.inf, prepared.facts["sfreq"] / 2)
    everywhere = np.arange(len(names))
    rows.append(
        _measured(name, config, prepared, fits, everywhere, HIGH_BAND_HZ)
        if top > high
        else _unmeasured(name, f"the prepared data end at {top:g} Hz")
    )
    return pl.DataFrame(
        rows,
        schema={
            "source": pl.String,
            "channels": pl.Int64,
            "accuracy": pl.Float64,
            "chance_bound": pl.Float64,
            "above_chance": pl.Boolean,
            "note": pl.String,
        },
    )


def suspicion(table: pl.DataFrame) -> list[Finding]:
    """Warnings about sources outside the centre, or above 30 Hz, that are decoded above chance.

    Args:
        table: From :func:`artefact_table`.

    Returns:
        One finding a suspicious source.
    """
    suspicious = table.filter(pl.col("above_chance") & ~pl.col("source").str.starts_with("central"))
    return [
        Finding(
            "warning",
            "artefact.suspected",
            row["source"],
            f"accuracy {row['accuracy']:.3f}, above the chance bound {row['chance_bound']:.3f}",
            "eyes or muscles may carry the decision: look at these channels, reject such trials "
            "with data.reject.peak_uv, or leave the channels out with data.channels",
        )
        for row in suspicious.iter_rows(named=True)
    ]


def _measured(
    name: str,
    config: MVCNetConfig,
    prepared: Prepared,
    fits: Sequence[Fit],
    channels: np.ndarray,
    band: tuple[float, float] | None,
) -> dict[str, Any]:
    right = count = 0
    settings = about(prepared.facts)
    settings["ch_names"] = [settings["ch_names"][channel] for channel in channels]
    for fit in fits:
        train, test = (
            _seen(prepared, rows, channels, band) for rows in (fit.split.train, fit.split.test)
        )
        aligned, references = training_part(config, prepared.index, fit, train)
        y = labels(prepared, fit.split.train)
        estimator = baselines.fit_baseline(_METHOD, aligned, y, **settings)
        x = testing_part(config, prepared.index, fit, test, references)
        decided = estimator.predict(x.astype(np.float64))
        right += int((decided == labels(prepared, fit.split.test)).sum())
        count += len(x)
    if not count:
        return _unmeasured(name, "no fit has training and test trials")
    bound = chance_bound(count, len(prepared.facts["classes"]))
    return {
        "source": name,
        "channels": len(channels),
        "accuracy": right / count,
        "chance_bound": bound,
        "above_chance": right / count > bound,
        "note": "",
    }


def _seen(
    prepared: Prepared,
    rows: Sequence[int],
    channels: np.ndarray,
    band: tuple[float, float] | None,
) -> np.ndarray:
    x = trials(prepared, rows)[:, channels]
    if band is None:
        return x
    return baselines.band_pass(x, band, float(prepared.facts["sfreq"])).astype(np.float32)


def _unmeasured(name: str, why: str) -> dict[str, Any]:
    return {
        "source": name,
        "channels": 0,
        "accuracy": None,
        "chance_bound": None,
        "above_chance": None,
        "note": why,
    }
