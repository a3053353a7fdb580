"""DICOM segmentations: zones beside the series they were found in, and labels that are read.

A DICOM segmentation belongs to its patient, study and frame of reference, so that it carries the
patient's identity as the standard demands; no other file that this package writes does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from diptych import __version__
from diptych.errors import UsageError
from diptych.files import write_atomically
from diptych_pirads.dicom import WHO, open_series, series_files
from diptych_pirads.geometry import Volume, to_grid
from diptych_pirads.labels import ZONES
from diptych_pirads.read import Opened, identifiers, refuse

SEGMENTS = {  # SNOMED CT
    "pz": ("Peripheral zone", "279706003", "Peripheral zone of prostate"),
    "tz": ("Transition zone", "399384005", "Transition zone of prostate"),
    "dpu": ("Distal prostatic urethra", "71553001", "Prostatic urethra"),
    "afs": (
        "Anterior fibromuscular stroma",
        "717025007",
        "Anterior fibromuscular stroma of prostate",
    ),
}
MAKER = "Diptych"
MAY_BE_EMPTY = (  # the standard wants these written, with or without a value
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
KEPT = (  # all else stays with the series: what names people is not copied beyond what must be
    *MAY_BE_EMPTY,
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Modality",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
)
BEYOND = 16  # slices; files leave out empty ones, which are known to be background
SERIES_NUMBER = 900  # far from those that scanners give


def write_seg(zones: Volume, source_folder: Path, out: Path, series: str | None = None) -> None:
    """Write zones as a binary DICOM segmentation with coded segments.

    Args:
        zones: (z, y, x) class numbers 0 to 4, on any grid in the frame of the series.
        source_folder: The DICOM files of the axial T2-weighted series.
        out: Gets the segmentation.
        series: As for `read.read_dicom_series`, where the folder holds several.

    Raises:
        UsageError: highdicom is not installed.
        DataError: With a finding E124 where the source lacks what the standard demands, or those
            of `read.read_dicom_series`.
    """
    try:
        import highdicom
    except ImportError:
        need = "predict.dicom_seg needs highdicom: pip install 'diptych-pirads[dicom]'"
        raise UsageError(need) from None
    stored = open_series(source_folder, series).volume
    label = to_grid(zones.with_array(zones.array.astype(np.uint8)), stored, "label").array
    files = series_files(source_folder, series)
    slices = [_read(path, stored.spacing[0]) for path in files]
    unique = [str(slices[0].SeriesInstanceUID), label.tobytes().hex()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values in the source that bend the standard
            segmentation = highdicom.seg.Segmentation(
                source_images=slices,
                pixel_array=label,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_descriptions(highdicom),
                series_instance_uid=generate_uid(entropy_srcs=["series", *unique]),
                series_number=SERIES_NUMBER,
                sop_instance_uid=generate_uid(entropy_srcs=["instance", *unique]),
                instance_number=1,
                manufacturer=MAKER,
                manufacturer_model_name="diptych-pirads",
                software_versions=__version__,
                device_serial_number="0",
                series_description="Prostate zones. Research use only. Not for diagnosis.",
                content_label="PROSTATE_ZONES",
            )
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        found = f"no DICOM segmentation can refer to this series ({error})"
        fix = "export the series again with its whole headers; the NIfTI file is written"
        raise refuse("E124", source_folder.name, found, fix) from None
    write_atomically(out, lambda file: segmentation.save_as(file, enforce_file_format=True))


def read_seg(path: Path) -> Opened:
    """Read a binary or label-map DICOM segmentation.

    Args:
        path: The one file.

    Returns:
        Values are segment numbers, their names the segments' labels. Slices that the file leaves
        out are empty, and so is what lies beyond its slices.

    Raises:
        UsageError: highdicom is not installed.
        DataError: With a finding E101.
    """
    try:
        import highdicom
    except ImportError:
        need = f"{path.name}: a DICOM segmentation needs pip install 'diptych-pirads[dicom]'"
        raise UsageError(need) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seg = highdicom.seg.segread(path)
            volume = seg.get_volume(combine_segments=True, skip_overlap_checks=True)
            names = {
                int(number): str(seg.get_segment_description(number).segment_label)
                for number in seg.segment_numbers
            }
    except Exception as error:  # pydicom raises whatever a damaged value makes Python raise
        found = f"cannot be read as a DICOM segmentation ({type(error).__name__})"
        raise refuse("E101", path.name, found, "export the segmentation again") from None
    array = np.pad(np.asarray(volume.array), ((BEYOND, BEYOND), (0, 0), (0, 0)))
    affine = volume.affine[:, [2, 1, 0, 3]].copy()
    affine[:3, 3] -= BEYOND * affine[:3, 2]
    who = [tag for tag in WHO if str(seg.get(tag) or "").strip()]
    frame = str(seg.get("FrameOfReferenceUID") or "")
    return Opened(Volume(array, affine), identifiers(path.name, who), names, frame)


def _read(path: Path, slice_mm: float) -> pydicom.Dataset:
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(KEPT))
    for tag in MAY_BE_EMPTY:
        if tag not in header:
            setattr(header, tag, "")
    if not header.get("SliceThickness"):
        header.SliceThickness = f"{slice_mm:.4f}"
    return header


def _descriptions(highdicom: Any) -> Sequence[Any]:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="diptych-pirads", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=SEGMENTS[zone][0],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=Code(SEGMENTS[zone][1], "SCT", SEGMENTS[zone][2]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, zone in enumerate(ZONES)
        if number
    ]
