"""From class probabilities to a label map in which every zone is one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from numpy import ndarray
from scipy import ndimage

from diptych_pirads.geometry import Box, Volume, bounding_box, to_grid
from diptych_pirads.labels import DPU, ZONES

Kind = Literal["diptych", "meyer", "none"]
Label = UInt8[ndarray, "z y x"]

HOLE_ML = 0.2
SECOND_DPU = 0.2  # least part of the largest piece
_PASSES = 20
_NOWHERE_MM = -3000.0  # of a class that does not occur
_FACES = ndimage.generate_binary_structure(3, 1)
_CORNERS = ndimage.generate_binary_structure(3, 3)


def postprocess_zones(
    prob_or_label: Shaped[ndarray, "*c z y x"], spacing: Sequence[float], kind: Kind = "diptych"
) -> Label:
    """A clean label map.

    Args:
        prob_or_label: (5, z, y, x) class probabilities, or (z, y, x) class numbers.
        spacing: mm along z, y, x.
        kind: "none": the most probable class. "diptych": of that, the largest 6-connected piece
            of the gland and the largest 26-connected piece of each zone (DPU also a second one
            of at least a fifth of it); voxels removed go to the nearest class in mm, background
            included; holes of the gland up to 0.2 mL are filled. "meyer": Meyer et al., ISBI
            2019: channels from 0.5 on, largest 6-connected piece of each class, voxels removed
            to the nearest class in voxels; voxels in which no class reaches 0.5 stay background.

    Returns:
        (z, y, x) class numbers 0 to 4; cleaning them again ("diptych") changes nothing.

    Raises:
        ValueError: Not (z, y, x) or five channels of it, or an unknown kind.
    """
    array = np.asarray(prob_or_label)
    if array.ndim not in {3, 4} or (array.ndim == 4 and len(array) != len(ZONES)):
        raise ValueError(
            f"array has shape {array.shape}: pass (z, y, x) or ({len(ZONES)}, z, y, x)"
        )
    if kind == "meyer":
        return _meyer(array)
    label: Label = (array.argmax(axis=0) if array.ndim == 4 else array).astype(np.uint8)
    if kind == "none":
        return label
    if kind != "diptych":
        raise ValueError(f"kind is '{kind}': choose 'diptych', 'meyer' or 'none'")
    label = label.copy()
    voxel_ml = float(np.prod(spacing)) / 1000
    # What goes to its nearest class can leave a crumb of its own; one pass is the rule.
    for _ in range(_PASSES):
        box = bounding_box(label > 0, margin=(1, 1, 1))
        if box is None:
            break
        cleaned = _clean(label[box], spacing, voxel_ml)
        if np.array_equal(cleaned, label[box]):
            break
        label[box] = cleaned
    return label


def to_original_grid(
    prob: Volume, original: Volume, resample: Literal["prob", "sdf_gauss"] = "prob"
) -> Volume:
    """Class numbers on the grid of the series they were predicted from.

    Args:
        prob: (5, z, y, x) class probabilities on the working grid.
        original: The series.
        resample: "prob": probabilities interpolated linearly, the largest wins. "sdf_gauss": as
            Meyer et al., ISBI 2019: the signed distances in mm of the most probable class
            interpolated linearly and smoothed with a Gaussian of variance 1 mm².

    Returns:
        (z, y, x) class numbers 0 to 4 on the grid of ``original``; background outside the
        working grid.
    """
    if resample == "prob":
        seen = to_grid(prob, original, "prob")
        return seen.with_array(seen.array.argmax(axis=0).astype(np.uint8))
    label = prob.array.argmax(axis=0)
    distances = np.stack(
        [_maurer_distance(label == number, prob.spacing) for number in range(len(ZONES))]
    )
    seen = to_grid(prob.with_array(distances), original, "prob")
    smooth = np.stack([_smoothed(channel, original.spacing) for channel in seen.array])
    return seen.with_array(smooth.argmax(axis=0).astype(np.uint8))


def _smoothed(array: Float[ndarray, "z y x"], spacing: Sequence[float]) -> Float[ndarray, "z y x"]:
    """Discrete Gaussian of variance 1 mm²."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(step) for step in spacing][::-1])
    smooth: Float[ndarray, "z y x"] = SimpleITK.GetArrayFromImage(
        SimpleITK.DiscreteGaussian(image, [1.0] * 3)
    )
    return smooth


def _maurer_distance(
    mask: Bool[ndarray, "z y x"], spacing: Sequence[float]
) -> Float[ndarray, "z y x"]:
    """Signed distance to the border, positive inside, in the form of the public code."""
    import SimpleITK

    if not mask.any():
        return np.full(mask.shape, _NOWHERE_MM, np.float32)
    image = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(step) for step in spacing][::-1])
    distance = SimpleITK.SignedMaurerDistanceMap(
        image, insideIsPositive=True, squaredDistance=False, useImageSpacing=True
    )
    array: Float[ndarray, "z y x"] = SimpleITK.GetArrayFromImage(distance)
    return array


def _clean(label: Label, spacing: Sequence[float], voxel_ml: float) -> Label:
    gland = _largest(label > 0, _FACES)
    kept = np.where(gland, label, 0).astype(np.uint8)
    removed = (label > 0) & ~gland
    for number in range(1, len(ZONES)):
        zone = kept == number
        if zone.any():
            removed |= zone & ~_largest(zone, _CORNERS, SECOND_DPU if number == DPU else 1.0)
    kept[removed] = 0
    kept = _to_nearest(kept, removed, removed, spacing)
    holes = _holes(kept > 0, HOLE_ML / voxel_ml)
    return _to_nearest(kept, holes, kept == 0, spacing)


def _largest(
    mask: Bool[ndarray, "z y x"], structure: Bool[ndarray, "3 3 3"], second: float = 1.0
) -> Bool[ndarray, "z y x"]:
    """The largest piece, and the next one too if it has the part ``second`` < 1 of its voxels."""
    pieces, count = ndimage.label(mask, structure)
    if count < 2:
        return mask
    voxels = np.bincount(pieces.ravel())
    order = 1 + np.argsort(-voxels[1:], kind="stable")
    keep: Bool[ndarray, "z y x"] = pieces == order[0]
    if second < 1 and voxels[order[1]] >= second * voxels[order[0]]:
        keep |= pieces == order[1]
    return keep


def _holes(gland: Bool[ndarray, "z y x"], most_voxels: float) -> Bool[ndarray, "z y x"]:
    """Background that the gland encloses, in pieces of at most so many voxels."""
    pieces, count = ndimage.label(~gland, _CORNERS)
    if count < 2:
        return np.zeros_like(gland)
    open_pieces = np.unique(
        np.concatenate([np.take(pieces, (0, -1), axis).ravel() for axis in range(3)])
    )
    small = np.bincount(pieces.ravel()) <= most_voxels
    small[open_pieces] = False
    small[0] = False
    return np.asarray(small[pieces])


def _to_nearest(
    label: Label,
    voxels: Bool[ndarray, "z y x"],
    unknown: Bool[ndarray, "z y x"],
    spacing: Sequence[float],
) -> Label:
    """Gives some voxels the class of the nearest one that is not unknown."""
    box = bounding_box(voxels, margin=(1, 1, 1))
    if box is None or unknown.all():
        return label
    # With a margin of one voxel, nothing beyond the box is nearer than what is in it, as long as
    # the margin is known; for holes it is the gland.
    index = ndimage.distance_transform_edt(
        unknown[box], sampling=spacing, return_distances=False, return_indices=True
    )
    filled = label.copy()
    filled[box][voxels[box]] = label[box][tuple(index)][voxels[box]]
    return filled


def _meyer(array: Shaped[ndarray, "*c z y x"]) -> Label:
    channels = array >= 0.5 if array.ndim == 4 else _one_hot(array)
    # Background last, as in the order of the public code's channels: it loses ties.
    order = [*range(1, len(ZONES)), 0]
    kept = {number: _largest(channels[number], _FACES) for number in order}
    removed = np.any([channels[number] & ~kept[number] for number in order], axis=0)
    label = np.zeros(array.shape[-3:], np.uint8)
    for number in order[:-1]:
        label[kept[number]] = number
    box: Box | None = bounding_box(removed)
    if box is None:
        return label
    voxel = (1.0, 1.0, 1.0)
    distances = np.stack([_maurer_distance(kept[number], voxel)[box] for number in order])
    nearest = np.asarray(order, np.uint8)[distances.argmax(axis=0)]
    label[box] = np.where(removed[box], nearest, label[box])
    return label


def _one_hot(label: Int[ndarray, "z y x"]) -> Bool[ndarray, "5 z y x"]:
    return np.stack([label == number for number in range(len(ZONES))])
