"""The embedded sample: generated studies as files, some with four zones, some with two or none."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diptych.files import write_json, write_text
from diptych_pirads.geometry import Volume
from diptych_pirads.labels import AFS, DPU, TZ
from diptych_pirads.phantom import make_phantom
from diptych_pirads.volumetry import zone_volumes
from diptych_pirads.write import write_nifti

COLUMNS = ("subject_id", "study_id", "t2", "label", "scheme", "reader", "split", "psa", "lesions")
TRUTH = "truth.json"  # beside a generated sample
SAMPLE = (  # label scheme, part, number of studies
    ("zones4", "train", 12),
    ("zones4", "validation", 4),
    ("zones4", "test", 8),
    ("pz_tz", "train", 4),
    (None, "train", 8),
)


def write_sample(folder: Path, seed: int = 0) -> None:
    """Writes the 36 studies of the demonstration.

    Args:
        folder: Gets ``studies.csv``, the images and labels it names, and ``truth.json``. Studies
            of the test part carry a second reader.
        seed: Key of every draw.
    """
    cases = [(scheme, part) for scheme, part, count in SAMPLE for _ in range(count)]
    write_cases(folder, seed, cases)


def write_dataset(
    out: Path, n: int, seed: int = 0, schemes: Sequence[str | None] = ("zones4", "pz_tz", None)
) -> None:
    """Writes generated studies whose label schemes take turns, without a split.

    Args:
        out: Gets ``studies.csv``, the images and labels it names, and ``truth.json``.
        n: Number of studies.
        seed: Key of every draw.
        schemes: "zones4", "pz_tz" (AFS and DPU within TZ) or None for a study without label.

    Raises:
        ValueError: An unknown scheme, or none.
    """
    unknown = [scheme for scheme in schemes if scheme not in {"zones4", "pz_tz", None}]
    if unknown or not schemes:
        raise ValueError(f"schemes {list(schemes)}: choose among 'zones4', 'pz_tz' and None")
    write_cases(out, seed, [(schemes[index % len(schemes)], "") for index in range(n)])


def is_generated(data: Path) -> bool:
    """Whether data are a sample that this module wrote."""
    return (data if data.is_dir() else data.parent).joinpath(TRUTH).is_file()


def write_cases(folder: Path, seed: int, cases: Sequence[tuple[str | None, str]]) -> None:
    """Writes generated studies with these labels in these parts.

    Args:
        folder: Gets ``studies.csv``, the images and labels it names, and ``truth.json``.
        seed: Key of every draw.
        cases: Label scheme and part of each study: "train", "validation", "test" or "". Studies
            of the test part carry a second reader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    truth = {}
    for index, (scheme, part) in enumerate(cases):
        study = make_phantom(seed, index)
        name = f"P{index + 1:02d}"
        write_nifti(study.image, folder / f"{name}_t2.nii.gz")
        write_nifti(study.lesions, folder / f"{name}_lesions.nii.gz")
        row = {
            "subject_id": name,
            "study_id": f"{name}-1",
            "t2": f"{name}_t2.nii.gz",
            "split": part,
            "psa": f"{study.params['psa']:.2f}",
            "lesions": f"{name}_lesions.nii.gz" if study.lesions.array.any() else "",
        }
        labels = _labels(study.label, scheme)
        if part == "test":
            labels["second"] = study.reader2
        for reader, label in labels.items():
            file = f"{name}_label-{reader}.nii.gz"
            write_nifti(label, folder / file)
            rows.append({**row, "label": file, "scheme": scheme or "", "reader": reader})
        if not labels:
            rows.append(row)
        truth[name] = {**study.params, "volumes_ml": zone_volumes(study.label)}
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "studies.csv", table.getvalue())
    write_json(folder / TRUTH, truth)


def _labels(label: Volume, scheme: str | None) -> dict[str, Volume]:
    if scheme is None:
        return {}
    if scheme == "zones4":
        return {"first": label}
    merged = np.where(np.isin(label.array, (DPU, AFS)), TZ, label.array)
    return {"first": label.with_array(merged.astype(np.uint8))}
