"""Volumes to files, in the frame and on the grid they came from."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from diptych.files import write_atomically
from diptych_pirads.geometry import Volume

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nifti(volume: Volume, path: Path) -> None:
    """Writes a volume as NIfTI-1; equal volumes give equal bytes.

    Args:
        volume: (z, y, x), or (C, z, y, x), whose channels become the file's fourth axis.
        path: Ends in ``.nii`` or ``.nii.gz``.

    Raises:
        ValueError: Another file name ending.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"'{path.name}' is no name for NIfTI: let it end in .nii.gz")
    array = volume.array
    xyz = array.transpose(2, 1, 0) if array.ndim == 3 else array.transpose(3, 2, 1, 0)
    image = nib.Nifti1Image(xyz, _LPS_TO_RAS @ volume.affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    write_atomically(path, lambda file: file.write(content))
