"""Volumes in patient space: axes, spacing, resampling, crops, and one grid seen from another.

Arrays are (z, y, x), spacings and sizes too; world coordinates are LPS millimetres (x to the
patient's left, y to the back, z to the head), as in DICOM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy import ndimage

EDGE = 1e-4  # voxels: on the border of a field of view counts as inside
Mode = Literal["label", "image", "prob"]
Rounding = Literal["round", "floor"]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class Volume:
    """An array and where it lies in the patient.

    Args:
        array: (z, y, x), or (C, z, y, x) for probabilities of C classes.
        affine: (4, 4), maps the index (x, y, z, 1) of a voxel to its centre in LPS mm.
    """

    array: Shaped[ndarray, "*c z y x"]
    affine: Float[ndarray, "4 4"]

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels along z, y, x."""
        z, y, x = self.array.shape[-3:]
        return z, y, x

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along z, y, x in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def directions(self) -> Float[ndarray, "3 3"]:
        """Unit vectors of the index axes x, y, z in LPS, as columns."""
        steps = self.affine[:3, :3]
        unit: Float[ndarray, "3 3"] = steps / np.linalg.norm(steps, axis=0)
        return unit

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in mL."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def with_array(self, array: Shaped[ndarray, "*c z y x"]) -> Volume:
        """Other values on the same grid."""
        return replace(self, array=array)

    def to_lps(self, index: Shaped[ndarray, "*n 3"]) -> Float[ndarray, "*n 3"]:
        """Positions of voxel indices.

        Args:
            index: (..., 3), in the order z, y, x; may be fractional.

        Returns:
            (..., 3), x, y, z in LPS mm.
        """
        index = np.asarray(index, dtype=np.float64)
        points: Float[ndarray, "*n 3"] = (
            index[..., ::-1] @ self.affine[:3, :3].T + self.affine[:3, 3]
        )
        return points

    def to_index(self, points: Shaped[ndarray, "*n 3"]) -> Float[ndarray, "*n 3"]:
        """Fractional indices of positions, the inverse of `to_lps`.

        Args:
            points: (..., 3), x, y, z in LPS mm.

        Returns:
            (..., 3), in the order z, y, x.
        """
        inverse = np.linalg.inv(self.affine)
        points = np.asarray(points, dtype=np.float64)
        index: Float[ndarray, "*n 3"] = points @ inverse[:3, :3].T + inverse[:3, 3]
        return index[..., ::-1]


@dataclass(frozen=True, eq=False)
class Roi:
    """A box of an axial series.

    Args:
        lo: First index along z, y, x.
        hi: One past the last index along z, y, x.
        center_lps: (3,), middle of the box in LPS mm.
    """

    lo: tuple[int, int, int]
    hi: tuple[int, int, int]
    center_lps: Float[ndarray, " 3"]


def reorient_lps(v: Volume) -> Volume:
    """The same voxels with axes permuted and flipped to the nearest of left, posterior, superior.

    Nothing is interpolated: a tilted series stays tilted, and every voxel keeps its position.

    Args:
        v: (z, y, x) with any axis order.

    Returns:
        (z, y, x), z growing to superior, y to posterior, x to the patient's left.
    """
    xyz = v.array.transpose(2, 1, 0)
    orientation = io_orientation(v.affine)
    affine = v.affine @ inv_ornt_aff(orientation, xyz.shape)
    array = apply_orientation(xyz, orientation).transpose(2, 1, 0)
    return Volume(np.ascontiguousarray(array), affine)


def resampled_size(
    size: Sequence[int],
    old: Sequence[float],
    new: Sequence[float],
    rounding: Rounding = "round",
) -> tuple[int, int, int]:
    """Voxels that cover the same extent at another spacing, at least one along each axis.

    Args:
        size: Voxels along z, y, x.
        old: Spacing of these in mm.
        new: Spacing wanted in mm.
        rounding: "floor" as in the public code of Meyer et al., ISBI 2019.

    Returns:
        Voxels along z, y, x.
    """
    exact = np.multiply(size, old) / np.asarray(new, dtype=np.float64)
    whole = np.rint(exact) if rounding == "round" else np.floor(exact + EDGE)
    z, y, x = (max(int(n), 1) for n in whole)
    return z, y, x


def resample(
    v: Volume,
    spacing: Sequence[float],
    order: Literal[0, 1] = 1,
    size: Sequence[int] | None = None,
) -> Volume:
    """The same field of view at another spacing, its first corner (not its first centre) kept.

    Args:
        v: (z, y, x).
        spacing: Wanted mm along z, y, x.
        order: 0 takes the nearest voxel, 1 interpolates linearly (result float32).
        size: Voxels along z, y, x; None: as many as cover the extent, rounded.

    Returns:
        (z, y, x) at the wanted spacing.
    """
    target = _regrid(v, spacing, size)
    scale, offset = _scale_offset(v, target)
    values = v.array if order == 0 else v.array.astype(np.float32, copy=False)
    array = ndimage.affine_transform(
        values, scale, offset, target.size, order=order, mode="nearest"
    )
    return target.with_array(array)


def resample_label(
    v: Volume, spacing: Sequence[float], size: Sequence[int] | None = None
) -> Volume:
    """Labels at another spacing: each value interpolated linearly as a mask, the largest wins.

    Args:
        v: (z, y, x), integers.
        spacing: Wanted mm along z, y, x.
        size: Voxels along z, y, x; None: as many as cover the extent, rounded.

    Returns:
        (z, y, x) of the same values, 0 the background; on equal shares the smaller value.
    """
    target = _regrid(v, spacing, size)
    scale, offset = (np.array(one) for one in _scale_offset(v, target))
    values = [value for value in np.unique(v.array) if value != 0]
    label = np.zeros(target.size, v.array.dtype)
    held = bounding_box(v.array != 0, (1, 1, 1))
    if held is None:
        return target.with_array(label)
    start, stop = (np.array([getattr(part, end) for part in held]) for end in ("start", "stop"))
    first = np.maximum(np.floor((start - offset) / scale), 0).astype(int)
    last = np.minimum(np.ceil((stop - offset) / scale) + 1, target.size).astype(int)
    box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    shares = [
        ndimage.affine_transform(
            (v.array[held] == value).astype(np.float32),
            scale,
            offset + scale * first - start,
            tuple(last - first),
            order=1,
            mode="nearest",
        )
        for value in values
    ]
    best = 1 - np.sum(shares, axis=0)  # the background's share
    within = np.zeros(best.shape, v.array.dtype)
    for value, share in zip(values, shares, strict=True):
        wins = share > best + EDGE
        within[wins] = value
        best[wins] = share[wins]
    label[box] = within
    return target.with_array(label)


def crop_pad(v: Volume, center_mm: ArrayLike, size: Sequence[int], fill: float = 0) -> Volume:
    """The box of a size whose middle is nearest to a position; nothing is interpolated.

    Args:
        v: (z, y, x) or (C, z, y, x).
        center_mm: x, y, z in LPS mm.
        size: Voxels of the box along z, y, x.
        fill: Value of voxels that the volume does not have.

    Returns:
        (z, y, x) or (C, z, y, x) of the size.
    """
    first = crop_start(v, center_mm, size)
    last = first + np.asarray(size)
    array = np.full((*v.array.shape[:-3], *size), fill, v.array.dtype)
    kept = [(max(a, 0), min(b, n)) for a, b, n in zip(first, last, v.size, strict=True)]
    if all(a < b for a, b in kept):
        from_z, from_y, from_x = (slice(a, b) for a, b in kept)
        z, y, x = (slice(a - f, b - f) for (a, b), f in zip(kept, first, strict=True))
        array[..., z, y, x] = v.array[..., from_z, from_y, from_x]
    return Volume(array, _shifted(v.affine, first))


def crop_start(v: Volume, center_mm: ArrayLike, size: Sequence[int]) -> Int[ndarray, " 3"]:
    """Index along z, y, x of the first voxel of `crop_pad`; may be negative."""
    first = v.to_index(np.asarray(center_mm)) - (np.asarray(size) - 1) / 2
    start: Int[ndarray, " 3"] = np.floor(first + 0.5 + EDGE).astype(int)  # ties never flicker
    return start


def to_grid(v: Volume, like: Volume, mode: Mode) -> Volume:
    """A volume seen on the grid of another, through patient space.

    Args:
        v: (z, y, x); for "prob" (C, z, y, x) with class 0 the background.
        like: Where it is wanted; its values are not looked at.
        mode: "label" takes the nearest voxel, "image" and "prob" interpolate linearly.

    Returns:
        The volume on the grid of `like`. Outside the field of view of `v` labels and images are 0
        and probabilities those of certain background.
    """
    channels = v.array if mode == "prob" else v.array[None]
    dtype = v.array.dtype if mode == "label" else np.dtype(np.float32)
    array = np.zeros((len(channels), *like.size), dtype)
    if mode == "prob":
        array[0] = 1
    box = _box_seen(v, like)
    if box is not None:
        first = [part.start for part in box]
        size = tuple(part.stop - part.start for part in box)
        inside = Volume(np.empty(size, bool), _shifted(like.affine, first))
        seen = _sampler(v, inside)
        covered = field_of_view(v, inside)
        for target, channel in zip(array, channels, strict=True):
            values = seen(channel, 0 if mode == "label" else 1)
            target[box] = np.where(covered, values, target[box])
    return Volume(array if mode == "prob" else array[0], like.affine)


def field_of_view(v: Volume, like: Volume) -> Bool[ndarray, "z y x"]:
    """Which voxel centres of one grid lie inside the voxels of another volume.

    Args:
        v: The volume that covers.
        like: The grid that is asked about.

    Returns:
        (z, y, x) on the grid of `like`.
    """
    inside = np.ones(like.size, bool)
    for index, count in zip(_indices_in(v, like), v.size, strict=True):
        inside &= (index >= -0.5 - EDGE) & (index <= count - 0.5 + EDGE)
    return inside


def roi_from_three_series(tra: Volume, sag: Volume, cor: Volume) -> Roi:
    """The part of an axial series that the sagittal and the coronal series see too.

    It finds the prostate, on which all three are centred; it may cut the gland, so that it is a
    locator and no crop. Meyer et al., ISBI 2019.

    Args:
        tra: Axial series.
        sag: Sagittal series.
        cor: Coronal series.

    Returns:
        The box of axial voxels inside both fields of view.

    Raises:
        ValueError: The three series have no voxel in common.
    """
    box = bounding_box(field_of_view(sag, tra) & field_of_view(cor, tra))
    if box is None:
        raise ValueError("the axial, sagittal and coronal series have no voxel in common")
    lo, hi = [part.start for part in box], [part.stop for part in box]
    middle = tra.to_lps((np.add(lo, hi) - 1) / 2)
    return Roi((lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2]), middle)


def bounding_box(mask: Bool[ndarray, "z y x"], margin: Sequence[int] = (0, 0, 0)) -> Box | None:
    """The smallest box around the voxels of a mask.

    Args:
        mask: (z, y, x).
        margin: Voxels more on both sides along z, y, x, as far as the array goes.

    Returns:
        Slices along z, y, x; None for an empty mask.
    """
    lines = [mask.any(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    if not lines[0].any():
        return None
    ends = [np.flatnonzero(line)[[0, -1]] for line in lines]
    z, y, x = (
        slice(max(int(a) - m, 0), min(int(b) + 1 + m, n))
        for (a, b), m, n in zip(ends, margin, mask.shape, strict=True)
    )
    return z, y, x


def cut(v: Volume, box: Box) -> Volume:
    """The part of a volume inside a box of voxels, where it lies."""
    return Volume(v.array[(..., *box)], _shifted(v.affine, [part.start for part in box]))


def same_grid(a: Volume, b: Volume, tolerance_mm: float = 1e-2) -> bool:
    """Whether two grids have one size and corners that agree to a tolerance in mm."""
    return a.size == b.size and bool(np.abs(corners(a) - corners(b)).max() <= tolerance_mm)


def corners(v: Volume) -> Float[ndarray, "8 3"]:
    """Centres of the eight corner voxels in LPS mm."""
    return v.to_lps(np.array(list(product(*((0, n - 1) for n in v.size)))))


def _regrid(v: Volume, spacing: Sequence[float], size: Sequence[int] | None) -> Volume:
    wanted = resampled_size(v.size, v.spacing, spacing) if size is None else tuple(size)
    scale = (np.asarray(spacing) / v.spacing)[::-1]
    affine = v.affine @ np.diag([*scale, 1.0])
    affine[:3, 3] = v.affine[:3, :3] @ (scale / 2 - 0.5) + v.affine[:3, 3]
    return Volume(np.empty(wanted, bool), affine)


def _scale_offset(v: Volume, target: Volume) -> tuple[list[float], list[float]]:
    scale = np.divide(target.spacing, v.spacing)
    return list(scale), list(scale / 2 - 0.5)


def _shifted(affine: Float[ndarray, "4 4"], first: ArrayLike) -> Float[ndarray, "4 4"]:
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(first, dtype=np.float64)[::-1]
    return moved


def _between(v: Volume, like: Volume) -> tuple[Float[ndarray, "3 3"], Float[ndarray, " 3"]]:
    """Matrix and offset that take an index (z, y, x) of `like` to one of `v`."""
    step = np.linalg.inv(v.affine) @ like.affine
    matrix = step[:3, :3][::-1, ::-1].copy()
    matrix[np.abs(matrix) < EDGE / max(like.size)] = 0  # rounding of stored directions, no tilt
    return matrix, step[:3, 3][::-1].copy()


def _indices_in(v: Volume, like: Volume) -> Iterator[Float[ndarray, "#z #y #x"]]:
    """For each axis of `v` the fractional index of every voxel of `like`, not yet broadcast."""
    matrix, offset = _between(v, like)
    grid = np.ogrid[tuple(slice(n) for n in like.size)]
    for row, start in zip(matrix, offset, strict=True):
        yield start + sum(step * axis for step, axis in zip(row, grid, strict=True) if step)


def _box_seen(v: Volume, like: Volume) -> Box | None:
    """The box of `like` that holds all of its voxels inside `v`; None where there are none."""
    ends = [(-0.5, n - 0.5) for n in v.size]
    points = like.to_index(v.to_lps(np.array(list(product(*ends)))))
    first = np.maximum(np.floor(points.min(0)), 0).astype(int)
    last = np.minimum(np.ceil(points.max(0)) + 1, like.size).astype(int)
    if (first >= last).any():
        return None
    z, y, x = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return z, y, x


def _sampler(v: Volume, like: Volume) -> Any:
    matrix, offset = _between(v, like)
    # scipy takes a much faster way for matrices given by their diagonal
    form = np.diag(matrix) if np.array_equal(matrix, np.diag(np.diag(matrix))) else matrix

    def sample(channel: ndarray, order: int) -> ndarray:
        values = channel if order == 0 else channel.astype(np.float32, copy=False)
        seen: ndarray = ndimage.affine_transform(
            values, form, offset, like.size, order=order, mode="nearest"
        )
        return seen

    return sample
