"""The prepared folder: what is kept of a study, and the study as it is opened again.

One row of the index is one study. Its arrays differ in shape from row to row, so that each lies
in a file of its own: ``image`` float16 (C, z, y, x), and for reader k, counted from 0 (the one
trained on), ``label-k`` uint8 (z, y, x), ``sdf-k`` int8 (V, z, y, x) and ``reference-k`` uint8
(z, y, x). The column ``meta`` says in JSON where they lie in the patient.

Columns: item, unit (study), subject, source; scheme of reader 0 (null: unlabelled), split (the
user's own or null), center and scanner (``center-1``, never the user's words, or null), gland_ml
(mL by reader 0, null), readers (``reader1`` ... in the order of ``k``), meta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy import ndarray

from diptych.prepared import Part
from diptych_pirads.geometry import Volume
from diptych_pirads.labels import SCHEMES, LabelScheme
from diptych_pirads.prepare import PreparedLabel, PreparedStudy

if TYPE_CHECKING:
    from diptych.prepared import Prepared

SCHEMA = {
    "unit": pl.String,
    "scheme": pl.String,
    "split": pl.String,
    "center": pl.String,
    "scanner": pl.String,
    "gland_ml": pl.Float64,
    "readers": pl.List(pl.String),
    "meta": pl.String,
}


def study(prepared: Prepared, row: int) -> PreparedStudy:
    """A study of a prepared folder, its arrays memory-mapped.

    Args:
        prepared: The prepared data.
        row: Row of the index.

    Returns:
        As `prepare.prepare_study` gave it, with the image in float16, the label of reader 0, and
        without findings.
    """
    meta = _meta(prepared, row)
    return PreparedStudy(
        image=Volume(prepared.ragged("image", row), np.array(meta["affine"])),
        present=tuple(meta["present"]),
        original=_empty(meta["original"]),
        center=np.array(meta["center"]),
        training_center=np.array(meta["training_center"]),
        training_center_from=meta["training_center_from"],
        label=_label(prepared, row, 0, meta["labels"][0]) if meta["labels"] else None,
    )


def other_labels(prepared: Prepared, row: int) -> dict[str, PreparedLabel]:
    """The labels of a study's further readers.

    Args:
        prepared: The prepared data.
        row: Row of the index.

    Returns:
        Reader -> label, arrays memory-mapped; reader 0, who is trained on, is not among them.
    """
    labels = _meta(prepared, row)["labels"]
    readers = prepared.index["readers"][row].to_list()
    return {readers[k]: _label(prepared, row, k, labels[k]) for k in range(1, len(labels))}


def part_of(
    prepared_study: PreparedStudy,
    others: Mapping[str, PreparedLabel] | None = None,
    *,
    reader: str = "reader1",
    columns: Mapping[str, str | None] | None = None,
) -> Part:
    """What a prepared folder keeps of a study: one row and its arrays.

    Args:
        prepared_study: The study with the label of reader 0.
        others: Labels of further readers by name.
        reader: Name of reader 0.
        columns: Of unit, split, center and scanner those that are known.

    Returns:
        A part of one row; in facts the ceiling of each zone that the grid allows.
    """
    first = prepared_study.label
    labels = {} if first is None else {reader: first, **(others or {})}
    row = {
        **dict.fromkeys(SCHEMA),
        **(columns or {}),
        "scheme": None if first is None else first.scheme.name,
        "gland_ml": None if first is None else gland_ml(first),
        "readers": list(labels),
        "meta": json.dumps(_to_json(prepared_study, list(labels.values())), allow_nan=False),
    }
    ragged: dict[str, list[ndarray | None]] = {
        "image": [prepared_study.image.array.astype(np.float16)]
    }
    for k, label in enumerate(labels.values()):
        ragged[f"label-{k}"] = [label.values.array]
        ragged[f"sdf-{k}"] = [label.sdf]
        ragged[f"reference-{k}"] = [label.reference.array]
    facts = {} if first is None else {"ceiling": _ceiling_by_zone(first)}
    return Part(pl.DataFrame([row], schema=SCHEMA), {}, facts, ragged)


def gland_ml(label: PreparedLabel) -> float:
    """Volume of the gland in mL, as the reader has it."""
    gland = np.isin(label.reference.array, label.scheme.foreground)
    return float(np.count_nonzero(gland) * label.reference.voxel_ml)


def _ceiling_by_zone(label: PreparedLabel) -> dict[str, float]:
    """Ceiling of the zones that a label tells from all others."""
    from diptych_pirads.labels import ZONES

    names = {
        value: ZONES[min(allowed)]
        for value, allowed in label.scheme.allowed.items()
        if value in label.scheme.peripheral or value in label.scheme.inner or len(allowed) == 1
    }
    return {names[value]: dice for value, dice in label.ceiling.items() if value in names}


def _meta(prepared: Prepared, row: int) -> Any:
    return json.loads(prepared.index["meta"][row])


def _to_json(one: PreparedStudy, labels: Sequence[PreparedLabel]) -> dict[str, Any]:
    return {
        "affine": one.image.affine.tolist(),
        "original": {"size": list(one.original.size), "affine": one.original.affine.tolist()},
        "present": list(one.present),
        "center": one.center.tolist(),
        "training_center": one.training_center.tolist(),
        "training_center_from": one.training_center_from,
        "labels": [_label_to_json(label) for label in labels],
    }


def _label_to_json(label: PreparedLabel) -> dict[str, Any]:
    return {
        "scheme": label.scheme.name,
        "allowed": {str(value): sorted(zones) for value, zones in label.scheme.allowed.items()},
        "affine": label.values.affine.tolist(),
        "seen": [[part.start, part.stop] for part in label.seen],
        "reference": label.reference.affine.tolist(),
        "ceiling": {str(value): dice for value, dice in label.ceiling.items()},
    }


def _label(prepared: Prepared, row: int, k: int, meta: Any) -> PreparedLabel:
    z, y, x = (slice(*part) for part in meta["seen"])
    return PreparedLabel(
        values=Volume(prepared.ragged(f"label-{k}", row), np.array(meta["affine"])),
        sdf=prepared.ragged(f"sdf-{k}", row),
        seen=(z, y, x),
        scheme=_scheme(meta),
        reference=Volume(prepared.ragged(f"reference-{k}", row), np.array(meta["reference"])),
        ceiling={int(value): dice for value, dice in meta["ceiling"].items()},
    )


def _scheme(meta: Any) -> LabelScheme:
    allowed = {int(value): frozenset(zones) for value, zones in meta["allowed"].items()}
    known = SCHEMES.get(meta["scheme"])
    return known if known and known.allowed == allowed else LabelScheme(meta["scheme"], allowed)


def _empty(grid: Any) -> Volume:
    return Volume(
        np.broadcast_to(np.zeros((), bool), tuple(grid["size"])), np.array(grid["affine"])
    )
