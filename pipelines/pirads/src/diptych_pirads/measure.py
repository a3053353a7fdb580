"""The verb ``measure``: two label files, or two folders of them, against each other; no model."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.errors import DataError, UsageError
from diptych.files import write_atomically
from diptych.findings import Finding, Findings
from diptych.progress import progress
from diptych_pirads.check_label import check_grid
from diptych_pirads.label_files import Label, open_label
from diptych_pirads.layout import Study
from diptych_pirads.metrics import Conventions, evaluate_case
from diptych_pirads.read import SUFFIXES
from diptych_pirads.verbs import MeasureOptions

SHOWN = ("dice", "masd", "hd95", "nsd", "volume_error_ml", "volume_error_percent", "miss")
SCHEME_CODES = ("E105", "I105")
TITLES = ("Dice", "MASD mm", "HD95 mm", "NSD 2 mm", "dV mL", "dV %", "missed")


def measure(config: Any, target: None, options: MeasureOptions) -> Findings:
    """Print overlap, distances and volumes of labels against a reference.

    Args:
        config: Not looked at.
        target: None: the verb takes no run and no data.
        options: The files and what the figures mean.

    Returns:
        What is wrong or remarkable about the files; pairs with errors are left out.

    Raises:
        UsageError: There is no pair of files, or ``out`` exists.
    """
    if options.out is not None and options.out.exists():
        raise UsageError(f"{options.out}: exists: choose another --out")
    findings: list[Finding] = []
    found: dict[str, dict[str, float]] = {}
    for pred, ref in progress(_pairs(options.pred, options.ref), "measure"):
        try:
            found[ref.name], noted = measure_pair(pred, ref, options)
            findings += noted
        except DataError as error:
            findings += error.findings or ()
    if found:
        print(table(found))
        if options.out is not None:
            _write(found, options.out)
    return Findings(tuple(findings))


def measure_pair(
    pred: Path, ref: Path, options: MeasureOptions
) -> tuple[dict[str, float], list[Finding]]:
    """Every metric of one label file against another.

    Args:
        pred: A label file.
        ref: The reference's.
        options: What values and figures mean.

    Returns:
        Metrics as `metrics.evaluate_case` names them, and findings about the files.

    Raises:
        DataError: The findings of a file that cannot be used.
    """
    opened = [
        _opened(path, scheme, option)
        for path, scheme, option in (
            (pred, options.pred_scheme, "--pred-scheme"),
            (ref, options.scheme, "--scheme"),
        )
    ]
    noted = [one for label in opened for one in label.findings]
    noted += check_grid(opened[0].volume, opened[1].volume, pred.name)
    errors = [one for one in noted if one.severity == "error"]
    if errors:
        raise DataError(errors[0].line(), Findings(tuple(noted)))
    form = Conventions(options.surface, options.average, options.empty, options.regions)
    own, reference = opened
    row = evaluate_case(own.volume, reference.volume, reference.scheme, own.scheme, form)
    return row, noted


def _opened(path: Path, scheme: str, option: str) -> Label:
    """A label file; findings about its scheme name the option that sets it."""

    def told(findings: Iterable[Finding]) -> tuple[Finding, ...]:
        return tuple(
            replace(one, fix=f"correct the label, or say what its values mean with {option}")
            if one.code in SCHEME_CODES
            else one
            for one in findings
        )

    try:
        label = open_label(Study(path.name, path.name, {}, (path,)), scheme)
    except DataError as error:
        raise DataError(str(error), Findings(told(error.findings or ()))) from None
    return replace(label, findings=told(label.findings))


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The figures in lines for a terminal, their means last where there are several pairs."""
    lines = [f"{'':24}{'zone':>6}" + "".join(f"{title:>10}" for title in TITLES)]
    for name, row in found.items():
        lines += _lines(name, row)
    if len(found) > 1:
        keys = list(dict.fromkeys(key for row in found.values() for key in row))
        lines += _lines(f"mean of {len(found)}", {key: _mean(found, key) for key in keys})
    return "\n".join(lines)


def _lines(name: str, row: Mapping[str, float]) -> list[str]:
    zones = [key.removeprefix("dice/") for key in row if key.startswith("dice/")]
    lines = []
    for zone in [zone for zone in zones if "/" not in zone]:
        values = [row.get(f"{metric}/{zone}", math.nan) for metric in SHOWN]
        words = ["-" if math.isnan(value) else f"{value:.3f}" for value in values]
        shown = name if len(name) <= 23 else f"{name[:20]}..."
        lines.append(f"{shown:24}{zone:>6}" + "".join(f"{word:>10}" for word in words))
    return lines


def _mean(found: Mapping[str, Mapping[str, float]], key: str) -> float:
    values = [row[key] for row in found.values() if key in row and math.isfinite(row[key])]
    return float(np.mean(values)) if values else math.nan


def _pairs(pred: Path, ref: Path) -> Sequence[tuple[Path, Path]]:
    for path in (pred, ref):
        if not path.exists():
            raise UsageError(f"{path}: does not exist: correct the path")
    if pred.is_file() and ref.is_file():
        return [(pred, ref)]
    if pred.is_file() or ref.is_file():
        raise UsageError("--pred and --ref: give two files or two folders")
    known = {path.name: path for path in pred.iterdir() if path.name.lower().endswith(SUFFIXES)}
    pairs = [(known[path.name], path) for path in sorted(ref.iterdir()) if path.name in known]
    if not pairs:
        raise UsageError(f"{pred} and {ref} have no file name in common: name files alike")
    return pairs


def _write(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    rows = []
    for name, row in found.items():
        for metric, value in row.items():
            kind, zone, *level = metric.split("/")
            region = level[0] if level else "all"
            own = {"file": name, "zone": zone, "region": region, "metric": kind}
            rows.append({**own, "value": value if math.isfinite(value) else None})
    stream = io.BytesIO()
    pl.DataFrame(rows, infer_schema_length=None).write_csv(stream)
    write_atomically(path, lambda file: file.write(stream.getvalue()))
