"""DICOM folders: which series they hold, and the slices of one as a volume."""

from __future__ import annotations

from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK
from pydicom.errors import InvalidDicomError

from diptych_pirads.geometry import Volume
from diptych_pirads.read import MAX_VOXELS, Opened, identifiers, quiet_itk, refuse

GAP = 1.5  # of the median distance between slices: more means that one is missing
SAME_MM = 1e-2
WHO = ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "PatientAddress")
TAGS = (
    *WHO,
    "SeriesInstanceUID",
    "SeriesDescription",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
)
Slices = list[tuple[Path, Any]]


def open_series(folder: Path, series: str | None = None) -> Opened:
    """Read one series of a folder.

    Args:
        folder: Files that are no DICOM images are passed over; folders inside are not entered.
        series: A SeriesInstanceUID or a glob pattern of the series description; None where the
            folder holds only one series.

    Raises:
        DataError: With a finding E101 (no image, several frames in a file), E113 (no stack), E115
            (a missing slice) or E116 (several series and none chosen).
    """
    found = _series_in(folder)
    if not found:
        fix = "give the folder that directly holds the series' files"
        raise refuse("E101", folder.name, "holds no DICOM image", fix)
    slices = _chosen(found, series, folder.name)
    files, affine = _stack(slices, folder.name)
    first = slices[0][1]
    who = [tag for tag in WHO if str(first.get(tag, "")).strip()]
    return Opened(_pixels(files, affine, folder.name), identifiers(folder.name, who))


def _series_in(folder: Path) -> dict[str, Slices]:
    series: dict[str, Slices] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        except (InvalidDicomError, OSError, EOFError, ValueError):
            continue
        if header.get("Rows") and header.get("SeriesInstanceUID"):
            series[str(header.SeriesInstanceUID)].append((path, header))
    return dict(series)


def _chosen(found: dict[str, Slices], series: str | None, where: str) -> Slices:
    if series is None:
        kept = found
    else:
        kept = {
            uid: slices
            for uid, slices in found.items()
            if series == uid or fnmatch(_description(slices).lower(), series.lower())
        }
    if len(kept) == 1:
        return next(iter(kept.values()))
    held = "; ".join(
        f"'{_description(s)}' {s[0][1].Columns} x {s[0][1].Rows} x {len(s)}" for s in found.values()
    )
    chosen = "none is chosen" if series is None else f"data.series={series} fits {len(kept)}"
    raise refuse(
        "E116",
        where,
        f"{len(found)} series and {chosen}: {held}",
        "leave one series in the folder, or name it with data.series (its SeriesInstanceUID or a "
        "pattern of its description)",
    )


def _description(slices: Slices) -> str:
    return str(slices[0][1].get("SeriesDescription", "")) or "no description"


def _stack(slices: Slices, where: str) -> tuple[list[Path], np.ndarray]:
    """The files in the order of their positions, and the affine of the stack."""
    if any(int(header.get("NumberOfFrames", 1) or 1) > 1 for _, header in slices):
        fix = "convert the series to NIfTI, for example with dcm2niix"
        raise refuse("E101", where, "several frames in one DICOM file are not read", fix)
    try:
        layouts = np.array(
            [[h.Rows, h.Columns, *h.PixelSpacing, *h.ImageOrientationPatient] for _, h in slices],
            np.float64,
        )
        positions = np.array([h.ImagePositionPatient for _, h in slices], np.float64)
    except (AttributeError, TypeError, ValueError):
        fix = "export the original series again"
        raise refuse("E101", where, "slices without position or voxel size", fix) from None
    if len(slices) < 2 or np.ptp(layouts, axis=0).max() > SAME_MM:
        found = f"{len(slices)} slices" + ("" if len(slices) < 2 else " of different layout")
        fix = "give the folder of one axial series"
        raise refuse("E113", where, f"not one three-dimensional image ({found})", fix)
    rows, columns, row_mm, column_mm, *orientation = layouts[0]
    if rows * columns * len(slices) > MAX_VOXELS:
        fix = "check that this is a prostate series"
        raise refuse("E101", where, f"more than {MAX_VOXELS} voxels", fix)
    along_x, along_y = np.reshape(orientation, (2, 3))
    heights = positions @ np.cross(along_x, along_y)
    order = np.argsort(heights)
    _require_even(heights[order], where)
    first, last = positions[order[0]], positions[order[-1]]
    affine = np.eye(4)
    affine[:3, 0] = along_x * column_mm
    affine[:3, 1] = along_y * row_mm
    affine[:3, 2] = (last - first) / (len(slices) - 1)
    affine[:3, 3] = first
    return [slices[i][0] for i in order], affine


def _require_even(heights: np.ndarray, where: str) -> None:
    steps = np.diff(heights)
    median = float(np.median(steps))
    if steps.min() < SAME_MM:
        found = "not one three-dimensional image (several slices at one position)"
        fix = "give one file a volume, such as one echo or one b-value"
        raise refuse("E113", where, found, fix)
    gaps = np.flatnonzero(steps > GAP * median)
    if len(gaps):
        n = int(gaps[0])
        raise refuse(
            "E115",
            where,
            f"{len(gaps)} gaps between slices, the first of {steps[n]:.2f} mm after slice {n + 1} "
            f"of {len(heights)} where {median:.2f} mm are usual",
            "copy the missing slices from the archive",
        )


def _pixels(files: list[Path], affine: np.ndarray, where: str) -> Volume:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    try:
        with quiet_itk():
            image = reader.Execute()
    except RuntimeError:
        fix = "export the series again without compression"
        raise refuse("E101", where, "the pixels cannot be read", fix) from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        fix = "give the original series, no colour copy"
        raise refuse("E113", where, "colour pictures", fix)
    return Volume(SimpleITK.GetArrayFromImage(image), affine)
