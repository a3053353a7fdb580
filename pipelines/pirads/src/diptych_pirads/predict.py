"""New studies -> zones on their own grid, volumes, PSA density, and the sectors of lesions."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy import ndarray
from torch import nn

from diptych.contract import Facts, Trained
from diptych.errors import DataError
from diptych.files import write_atomically
from diptych.findings import Finding, Findings
from diptych.progress import progress
from diptych_pirads.cases import case_of, case_page
from diptych_pirads.check_label import check_grid, check_volumes
from diptych_pirads.config import PiradsConfig
from diptych_pirads.dicomseg import write_seg
from diptych_pirads.geometry import Volume, reorient_lps, to_grid
from diptych_pirads.infer import Segmentation, segment
from diptych_pirads.layout import Study, leave_out, locate
from diptych_pirads.novelty import ARTIFACT, novelty_percentile
from diptych_pirads.prepare import PreparedStudy, prepare_study
from diptych_pirads.read import SUFFIXES, open_volume
from diptych_pirads.scale import ARTIFACT as SCALE
from diptych_pirads.scale import standardized
from diptych_pirads.sectors import OUTSIDE, lesion_sectors, snomed_code
from diptych_pirads.volumetry import (
    PSA_DENSITY_FLAG,
    ellipsoid_volume,
    psa_density,
    zone_volumes,
)
from diptych_pirads.write import write_nifti

MODEL = "model"  # name of the module of every fit
DISAGREEMENT_FLAG = 0.15
UNUSUAL_PERCENTILE = 99.0
SHOWN_CODES = ("W121", "W123")  # findings that stand on a study's page
KINDS = {  # of columns that may hold nothing; the others are numbers
    "psa_density_raised": pl.Boolean,
    "review_because": pl.String,
    "snomed_code": pl.String,
    "snomed_meaning": pl.String,
}
NOTICE = "Research use only. Not for diagnosis."


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A trained network, ready for studies.

    Args:
        network: One that `model.probabilities` knows.
        facts: What it was trained with.
        config: The run's configuration with the values of this call.
        novelty: Statistics of its training studies, from `novelty.fit_novelty`.
        scale: Their intensities, from `scale.fit_scale`.
    """

    network: nn.Module
    facts: Facts
    config: PiradsConfig
    novelty: Mapping[str, ndarray]
    scale: Mapping[str, ndarray]


@dataclass(frozen=True, eq=False)
class Zones:
    """What is found in one study.

    Args:
        volume: uint8 (z, y, x), class numbers 0 to 4 on the grid of the T2-weighted file.
        prob: (5, z, y, x), class probabilities on the working grid.
        volumes: mL of "pz", "tz", "dpu", "afs" and "gland".
        disagreement: 1 - Dice of the two paths, by common zone; empty for one path.
        row: The study's row of `zones.parquet`.
        lesions: Rows of `lesions.parquet`.
        findings: Warnings and notes.
        study: As it was prepared.
        segmentation: As it came from the network.
    """

    volume: Volume
    prob: Volume
    volumes: Mapping[str, float]
    disagreement: Mapping[str, float]
    row: Mapping[str, Any]
    lesions: Sequence[Mapping[str, Any]]
    findings: Sequence[Finding]
    study: PreparedStudy
    segmentation: Segmentation


def open_segmenter(config: PiradsConfig, trained: Trained) -> Segmenter:
    """The model of a run that predicts.

    Args:
        config: The run's configuration with the values of this call.
        trained: The run's fits.
    """
    name = trained.final
    left = trained.artifacts(name)
    return segmenter_of(trained.modules(name)[MODEL], trained.facts(name), config, left)


def segmenter_of(
    network: nn.Module, facts: Facts, config: PiradsConfig, left: Mapping[str, Any]
) -> Segmenter:
    """A segmenter from a network and what its fit left.

    Args:
        network: The network.
        facts: What it was trained with.
        config: The configuration.
        left: The fit's artifacts.
    """
    return Segmenter(network, facts, config, left.get(ARTIFACT, {}), left.get(SCALE, {}))


def predict(config: PiradsConfig, trained: Trained, source: Path, out: Path) -> Findings:
    """Segment every study of an input.

    Args:
        config: The run's configuration with the values of this call.
        trained: The run's fits.
        source: A T2-weighted image or a folder of such, a folder of DICOM files, or a manifest
            `studies.csv` (its labels are not looked at).
        out: Folder for ``<study>_zones.nii.gz``, ``<study>.png``, where asked for
            ``<study>_prob.nii.gz`` and ``<study>_seg.dcm``, and for ``zones.parquet`` and
            ``lesions.parquet``. It is not made where no study can be segmented.

    Returns:
        Findings; studies with errors are left out.
    """
    segmenter = open_segmenter(config, trained)
    located, findings = locate(source)
    located, left_out = leave_out(located, config.data.exclude)
    findings += left_out
    studies, noted = _inputs(located, config)
    findings += noted
    rows: list[Mapping[str, Any]] = []
    lesions: list[Mapping[str, Any]] = []
    for name, study in progress(list(studies.items()), "predict"):
        try:
            zones = predict_study(segmenter, study, name)
        except DataError as error:
            findings += error.findings or [_unnamed(error, name)]
            continue
        out.mkdir(parents=True, exist_ok=True)
        findings += [*zones.findings, *write_study(zones, study, name, out, config)]
        rows.append(zones.row)
        lesions += zones.lesions
    if rows:
        _write_table(rows, out / "zones.parquet")
    if lesions:
        _write_table(lesions, out / "lesions.parquet")
    return Findings(tuple(findings))


def predict_study(segmenter: Segmenter, study: Study, name: str) -> Zones:
    """Segment one study and measure it.

    Args:
        segmenter: From `open_segmenter`.
        study: Its files; a label is not looked at.
        name: What its files and rows are called.

    Raises:
        DataError: The findings of a study that cannot be used.
    """
    config = segmenter.config
    prepared = prepare_study(replace(study, label=()), config)
    prepared = standardized(prepared, segmenter.scale, segmenter.facts["size"])
    t2 = study.images["t2"]
    where = study.name_of(t2)
    mask = None if study.lesions is None else _open_lesions(study, prepared.original)
    found = segment(segmenter.network, prepared, config, segmenter.facts)
    stored = open_volume(t2, config.data.series if t2.is_dir() else None).volume
    volumes = zone_volumes(found.zones)
    percentile = novelty_percentile(segmenter.novelty, found.features)
    findings = list(prepared.findings)
    sizes = check_volumes(volumes["gland"], volumes["pz"], where)
    findings += sizes
    if percentile > UNUSUAL_PERCENTILE:
        words = f"farther from the training studies than {percentile:.0f} % of them are"
        fix = "look at the outlines: treatment, coil or field strength may be new to the model"
        findings.append(Finding("warning", "W123", where, words, fix))
    if mask is not None and not mask.array.any():
        words, fix = "the mask holds no lesion", "nothing, or give the right file"
        assert study.lesions is not None
        findings.append(Finding("note", "I109", study.name_of(study.lesions), words, fix))
    reasons = review_reasons(found, bool(sizes))
    row = {
        "study": name,
        "subject": name if study.subject == t2.name else study.subject,
        **{f"{zone}_ml": millilitres for zone, millilitres in volumes.items()},
        "ellipsoid_ml": ellipsoid_volume(found.zones),
        "psa_ng_ml": _known(study.psa),
        **_density(study.psa, volumes["gland"]),
        **{f"disagreement_{zone}": _known(value) for zone, value in found.disagreement.items()},
        "entropy_nats": _known(found.entropy),
        "pieces": found.components,
        "novelty_percentile": _known(percentile),
        "review": bool(reasons),
        "review_because": "; ".join(reasons) or None,
    }
    lesions = [] if mask is None else _lesion_rows(mask, found.zones, name, config)
    return Zones(
        volume=to_grid(found.zones, stored, "label"),
        prob=found.prob,
        volumes=volumes,
        disagreement=found.disagreement,
        row=row,
        lesions=lesions,
        findings=findings,
        study=prepared,
        segmentation=found,
    )


def review_reasons(found: Segmentation, unusual_volume: bool) -> list[str]:
    """Why someone should look at the outlines before they are used; none where nothing stands out.

    Args:
        found: What the network says.
        unusual_volume: Whether gland or PZ have a volume that prostates rarely have (W121).
    """
    reasons = []
    for zone, value in found.disagreement.items():
        if math.isnan(value):
            reasons.append(f"neither path is sure of any {zone.upper()}")
        elif value > DISAGREEMENT_FLAG:
            reasons.append(f"the paths disagree about {zone.upper()} (1 - Dice {value:.2f})")
    if unusual_volume:
        reasons.append("unusual volume")
    if found.components != 1:
        reasons.append(f"{found.components} pieces of gland before cleaning")
    return reasons


def write_study(
    zones: Zones, study: Study, name: str, out: Path, config: PiradsConfig
) -> list[Finding]:
    """Write the files of one study, each whole or not at all.

    Args:
        zones: From `predict_study`.
        study: The study.
        name: How the files' names begin.
        out: The folder.
        config: `predict.prob` and `predict.dicom_seg` count.

    Returns:
        What is to be known about a DICOM segmentation.
    """
    write_nifti(zones.volume, out / f"{name}_zones.nii.gz")
    if config.predict.prob:
        on_t2 = to_grid(zones.prob, zones.volume, "prob")
        write_nifti(on_t2, out / f"{name}_prob.nii.gz")
    page = io.BytesIO()
    case = case_of(zones.segmentation, zones.study)
    figure = case_page(case, name, _measures(zones), _warnings(zones))
    figure.savefig(page, format="png", dpi=110, metadata={"Software": None})
    write_atomically(out / f"{name}.png", lambda file: file.write(page.getvalue()))
    if not config.predict.dicom_seg:
        return []
    t2 = study.images["t2"]
    where = study.name_of(t2)
    if not t2.is_dir():
        fix = "give the folder of DICOM files as input"
        found = "no DICOM series, so no DICOM segmentation"
        return [Finding("warning", "W124", where, found, fix)]
    try:
        write_seg(zones.volume, t2, out / f"{name}_seg.dcm", config.data.series)
    except DataError as error:
        return list(error.findings or ())
    found = "the DICOM segmentation holds the patient's identity, as the standard demands"
    fix = f"remove it before sharing {name}_seg.dcm; no other file holds it"
    return [Finding("warning", "W119", where, found, fix)]


def _warnings(zones: Zones) -> list[str]:
    because = zones.row["review_because"]
    review = [f"Look at the outlines: {because}."] if because else []
    return [NOTICE, *review, *(one.found for one in zones.findings if one.code in SHOWN_CODES)]


def _measures(zones: Zones) -> list[str]:
    row = zones.row
    lines = [
        f"{zone if zone == 'gland' else zone.upper()}: {ml:.1f} mL"
        for zone, ml in zones.volumes.items()
    ]
    lines.append(f"ellipsoid: {row['ellipsoid_ml']:.1f} mL")
    if row["psa_density_ng_ml2"] is not None:
        high = " (raised)" if row["psa_density_raised"] else ""
        lines.append(f"PSA density: {row['psa_density_ng_ml2']:.2f} ng/mL²{high}")
    if row["novelty_percentile"] is not None:
        lines.append(f"unlike training: percentile {row['novelty_percentile']:.0f}")
    for lesion in zones.lesions:
        maybe = " or CZ" if lesion["or_central_zone"] else ""
        lines.append(f"lesion {lesion['lesion']}: {lesion['sector']}{maybe}")
    return lines


def _inputs(
    located: Sequence[Study], config: PiradsConfig
) -> tuple[dict[str, Study], list[Finding]]:
    """The studies by the names of their files; rows of several readers are one study."""
    asked = config.predict
    unique = {(study.subject, study.study): study for study in reversed(located)}
    studies = list(unique.values())[::-1]
    findings = []
    if asked.psa is not None or asked.lesions is not None:
        if len(studies) == 1:
            psa = studies[0].psa if asked.psa is None else asked.psa
            studies = [replace(studies[0], psa=psa, lesions=asked.lesions or studies[0].lesions)]
        else:
            found = f"predict.psa and predict.lesions are for one study, here are {len(studies)}"
            fix = "write them into the columns psa and lesions of the manifest"
            findings.append(Finding("warning", "W100", "predict", found, fix))
    stems = [_stem(study.study) for study in studies]
    often = Counter(stems)
    names = [
        stem if often[stem] == 1 else f"{_stem(study.subject)}_{stem}"
        for stem, study in zip(stems, studies, strict=True)
    ]
    again: Counter[str] = Counter()
    named = {}
    for name, study in zip(names, studies, strict=True):
        again[name] += 1
        named[name if again[name] == 1 else f"{name}_{again[name]}"] = study
    return named, findings


def _stem(name: str) -> str:
    """A name that every file system takes, without the ending of an image."""
    ending = next(
        (end for end in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(end)), ""
    )
    return re.sub(r"[^\w.-]+", "_", name[: len(name) - len(ending)]).strip(".") or "study"


def _open_lesions(study: Study, original: Volume) -> Volume:
    assert study.lesions is not None
    where = study.name_of(study.lesions)
    mask = reorient_lps(open_volume(study.lesions).volume)
    mask = mask.with_array((mask.array != 0).astype(np.uint8))
    errors = [one for one in check_grid(mask, original, where) if one.severity == "error"]
    if errors:
        raise DataError(errors[0].line(), Findings(tuple(errors)))
    return mask


def _lesion_rows(
    mask: Volume, zones: Volume, name: str, config: PiradsConfig
) -> list[dict[str, Any]]:
    found = lesion_sectors(mask, zones, version=config.predict.sectors)
    rows = []
    for number, lesion in enumerate(found, 1):
        code, meaning = (None, None) if lesion.main == OUTSIDE else snomed_code(lesion.main)
        rows.append(
            {
                "study": name,
                "lesion": number,
                "volume_ml": lesion.volume_ml,
                "sector": lesion.main,
                "snomed_code": code,
                "snomed_meaning": meaning,
                "or_central_zone": lesion.maybe_central_zone,
                "part_in_gland": lesion.inside,
                "sectors": "; ".join(
                    f"{sector} {part:.0%}" for sector, part in lesion.fractions.items()
                ),
            }
        )
    return rows


def _density(psa: float, gland_ml: float) -> dict[str, float | bool | None]:
    density = psa_density(psa, gland_ml)
    raised = None if math.isnan(density) else density >= PSA_DENSITY_FLAG
    return {"psa_density_ng_ml2": _known(density), "psa_density_raised": raised}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _unnamed(error: DataError, name: str) -> Finding:
    return Finding("error", "E101", name, str(error), "check the files of the study")


def _without_value(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in rows[0] if all(row.get(name) is None for row in rows)]


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    # A column of nothing but nulls would have no type, and could not be joined to other tables.
    kinds = {name: KINDS.get(name, pl.Float64) for name in _without_value(rows)}
    stream = io.BytesIO()
    table = pl.DataFrame(rows, infer_schema_length=None, schema_overrides=kinds)
    table.write_parquet(stream)
    write_atomically(path, lambda file: file.write(stream.getvalue()))
