"""One intensity scale for all scanners, learnt on the training part (Nyul and Udupa 1999).

What depends on the training part belongs to a fit, never to prepared data: those hold the usual
percentile normalisation, and the fit's scale is laid over it wherever a study is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from diptych_pirads.prepare import PreparedStudy, crop_image
from diptych_pirads.store import study

if TYPE_CHECKING:
    from diptych.prepared import Prepared
    from diptych_pirads.config import PiradsConfig

ARTIFACT = "scale"  # name among a fit's artifacts
STANDARD = "standard"
LANDMARKS = tuple(range(10, 100, 10))  # percentiles between the two that normalisation fixes
QUANTITATIVE = ("adc",)  # its numbers mean the same everywhere


def training_scale(
    config: PiradsConfig, prepared: Prepared, rows: Sequence[int]
) -> dict[str, ndarray]:
    """The scale that the configuration asks for; empty for other normalisations than "nyul".

    Args:
        config: `data.normalize.mode` counts.
        prepared: Prepared studies.
        rows: The training part.
    """
    if config.data.normalize.mode != "nyul":
        return {}
    facts = prepared.facts
    return fit_scale((study(prepared, row) for row in rows), facts["channels"], facts["size"])


def fit_scale(
    studies: Iterable[PreparedStudy], channels: Sequence[str], size: Sequence[int]
) -> dict[str, ndarray]:
    """The mean histogram landmarks of a training set.

    Args:
        studies: The training part; one at a time is looked at.
        channels: Names of the image channels.
        size: Voxels of the crop along z, y, x whose intensities count.

    Returns:
        "standard" (C, 11): the landmarks of each channel, from 0 to 1; NaN for channels that stay
        as they are.
    """
    each = [_landmarks(one, size) for one in studies]
    standard = np.full((len(channels), len(LANDMARKS) + 2), np.nan)
    for c, name in enumerate(channels):
        known = [rows[c] for rows in each if np.isfinite(rows[c]).all()]
        if known and name not in QUANTITATIVE:
            standard[c] = np.mean(known, axis=0)
    return {STANDARD: standard}


def standardized(
    one: PreparedStudy, scale: Mapping[str, ndarray], size: Sequence[int]
) -> PreparedStudy:
    """A study on a training set's scale.

    Args:
        one: As it was prepared.
        scale: From `fit_scale`; empty where another normalisation was chosen.
        size: As in `fit_scale`.

    Returns:
        The study, its intensities mapped piecewise linearly so that its landmarks are the
        standard ones; 0 and 1 stay.
    """
    if not scale:
        return one
    image = np.array(one.image.array, np.float32)
    pairs = zip(image, _landmarks(one, size), scale[STANDARD], strict=True)
    for channel, own, standard in pairs:
        if np.isfinite(own).all() and np.isfinite(standard).all():
            channel[:] = np.interp(channel, own, standard)
    return replace(one, image=one.image.with_array(image))


def _landmarks(one: PreparedStudy, size: Sequence[int]) -> Float[ndarray, "c 11"]:
    """Landmarks of each channel where prediction starts; NaN for a channel without contrast."""
    crop = crop_image(one, one.center, size).array
    found = np.full((len(crop), len(LANDMARKS) + 2), np.nan)
    for row, channel in zip(found, crop, strict=True):
        inside = channel[(channel > 0) & (channel < 1)]  # neither padding nor clipped
        if inside.size:
            row[:] = [0.0, *np.percentile(inside.astype(np.float64), LANDMARKS), 1.0]
    return found
