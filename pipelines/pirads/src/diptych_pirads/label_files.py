"""A study's label from its file, its three masks or its slices, and what its values mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK
from jaxtyping import Shaped, UInt8
from numpy import ndarray

from diptych.findings import Finding
from diptych_pirads import labels
from diptych_pirads.geometry import Volume, reorient_lps, same_grid
from diptych_pirads.labels import FROM_SEGMENTS, SCHEMES, LabelScheme
from diptych_pirads.layout import Study
from diptych_pirads.read import Opened, open_volume, quiet_itk, refuse

SHOWN = 5  # values named in a message


@dataclass(frozen=True, eq=False)
class Label:
    """A label whose values are whole numbers of its scheme.

    Args:
        volume: uint8 (z, y, x), axes nearest to left, posterior, superior.
        scheme: What the values mean.
        findings: Warnings and notes about its files.
        frame: DICOM's frame of reference, "" where the file knows none.
    """

    volume: Volume
    scheme: LabelScheme
    findings: tuple[Finding, ...] = ()
    frame: str = ""


def open_label(study: Study, scheme: str = "auto", image: Volume | None = None) -> Label:
    """Read the label of a study.

    Args:
        study: The study; its own scheme wins over `scheme`.
        scheme: The scheme of labels whose study does not say one; "auto" guesses from the values.
        image: The T2-weighted series as stored; `ucla_png` slices lie on its grid.

    Raises:
        DataError: With a finding E101, E104, E105, E106, E107, E109 or E113.
    """
    name = study.scheme or scheme
    where = study.name_of(study.label[0])
    if name == "prostatex_masks":
        return _joined(study)
    if name == "ucla_png":
        values = labels.join_contours(_png_slices(study.label[0], where, image))
        grid = np.eye(4) if image is None else image.affine
        return _checked(Volume(values, grid), SCHEMES[name], where, ())
    opened = open_volume(study.label[0])
    values = _whole(opened.volume.array, where)
    findings = opened.findings
    if name == FROM_SEGMENTS or (name == "auto" and opened.segments):
        known = _named_segments(opened, where)
        values, known = _as_four_zones(values, known)
    elif name == "auto":
        name = labels.guess_scheme(np.unique(values))
        known = SCHEMES[name]
        fix = "write the scheme into the manifest's column scheme, or set data.scheme"
        note = f"no scheme is given; taken as {name} from the values"
        findings += (Finding("note", "I105", where, note, fix),)
    else:
        known = SCHEMES[name]
    label = _checked(opened.volume.with_array(values), known, where, findings)
    return replace(label, frame=opened.frame)


def _whole(array: Shaped[ndarray, "z y x"], where: str) -> Shaped[ndarray, "z y x"]:
    if array.dtype.kind == "f":
        whole = np.rint(array)
        broken = array[~(whole == array)]
        if len(broken):
            found = f"{len(broken)} voxels are no whole numbers ({_listed(np.unique(broken))})"
            fix = "export the label with nearest-neighbour interpolation"
            raise refuse("E104", where, found, fix)
        array = whole.astype(np.int64)
    return array


def _checked(
    volume: Volume, scheme: LabelScheme, where: str, findings: tuple[Finding, ...]
) -> Label:
    values, counts = np.unique(volume.array, return_counts=True)
    strange = [i for i, value in enumerate(values) if int(value) not in scheme.allowed]
    if strange:
        found = ", ".join(f"{values[i]} in {counts[i]} voxels" for i in strange[:SHOWN])
        allowed = ", ".join(map(str, sorted(scheme.allowed)))
        fix = "correct the label, or name its scheme in the manifest's column scheme"
        found = f"values outside the scheme {scheme.name} ({allowed}): {found}"
        raise refuse("E105", where, found, fix)
    if not np.isin(values, scheme.foreground).any():
        fix = "give the right file, or leave the label empty in the manifest"
        raise refuse("E109", where, "the label is empty", fix)
    lps = reorient_lps(volume)
    return Label(lps.with_array(lps.array.astype(np.uint8)), scheme, findings)


def _named_segments(opened: Opened, where: str) -> LabelScheme:
    try:
        if not opened.segments:
            raise ValueError("the file names no segments")
        return labels.scheme_of_segments(opened.segments)
    except ValueError as error:
        fix = "save the segmentation as .seg.nrrd with its segment names, or use another scheme"
        raise refuse("E105", where, str(error), fix) from None


def _as_four_zones(
    values: Shaped[ndarray, "z y x"], scheme: LabelScheme
) -> tuple[Shaped[ndarray, "z y x"], LabelScheme]:
    """Segments that are the four zones become the scheme `zones4`; others stay what they are."""
    classes = {value: next(iter(z)) for value, z in scheme.allowed.items() if len(z) == 1}
    if len(classes) < len(scheme.allowed) or set(classes.values()) != set(range(len(labels.ZONES))):
        return values, scheme
    if not set(np.unique(values).tolist()) <= set(classes):
        return values, scheme
    table = np.zeros(labels.UNSEEN + 1, np.uint8)
    for value, zone in classes.items():
        table[value] = zone
    return table[values], SCHEMES["zones4"]


def _joined(study: Study) -> Label:
    opened = [open_volume(path) for path in study.label]
    where = study.name_of(study.label[0])
    for path, other in zip(study.label[1:], opened[1:], strict=True):
        if not same_grid(opened[0].volume, other.volume):
            fix = "export the three masks on the grid of one series"
            found = f"not on the grid of '{where}'"
            raise refuse("E106", study.name_of(path), found, fix)
    masks = [
        _whole(one.volume.array, study.name_of(path)) > 0
        for path, one in zip(study.label, opened, strict=True)
    ]
    values, overlap = labels.join_masks(*masks)
    findings = tuple(finding for one in opened for finding in one.findings)
    if overlap:
        found = f"{overlap} voxels are in the masks of PZ and of TZ"
        fix = "nothing: they count as gland of an unknown zone"
        findings += (Finding("warning", "W105", where, found, fix),)
    return _checked(
        opened[0].volume.with_array(values), SCHEMES["prostatex_masks"], where, findings
    )


def _png_slices(folder: Path, where: str, image: Volume | None) -> UInt8[ndarray, "z y x"]:
    files = sorted(folder.glob("*.png"), key=_natural) if folder.is_dir() else []
    if not files:
        raise refuse("E101", where, "no folder of PNG slices", "give the folder of one study")
    try:
        with quiet_itk():
            values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage([str(f) for f in files]))
    except RuntimeError:
        fix = "give one PNG a slice, all of one size"
        raise refuse("E101", where, "the PNG slices cannot be read", fix) from None
    if image is not None and values.shape != image.size:
        found = f"{_times(values.shape)} voxels where the image has {_times(image.size)}"
        raise refuse("E106", where, found, "give one PNG for each slice of the image")
    slices: UInt8[ndarray, "z y x"] = values
    return slices


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts `s2` before `s10`."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _times(size: Sequence[int]) -> str:
    return " x ".join(str(n) for n in size)


def _listed(values: Shaped[ndarray, " n"]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:SHOWN])
    return shown + (", ..." if len(values) > SHOWN else "")
