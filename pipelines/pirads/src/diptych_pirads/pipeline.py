"""The pipeline as the runtime sees it; every room is imported when it is first used."""

from __future__ import annotations

from functools import partial
from typing import Literal

from diptych.contract import Metric, Pipeline, Verb, lazy
from diptych_pirads.config import SHAPE_BASELINES, PiradsConfig
from diptych_pirads.verbs import LayoutOptions, MeasureOptions

AREAS = ("pz", "tz", "dpu", "afs", "gland")
LEVELS = ("apex", "mid", "base")  # thirds of the gland, for the first two
_WORDS: dict[str, tuple[str, str, Literal["higher", "lower"], float]] = {
    "masd": ("MASD", "mm", "lower", 0.1),
    "dice": ("Dice", "", "higher", 0.01),
    "masd_penalised": ("MASD with misses", "mm", "lower", 0.1),
    "miss": ("Missed", "%", "lower", 0.0),
    "hd95": ("HD95", "mm", "lower", 0.5),
    "nsd": ("Surface Dice", "", "higher", 0.01),
    "absolute_volume_error_ml": ("Absolute volume error", "mL", "lower", 1.0),
    "absolute_volume_error_percent": ("Absolute volume error in percent", "", "lower", 5.0),
}


def _metrics() -> dict[str, Metric]:
    """Every metric by name, such as ``masd/pz`` and ``dice/tz/apex``; distances head the report."""
    found = {}
    for name, (title, unit, better, margin) in _WORDS.items():
        for area in AREAS:
            words = f"{title}, {area.upper() if area != 'gland' else area}"
            headline = name == "masd" and area != "gland"
            found[f"{name}/{area}"] = Metric(words, unit, better, headline, margin)
            for level in LEVELS if name in ("masd", "dice") else ():
                found[f"{name}/{area}/{level}"] = Metric(
                    f"{words}, {level}", unit, better, margin=margin
                )
    found["dice"] = Metric("Dice, mean of the zones", "", "higher", margin=0.01)  # of validation
    found["centerline/dpu"] = Metric("Centre line, DPU", "mm", "lower", margin=0.5)
    return found


METRICS = _metrics()

PIPELINE = Pipeline(
    name="pirads",
    title="Prostate zones on T2-weighted MRI: a dual-path network beside shapes and single paths",
    subject="patient",
    config=PiradsConfig,
    metrics=METRICS,
    check=lazy("diptych_pirads.check:check"),
    prepare=lazy("diptych_pirads.store:prepare"),
    plan=lazy("diptych_pirads.plan:plan"),
    modules=lazy("diptych_pirads.task:modules"),
    build=lazy("diptych_pirads.task:build"),
    evaluate=lazy("diptych_pirads.evaluate:evaluate"),
    baselines={
        name: partial(lazy("diptych_pirads.evaluate:evaluate_baseline"), name)
        for name in SHAPE_BASELINES
    },
    predict=lazy("diptych_pirads.predict:predict"),
    sample=lazy("diptych_pirads.sample:write_sample"),
    pictures=lazy("diptych_pirads.pictures:pictures"),
    export=lazy("diptych_pirads.export:export"),
    verbs={
        "measure": Verb(
            help="Overlap, distances and volumes of label files; no model is needed.",
            takes="nothing",
            run=lazy("diptych_pirads.measure:measure"),
            options=MeasureOptions,
        ),
        "layout": Verb(
            help="Write studies.csv for a folder that lies as a public data set does.",
            takes="data",
            run=lazy("diptych_pirads.public_layouts:layout"),
            options=LayoutOptions,
        ),
    },
)
