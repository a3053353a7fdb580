"""Generated prostates with four zones: known anatomy, T2-like contrast, and a second reader.

Every draw is keyed by seed, number of the case and purpose, so that a case does not depend on how
many others are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from numpy import ndarray
from scipy import ndimage

from diptych.randomness import Draw
from diptych_pirads.geometry import Volume
from diptych_pirads.labels import AFS, BG, DPU, PZ, TZ, ZONES
from diptych_pirads.post import postprocess_zones

Field = Float[ndarray, "z y x"]

TILT_DEGREES = 12.0  # axial series are tilted towards the rectum's wall
_CONTRAST = {  # mean and standard deviation of the texture
    BG: (0.50, 0.10),
    PZ: (0.80, 0.07),
    TZ: (0.47, 0.10),
    DPU: (0.66, 0.05),
    AFS: (0.20, 0.04),
}
_OFFSET_SD = 0.03
_CAPSULE, _RECTUM, _BLADDER, _MUSCLE = 0.25, 0.12, 0.95, 0.22
_WARP_MM = 1.2
_WARP, _TEXTURE, _READER = (2.0, 6.0, 6.0), (0.5, 1.5, 1.5), (1.0, 4.0, 4.0)  # sigma in voxels
_READER_SD_MM = {BG: 1.6, PZ: 1.6, TZ: 1.6, DPU: 2.0, AFS: 3.2}
_LESION_CONTRAST = 0.6


@dataclass(frozen=True, eq=False)
class Phantom:
    """One generated study.

    Args:
        image: (z, y, x) T2-like intensities in [0, 1].
        label: (z, y, x) class numbers 0 to 4, the truth.
        lesions: (z, y, x), 0 or the number of the lesion.
        params: What was drawn: semi-axes in mm, growth in [0, 1], AFS and DPU in mm, PSA in ng/mL.
        seed: Key of every draw.
        index: Number of the case.
    """

    image: Volume
    label: Volume
    lesions: Volume
    params: dict[str, float]
    seed: int
    index: int

    @cached_property
    def reader2(self) -> Volume:
        """(z, y, x) class numbers as a second reader would draw them."""
        label, draw = self.label, Draw(self.seed, "phantom")
        return label.with_array(_second_reader(draw, self.index, label.array, label.spacing))


@dataclass(frozen=True, eq=False)
class _Space:
    """Coordinates of every voxel in the gland's own frame, in mm: x to left, y back, z up."""

    z: Field
    y: Field
    x: Field


def make_phantom(
    seed: int,
    index: int,
    shape: Sequence[int] = (16, 64, 64),
    spacing: Sequence[float] = (3.0, 1.0, 1.0),
) -> Phantom:
    """A generated study.

    Args:
        seed: Key of every draw.
        index: Number of the case.
        shape: Voxels along z, y, x; 48 x 64 x 64 mm hold the largest gland.
        spacing: mm along z, y, x.

    Returns:
        Image, truth, second reader, lesions and what was drawn.

    Raises:
        ValueError: Shape or spacing are not three positive numbers.

    Example:
        >>> make_phantom(0, 3).label.size
        (16, 64, 64)
    """
    if any(len(triple) != 3 or not all(n > 0 for n in triple) for triple in (shape, spacing)):
        raise ValueError(f"shape {shape} and spacing {spacing}: pass three positive numbers each")
    draw = Draw(seed, "phantom")
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    params = _draw_params(draw, index)
    space = _space(draw, index, size, spacing, params)
    label = postprocess_zones(_zones(space, params), spacing)
    lesions = _lesions(draw, index, label, spacing)
    image = _image(draw, index, space, label, lesions, params)
    # So that density, not PSA, tells who has a lesion.
    gland_ml = np.count_nonzero(label) * math.prod(spacing) / 1000
    params["psa"] *= gland_ml * (1.6 if lesions.any() else 1.0)
    affine = _affine(size, spacing)
    volumes = [Volume(array, affine) for array in (image, label, lesions)]
    return Phantom(volumes[0], volumes[1], volumes[2], params, seed, index)


def _signed_distance(mask: Bool[ndarray, "z y x"], spacing: Sequence[float]) -> Field:
    """Distance to the nearest voxel of the other kind in mm, positive inside; far for no voxel."""
    if not mask.any():
        return np.full(mask.shape, -float(np.linalg.norm(np.multiply(mask.shape, spacing))))
    inside: Field = ndimage.distance_transform_edt(mask, sampling=spacing)
    outside: Field = ndimage.distance_transform_edt(~mask, sampling=spacing)
    return np.asarray(inside - outside)


def _uniform(draw: Draw, index: int, purpose: str, low: float, high: float) -> float:
    return float(draw.of(purpose).uniform([index], 1, low, high)[0, 0])


def _draw_params(draw: Draw, index: int) -> dict[str, float]:
    """Sizes in mm, angles in radians."""
    ranges = {
        "shift_x": (-4.0, 4.0),
        "shift_y": (-4.0, 4.0),
        "shift_z": (-2.0, 2.0),
        "rotation": (-0.17, 0.17),
        "ax": (20.0, 28.0),
        "ay": (14.0, 20.0),
        "az": (17.0, 22.0),
        "afs": (3.5, 7.0),
        "dpu": (3.0, 4.6),
        "noise": (0.03, 0.07),
    }
    params = {name: _uniform(draw, index, name, *bounds) for name, bounds in ranges.items()}
    # Beta(2, 2) is the median of three uniform numbers.
    params["growth"] = float(np.median(draw.of("growth").uniform([index], 3)))
    params["psa"] = 0.12 * math.exp(0.4 * float(draw.of("psa").normal([index])[0, 0]))
    return params


def _noise(
    draw: Draw, index: int, purpose: str, shape: Sequence[int], sigma: Sequence[float]
) -> Field:
    """Smooth noise of unit standard deviation; sigma in voxels."""
    white = draw.of(purpose).normal([index], math.prod(shape)).reshape(shape)
    smooth: Field = ndimage.gaussian_filter(white, sigma)
    return np.asarray(smooth / smooth.std())


def _space(
    draw: Draw,
    index: int,
    shape: tuple[int, int, int],
    spacing: Sequence[float],
    params: dict[str, float],
) -> _Space:
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    z, y, x = (
        grid
        - params[f"shift_{name}"]
        + _WARP_MM * _noise(draw, index, f"warp_{name}", shape, _WARP)
        for grid, name in zip((z, y, x), "zyx", strict=True)
    )
    cosine, sine = math.cos(params["rotation"]), math.sin(params["rotation"])
    return _Space(z, cosine * y - sine * x, cosine * x + sine * y)


def _zones(space: _Space, params: dict[str, float]) -> UInt8[ndarray, "z y x"]:
    z, y, x = space.z, space.y, space.x
    ax, ay, az = params["ax"], params["ay"], params["az"]
    taper = np.where(z < 0, 1 - 0.22 * np.minimum(1, -z / az) ** 2, 1.0)
    depth = ay * np.where(y > 0, 0.95, 1.05)
    gland = (x / (ax * taper)) ** 2 + (y / (depth * taper)) ** 2 + (z / az) ** 2 < 1
    label = np.where(gland, PZ, BG)
    size = 0.52 + 0.26 * params["growth"]
    transition = (
        (x / (size * ax)) ** 2
        + ((y + 0.22 * ay) / (0.95 * size * ay)) ** 2
        + ((z - 0.28 * az) / (0.72 * az)) ** 2
    ) < 1
    midline = (y < -0.25 * ay) & (np.abs(x) < 0.5 * ax) & (z > -0.3 * az)
    label[gland & (transition | midline)] = TZ
    front = (
        -1.05 * ay * taper * np.sqrt(np.clip(1 - (x / (ax * taper)) ** 2 - (z / az) ** 2, 0, None))
    )
    thickness = params["afs"] * np.clip(1 - (x / (0.62 * ax)) ** 2, 0, None)
    label[gland & (y < front + thickness) & (z > -0.75 * az)] = AFS
    tube = np.hypot(x, y + 0.12 * ay + 0.10 * ay * z / az) < params["dpu"]
    label[gland & tube & (z < 0.05 * az)] = DPU
    return label.astype(np.uint8)


def _lesions(
    draw: Draw, index: int, label: UInt8[ndarray, "z y x"], spacing: Sequence[float]
) -> UInt8[ndarray, "z y x"]:
    """None, one or two balls of 4 to 7 mm radius, cut to PZ and TZ."""
    lesions = np.zeros(label.shape, np.uint8)
    places = np.argwhere((label == PZ) | (label == TZ))
    count = int(draw.of("lesions").integers([index], 1, 3)[0, 0])
    if not len(places):
        return lesions
    chosen = draw.of("lesion_places").integers([index], 2, len(places))[0]
    radii = draw.of("lesion_radii").uniform([index], 2, 4.0, 7.0)[0]
    grid = np.indices(label.shape).transpose(1, 2, 3, 0)
    for number in range(count):
        distance = np.linalg.norm((grid - places[chosen[number]]) * spacing, axis=-1)
        ball = (distance < radii[number]) & ((label == PZ) | (label == TZ))
        lesions[ball & (lesions == 0)] = number + 1
    return lesions


def _image(
    draw: Draw,
    index: int,
    space: _Space,
    label: UInt8[ndarray, "z y x"],
    lesions: UInt8[ndarray, "z y x"],
    params: dict[str, float],
) -> Float32[ndarray, "z y x"]:
    shape = label.shape
    offset = _OFFSET_SD * draw.of("offsets").normal([index], len(ZONES))[0]
    image = np.zeros(shape)
    for number, (mean, deviation) in _CONTRAST.items():
        texture = (
            mean
            + offset[number]
            + deviation * _noise(draw, index, f"texture_{number}", shape, _TEXTURE)
        )
        image = np.where(label == number, texture, image)
    image = _surroundings(image, label, space, params)
    image[lesions > 0] *= _LESION_CONTRAST
    image = ndimage.gaussian_filter(image, (0.3, 0.6, 0.6))
    image *= np.exp(_bias(draw, index, shape))
    real, imaginary = params["noise"] * draw.of("noise_field").normal(
        [index], 2 * math.prod(shape)
    ).reshape(2, *shape)
    image = np.hypot(image + real, imaginary)
    low, high = np.percentile(image, (1, 99))
    scaled: Float32[ndarray, "z y x"] = np.clip((image - low) / (high - low), 0, 1).astype(
        np.float32
    )
    return scaled


def _surroundings(
    image: Field, label: UInt8[ndarray, "z y x"], space: _Space, params: dict[str, float]
) -> Field:
    """Capsule, rectum behind, bladder on top, muscle at the sides."""
    z, y, x = space.z, space.y, space.x
    ax, ay, az = params["ax"], params["ay"], params["az"]
    gland = label > 0
    image = np.where(~gland & (np.abs(x) > ax + 5), _MUSCLE, image)
    bladder = ((x / 22) ** 2 + ((y + 4) / 16) ** 2 < 1) & (z > 0.9 * az)
    image = np.where(~gland & bladder, _BLADDER, image)
    rectum = (x / 14) ** 2 + ((y - ay - 9) / 8) ** 2 < 1
    image = np.where(~gland & rectum, _RECTUM, image)
    ring = ndimage.binary_dilation(gland, np.ones((1, 3, 3), bool)) & ~gland
    return np.where(ring, _CAPSULE, image)


def _bias(draw: Draw, index: int, shape: Sequence[int]) -> Field:
    """Logarithm of a receive field: a random polynomial of second order over the volume."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    pairs = [(a, b) for a, b in product(range(3), repeat=2) if a <= b]
    weights = draw.of("bias").normal([index], 3 + len(pairs))[0]
    field = sum(0.18 * w * axis for w, axis in zip(weights[:3], axes, strict=True))
    for weight, (a, b) in zip(weights[3:], pairs, strict=True):
        field = field + 0.10 * weight * axes[a] * axes[b]
    return np.asarray(field)


def _second_reader(
    draw: Draw, index: int, label: UInt8[ndarray, "z y x"], spacing: Sequence[float]
) -> UInt8[ndarray, "z y x"]:
    """The class of the largest signed distance after each was shifted by smooth noise."""
    scores = [
        _signed_distance(label == number, spacing)
        + deviation * _noise(draw, index, f"reader_{number}", label.shape, _READER)
        for number, deviation in _READER_SD_MM.items()
    ]
    drawn: UInt8[ndarray, "z y x"] = np.argmax(scores, axis=0).astype(np.uint8)
    return drawn


def _affine(shape: Sequence[int], spacing: Sequence[float]) -> Float[ndarray, "4 4"]:
    """A series tilted about the left-right axis, its middle at the origin."""
    angle = math.radians(TILT_DEGREES)
    tilt = np.array(
        [
            [1, 0, 0],
            [0, math.cos(angle), -math.sin(angle)],
            [0, math.sin(angle), math.cos(angle)],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = tilt * np.asarray(spacing)[::-1]
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape)[::-1] - 1) / 2)
    return affine
