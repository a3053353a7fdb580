"""Findings over one label: its grid beside the image's, its shape, its volumes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from scipy import ndimage
from skimage.morphology import convex_hull_image

from diptych.findings import Finding
from diptych_pirads.geometry import Volume, bounding_box, cut
from diptych_pirads.label_files import Label
from diptych_pirads.labels import ZONES

SHIFT_VOXELS = 0.5
TILT = 1e-2
CUT_MM = 5.0  # a thinner rim beyond the mask is left unlabelled; more means a cut label
ANTERIOR_MM = 0.5
GLAND_ML = (8.0, 250.0)
PZ_ML = 3.0
AXES = ("z", "y", "x")
EVERY_NEIGHBOUR = np.ones((3, 3, 3), bool)


def check_label(
    label: Label, where: str, image: Volume | None = None, *, strict: bool = False
) -> list[Finding]:
    """Everything remarkable about a label that could be read.

    Args:
        label: The label.
        where: Its file, for messages.
        image: The T2-weighted series, axes nearest to left, posterior, superior.
        strict: Zones that look exchanged are an error.
    """
    findings = [] if image is None else check_grid(label.volume, image, where)
    box = bounding_box(label.volume.array > 0)
    if box is None:
        return findings
    inside = replace(label, volume=cut(label.volume, box))
    return [
        *findings,
        *_check_zones(inside, where, strict),
        *_check_components(inside, where),
        *_check_volumes(inside, where),
    ]


def check_grid(label: Volume, image: Volume, where: str) -> list[Finding]:
    """E106, W106 and I122: whether a label lies where its image lies.

    Args:
        label: (z, y, x), 0 the background.
        image: (z, y, x); both with axes nearest to left, posterior, superior.
        where: The label's file, for messages.
    """
    if np.abs(label.directions - image.directions).max() > TILT:
        tilt = f"its axes are tilted by {_angle(label, image):.1f} degrees against the image's"
        return [_elsewhere(where, tilt)]
    if label.size == image.size and np.allclose(label.spacing, image.spacing, rtol=1e-3):
        voxels = np.abs(image.to_index(label.to_lps(np.zeros(3))))
        if voxels.max() > SHIFT_VOXELS:
            axis = int(voxels.argmax())
            mm = voxels[axis] * image.spacing[axis]
            return [
                _elsewhere(where, f"origin differs from the image by {mm:.2f} mm ({AXES[axis]})")
            ]
        if np.array_equal(label.affine, image.affine):
            return []
        found = "geometry differs from the image's by rounding"
        return [Finding("note", "I122", where, found, "nothing: taken as equal")]
    outside = _leaves(label, image)
    cut_mm, cut = _cut_by_its_grid(label, image)
    if outside or cut_mm > CUT_MM:
        return [_elsewhere(where, outside or cut)]
    found = f"on another grid than the image: {_grid(label)}, the image {_grid(image)}"
    found += f"; {cut}" if cut else ""
    fix = "nothing: it is resampled, and voxels that it does not reach count as unlabelled"
    return [Finding("warning", "W106", where, found, fix)]


def check_frame(frame: str, image_frame: str, where: str) -> list[Finding]:
    """W126: positions are compared that were measured from different places.

    Args:
        frame: DICOM's frame of reference of a series or label; "" where it is not known.
        image_frame: That of the T2-weighted series.
        where: The file, for messages.
    """
    if not frame or not image_frame or frame == image_frame:
        return []
    found = "another DICOM frame of reference than the T2-weighted series: they may not fit"
    fix = "give series of one examination; look at them together if only identifiers were replaced"
    return [Finding("warning", "W126", where, found, fix)]


def solidity(mask: Bool[ndarray, "z y x"]) -> float:
    """Area of a mask over the area of its convex hull, both summed over slices.

    Returns:
        In (0, 1], 1 for convex slices; NaN for an empty mask.
    """
    box = bounding_box(mask)
    if box is None:
        return math.nan
    filled = [convex_hull_image(part).sum() for part in mask[box] if part.any()]
    return float(mask.sum() / sum(filled))


def check_volumes(gland_ml: float, pz_ml: float | None, where: str) -> list[Finding]:
    """W121: volumes that prostates rarely have.

    Args:
        gland_ml: Volume of the gland in mL.
        pz_ml: Volume of the peripheral zone in mL; None where it is not told from the rest.
        where: The file, for messages.
    """
    unusual = []
    if not GLAND_ML[0] <= gland_ml <= GLAND_ML[1]:
        usual = f"usual are {GLAND_ML[0]:g} to {GLAND_ML[1]:g}"
        unusual.append(f"the gland has {gland_ml:.1f} mL, {usual}")
    if pz_ml is not None and pz_ml < PZ_ML:
        unusual.append(f"PZ has {pz_ml:.1f} mL, usual are {PZ_ML:g} or more")
    fix = "look at the outlines; a wrong voxel size or a cut gland shows like this"
    return [Finding("warning", "W121", where, "; ".join(unusual), fix)] if unusual else []


def _check_zones(label: Label, where: str, strict: bool) -> list[Finding]:
    """W108 and W110: the peripheral zone is a crescent, and lies behind.

    Of PZ and the rest, whichever fills its convex hulls less, over the middle half of the slices,
    is the true PZ. Position alone could not tell an exchange from a flip.
    """
    v, scheme = label.volume, label.scheme
    pz, inner = np.isin(v.array, scheme.peripheral), np.isin(v.array, scheme.inner)
    gland = bounding_box(pz | inner)
    if gland is None:
        return []
    quarter = (gland[0].stop - gland[0].start) // 4
    middle = slice(gland[0].start + quarter, gland[0].stop - quarter)
    pz_solidity, inner_solidity = solidity(pz[middle]), solidity(inner[middle])
    if math.isnan(pz_solidity) or math.isnan(inner_solidity):
        return []
    findings = []
    exchanged = inner_solidity < pz_solidity
    if exchanged:
        found = (
            f"PZ and TZ look exchanged: the label of PZ fills {pz_solidity:.2f} of its convex "
            f"hulls, the other {inner_solidity:.2f}"
        )
        fix = "correct the column scheme (pz_tz: 1 is PZ; prostate158: 1 is TZ)"
        findings.append(Finding("error" if strict else "warning", "W108", where, found, fix))
    real = inner if exchanged else pz
    ahead = _posterior_mm(v, pz | inner) - _posterior_mm(v, real)
    if ahead > ANTERIOR_MM:
        found = f"flipped front to back: PZ lies {ahead:.1f} mm before the gland's middle"
        fix = "export the label again; its rows run against the image's"
        findings.append(Finding("warning", "W110", where, found, fix))
    return findings


def _check_components(label: Label, where: str) -> list[Finding]:
    v, scheme = label.volume, label.scheme
    parts = {"gland": np.isin(v.array, scheme.foreground)}
    for value in scheme.foreground if len(scheme.foreground) > 1 else ():
        parts["/".join(ZONES[c] for c in sorted(scheme.allowed[value]))] = v.array == value
    islands = []
    for name, mask in parts.items():
        components, count = ndimage.label(mask, EVERY_NEIGHBOUR)
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]
            rest = (sizes.sum() - sizes.max()) * v.voxel_ml
            islands.append(f"{name} {count - 1} ({rest:.3f} mL)")
    if not islands:
        return []
    found = f"components beside the largest: {', '.join(islands)}"
    fix = "remove them if they are slips of the drawing"
    return [Finding("warning", "W114", where, found, fix)]


def _check_volumes(label: Label, where: str) -> list[Finding]:
    v, scheme = label.volume, label.scheme
    gland = int(np.isin(v.array, scheme.foreground).sum()) * v.voxel_ml
    pz = int(np.isin(v.array, scheme.peripheral).sum()) * v.voxel_ml
    return check_volumes(gland, pz if scheme.peripheral else None, where)


def _leaves(label: Volume, image: Volume) -> str:
    box = bounding_box(label.array > 0)
    if box is None:
        return ""
    ends = np.array([[part.start, part.stop - 1] for part in box]).T
    index = image.to_index(label.to_lps(ends))
    beyond = np.maximum(-0.5 - index, index - (np.array(image.size) - 0.5)).max(0)
    if beyond.max() <= SHIFT_VOXELS:
        return ""
    axis = int(beyond.argmax())
    mm = beyond[axis] * image.spacing[axis]
    return f"labelled voxels lie up to {mm:.1f} mm outside the image ({AXES[axis]})"


def _cut_by_its_grid(label: Volume, image: Volume) -> tuple[float, str]:
    """How far the image goes on where the label ends with its own grid, in mm and in words."""
    box = bounding_box(label.array > 0)
    if box is None:
        return 0.0, ""
    first = image.to_index(label.to_lps(np.full(3, -0.5)))
    last = image.to_index(label.to_lps(np.array(label.size) - 0.5))
    cuts = [(0.0, "")]
    for axis, part in enumerate(box):
        before, after = first[axis] + 0.5, image.size[axis] - 0.5 - last[axis]
        ends = (("first", before, part.start == 0), ("last", after, part.stop == label.size[axis]))
        for end, more, touches in ends:
            if touches and more > SHIFT_VOXELS:
                mm = float(more * image.spacing[axis])
                words = f"the label reaches the {end} voxels of its own grid along {AXES[axis]}"
                cuts.append((mm, f"{words} while the image goes on for {mm:.1f} mm"))
    return max(cuts)


def _elsewhere(where: str, found: str) -> Finding:
    fix = "draw or export the label on this very T2-weighted series"
    return Finding("error", "E106", where, found, fix)


def _angle(a: Volume, b: Volume) -> float:
    cosines = np.clip((a.directions * b.directions).sum(0), -1, 1)
    return float(np.degrees(np.arccos(cosines.min())))


def _grid(v: Volume) -> str:
    size = " x ".join(str(n) for n in v.size[::-1])
    return f"{size} voxels of {' x '.join(f'{mm:.3g}' for mm in v.spacing[::-1])} mm"


def _posterior_mm(v: Volume, mask: Bool[ndarray, "z y x"]) -> float:
    middle = [float(part.mean()) for part in np.nonzero(mask)]
    return float(v.to_lps(np.array(middle))[1])
