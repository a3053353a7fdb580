"""DICOM folders: which series they hold, and the slices of one as a volume."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK
from jaxtyping import Float
from numpy import ndarray
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
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
)


@dataclass(frozen=True)
class Slice:
    """What the header of one file says."""

    path: Path
    series: str
    description: str
    size: tuple[int, int]
    frames: int
    spacing: tuple[float, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    frame: str
    identifiers: tuple[str, ...]


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
    slices = _slices(folder, series)
    files, affine = _stack(slices, folder.name)
    who = {tag for one in slices for tag in one.identifiers}
    volume = _pixels(files, affine, folder.name)
    return Opened(volume, identifiers(folder.name, list(who)), frame=slices[0].frame)


def series_files(folder: Path, series: str | None = None) -> list[Path]:
    """The files of one series, in the order of `open_series`' slices.

    Args:
        folder: As for `open_series`.
        series: As for `open_series`.

    Raises:
        DataError: As `open_series`.
    """
    return _stack(_slices(folder, series), folder.name)[0]


def _slices(folder: Path, series: str | None) -> list[Slice]:
    found = _series_in(folder)
    if not found:
        fix = "give the folder that directly holds the series' files"
        raise refuse("E101", folder.name, "holds no DICOM image", fix)
    return _chosen(found, series, folder.name)


def _series_in(folder: Path) -> dict[str, list[Slice]]:
    series: dict[str, list[Slice]] = defaultdict(list)
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        slice_ = _read_header(path, folder.name)
        if slice_ is not None:
            series[slice_.series].append(slice_)
    return dict(series)


def _read_header(path: Path, where: str) -> Slice | None:
    """The header of an image; None for files that are no DICOM images."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard and are not used
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
            if not header.get("Rows"):
                return None
            return Slice(
                path=path,
                series=str(header.SeriesInstanceUID),
                description=str(header.get("SeriesDescription") or "no description"),
                size=(int(header.Rows), int(header.Columns)),
                frames=int(header.get("NumberOfFrames") or 1),
                spacing=_numbers(header, "PixelSpacing"),
                orientation=_numbers(header, "ImageOrientationPatient"),
                position=_numbers(header, "ImagePositionPatient"),
                frame=str(header.get("FrameOfReferenceUID") or ""),
                identifiers=tuple(tag for tag in WHO if str(header.get(tag) or "").strip()),
            )
    except InvalidDicomError:
        return None
    except Exception as error:  # pydicom raises whatever a damaged value makes Python raise
        fix = "copy the file again from the archive"
        found = f"the DICOM file {path.name} is damaged ({type(error).__name__})"
        raise refuse("E101", where, found, fix) from None


def _numbers(header: pydicom.Dataset, tag: str) -> tuple[float, ...]:
    return tuple(float(value) for value in header.get(tag) or ())


def _chosen(found: dict[str, list[Slice]], series: str | None, where: str) -> list[Slice]:
    if series is None:
        kept = found
    else:
        kept = {
            uid: slices
            for uid, slices in found.items()
            if series == uid or fnmatch(slices[0].description.lower(), series.lower())
        }
    if len(kept) == 1:
        return next(iter(kept.values()))
    held = "; ".join(
        f"'{s[0].description}' {s[0].size[1]} x {s[0].size[0]} x {len(s)}" for s in found.values()
    )
    chosen = "none is chosen" if series is None else f"data.series={series} fits {len(kept)}"
    raise refuse(
        "E116",
        where,
        f"{len(found)} series and {chosen}: {held}",
        "leave one series in the folder, or name it with data.series (its SeriesInstanceUID or a "
        "pattern of its description)",
    )


def _stack(slices: list[Slice], where: str) -> tuple[list[Path], Float[ndarray, "4 4"]]:
    """The files in the order of their positions, and the affine of the stack."""
    if any(one.frames > 1 for one in slices):
        fix = "convert the series to NIfTI, for example with dcm2niix"
        raise refuse("E101", where, "several frames in one DICOM file are not read", fix)
    counts = {(len(one.spacing), len(one.orientation), len(one.position)) for one in slices}
    if counts != {(2, 6, 3)}:
        fix = "export the original series again"
        raise refuse("E101", where, "slices without position or voxel size", fix)
    if len({one.frame for one in slices}) > 1:
        fix = "export the series of one examination again"
        raise refuse("E113", where, "slices of several frames of reference", fix)
    layouts = np.array([[*one.size, *one.spacing, *one.orientation] for one in slices])
    positions = np.array([one.position for one in slices])
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
    return [slices[i].path for i in order], affine


def _require_even(heights: Float[ndarray, " n"], where: str) -> None:
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


def _pixels(files: list[Path], affine: Float[ndarray, "4 4"], where: str) -> Volume:
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
