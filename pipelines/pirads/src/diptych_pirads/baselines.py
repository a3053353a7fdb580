"""What the shape of other glands alone gives: the lines that a model has to beat.

Both baselines look at no image. A model under them has learned nothing from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from numpy import ndarray
from scipy import ndimage

from diptych_pirads.geometry import Volume, bounding_box, to_grid
from diptych_pirads.labels import BG, ZONES
from diptych_pirads.prepare import PreparedLabel, PreparedStudy

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
    def fit(cls, studies: Iterable[PreparedStudy]) -> MeanShape:
        """Class frequencies of a training set, aligned at the middle that prediction starts from.

        Args:
            studies: Those whose labels tell PZ from TZ count; one at a time is looked at.

        Raises:
            ValueError: No such study.
        """
        known = [
            (classes, label.values.spacing, tuple(label.values.to_index(study.center)))
            for study, label, classes in _drawn(studies)
        ]
        _refuse_none(known)
        labels, spacings, centers = zip(*known, strict=True)
        return cls.fit_labels(labels, spacings, centers)

    @classmethod
    def fit_labels(
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

    def predict(self, study: PreparedStudy) -> Volume:
        """Class probabilities for a study, whose image and label are not looked at.

        Args:
            study: The study.

        Returns:
            float32 (5, z, y, x) on the working grid.
        """
        grid = study.image
        center = tuple(grid.to_index(study.center))
        return grid.with_array(self.on_grid(grid.size, grid.spacing, center))

    def on_grid(
        self, shape: Sequence[int], spacing: Sequence[float], center: Sequence[float]
    ) -> Float32[ndarray, "5 z y x"]:
        """Class probabilities around a centre.

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
    def fit(cls, studies: Iterable[PreparedStudy]) -> BoxAtlas:
        """Class frequencies of a training set.

        Args:
            studies: Those whose labels tell PZ from TZ count; one at a time is looked at.

        Raises:
            ValueError: No such study.
        """
        return cls.fit_labels([classes for _, _, classes in _drawn(studies)])

    @classmethod
    def fit_labels(
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

    def predict(self, study: PreparedStudy, box: Float[ndarray, "2 3"] | None = None) -> Volume:
        """Class probabilities for a study whose gland is known, by a model or by a reader.

        Args:
            study: The study; its image is not looked at.
            box: First and one past the last voxel of the gland along z, y, x on the working grid,
                NaN where there is none; None: as the study's own reader has it.

        Returns:
            float32 (5, z, y, x) on the working grid; certain background without gland.

        Raises:
            ValueError: No box is given, and the study has no label.
        """
        box = drawn_box(study) if box is None else box
        gland = np.zeros(study.image.size, bool)
        if np.isfinite(box).all():
            z, y, x = (slice(int(a), int(b)) for a, b in zip(*box, strict=True))
            gland[z, y, x] = True
        return study.image.with_array(self.in_box(gland))

    def in_box(self, gland: Bool[ndarray, "z y x"]) -> Float32[ndarray, "5 z y x"]:
        """Class probabilities in the bounding box of a gland.

        Args:
            gland: (z, y, x).

        Returns:
            (5, z, y, x); certain background outside the box, and everywhere without gland.
        """
        prob = np.zeros((len(ZONES), *gland.shape), np.float32)
        prob[BG] = 1
        box = bounding_box(gland)
        if box is not None:
            prob[(slice(None), *box)] = _stretched(self.frequencies, gland[box].shape)
        return prob


def drawn_box(study: PreparedStudy) -> Float[ndarray, "2 3"]:
    """Where the study's first reader has the gland.

    Args:
        study: A labelled study.

    Returns:
        First and one past the last voxel along z, y, x on the working grid; NaN without gland.

    Raises:
        ValueError: The study has no label.
    """
    if study.label is None:
        raise ValueError("the study has no label: pass the box of its gland")
    values = study.label.values
    gland = values.with_array(np.isin(values.array, study.label.scheme.foreground).astype(np.uint8))
    return box_ends(to_grid(gland, Volume(study.image.array[0], study.image.affine), "label").array)


def box_ends(gland: Int[ndarray, "z y x"]) -> Float[ndarray, "2 3"]:
    """First and one past the last voxel of a mask along z, y, x; NaN for an empty one."""
    box = bounding_box(gland > 0)
    if box is None:
        return np.full((2, 3), np.nan)
    return np.array([[part.start for part in box], [part.stop for part in box]], float)


def classes_of(label: PreparedLabel) -> UInt8[ndarray, "z y x"] | None:
    """Class numbers of a label's values; None where it does not tell PZ from the rest.

    Returns:
        On the grid of `label.values`; what a scheme leaves open goes to the first zone that it
        allows, as AFS and DPU to TZ in two-zone labels.
    """
    scheme = label.scheme
    if not (scheme.peripheral and scheme.inner):
        return None
    table = np.zeros(256, np.uint8)
    for value, allowed in scheme.allowed.items():
        table[value] = min(allowed)
    classes: UInt8[ndarray, "z y x"] = table[label.values.array]
    return classes


def _drawn(
    studies: Iterable[PreparedStudy],
) -> Iterator[tuple[PreparedStudy, PreparedLabel, UInt8[ndarray, "z y x"]]]:
    for study in studies:
        classes = None if study.label is None else classes_of(study.label)
        if study.label is not None and classes is not None:
            yield study, study.label, classes


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
