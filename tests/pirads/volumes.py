"""Small prostates for the tests of files: drawn, written as a scanner or a user would."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from tests.pirads.masks import picai

from diptych_pirads.geometry import Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = (3.0, 1.0, 1.0)
SIZE = (14, 64, 64)


def affine(
    spacing: tuple[float, float, float] = SPACING,
    origin: tuple[float, float, float] = (-30.0, -25.0, 10.0),
    tilt_degrees: float = 0.0,
) -> np.ndarray:
    """LPS affine of an axial series, tilted about the left-right axis."""
    c, s = np.cos(np.radians(tilt_degrees)), np.sin(np.radians(tilt_degrees))
    made = np.eye(4)
    made[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) * spacing[::-1]
    made[:3, 3] = origin
    return made


def two_zones(size: tuple[int, int, int] = SIZE) -> np.ndarray:
    """PZ (1) is a crescent behind the round TZ (2); at 3 x 1 x 1 mm a gland of 30 mL."""
    z, y, x = np.ogrid[tuple(slice(n) for n in size)]
    middle = [(n - 1) / 2 for n in size]
    height = ((z - middle[0]) / 6.5) ** 2
    gland = height + ((y - middle[1]) / 18) ** 2 + ((x - middle[2]) / 22) ** 2 < 1
    inner = height / 0.8 + ((y - middle[1] + 6) / 12) ** 2 + ((x - middle[2]) / 14) ** 2 < 1
    label = np.zeros(size, np.uint8)
    label[gland] = 1
    label[gland & (inner | (y < middle[1] - 8))] = 2
    return label


def texture(size: tuple[int, int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """Whole numbers between 50 and 250."""
    drawn: np.ndarray = np.random.default_rng(seed).integers(50, 250, size).astype(np.int16)
    return drawn


def write_nifti(path: Path, array: np.ndarray, lps: np.ndarray | None = None) -> Path:
    """Write (z, y, x) with an LPS affine."""
    grid = affine() if lps is None else lps
    nib.save(nib.Nifti1Image(array.transpose(*range(array.ndim)[::-1]), LPS_TO_RAS @ grid), path)
    return path


def write_manifest(path: Path, *rows: dict[str, Any]) -> Path:
    """A manifest with the columns of its first row."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_dicom(folder: Path, v: Volume, *, uid: str, description: str = "t2_tra") -> Path:
    """One file a slice, in an order that is not that of the positions."""
    folder.mkdir(exist_ok=True)
    for n in range(v.size[0]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        name = folder / f"{(n * 7) % v.size[0]:02d}-{uid[-3:]}.dcm"
        slice_ = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID = uid, "1.2.3"
        slice_.SeriesDescription, slice_.Modality = description, "MR"
        slice_.FrameOfReferenceUID = "1.2.3.4"
        slice_.PatientName = "Test^Phantom"
        slice_.Rows, slice_.Columns = v.size[1:]
        slice_.PixelSpacing = list(v.spacing[1:])
        slice_.ImageOrientationPatient = [*v.directions[:, 0], *v.directions[:, 1]]
        slice_.ImagePositionPatient = list(v.to_lps(np.array([n, 0, 0])))
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 0
        slice_.PixelData = v.array[n].astype("<u2").tobytes()
        slice_.save_as(name, enforce_file_format=True)
    return folder


def real_data() -> Path:
    """The folder of real prostates; skips the test where it is not there."""
    return picai().parent
