"""Prepared studies in memory, drawn, for the tests of crops, training and prediction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from diptych.prepared import Prepared
from diptych_pirads.geometry import Volume
from diptych_pirads.labels import SCHEMES
from diptych_pirads.phantom import make_phantom
from diptych_pirads.prepare import MARGIN_MM, PreparedLabel, PreparedStudy, signed_distances
from diptych_pirads.store import part_of

SPACING = (3.0, 1.0, 1.0)


def study_of(
    image: np.ndarray,
    label: np.ndarray | None,
    scheme: str = "zones4",
    affine: np.ndarray | None = None,
) -> PreparedStudy:
    """A study whose working grid is its own grid."""
    grid = np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine
    volume = Volume(image if image.ndim == 4 else image[None], grid)
    middle = volume.to_lps((np.array(volume.size) - 1) / 2)
    prepared, center = None, middle
    if label is not None:
        prepared = label_of(volume, label, scheme)
        ends = np.argwhere(label > 0)
        center = volume.to_lps((ends.min(0) + ends.max(0)) / 2)
    return PreparedStudy(
        image=volume,
        present=(True,) * len(volume.array),
        original=volume.with_array(np.zeros(volume.size, bool)),
        center=middle,
        training_center=center,
        training_center_from="volume" if label is None else "label",
        label=prepared,
    )


def label_of(volume: Volume, label: np.ndarray, scheme: str) -> PreparedLabel:
    """The label in the gland's box and 15 mm, as `prepare_study` keeps it."""
    ends = np.argwhere(label > 0)
    margin = [int(np.ceil(MARGIN_MM / mm)) for mm in volume.spacing]
    wide = np.pad(label, [(m, m) for m in margin])
    box = tuple(
        slice(a, b + 2 * m + 1) for a, b, m in zip(ends.min(0), ends.max(0), margin, strict=True)
    )
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps(ends.min(0) - margin)
    values = Volume(wide[box].astype(np.uint8), affine)
    known = SCHEMES[scheme]
    seen = tuple(slice(0, n) for n in volume.size)
    return PreparedLabel(
        values,
        signed_distances(values.array, known.foreground, values.spacing),
        (seen[0], seen[1], seen[2]),
        known,
        volume.with_array(label),
        volume.with_array(np.broadcast_to(np.zeros((), bool), volume.size)),
        {},
    )


def phantom_study(index: int, scheme: str | None = "zones4", seed: int = 0) -> PreparedStudy:
    """A generated prostate on 16 x 64 x 64 voxels of 3 x 1 x 1 mm."""
    phantom = make_phantom(seed, index)
    label = phantom.label.array
    if scheme == "pz_tz":
        label = np.where(label > 2, 2, label)
    elif scheme == "gland":
        label = (label > 0).astype(np.uint8)
    image = phantom.image.array.astype(np.float32)
    known = None if scheme is None else label
    return study_of(image, known, scheme or "zones4", phantom.image.affine)


def prepared_of(schemes: Sequence[str | None], size: Sequence[int] = (16, 64, 64)) -> Prepared:
    """Prepared data in memory: one generated study of each scheme, one subject each."""
    parts = [part_of(phantom_study(k, scheme)) for k, scheme in enumerate(schemes)]
    names = {name for part in parts for name in part.ragged}
    index = pl.concat([part.rows for part in parts])
    return Prepared.from_arrays(
        index.with_columns(subject=pl.Series([f"S-{k}" for k in range(len(schemes))])),
        {"channels": ["t2"], "spacing": list(SPACING), "size": list(size)},
        {},
        {name: [part.ragged.get(name, [None])[0] for part in parts] for name in names},
    )
