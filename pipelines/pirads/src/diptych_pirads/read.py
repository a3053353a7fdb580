"""Files to volumes: NIfTI by nibabel, NRRD and MetaImage by SimpleITK, DICOM series by folder.

NIfTI is not read by SimpleITK because that turns NaN into 0 without a word.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
from jaxtyping import Shaped
from numpy import ndarray

from diptych.errors import DataError
from diptych.findings import Finding, Findings
from diptych_pirads.geometry import Volume

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = (*NIFTI, *ITK)
SEGMENTATION = ".dcm"  # one file; series are folders
MAX_VOXELS = 2**28
IN_PLANE_MM = (0.15, 2.0)
SLICE_MM = (0.8, 6.0)
TOLERANCE_MM = 1e-3
IDENTIFIES = "0010|"  # DICOM's patient group, as MetaImage and NRRD dictionaries write it
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


@dataclass(frozen=True, eq=False)
class Opened:
    """A volume and what its file says beside the voxels.

    Args:
        volume: (z, y, x), axes as stored.
        findings: Warnings and notes about the file.
        segments: File value -> segment name, where the file names its segments.
        frame: DICOM's frame of reference: positions in two frames cannot be compared; "" where
            the file knows none.
    """

    volume: Volume
    findings: tuple[Finding, ...] = ()
    segments: Mapping[int, str] = field(default_factory=dict)
    frame: str = ""


def refuse(code: str, where: str, found: str, fix: str) -> DataError:
    """A data error that carries its one finding."""
    finding = Finding("error", code, where, found, fix)
    return DataError(finding.line(), Findings((finding,)))


def read_volume(path: Path) -> Volume:
    """Read one image, label or DICOM folder.

    Args:
        path: A file with one of `SUFFIXES`, or a folder that holds one DICOM series.

    Returns:
        (z, y, x), axes as stored; `geometry.reorient_lps` sorts them.

    Raises:
        DataError: With a finding E101, E107, E113, E115 or E116.

    Example:
        ``read_volume(Path("case_t2.nii.gz")).spacing``
    """
    return open_volume(path).volume


def read_dicom_series(folder: Path, series_uid: str | None = None) -> Volume:
    """Read the slices of one DICOM series, in the order of their positions.

    Args:
        folder: Files that are no DICOM images are passed over; folders inside are not entered.
        series_uid: Which series; None where the folder holds only one. A glob pattern of the
            series description does too.

    Raises:
        DataError: With a finding E101, E107, E113, E115 or E116.
    """
    return open_volume(folder, series_uid).volume


def open_volume(path: Path, series: str | None = None) -> Opened:
    """Read a file or a DICOM folder, and keep what is remarkable about it.

    Args:
        path: A file with one of `SUFFIXES`, or a folder. `NAME.nii.gz#1` is the second volume of
            a four-dimensional file, such as the diffusion map in Task05 of the Medical
            Segmentation Decathlon.
        series: For folders: a SeriesInstanceUID or a glob pattern of the series description.

    Raises:
        DataError: With a finding E101, E107, E113, E115 or E116.
    """
    file, number = _volume_of(path)
    if path.is_dir():
        from diptych_pirads.dicom import open_series

        opened = open_series(path, series)
    elif not file.is_file():
        raise refuse("E101", path.name, "there is no such file", "correct the path")
    elif file.name.lower().endswith(NIFTI):
        opened = _open_nifti(file, number)
    elif file.name.lower().endswith(SEGMENTATION):
        from diptych_pirads.dicomseg import read_seg

        opened = read_seg(file)
    elif number is not None:
        raise refuse("E113", path.name, "a volume of a file that is no NIfTI", "leave out the #")
    elif path.name.lower().endswith(ITK):
        opened = _open_itk(path)
    else:
        raise refuse(
            "E101",
            path.name,
            "not a known image format",
            f"give {', '.join(SUFFIXES)} or a folder of DICOM files",
        )
    _require_geometry(opened.volume, path.name)
    return opened


def names_of(path: Path) -> list[Path]:
    """The files behind a path: itself, or the files of a folder in order of their names."""
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.is_file())
    file, _ = _volume_of(path)
    return [file] if file.is_file() else []


def _volume_of(path: Path) -> tuple[Path, int | None]:
    """A file, and the number of one of its volumes where `#NUMBER` follows its name."""
    name, sign, number = path.name.rpartition("#")
    if not sign or not number.isdecimal() or path.exists():
        return path, None
    return path.with_name(name), int(number)


def _three_dimensions(
    array: Shaped[ndarray, "*n"], where: str, number: int | None = None
) -> tuple[Shaped[ndarray, "x y z"], tuple[Finding, ...]]:
    """The three-dimensional array of a file, unit axes beyond the third dropped.

    Args:
        array: Axes x, y, z and perhaps more.
        where: The file, for messages.
        number: Which volume along the fourth axis; None where the file has one.

    Raises:
        DataError: E113, fewer or more than one volume.
    """
    if number is not None:
        if array.ndim != 4 or number >= array.shape[3]:
            volumes = array.shape[3] if array.ndim == 4 else 1
            found = f"there is no volume #{number}, but {volumes}, counted from 0"
            raise refuse("E113", where, found, "correct the number in the manifest")
        return array[..., number], ()
    if array.ndim == 3:
        return array, ()
    if array.ndim > 3 and max(array.shape[3:]) == 1:
        found = f"{array.ndim} dimensions, but one volume"
        warning = Finding("warning", "W113", where, found, "nothing: the volume is used")
        return array.reshape(array.shape[:3]), (warning,)
    raise _not_3d(where, " x ".join(map(str, array.shape)))


def identifiers(where: str, keys: list[str]) -> tuple[Finding, ...]:
    """A warning where a header says who the patient is; the values are never repeated.

    Args:
        where: The file, for messages.
        keys: The header entries that identify and are not empty.
    """
    if not keys:
        return ()
    found = f"the header identifies the patient ({', '.join(sorted(keys))})"
    fix = "nothing for this program, which copies none of it; remove it before sharing the file"
    return (Finding("warning", "W119", where, found, fix),)


def _open_nifti(path: Path, number: int | None = None) -> Opened:
    where = path.name if number is None else f"{path.name}#{number}"
    try:
        with _quiet_nibabel():
            image: Any = nib.load(path, mmap=False)  # a mapped file that changes would crash
            spacing = _stored_spacing(image)
            if not (spacing > 0).all():
                raise _bad_spacing(where, spacing[::-1])
            _require_size(image.shape, where)
            array = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise _unreadable(where, error) from None
    if array.dtype.kind not in "biuf":
        raise _not_3d(where, f"voxels of type {array.dtype}")
    xyz, findings = _three_dimensions(array, where, number)
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        found = "the header stores no orientation (sform and qform codes are 0)"
        fix = "convert the original series again; here left, back and head are taken as positive"
        findings += (Finding("warning", "W111", where, found, fix),)
    return Opened(Volume(xyz.transpose(2, 1, 0), RAS_TO_LPS @ image.affine), findings)


def _stored_spacing(image: Any) -> ndarray:
    """The voxel sizes as written: nibabel's own header has a size of 0 mended to 1."""
    with image.file_map["image"].get_prepare_fileobj("rb") as stream:
        header = type(image).header_class.from_fileobj(stream, check=False)
    sizes: ndarray = header["pixdim"][1:4]
    return sizes


def _open_itk(path: Path) -> Opened:
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
            _require_size(reader.GetSize(), path.name)
            if reader.GetNumberOfComponents() != 1:
                raise _not_3d(path.name, f"{reader.GetNumberOfComponents()} values a voxel")
            image = reader.Execute()
    except RuntimeError as error:
        if "spacing" in str(error).lower():
            found = "a voxel size of zero"
            raise refuse("E107", path.name, found, "correct it in the header") from None
        raise _unreadable(path.name, error) from None
    array = SimpleITK.GetArrayFromImage(image)
    xyz, findings = _three_dimensions(array.transpose(), path.name)
    keys = _dictionary(image)
    who = [k for k, v in keys.items() if k.startswith(IDENTIFIES) and v.strip()]
    return Opened(
        Volume(xyz.transpose(2, 1, 0), _itk_affine(image)),
        findings + identifiers(path.name, who),
        _segments(keys),
    )


def _itk_affine(image: Any) -> ndarray:
    n = image.GetDimension()
    affine = np.eye(4)
    directions = np.reshape(image.GetDirection(), (n, n))[:3, :3]
    affine[:3, :3] = directions * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return affine


def _dictionary(image: Any) -> dict[str, str]:
    known = {}
    for key in image.GetMetaDataKeys():
        with suppress(TypeError, UnicodeDecodeError):  # bytes that are no text
            known[key] = str(image.GetMetaData(key))
    return known


def _segments(keys: Mapping[str, str]) -> dict[int, str]:
    """The names that a `.seg.nrrd` file gives to its values."""
    ends = "_LabelValue"
    return {
        int(value): keys[key.removesuffix(ends) + "_Name"]
        for key, value in keys.items()
        if key.endswith(ends) and key.removesuffix(ends) + "_Name" in keys and value.isdecimal()
    }


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Without ITK's own lines on stderr: what matters comes back as a finding."""
    shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Without nibabel's lines about headers that it mends."""
    logger = nib.imageglobals.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _require_size(shape: tuple[int, ...], where: str) -> None:
    voxels = int(np.prod(shape, dtype=np.float64))
    if voxels > MAX_VOXELS or voxels < 1:
        found = f"{' x '.join(map(str, shape))} voxels; between 1 and {MAX_VOXELS} are read"
        raise refuse("E101", where, found, "check that this is a prostate series")


def _require_geometry(v: Volume, where: str) -> None:
    """Refuse voxel sizes that no prostate series has, and axes that are not perpendicular."""
    spacing = np.array(v.spacing)
    plane, slices = np.sort(spacing)[:2], spacing.max()
    if not np.isfinite(v.affine).all() or not (
        IN_PLANE_MM[0] - TOLERANCE_MM <= plane.min()
        and plane.max() <= IN_PLANE_MM[1] + TOLERANCE_MM
        and SLICE_MM[0] - TOLERANCE_MM <= slices <= SLICE_MM[1] + TOLERANCE_MM
    ):
        raise _bad_spacing(where, spacing)
    if np.abs(v.directions.T @ v.directions - np.eye(3)).max() > 1e-2:
        fix = "resample the series to perpendicular axes"
        raise refuse("E107", where, "the voxel axes are not perpendicular", fix)


def _bad_spacing(where: str, spacing: ndarray) -> DataError:
    sizes = " x ".join(f"{size:g}" for size in spacing[::-1])
    return refuse(
        "E107",
        where,
        f"voxels of {sizes} mm; in plane {IN_PLANE_MM[0]:g} to {IN_PLANE_MM[1]:g} mm and between "
        f"slices {SLICE_MM[0]:g} to {SLICE_MM[1]:g} mm are possible",
        "correct the voxel size in the header, or convert the original series again",
    )


def _unreadable(where: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    words = "cut short" if isinstance(error, (EOFError, zlib.error)) else "damaged or no image"
    return refuse("E101", where, f"cannot be read: {words}", "copy or convert the file again")


def _not_3d(where: str, found: str) -> DataError:
    fix = "give one file a volume, or name one of a NIfTI's in the manifest: FILE.nii.gz#0"
    return refuse("E113", where, f"not one three-dimensional image ({found})", fix)
