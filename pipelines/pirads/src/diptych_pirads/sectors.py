"""The PI-RADS sector map: which of 39 (version 2) or 41 (version 2.1) sectors a point lies in.

The sectors are drawn schematically in PI-RADS; the rule that finds them on zone masks is this
project's: thirds of the gland, the midline of each slice, and fractions of its width and depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage
from scipy.spatial import cKDTree

from diptych_pirads.geometry import Volume, bounding_box, reorient_lps, same_grid, to_grid
from diptych_pirads.labels import AFS, DPU, PZ, TZ
from diptych_pirads.volumetry import LEVELS, gland_levels

Version = Literal["2.1", "2"]

SIDES = ("R", "L")
PLACES = ("PZa", "PZpl", "PZpm", "TZa", "TZp", "AFS")
OUTSIDE = "outside"
NEAR_MM = 5.0  # a point this near to the gland still gets its nearest sector
CENTRAL_ZONE = {"R-base-TZp": "R-base-CZ", "L-base-TZp": "L-base-CZ"}  # these masks cannot tell

_PROSTATE = tuple(
    f"{side}-{level}-{place}" for level in reversed(LEVELS) for side in SIDES for place in PLACES
)
_OTHERS = ("R-SV", "L-SV", "US")
_V2_NAMES = {f"{side}-base-PZpm": f"{side}-base-CZ" for side in SIDES}
SECTORS_V2 = (*(_V2_NAMES.get(name, name) for name in _PROSTATE), *_OTHERS)
SECTORS_V21 = (*_PROSTATE, *_V2_NAMES.values(), *_OTHERS)

_SCT_LEVELS = {"base": "Basal", "mid": "Middle", "apex": "Apical"}
_SCT_SIDES = {"R": "Right", "L": "Left"}
_SCT_OTHERS = {
    "R-SV": "RightSeminalVesicle",
    "L-SV": "LeftSeminalVesicle",
    "US": "MaleExternalUrethralSphincter",
}


@dataclass(frozen=True)
class LesionSectors:
    """Where one lesion lies.

    Args:
        main: Sector of most of its voxels within the gland; "outside" where it lies farther off.
        fractions: Sectors with at least the least part of its voxels within the gland, by size.
        inside: Part of its voxels within the gland, in [0, 1].
        volume_ml: Volume of the whole lesion in mL.
        maybe_central_zone: Whether ``main`` may be the central zone, which the masks do not hold.
    """

    main: str
    fractions: dict[str, float]
    inside: float
    volume_ml: float
    maybe_central_zone: bool


def assign_sector(
    points_lps_mm: Float[ndarray, "n 3"], zones: Volume, version: Version = "2.1"
) -> list[str]:
    """Sector of each point.

    Args:
        points_lps_mm: (n, 3), x, y, z in LPS mm.
        zones: (z, y, x) class numbers 0 to 4.
        version: Of PI-RADS; in version 2 the posteromedial peripheral zone at the base is CZ.

    Returns:
        Names such as "R-mid-PZpl". A point outside the gland gets the sector of the nearest gland
        voxel within 5 mm, else "outside". "TZp" at the base may be the central zone
        (`CENTRAL_ZONE`).

    Raises:
        ValueError: Points are not (n, 3), or the version is unknown.
    """
    points = np.asarray(points_lps_mm, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points have shape {points.shape}: pass (n, 3) in LPS mm")
    names = _sector_names(version)
    upright = reorient_lps(zones)
    codes = sector_map(upright.array)
    index = np.rint(upright.to_index(points)).astype(np.int64)
    held = ((index >= 0) & (index < upright.size)).all(axis=1)
    found = np.zeros(len(points), dtype=np.int64)
    found[held] = codes[tuple(index[held].T)]
    missed = np.flatnonzero(found == 0)
    inside = np.argwhere(codes > 0)
    if len(missed) and len(inside):
        distance, nearest = cKDTree(upright.to_lps(inside)).query(points[missed])
        near = distance <= NEAR_MM
        found[missed[near]] = codes[tuple(inside[nearest[near]].T)]
    return [names[code] for code in found]


def lesion_sectors(
    lesion: Volume, zones: Volume, min_fraction: float = 0.05, version: Version = "2.1"
) -> list[LesionSectors]:
    """Sectors of every lesion of a mask, by its voxels: its centre may lie outside the gland.

    Args:
        lesion: (z, y, x), any value but 0 is lesion; each 26-connected piece is one lesion.
        zones: (z, y, x) class numbers 0 to 4; the lesion is brought to this grid.
        min_fraction: Least part of a lesion's voxels for a sector to be listed, in [0, 1].
        version: Of PI-RADS.

    Returns:
        One entry a lesion, in the order of the pieces' first voxels on the grid of ``zones``.
    """
    upright = reorient_lps(zones)
    mask = lesion.with_array((lesion.array != 0).astype(np.uint8))
    upright_mask = reorient_lps(mask)
    if not same_grid(upright_mask, upright):
        upright_mask = to_grid(mask, upright, "label")
    codes = sector_map(upright.array)
    pieces, count = ndimage.label(upright_mask.array, ndimage.generate_binary_structure(3, 3))
    return [
        _one_lesion(pieces == number, codes, upright, min_fraction, version)
        for number in range(1, count + 1)
    ]


def sector_map(zones: Int[ndarray, "z y x"]) -> Int[ndarray, "z y x"]:
    """Sector of every gland voxel.

    Args:
        zones: (z, y, x) class numbers 0 to 4, axes growing to superior, posterior and left.

    Returns:
        (z, y, x), 0 outside the gland, else 1 + the place in `SECTORS_V21`: 6 to a side, 12 to a
        level, base first. DPU counts as TZ; the column of the midline itself as right.
    """
    box = bounding_box(zones > 0)
    codes = np.zeros(zones.shape, dtype=np.int64)
    if box is None:
        return codes
    inner = zones[box]
    gland = inner > 0
    levels = gland_levels(gland)
    middle = _midlines(inner, gland)
    left = np.arange(inner.shape[2]) > middle[:, None]
    offset = np.abs(np.arange(inner.shape[2]) - middle[:, None])
    first, last = _extent(gland, axis=1)
    medial = offset <= 0.25 * (last - first + 1)[:, None]
    behind_gland = _behind_middle(gland)
    transition = np.where((inner == TZ).any(axis=(1, 2))[:, None, None], inner == TZ, gland)
    behind_tz = _behind_middle(transition)
    peripheral = np.where(behind_gland[:, :, None], np.where(medial, 2, 1)[:, None, :], 0)
    place = np.where(inner == PZ, peripheral, np.where(behind_tz, 4, 3)[:, :, None])
    place[inner == AFS] = 5
    level = (len(LEVELS) - 1 - levels)[:, None, None]
    sector = 1 + len(PLACES) * (len(SIDES) * level + left[:, None, :]) + place
    codes[box] = np.where(gland, sector, 0)
    return codes


def snomed_code(sector: str) -> tuple[str, str]:
    """SNOMED CT code of a sector, by its name in DICOM's dictionary of concepts.

    Args:
        sector: One of `SECTORS_V2` or `SECTORS_V21`.

    Returns:
        Code value and meaning.

    Raises:
        ValueError: No such sector.

    Example:
        >>> snomed_code("R-mid-PZpl")[0]
        '716921007'
    """
    from pydicom.sr.codedict import codes

    if sector not in SECTORS_V2 and sector not in SECTORS_V21:
        raise ValueError(f"'{sector}' is no sector: choose one of {', '.join(SECTORS_V21)}")
    code = getattr(codes.SCT, _SCT_OTHERS.get(sector) or _concept(sector))
    return str(code.value), str(code.meaning)


def _concept(sector: str) -> str:
    side, level, place = sector.split("-")
    hand, third = _SCT_SIDES[side], _SCT_LEVELS[level]
    return {
        "PZa": f"{hand}Anterior{third}PeripheralZoneOfProstate",
        "PZpl": f"{hand}Posterolateral{third}PeripheralZoneOfProstate",
        "PZpm": f"{hand}Posteromedial{third}PeripheralZoneOfProstate",
        "TZa": f"{hand}Anterior{third}TransitionZoneOfProstate",
        "TZp": f"{hand}Posterior{third}TransitionZoneOfProstate",
        "AFS": f"{hand}{third}AnteriorFibromuscularStromaOfProstate",
        "CZ": f"CentralZoneOf{hand}HalfProstate",
    }[place]


def _sector_names(version: Version) -> tuple[str, ...]:
    names = {"2.1": SECTORS_V21, "2": SECTORS_V2}
    if version not in names:
        raise ValueError(f"PI-RADS version is '{version}': choose '2.1' or '2'")
    return (OUTSIDE, *names[version][: len(_PROSTATE)])


def _one_lesion(
    piece: Bool[ndarray, "z y x"],
    codes: Int[ndarray, "z y x"],
    zones: Volume,
    min_fraction: float,
    version: Version,
) -> LesionSectors:
    names = _sector_names(version)
    held = codes[piece]
    inside = held[held > 0]
    if len(inside):
        found = [names[code] for code in inside]
    else:
        near = assign_sector(zones.to_lps(np.argwhere(piece)), zones, version)
        found = [name for name in near if name != OUTSIDE] or [OUTSIDE]
    sectors, counts = np.unique(found, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    main = str(sectors[order[0]])
    return LesionSectors(
        main=main,
        fractions={
            str(sectors[n]): float(counts[n] / len(found))
            for n in order
            if counts[n] >= min_fraction * len(found)
        },
        inside=len(inside) / len(held),
        volume_ml=len(held) * zones.voxel_ml,
        maybe_central_zone=main in CENTRAL_ZONE,
    )


def _midlines(zones: Int[ndarray, "z y x"], gland: Bool[ndarray, "z y x"]) -> Float[ndarray, " z"]:
    """Column of the midline of each slice: the urethra, else the middle of the gland's width."""
    first, last = _extent(gland, axis=1)
    middle = (first + last) / 2
    for z in np.flatnonzero((zones == DPU).any(axis=(1, 2))):
        middle[z] = np.nonzero(zones[z] == DPU)[1].mean()
    held = gland.any(axis=(1, 2))
    weights = ndimage.convolve1d(held.astype(float), np.ones(3), mode="constant")
    total = ndimage.convolve1d(np.where(held, middle, 0.0), np.ones(3), mode="constant")
    smooth: Float[ndarray, " z"] = total / np.maximum(weights, 1)
    return smooth


def _behind_middle(mask: Bool[ndarray, "z y x"]) -> Bool[ndarray, "z y"]:
    """Rows from the middle of a mask's depth on, for each slice."""
    first, last = _extent(mask, axis=2)
    rows: Bool[ndarray, "z y"] = np.arange(mask.shape[1]) >= ((first + last) / 2)[:, None]
    return rows


def _extent(
    mask: Bool[ndarray, "z y x"], axis: int
) -> tuple[Int[ndarray, " z"], Int[ndarray, " z"]]:
    """First and last row (``axis`` 2) or column (1) of a mask on each slice; all where empty."""
    lines = np.asarray(mask.any(axis=axis))
    return lines.argmax(axis=1), lines.shape[1] - 1 - lines[:, ::-1].argmax(axis=1)
