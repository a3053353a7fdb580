"""Zones of one study against each of its readers -> rows of the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from diptych_pirads.config import PiradsEvaluateSection
from diptych_pirads.geometry import Volume, crop_pad
from diptych_pirads.labels import ZONES
from diptych_pirads.metrics import Conventions, evaluate_case
from diptych_pirads.prepare import PreparedLabel
from diptych_pirads.store import other_labels, study

if TYPE_CHECKING:
    from diptych.prepared import Prepared

AREAS = (*ZONES[1:], "gland")
HEADLINE = ("masd", "dice")
READERS = "readers"  # table of one reader against another
# What stands in a table of its own: metric -> name of the table; reader 1 alone is scored there.
TABLES = {
    "masd_penalised": "misses",
    "miss": "misses",
    "hd95": "95 % Hausdorff distance",
    "centerline": "95 % Hausdorff distance",
    "nsd": "surface Dice",
    "volume_error_ml": "volumes",
    "volume_error_percent": "volumes",
}
SIGNED = ("volume_error_ml", "volume_error_percent")  # their sizes stand in tables


def conventions(section: PiradsEvaluateSection) -> Conventions:
    """What the figures of a run mean."""
    return Conventions(section.surface, section.average, section.empty, section.regions)


def whole_reference(label: PreparedLabel) -> Volume:
    """A reader's label on its whole grid, background around what was kept of it."""
    middle = label.field.to_lps((np.array(label.field.size) - 1) / 2)
    return crop_pad(label.reference, middle, label.field.size)


def labels_of(prepared: Prepared, row: int) -> dict[str, PreparedLabel]:
    """Every reader's label of a study, the one that is trained on first."""
    first = study(prepared, row).label
    if first is None:
        return {}
    return {prepared.index["readers"][row][0]: first, **other_labels(prepared, row)}


def score_study(
    prepared: Prepared, row: int, zones: Volume, form: Conventions
) -> dict[str, dict[str, float]]:
    """Every metric of a segmentation against each reader of a study.

    Args:
        prepared: The data.
        row: Row of the index.
        zones: (z, y, x) class numbers.
        form: What the figures mean.

    Returns:
        Reader -> metrics as `metrics.evaluate_case` names them.
    """
    return {
        reader: evaluate_case(zones, whole_reference(label), label.scheme, conventions=form)
        for reader, label in labels_of(prepared, row).items()
    }


def score_readers(prepared: Prepared, row: int, form: Conventions) -> dict[str, dict[str, float]]:
    """Every metric of the further readers of a study against the first.

    Returns:
        Reader -> metrics; empty where one reader alone drew the study.
    """
    (_, first), *others = labels_of(prepared, row).items()
    reference = whole_reference(first)
    return {
        reader: evaluate_case(whole_reference(label), reference, first.scheme, label.scheme, form)
        for reader, label in others
    }


def table_rows(
    scores: Mapping[str, Mapping[str, float]], place: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of the tables from what `score_study` gives.

    Args:
        scores: Reader -> metrics; the first reader's are the headline, others' a condition.
        place: subject, unit, method and fit.
    """
    for number, (reader, values) in enumerate(scores.items()):
        condition = reader if number else ""
        for metric, value in values.items():
            name, _, *level = metric.split("/")
            if name in HEADLINE and (not level or not number):
                table = level[0] if level else ""
            elif name in TABLES and not number:
                table = TABLES[name]
            else:
                continue
            shown = (f"absolute_{metric}", abs(value)) if name in SIGNED else (metric, value)
            own = {"table": table, "condition": condition}
            yield {**place, **own, "metric": shown[0], "value": shown[1]}


def long_rows(
    scores: Mapping[str, Mapping[str, float]], place: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of ``metrics.parquet``: one a reader, zone, region and metric.

    Args:
        scores: Reader -> metrics.
        place: subject, unit, method and fit.
    """
    for reader, values in scores.items():
        for metric, value in values.items():
            name, area, *level = metric.split("/")
            region = level[0] if level else "all"
            own = {"reader": reader, "zone": area, "region": region, "metric": name}
            yield {**place, **own, "value": value}


def long_table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """``metrics.parquet``: subject, unit, method, fit, reader, zone, region, metric, value."""
    names = ("subject", "unit", "method", "fit", "reader", "zone", "region", "metric")
    schema = {**dict.fromkeys(names, pl.String), "value": pl.Float64}
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col("value").fill_nan(None))
