"""What the shape of other glands alone gives: the lines that a model has to beat.

Both baselines look at no image. A model under them has learned nothing from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int
from numpy import ndarray
from scipy import ndimage

from diptych_pirads.geometry import bounding_box
from diptych_pirads.labels import BG, ZONES

MEAN_SHAPE_SPACING = (3.0, 1.0, 1.0)
MEAN_SHAPE_SIZE = (32, 84, 84)
BOX_SIZE = (24, 48, 48)


@dataclass(frozen=True, eq=False)
class MeanShape:
    """Frequency of each class around a centre.

    Args:
        frequencies: (5, z, y, x), sum 1 over the classes; the centre is in the middle.
        spacing: mm along z, y, x.
    """

    frequencies: Float32[ndarray, "5 z y x"]
    spacing: tuple[float, float, float]

    @classmethod
    def fit(
        cls,
        labels: Sequence[Int[ndarray, "z y x"]],
        spacings: Sequence[Sequence[float]],
        centers: Sequence[Sequence[float]],
        spacing: tuple[float, float, float] = MEAN_SHAPE_SPACING,
        size: tuple[int, int, int] = MEAN_SHAPE_SIZE,
    ) -> MeanShape:
        """Class frequencies of a training set.

        Args:
            labels: (z, y, x) class numbers 0 to 4 of each study; studies may differ in shape.
            spacings: mm along z, y, x of each study.
            centers: Where to align each study: index along z, y, x, may be fractional.
            spacing: mm along z, y, x of the frequencies.
            size: Voxels along z, y, x of the frequencies.

        Returns:
            The mean over the studies.

        Raises:
            ValueError: No studies, or lists of different lengths.
        """
        studies = list(zip(labels, spacings, centers, strict=True))
        _refuse_none(studies)
        total = np.zeros((len(ZONES), *size), np.float32)
        middle = (np.asarray(size) - 1) / 2
        for label, own, center in studies:
            scale = np.divide(spacing, own)
            total += _sampled(_one_hot(label), scale, center - scale * middle, size)
        return cls(total / len(studies), spacing)

    def predict(
        self, shape: Sequence[int], spacing: Sequence[float], center: Sequence[float]
    ) -> Float32[ndarray, "5 z y x"]:
        """Class probabilities for a study.

        Args:
            shape: Voxels along z, y, x.
            spacing: mm along z, y, x.
            center: Index along z, y, x where the centre lies, may be fractional.

        Returns:
            (5, z, y, x); background beyond the frequencies' grid.
        """
        scale = np.divide(spacing, self.spacing)
        middle = (np.asarray(self.frequencies.shape[1:]) - 1) / 2
        return _sampled(self.frequencies, scale, middle - scale * np.asarray(center), shape)


@dataclass(frozen=True, eq=False)
class BoxAtlas:
    """Frequency of each class within the gland's bounding box.

    Args:
        frequencies: (5, z, y, x), sum 1 over the classes; the array is the box.
    """

    frequencies: Float32[ndarray, "5 z y x"]

    @classmethod
    def fit(
        cls,
        labels: Sequence[Int[ndarray, "z y x"]],
        size: tuple[int, int, int] = BOX_SIZE,
    ) -> BoxAtlas:
        """Class frequencies of a training set.

        Args:
            labels: (z, y, x) class numbers 0 to 4 of each study; those without gland are left out.
            size: Voxels along z, y, x of the frequencies.

        Returns:
            The mean over the studies.

        Raises:
            ValueError: No study with a gland.
        """
        boxes = [(label, bounding_box(label != BG)) for label in labels]
        glands = [label[box] for label, box in boxes if box is not None]
        _refuse_none(glands)
        return cls(np.mean([_stretched(_one_hot(gland), size) for gland in glands], axis=0))

    def predict(
        self, gland: Bool[ndarray, "z y x"], *, within_gland: bool = False
    ) -> Float32[ndarray, "5 z y x"]:
        """Class probabilities for a study whose gland is known, by a model or by a reader.

        Args:
            gland: (z, y, x); its bounding box is what counts.
            within_gland: Make the mask itself the gland: background outside it, zones inside.

        Returns:
            (5, z, y, x); certain background outside the box, and everywhere without gland.
        """
        prob = np.zeros((len(ZONES), *gland.shape), np.float32)
        prob[BG] = 1
        box = bounding_box(gland)
        if box is None:
            return prob
        inside = _stretched(self.frequencies, gland[box].shape)
        if within_gland:
            zones = inside[BG + 1 :] + np.float32(1e-6)  # where no gland was seen: evenly
            inside = np.concatenate([np.zeros_like(inside[:1]), zones / zones.sum(axis=0)])
            inside = np.where(gland[box], inside, prob[(slice(None), *box)])
        prob[(slice(None), *box)] = inside
        return prob


def _one_hot(label: Int[ndarray, "z y x"]) -> Float32[ndarray, "5 z y x"]:
    return np.stack([label == number for number in range(len(ZONES))]).astype(np.float32)


def _stretched(
    channels: Float32[ndarray, "5 z y x"], size: Sequence[int]
) -> Float32[ndarray, "5 z y x"]:
    """The same field of view in another number of voxels; what is outside repeats the edge."""
    scale = np.divide(channels.shape[1:], size)
    return np.stack(
        [
            ndimage.affine_transform(
                c, scale, scale / 2 - 0.5, tuple(size), order=1, mode="nearest"
            )
            for c in channels
        ]
    )


def _sampled(
    channels: Float32[ndarray, "5 z y x"],
    scale: ndarray,
    offset: ndarray,
    size: Sequence[int],
) -> Float32[ndarray, "5 z y x"]:
    """Linear interpolation at index scale * i + offset; background where there is nothing."""
    outside = [1.0 if number == BG else 0.0 for number in range(len(ZONES))]
    return np.stack(
        [
            ndimage.affine_transform(c, scale, offset, tuple(size), order=1, cval=value)
            for c, value in zip(channels, outside, strict=True)
        ]
    )


def _refuse_none(studies: Sequence[object]) -> None:
    if not studies:
        raise ValueError("no labelled study to fit on: pass at least one")
