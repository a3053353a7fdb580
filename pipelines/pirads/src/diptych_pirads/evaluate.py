"""Every scored fit and baseline on its test studies, in the original geometry and in mm.

A study is segmented as `predict` does it: the crop is where the network finds the gland, never
where its label is. Files beside the tables: ``metrics`` (one row a study, reader, zone, region),
``review`` (one row a study: how sure the network is), ``cases`` (the worst, the median and the
best study for pictures).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy import ndarray

from diptych.config import resolve
from diptych.contract import Evaluation, Fit, Trained
from diptych.findings import Finding, Findings
from diptych.progress import progress
from diptych_pirads.baselines import BoxAtlas, MeanShape, box_ends, classes_of
from diptych_pirads.cases import case_of, to_arrays
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import Volume, to_grid
from diptych_pirads.infer import Segmentation, segment, zones_on_original
from diptych_pirads.plan import is_scored
from diptych_pirads.prepare import PreparedStudy
from diptych_pirads.scale import ARTIFACT as SCALE
from diptych_pirads.scale import standardized
from diptych_pirads.scores import (
    AREAS,
    READERS,
    conventions,
    long_rows,
    long_table,
    score_readers,
    score_study,
    table_rows,
)
from diptych_pirads.store import study
from diptych_pirads.volumetry import zone_volumes

if TYPE_CHECKING:
    from torch import nn

    from diptych.prepared import Prepared

MODEL = "model"
REFERENCE_BOX = "reference box"  # table of the atlas that is told where the gland is
SAMPLE_BAND = {"pz": 0.88, "tz": 0.87, "dpu": 0.55, "afs": 0.78}  # least mean Dice of the demo
TOO_GOOD = 0.985
RANKS = ("worst", "median", "best")


@dataclass
class _Scored:
    """What is gathered over studies and fits."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    long: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, scores: Mapping[str, Mapping[str, float]], place: Mapping[str, Any], table: str = ""
    ) -> None:
        """Scores of one study; those for another table than the headline's by its name."""
        found = list(table_rows(scores, place))
        if table:
            found = [{**row, "table": table} for row in found if not row["table"]]
            self.rows += [row for row in found if not row["condition"]]
            return
        self.rows += found
        self.long += long_rows(scores, place)

    def evaluation(self, **more: Any) -> Evaluation:
        """The contract's form."""
        return Evaluation(rows=_frame(self.rows), **more)


def evaluate(config: PiradsConfig, prepared: Prepared, trained: Trained) -> Evaluation:
    """Scores of the model and of the trained baselines on the test parts of their fits.

    Args:
        config: The run's configuration.
        prepared: The data that the fits' splits index.
        trained: Finished fits.

    Returns:
        Rows by method: against reader 1 in the headline table, against others as conditions, one
        reader against another in the table "readers"; files; notes on what the figures mean.
    """
    form = conventions(config.evaluate)
    scored = _Scored()
    review: list[dict[str, Any]] = []
    quality: list[tuple[float, int]] = []  # mean Dice and row, of the first seed
    fits = [fit for fit in trained.fits if is_scored(fit, config)]
    seed = _shown_seed(config, fits)
    for fit in fits:
        network, own = trained.modules(fit.name)[MODEL], resolve(config, fit)
        found: dict[int, ndarray] = {}
        opened = _opener(trained, fit, prepared)
        for row in progress(_labelled(prepared, fit.split.test), f"evaluate {fit.name}"):
            one = opened(row)
            seen = segment(network, one, own, trained.facts(fit.name))
            scores = score_study(prepared, row, seen.zones, form)
            place = _place(prepared, row, fit.method, fit)
            scored.add(scores, place)
            if fit.method:
                continue
            found[row] = _gland_box(one, seen)
            between = score_readers(prepared, row, form)
            for reader, values in between.items():
                scored.add({reader: values}, {**place, "method": reader}, READERS)
            if between:
                scored.add(scores, place, READERS)
            review.append({**place, **_certainty(seen)})
            if fit.seed == seed:
                own_dice = next(iter(scores.values()))
                quality.append((_mean_dice(own_dice), row))
        if not fit.method:
            _remember(prepared, own, fit, network, found)
    files: dict[str, Any] = {"metrics": long_table(scored.long)}
    if review:
        files["review"] = pl.DataFrame(review, infer_schema_length=None)
    if quality:
        own_fits = [fit for fit in fits if (fit.method, fit.seed) == ("", seed)]
        files["cases"] = _cases(config, prepared, trained, own_fits, quality)
    return scored.evaluation(
        files=files,
        notes=_notes(config, prepared, scored.rows),
        findings=Findings(_credible(prepared, scored.rows)),
    )


def evaluate_baseline(
    name: str, config: PiradsConfig, prepared: Prepared, trained: Trained
) -> Evaluation:
    """Scores of a baseline that looks at no image, on the splits of the network.

    Args:
        name: "mean_shape": class frequencies around the middle of the series, or of what three
            series share; no image is looked at. "box_atlas": frequencies within the box of the
            gland that the network found, and in the table "reference box" within the label's.
        config: The run's configuration.
        prepared: The data.
        trained: Finished fits of the network.

    Returns:
        Rows, and the fitted frequencies of every fit.
    """
    form = conventions(config.evaluate)
    scored = _Scored()
    artifacts = {}
    for fit in [f for f in trained.fits if is_scored(f, config) and not f.method]:
        own = resolve(config, fit)
        fitted = _fitted(name, prepared, trained, fit)
        if fitted is None:
            continue
        artifacts[fit.name] = {"shape": _state(fitted)}
        glands = _recall(prepared, own, fit, trained) if isinstance(fitted, BoxAtlas) else {}
        for row in _labelled(prepared, fit.split.test):
            one = study(prepared, row)
            place = _place(prepared, row, name, fit)
            if isinstance(fitted, MeanShape):
                prob = fitted.predict(one)
            else:
                told = zones_on_original(fitted.predict(one), one.original, own)
                scored.add(score_study(prepared, row, told, form), place, REFERENCE_BOX)
                prob = fitted.predict(one, glands[row])
            zones = zones_on_original(prob, one.original, own)
            scored.add(score_study(prepared, row, zones, form), place)
    notes = () if artifacts else (f"{name}: no training label tells PZ from TZ; not scored.",)
    return scored.evaluation(
        artifacts={name: artifacts} if artifacts else {},
        files={f"metrics-{name}": long_table(scored.long)},
        notes=notes,
    )


def _opener(trained: Trained, fit: Fit, prepared: Prepared) -> Callable[[int], PreparedStudy]:
    """Opens studies by row, with the intensities that a fit's network was trained on."""
    scale, size = trained.artifacts(fit.name).get(SCALE, {}), trained.facts(fit.name)["size"]
    return lambda row: standardized(study(prepared, row), scale, size)


def _labelled(prepared: Prepared, rows: Sequence[int]) -> list[int]:
    schemes = prepared.index["scheme"]
    return [row for row in rows if schemes[row] is not None]


def _place(prepared: Prepared, row: int, method: str, fit: Fit) -> dict[str, Any]:
    subject, unit = prepared.index.select("subject", "unit").row(row)
    return {"subject": subject, "unit": unit, "method": method, "fit": f"seed-{fit.seed}"}


def _frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    names = ("table", "condition", "subject", "unit", "method", "metric", "fit")
    schema = {**dict.fromkeys(names, pl.String), "value": pl.Float64}
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col("value").fill_nan(None))


def _shown_seed(config: PiradsConfig, fits: Sequence[Fit]) -> int:
    """The seed whose studies are shown: the run's first, or that of published weights."""
    seeds = {fit.seed for fit in fits if not fit.method}
    return config.run.seeds[0] if config.run.seeds[0] in seeds else min(seeds, default=0)


def _mean_dice(values: Mapping[str, float]) -> float:
    own = [values[f"dice/{area}"] for area in AREAS[:-1] if f"dice/{area}" in values]
    known = [value for value in own if np.isfinite(value)]
    return float(np.mean(known)) if known else 0.0


def _certainty(seen: Segmentation) -> dict[str, Any]:
    volumes = {f"{zone}_ml": value for zone, value in zone_volumes(seen.zones).items()}
    apart = {f"disagreement_{zone}": value for zone, value in seen.disagreement.items()}
    return {**volumes, **apart, "entropy": seen.entropy, "components": seen.components}


# Where the network found the gland: the box atlas starts from there.


def _gland_box(one: PreparedStudy, seen: Segmentation) -> ndarray:
    """(2, 3): first and one past the last voxel of the gland on the working grid, or NaN."""
    grid = Volume(one.image.array[0], one.image.affine)
    return box_ends(to_grid(seen.zones, grid, "label").array)


def _remember(
    prepared: Prepared,
    config: PiradsConfig,
    fit: Fit,
    network: nn.Module,
    found: Mapping[int, ndarray],
) -> None:
    if found:
        prepared.cache(
            "gland-boxes", _key(config, fit, network), lambda: np.stack([*found.values()])
        )


def _recall(
    prepared: Prepared, config: PiradsConfig, fit: Fit, trained: Trained
) -> dict[int, ndarray]:
    """What `evaluate` has found a moment ago; found anew where that is not kept."""
    network, rows = trained.modules(fit.name)[MODEL], _labelled(prepared, fit.split.test)

    def compute() -> ndarray:
        facts = trained.facts(fit.name)
        studies = map(_opener(trained, fit, prepared), rows)
        return np.stack([_gland_box(one, segment(network, one, config, facts)) for one in studies])

    known = prepared.cache("gland-boxes", _key(config, fit, network), compute)
    return dict(zip(rows, known, strict=True))


def _key(config: PiradsConfig, fit: Fit, network: nn.Module) -> dict[str, Any]:
    weights = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return {
        "weights": weights.hexdigest(),
        "predict": config.predict.model_dump(mode="json"),
        "center": config.data.crop.center,
        "rows": list(fit.split.test),
    }


def _fitted(
    name: str, prepared: Prepared, trained: Trained, fit: Fit
) -> MeanShape | BoxAtlas | None:
    """A baseline fitted on a fit's training part; for other data from its artifacts."""
    if not fit.split.train:
        state = trained.artifacts(f"{name}/{fit.name}").get("shape")
        return None if state is None else _restored(name, state)
    schemes = prepared.index["scheme"]
    rows = _labelled(prepared, fit.split.train)
    rows = [row for row in rows if schemes[row] == "zones4"] or rows
    labels = ((row, study(prepared, row).label) for row in rows)
    rows = [row for row, label in labels if label and classes_of(label) is not None]
    if not rows:
        return None
    studies = (study(prepared, row) for row in rows)
    return MeanShape.fit(studies) if name == "mean_shape" else BoxAtlas.fit(studies)


def _state(fitted: MeanShape | BoxAtlas) -> dict[str, ndarray]:
    state = {"frequencies": fitted.frequencies}
    if isinstance(fitted, MeanShape):
        state["spacing"] = np.array(fitted.spacing)
    return state


def _restored(name: str, state: Mapping[str, ndarray]) -> MeanShape | BoxAtlas:
    if name == "box_atlas":
        return BoxAtlas(state["frequencies"])
    z, y, x = (float(step) for step in state["spacing"])
    return MeanShape(state["frequencies"], (z, y, x))


def _cases(
    config: PiradsConfig,
    prepared: Prepared,
    trained: Trained,
    fits: Sequence[Fit],
    quality: Sequence[tuple[float, int]],
) -> dict[str, ndarray]:
    """The worst, the median and the best study by mean Dice, in the form of `cases.to_arrays`.

    Each is shown once, so that two studies are the worst and the best. They are segmented again:
    keeping the maps of every study would fill the memory.
    """
    ordered = sorted(quality)
    ranks: dict[int, str] = {}
    for rank, place in zip(RANKS, (0, (len(ordered) - 1) // 2, len(ordered) - 1), strict=True):
        ranks.setdefault(place, rank)
    cases = {}
    for place, rank in ranks.items():
        _, row = ordered[place]
        fit = next(fit for fit in fits if row in fit.split.test)
        one, own = _opener(trained, fit, prepared)(row), resolve(config, fit)
        seen = segment(trained.modules(fit.name)[MODEL], one, own, trained.facts(fit.name))
        cases[rank] = case_of(seen, one)
    return to_arrays(cases)


def _notes(
    config: PiradsConfig, prepared: Prepared, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    section = config.evaluate
    notes = [
        f"surface={section.surface}",
        f"average={section.average}",
        f"empty={section.empty}",
        f"protocol={config.split.kind}",
    ]
    ceiling = prepared.facts.get("ceiling", {})
    if ceiling:
        words = ", ".join(f"{zone.upper()} {dice['mean']:.3f}" for zone, dice in ceiling.items())
        notes.append(f"Best mean Dice that the working grid allows: {words}.")
    missed = _misses(rows)
    if missed:
        notes.append(
            f"Missed zones, which the distances leave out: {missed}. The table 'misses' counts "
            "half the diagonal of the gland's box for each."
        )
    if section.empty == "zero":
        notes.append("A zone that is never found counts as distance 0 here: not comparable.")
    if prepared.facts.get("left_out"):
        notes.append(f"{prepared.facts['left_out']} studies could not be prepared and are left out")
    if section.baselines == ():
        notes.append("Unanchored: no baseline was scored on the same splits.")
    return tuple(notes)


def _misses(rows: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        name, area, *_ = row["metric"].split("/")
        if name == "miss" and not row["method"] and row["value"] == 1:
            counts[area] = counts.get(area, 0) + 1
    return ", ".join(f"{area.upper()} {count}" for area, count in counts.items())


def _credible(prepared: Prepared, rows: Sequence[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """For the generated sample, where the zones are known: a mean Dice that cannot be right."""
    if not prepared.facts.get("generated"):
        return ()
    found = []
    fix = "the installation is suspect: compare the versions that 'diptych doctor' lists"
    for zone, least in SAMPLE_BAND.items():
        values = [
            row["value"]
            for row in rows
            if row["metric"] == f"dice/{zone}"
            and not (row["table"] or row["condition"] or row["method"])
            and np.isfinite(row["value"])
        ]
        mean = float(np.mean(values)) if values else 0.0
        if not least <= mean <= TOO_GOOD:
            text = f"mean Dice of {zone.upper()} is {mean:.3f}, outside {least:g}-{TOO_GOOD:g}"
            found.append(Finding("error", "sample.dice", "generated sample", text, fix))
    return tuple(found)
