"""The prepared folder: what is kept of a study, and the study as it is opened again.

One row of the index is one study. Its arrays differ in shape from row to row, so that each lies
in a file of its own: ``image`` float16 (C, z, y, x), and for reader k, counted from 0 (the one
trained on), ``label-k`` uint8 (z, y, x), ``sdf-k`` int8 (V, z, y, x) and ``reference-k`` uint8
(z, y, x). The column ``meta`` says in JSON where they lie in the patient.

Columns: item, unit (study), subject, source; scheme of reader 0 (null: unlabelled), split (the
user's own or null; fold where ``split.file`` names folds), center and scanner (``center-1``, never
the user's words, or null), gland_ml (mL by reader 0, null), readers (``reader1`` ... in the order
of ``k``), meta.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy import ndarray

from diptych.errors import DataError
from diptych.log import TERMINAL_ONLY
from diptych.manifest import Source
from diptych.prepared import Part, prepare_parts
from diptych_pirads.check import Survey, survey
from diptych_pirads.geometry import Volume
from diptych_pirads.labels import PZ, SCHEMES, TZ, ZONES, LabelScheme
from diptych_pirads.layout import Study
from diptych_pirads.prepare import PreparedLabel, PreparedStudy, prepare_study
from diptych_pirads.sample import is_generated

if TYPE_CHECKING:
    from diptych.prepared import Prepared
    from diptych_pirads.config import PiradsConfig

VERSION = "1"
SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "scheme": pl.String,
    "gland_ml": pl.Float64,
    "readers": pl.List(pl.String),
    "meta": pl.String,
}
# What changes a prepared study; everything else of section data only chooses files or crops.
_SETTINGS: Any = {
    "channels": True,
    "scheme": True,
    "series": True,
    "repair_nan": True,
    "registration": True,
    "on_error": True,
    "geometry": True,
    "crop": {"center"},
    "normalize": True,
}

log = logging.getLogger("diptych.pirads")


def prepare(config: PiradsConfig, data: Path, target: Path) -> Prepared:
    """Bring every study to the working grid; one of them is in memory at a time.

    Args:
        config: The configuration; `run.workers` processes share the work.
        data: A manifest, a folder with `studies.csv`, one image, or a DICOM folder.
        target: The prepared folder.

    Returns:
        The opened folder; nothing is done where it already agrees with files and settings.

    Raises:
        DataError: The data have errors; the findings say which.
    """
    seen = survey(config, data)
    if seen.findings.errors:
        lines = "\n".join(finding.line() for finding in seen.findings.errors)
        raise DataError(lines, seen.findings)
    studies: dict[tuple[str, str], list[Study]] = {}
    for row in seen.studies:
        studies.setdefault((row.subject, row.study), []).append(row)
    readers = _codes((row.reader for row in seen.studies if row.label), "reader{}")
    sources = _sources(studies, seen, readers)
    rows_of = dict(zip((one.name for one in sources), studies.values(), strict=True))
    prepared = prepare_parts(
        target,
        sources,
        partial(_convert, config=config, rows_of=rows_of, readers=readers),
        version=VERSION,
        settings=config.data.model_dump(mode="json", include=_SETTINGS),
        facts=partial(_facts, config=config, generated=is_generated(data)),
        label="prepare",
        jobs=max(1, config.run.workers),
    )
    _say_what_the_grid_costs(prepared.facts)
    return prepared


def _codes(words: Iterable[str], form: str) -> dict[str, str]:
    """The user's words, numbered in the order in which they come first."""
    return {word: form.format(n) for n, word in enumerate(dict.fromkeys(words), 1)}


def _sources(
    studies: Mapping[tuple[str, str], Sequence[Study]], seen: Survey, readers: Mapping[str, str]
) -> list[Source]:
    """One source a study, named by the content of its files, and who it belongs to."""
    centers = _codes((s.center for s in seen.studies if s.center), "center-{}")
    scanners = _codes((s.scanner for s in seen.studies if s.scanner), "scanner-{}")
    sources = []
    for (subject, study_name), rows in studies.items():
        first = rows[0]
        roles = [[role, seen.digests[path]] for role, path in sorted(first.images.items())]
        for row in rows:
            label = [seen.digests[path] for path in row.label]
            roles.append([readers.get(row.reader, ""), row.scheme, *label])
        digest = hashlib.sha256(json.dumps(roles).encode()).hexdigest()
        files = dict.fromkeys(seen.digests[p] for r in rows for p in (*r.images.values(), *r.label))
        columns = {
            "unit": seen.units[subject, study_name],
            "subject": seen.subjects[subject],
            "split": first.split or None,
            "center": centers.get(first.center),
            "scanner": scanners.get(first.scanner),
        }
        if seen.split is not None:
            part = seen.split.part_of({"subject": subject, "study": study_name})
            columns[seen.split.column] = part
        sources.append(Source(first.images["t2"], digest, 0, columns, tuple(files)))
    return sources


def _convert(
    source: Source,
    *,
    config: PiradsConfig,
    rows_of: Mapping[str, Sequence[Study]],
    readers: Mapping[str, str],
) -> Part:
    first, *rest = rows_of[source.name]
    try:
        one = prepare_study(first, config)
        others = {readers[row.reader]: prepare_study(row, config).label for row in rest}
    except DataError as error:
        if config.data.on_error == "stop":
            raise
        for finding in error.findings or ():
            log.warning("%s: left out", finding.line(), extra=TERMINAL_ONLY)
        return Part(pl.DataFrame(schema=SCHEMA), {}, {"left_out": True})
    labels = {reader: label for reader, label in others.items() if label is not None}
    return part_of(one, labels, reader=readers.get(first.reader, "reader1"))


def _facts(
    parts: Sequence[Mapping[str, Any]], *, config: PiradsConfig, generated: bool
) -> dict[str, Any]:
    """Grid and channels, the best Dice that the grid allows, and what happened on the way."""
    ceilings: dict[str, list[float]] = {}
    for part in parts:
        for zone, dice in part.get("ceiling", {}).items():
            ceilings.setdefault(zone, []).append(dice)
    return {
        "channels": list(config.data.channels),
        "spacing": list(config.data.geometry.spacing),
        "size": list(config.data.geometry.size),
        "zones": list(ZONES),
        "schemes": dict(sorted(Counter(p["scheme"] for p in parts if p.get("scheme")).items())),
        "ceiling": {
            zone: {"mean": float(np.mean(ceilings[zone])), "lowest": min(ceilings[zone])}
            for zone in (*ZONES, "gland")
            if zone in ceilings
        },
        "not_registered": sum("W125" in part.get("warnings", ()) for part in parts),
        "cut_by_crop": sum("W112" in part.get("warnings", ()) for part in parts),
        "left_out": sum(bool(part.get("left_out")) for part in parts),
        "generated": generated,
    }


def _say_what_the_grid_costs(facts: Mapping[str, Any]) -> None:
    ceilings = [
        f"{zone} {dice['mean']:.3f} (lowest {dice['lowest']:.3f})"
        for zone, dice in facts["ceiling"].items()
    ]
    if ceilings:
        log.info("best Dice that this grid allows: %s", ", ".join(ceilings))
    if facts["cut_by_crop"]:
        log.warning("%d glands are larger than the crop (W112)", facts["cut_by_crop"])
    if facts["not_registered"]:
        log.warning("%d studies could not be registered (W125)", facts["not_registered"])


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
        original=_grid(meta["original"]),
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
) -> Part:
    """What a prepared folder keeps of a study: one row and its arrays.

    Args:
        prepared_study: The study with the label of reader 0.
        others: Labels of further readers by name.
        reader: Name of reader 0.

    Returns:
        A part of one row; its facts say the ceiling of each zone.
    """
    first = prepared_study.label
    labels = {} if first is None else {reader: first, **(others or {})}
    row = {
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
    facts: dict[str, Any] = {"warnings": sorted({one.code for one in prepared_study.findings})}
    if first is not None:
        facts |= {"scheme": first.scheme.name, "ceiling": _ceiling_by_zone(first)}
    return Part(pl.DataFrame([row], schema=SCHEMA), {}, facts, ragged)


def gland_ml(label: PreparedLabel) -> float:
    """Volume of the gland in mL, as the reader has it."""
    gland = np.isin(label.reference.array, label.scheme.foreground)
    return float(np.count_nonzero(gland) * label.reference.voxel_ml)


def _ceiling_by_zone(label: PreparedLabel) -> dict[str, float]:
    """Ceiling of the values that stand for one zone, or for the gland."""
    named = {}
    for value, dice in label.ceiling.items():
        allowed = label.scheme.allowed[value]
        named["gland" if {PZ, TZ} <= allowed else ZONES[min(allowed)]] = dice
    return named


def _meta(prepared: Prepared, row: int) -> Any:
    return json.loads(prepared.index["meta"][row])


def _to_json(one: PreparedStudy, labels: Sequence[PreparedLabel]) -> dict[str, Any]:
    return {
        "affine": one.image.affine.tolist(),
        "original": _grid_to_json(one.original),
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
        "field": _grid_to_json(label.field),
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
        field=_grid(meta["field"]),
        ceiling={int(value): dice for value, dice in meta["ceiling"].items()},
    )


def _scheme(meta: Any) -> LabelScheme:
    allowed = {int(value): frozenset(zones) for value, zones in meta["allowed"].items()}
    known = SCHEMES.get(meta["scheme"])
    return known if known and known.allowed == allowed else LabelScheme(meta["scheme"], allowed)


def _grid_to_json(v: Volume) -> dict[str, Any]:
    return {"size": list(v.size), "affine": v.affine.tolist()}


def _grid(stored: Any) -> Volume:
    empty = np.broadcast_to(np.zeros((), bool), tuple(stored["size"]))
    return Volume(empty, np.array(stored["affine"]))
