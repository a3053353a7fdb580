"""Training crops: one keyed affine in mm for image and label, then keyed changes of intensity.

A label is warped through the signed distances of its values, in the part of the crop alone where
the gland can be; elsewhere it is background. Nothing depends on the other studies of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped, UInt8
from numpy import ndarray
from torch import Tensor

from diptych.randomness import Draw
from diptych_pirads.config import ViewsSection
from diptych_pirads.labels import ANY, ZONES
from diptych_pirads.prepare import MARGIN_MM, SDF_MM, SDF_STEPS, PreparedLabel, PreparedStudy

Size = tuple[int, int, int]
Image = Float[Tensor, "n c z y x"]

HIDDEN_SHARE, HIDDEN_BLOCK = 0.15, (4, 16, 16)
_BIAS_DEGREE = 3
_BLUR_RADIUS = 2
_WORD = 1 << 32


@dataclass(frozen=True)
class Warp:
    """An affine map from a crop to the series, about the crop's middle.

    Args:
        matrix: Takes offsets from the middle along z, y, x in mm to those in the series.
        shift: Of the middle along z, y, x in mm.
        scale: How much larger things become.
    """

    matrix: Float[ndarray, "3 3"]
    shift: Float[ndarray, " 3"]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Crop:
    """One study as a network sees it in training.

    Args:
        image: float32 channels, 0 beyond the series.
        inside: Where the series is; None: everywhere.
        sets: Classes that each voxel may have, as bits.
        sdf: Signed distance to each zone's border in mm, cut at 12.7; None unless wanted of a
            study with four zones.
    """

    image: Float[Tensor, "c z y x"]
    inside: Bool[Tensor, "z y x"] | None
    sets: UInt8[Tensor, "z y x"]
    sdf: Float[Tensor, "4 z y x"] | None


IDENTITY = Warp(np.eye(3), np.zeros(3))


def draw_warps(
    draw: Draw, ids: Sequence[int], views: ViewsSection, jitter_mm: Sequence[float]
) -> list[Warp]:
    """Maps of training crops.

    Args:
        draw: Of this epoch.
        ids: Items; each has its own map.
        views: Ranges.
        jitter_mm: Largest shift along z, y, x.

    Returns:
        One map an item: flip of left and right, rotations, scale and shift.
    """
    flips = draw.of("flip").uniform(ids)[:, 0] < views.flip
    limits = np.radians(views.rotation_degrees)
    angles = draw.of("rotation").uniform(ids, 3, -1, 1) * limits
    scales = draw.of("scale").uniform(ids, 1, *views.scale)[:, 0]
    shifts = draw.of("shift").uniform(ids, 3, -1, 1) * np.asarray(jitter_mm)
    return [
        Warp(_rotation(a) @ np.diag([1, 1, -1 if flip else 1]) / s, shift, float(s))
        for flip, a, s, shift in zip(flips, angles, scales, shifts, strict=True)
    ]


def warp_crop(
    study: PreparedStudy, warp: Warp, size: Sequence[int], *, distances: bool = True
) -> Crop:
    """Cut a crop out of a study, warped.

    Args:
        study: The study; the middle is its `training_center`.
        warp: From `draw_warps`.
        size: Voxels along z, y, x.
        distances: Whether signed distances are wanted.

    Returns:
        Image and label.

    Example:
        ``warp_crop(study, IDENTITY, (24, 112, 112)).sets``
    """
    spacing = np.array(study.image.spacing)
    grid = _Grid(
        study.image.to_index(study.training_center) + warp.shift / spacing,
        warp.matrix * spacing / spacing[:, None],
        (int(size[0]), int(size[1]), int(size[2])),
    )
    whole = study.image.size
    sets = torch.full(grid.size, ANY, dtype=torch.uint8)
    sdf = None
    if study.label is not None:
        first = np.rint(study.image.to_index(study.label.values.to_lps(np.zeros(3)))).astype(int)
        wanted = distances and study.label.scheme.foreground == tuple(range(1, len(ZONES)))
        sets, sdf = _warp_label(study.label, first, grid, warp.scale, wanted)
        ends = [(part.start, part.stop) for part in study.label.seen]
        seen = grid.within(ends)
        if seen is not None:
            sets[~seen] = ANY
    return Crop(
        grid.sample(study.image.array, np.zeros(3, int)),
        grid.within([(0, n) for n in whole]),
        sets,
        sdf,
    )


def vary_intensities(
    x: Image,
    draw: Draw,
    ids: Sequence[int],
    views: ViewsSection,
    *,
    inside: Bool[Tensor, "n z y x"] | None = None,
    rician: bool = True,
) -> Image:
    """Other contrast, brightness, coil profile, sharpness and noise for each image and channel.

    Args:
        x: Normalised images.
        draw: Of this epoch and view.
        ids: Item of each image.
        views: Ranges.
        inside: Voxels of the series; others stay 0, and so do missing channels.
        rician: Whether noise is that of magnitude images; else it is Gaussian.

    Returns:
        New images.
    """
    c = x.shape[1]
    kept = (x != 0).flatten(2).any(2)[:, :, None, None, None]
    if inside is not None:
        kept = kept & inside[:, None]

    def drawn(name: str, low: float, high: float) -> Tensor:
        values = draw.of(name).uniform(ids, c, low, high)
        return torch.from_numpy(values.astype(np.float32))[:, :, None, None, None]

    gamma = drawn("gamma", math.log(views.gamma[0]), math.log(views.gamma[1])).exp()
    y = x.sign() * x.abs().pow(gamma)
    y = y * drawn("gain", *views.gain) + drawn("offset", -views.offset, views.offset)
    if views.bias:
        y = y * _bias_fields(draw.of("bias"), ids, c, x.shape[2:], views.bias).exp()
    if views.blur:
        y = _blurred(y, drawn("blur", 0, views.blur))
    if views.noise:
        sigma = drawn("sigma", 0, views.noise)
        y = y + sigma * _noise(draw.of("noise"), ids, y)
        if rician:
            y = torch.hypot(y, sigma * _noise(draw.of("noise-2"), ids, y))
    return torch.where(kept, y, 0.0)


def drop_channels(x: Image, draw: Draw, ids: Sequence[int], probability: float) -> Image:
    """Take away each channel but the first with a probability, so that it may be missing later."""
    c = x.shape[1]
    if c == 1 or not probability:
        return x
    kept = draw.of("channels").uniform(ids, c) >= probability
    kept[:, 0] = True
    return x * torch.from_numpy(kept)[:, :, None, None, None].to(x.dtype)


def hidden_blocks(draw: Draw, ids: Sequence[int], size: Sequence[int]) -> Bool[Tensor, "n 1 z y x"]:
    """Blocks of 4 x 16 x 16 voxels, of which 15 % are hidden."""
    counts = [-(-n // block) for n, block in zip(size, HIDDEN_BLOCK, strict=True)]
    chosen = draw.of("hidden").uniform(ids, math.prod(counts)) < HIDDEN_SHARE
    blocks = torch.from_numpy(chosen.reshape(len(ids), 1, *counts))
    for axis, block in enumerate(HIDDEN_BLOCK, 2):
        blocks = blocks.repeat_interleave(block, axis)
    z, y, x = size
    return blocks[:, :, :z, :y, :x]


@dataclass(frozen=True)
class _Grid:
    """Index `middle + matrix (i - (size - 1) / 2)` of the series at the crop's index i."""

    middle: Float[ndarray, " 3"]
    matrix: Float[ndarray, "3 3"]
    size: Size

    @property
    def zero(self) -> Float[ndarray, " 3"]:
        """Where the crop's first voxel lies in the series."""
        origin: Float[ndarray, " 3"] = self.middle - self.matrix @ ((np.array(self.size) - 1) / 2)
        return origin

    def part(self, start: Sequence[int], size: Size) -> _Grid:
        """The grid of a box of the crop."""
        zero = self.zero + self.matrix @ np.asarray(start)
        return _Grid(zero + self.matrix @ ((np.array(size) - 1) / 2), self.matrix, size)

    def corners(self) -> Float[ndarray, "8 3"]:
        """Where the crop's corner voxels lie in the series."""
        index = np.array(list(product(*((0, n - 1) for n in self.size))))
        return np.asarray(self.zero + index @ self.matrix.T)

    def within(self, ends: Sequence[tuple[int, int]]) -> Bool[Tensor, "z y x"] | None:
        """Which voxels lie in a box of the series; None: all."""
        low, high = (np.array(end) - 0.5 for end in zip(*ends, strict=True))
        corners = self.corners()
        if (corners >= low).all() and (corners <= high).all():
            return None
        mask = torch.ones(self.size, dtype=torch.bool)
        steps = [torch.arange(n, dtype=torch.float32) for n in self.size]
        for axis in range(3):
            z, y, x = (step * float(m) for step, m in zip(steps, self.matrix[axis], strict=True))
            place = (z + float(self.zero[axis]))[:, None, None] + y[:, None] + x
            mask &= (place >= low[axis]) & (place <= high[axis])
        return mask

    def sample(
        self, array: Shaped[ndarray, "k z y x"], first: Shaped[ndarray, " 3"]
    ) -> Float[Tensor, "k z y x"]:
        """Linear interpolation of an array whose first voxel has an index in the series."""
        corners = self.corners() - first
        whole = np.array(array.shape[1:])
        start = np.clip(np.floor(corners.min(0)).astype(int), 0, whole - 1)
        stop = np.clip(np.ceil(corners.max(0)).astype(int) + 1, start + 1, whole)
        z, y, x = (slice(a, b) for a, b in zip(start, stop, strict=True))
        source = torch.from_numpy(np.array(array[:, z, y, x], np.float32))
        n = stop - start
        theta = np.empty((3, 4))
        theta[:, :3] = self.matrix * np.array(self.size) / n[:, None]
        theta[:, 3] = (2 * (self.middle - first - start) + 1) / n - 1
        theta[:, :3] = theta[::-1, 2::-1]  # torch counts x, y, z
        theta[:, 3] = theta[::-1, 3]
        shape = [1, len(array), *self.size]
        grid = F.affine_grid(torch.from_numpy(theta).float()[None], shape, align_corners=False)
        return F.grid_sample(source[None], grid, align_corners=False)[0]


def _warp_label(
    label: PreparedLabel,
    first: Shaped[ndarray, " 3"],
    grid: _Grid,
    scale: float,
    distances: bool,
) -> tuple[UInt8[Tensor, "z y x"], Float[Tensor, "4 z y x"] | None]:
    known = label.scheme.to_sets(np.array([0, *label.scheme.foreground]))
    sets = torch.full(grid.size, int(known[0]), dtype=torch.uint8)
    sdf = torch.full((len(ZONES) - 1, *grid.size), -SDF_MM) if distances else None
    # the box that was prepared reaches 15 mm beyond the gland; labels need a voxel of it
    spare = [0 if distances else math.ceil(MARGIN_MM / mm) - 1 for mm in label.values.spacing]
    ends = [
        (a + low, a + n - low) for a, n, low in zip(first, label.values.size, spare, strict=True)
    ]
    box = _box_in_crop(grid, ends)
    if box is None:
        return sets, sdf
    z, y, x = box
    near = grid.part([z.start, y.start, x.start], (_length(z), _length(y), _length(x)))
    stored = np.asarray(label.sdf)
    # Outside all zones the background's distance is minus the largest of theirs.
    warped = near.sample(np.concatenate([stored, stored.max(0, keepdims=True)]), first)
    zones, most = warped[:-1], warped[-1]
    # beyond what was prepared interpolation gives 0, which would be a border
    outside = near.within([(a, a + n) for a, n in zip(first, label.values.size, strict=True)])
    if outside is not None:
        zones = torch.where(outside, zones, -SDF_MM * SDF_STEPS)
    best, number = zones.max(0)
    bits = torch.from_numpy(known.astype(np.uint8))
    sets[z, y, x] = torch.where(best + most > 0, bits[number + 1], bits[0])
    if sdf is not None:
        sdf[:, z, y, x] = zones * (scale / SDF_STEPS)
    return sets, sdf


def _box_in_crop(grid: _Grid, ends: Sequence[tuple[int, int]]) -> tuple[slice, slice, slice] | None:
    """The part of the crop in which a box of the series can be."""
    corners = np.array(list(product(*((a - 1.0, b) for a, b in ends))))
    inverse = np.linalg.inv(grid.matrix)
    index = (corners - grid.zero) @ inverse.T
    start = np.maximum(np.floor(index.min(0)).astype(int), 0)
    stop = np.minimum(np.ceil(index.max(0)).astype(int) + 1, grid.size)
    if (start >= stop).any():
        return None
    z, y, x = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    return z, y, x


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _rotation(angles: Float[ndarray, " 3"]) -> Float[ndarray, "3 3"]:
    """Rotations about z, y and x in turn, for vectors z, y, x."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, other = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = math.cos(angle)
        turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _bias_fields(
    draw: Draw, ids: Sequence[int], channels: int, size: Sequence[int], largest: float
) -> Image:
    """Smooth fields: Legendre polynomials up to degree 3, scaled to a drawn largest value."""
    powers = [p for p in product(range(_BIAS_DEGREE + 1), repeat=3) if 0 < sum(p) <= _BIAS_DEGREE]
    count = channels * len(powers)
    drawn = draw.of("coefficients").normal(ids, count).reshape(len(ids), channels, -1)
    cube = np.zeros((len(ids), channels, *[_BIAS_DEGREE + 1] * 3))
    for place, (i, j, k) in enumerate(powers):
        cube[:, :, i, j, k] = drawn[:, :, place]
    field = torch.from_numpy(cube).float()
    for n in size:  # one axis at a time; the axis just made goes to the end
        values = np.polynomial.legendre.legvander(np.linspace(-1, 1, n), _BIAS_DEGREE)
        field = torch.tensordot(field, torch.from_numpy(values).float(), ([2], [1]))
    peak = field.abs().amax((2, 3, 4), keepdim=True).clamp(min=1e-6)
    wanted = draw.of("strength").uniform(ids, channels, 0, largest).astype(np.float32)
    return field * (torch.from_numpy(wanted)[:, :, None, None, None] / peak)


def _blurred(x: Image, sigma: Float[Tensor, "n c 1 1 1"]) -> Image:
    """Gaussian within slices; sigma in voxels."""
    steps = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weights = (-0.5 * (steps / sigma.clamp(min=1e-3)) ** 2).exp()  # (n, c, 1, 1, 5)
    weights = weights / weights.sum(-1, keepdim=True)
    for axis in (3, 4):
        pad = (
            (_BLUR_RADIUS,) * 2 + (0, 0) * 2 if axis == 4 else (0, 0) + (_BLUR_RADIUS,) * 2 + (0, 0)
        )
        wide = F.pad(x, pad, mode="replicate")
        parts = [
            wide.narrow(axis, k, x.shape[axis]) * weights[..., k : k + 1]
            for k in range(2 * _BLUR_RADIUS + 1)
        ]
        x = torch.stack(parts).sum(0)
    return x


def _noise(draw: Draw, ids: Sequence[int], like: Image) -> Image:
    """Standard normal numbers; torch's generator, seeded by each item, is fast for whole images."""
    made = torch.empty_like(like)
    for image, (high, low) in zip(made, draw.integers(ids, 2, _WORD).tolist(), strict=True):
        image.normal_(generator=torch.Generator().manual_seed(high * _WORD + low))
    return made
