"""The experiment of pirads: what two paths, co-training and partial labels each add.

    python tools/bench/pirads_experiment.py --out RUNS [--masks PICAI] [--arms single,dual,...]

Draws prostates, trains every arm on the same prepared data and prints the tables of
``docs/results/pirads.md``; intervals are over the test prostates. With the folder of the two public
zonal masks of PI-CAI cases (``zonal_yuan23``, ``zonal_hevi23``) it also prints how far two readers
agree on real glands and what shape alone gives there. Finished arms are kept, interrupted ones go
on: the same command can be given again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy import ndarray
from scipy import ndimage

from diptych import verbs
from diptych.compare import Pair, compare
from diptych.config import load
from diptych.statistics import mean_intervals
from diptych_pirads.baselines import MEAN_SHAPE_SPACING, BoxAtlas, MeanShape
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import Volume, bounding_box, reorient_lps, same_grid
from diptych_pirads.metrics import dice, evaluate_case, masd
from diptych_pirads.phantom import make_phantom
from diptych_pirads.pipeline import PIPELINE
from diptych_pirads.read import read_volume
from diptych_pirads.sample import write_cases
from diptych_pirads.volumetry import zone_volumes

STUDIES = (  # label scheme, part, number of prostates
    ("zones4", "train", 12),
    ("zones4", "validation", 3),
    ("zones4", "test", 20),
    ("pz_tz", "train", 8),
    (None, "train", 12),
)
SEED = 0  # of the prostates
ZONES = ("pz", "tz", "dpu", "afs")
METRICS = {"dice": ("Dice", 3), "masd": ("MASD, mm", 2)}  # title, decimals
COMMON = [
    "data.geometry.spacing=[3.0, 1.5, 1.5]",
    "data.geometry.size=[16, 32, 40]",
    "data.crop.jitter_mm=[3.0, 4.0, 4.0]",
    "train.epochs=8",
    "stages={stage-2: {train.epochs: 4, optim.lr: 3.0e-3}}",
    "predict.passes=1",  # the crop holds the whole gland
    "predict.tta=none",
    "run.threads=1",
    "run.device=cpu",
]
# Arm -> what differs. The first carries the baselines that look at no image.
ARMS: dict[str, list[str]] = {
    "full": ["evaluate.baselines=[mean_shape, box_atlas]"],
    "four_zones": ["objective.partial.weight=0"],
    "single": ["model.name=aniso", "train.stages=[stage-1]", "train.epochs=12"],
    "dual": ["objective.co.weight=0"],
    "separate": ["model.share=none"],
}
TITLES = {
    "mean_shape": "mean shape, no image",
    "box_atlas": "box atlas, no image but the model's gland",
    "single": "single path (AnisoUNet)",
    "dual": "dual path, shared encoder, no co-training",
    "full": "dual path, shared encoder, co-training (full model)",
    "separate": "dual path, nothing shared, co-training",
    "four_zones": "as the full model, without the two-zone studies",
}
MODEL = PIPELINE.name
LARGEST_LOSS = 0.05  # of Dice, that labels of two zones may cost
REFERENCE_PHANTOMS = 48
READERS = ("zonal_yuan23", "zonal_hevi23")
MARGIN_MM = 10  # around a real gland, kept for its shape


def main() -> None:
    """Draw and prepare once, train every arm, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--masks", type=Path, help="folder of the public zonal masks")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--parallel", type=int, default=2, help="fits side by side")
    options = parser.parse_args()
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}: choose among {', '.join(ARMS)}")
    if options.masks is not None and not (options.masks / READERS[0]).is_dir():
        parser.error(f"{options.masks} has no folder {READERS[0]}")
    arms = ["full", *(arm for arm in arms if arm != "full")]
    prepared = prepare(options.out)
    runs = {arm: train(prepared, options, arm) for arm in arms}
    print(tables(runs), flush=True)
    print(phantoms(), flush=True)
    if options.masks is not None:
        print(real_masks(options.masks))


def prepare(out: Path) -> Path:
    """The prepared folder of the experiment."""
    data, prepared = out / "data", out / "prepared"
    if not (data / "truth.json").is_file():  # which is written last
        cases = [(scheme, part) for scheme, part, count in STUDIES for _ in range(count)]
        write_cases(data, SEED, cases)
    if not (prepared / "config.yaml").is_file():
        verbs.prepare(PIPELINE, data, prepared, resolved([]))
    return prepared


def train(prepared: Path, options: argparse.Namespace, arm: str) -> Path:
    """One arm with all seeds; returns its run folder."""
    run: Path = options.out / arm
    if (run / "evaluation" / "results.json").is_file():
        return run
    common = [f"run.seeds=[{options.seeds}]", f"run.parallel_fits={options.parallel}"]
    config = resolved([*common, "evaluate.baselines=[]", *ARMS[arm]])
    return verbs.train(PIPELINE, prepared, run, config, resume=(run / "run.json").is_file())


def resolved(values: list[str]) -> PiradsConfig:
    """The default configuration with values of the experiment; later ones win."""
    return load(PiradsConfig, sets=[*COMMON, *values])


def tables(runs: Mapping[str, Path]) -> str:
    """One table a metric, its seeds, the differences to the full model, and what labels cost."""
    results = {arm: read(run) for arm, run in runs.items()}
    scores = {arm: result["methods"][MODEL] for arm, result in results.items()}
    scores |= {name: results["full"]["methods"][name] for name in ("mean_shape", "box_atlas")}
    lines = [f"Seeds {results['full']['seeds']}, {results['full']['n_subjects']} test prostates."]
    for metric, (title, digits) in METRICS.items():
        lines += ["", f"### {title} [95 % interval]", "", header()]
        lines += [
            row(TITLES[name], [cell(scores[name].get(f"{metric}/{z}"), digits) for z in ZONES])
            for name in TITLES
            if name in scores
        ]
        reader = reader_line(results["full"], metric, digits)
        lines += [row("second reader", reader)] if reader else []
    lines += ["", "### Dice, lowest and highest seed", "", header()]
    lines += [row(TITLES[arm], seeds(runs[arm])) for arm in TITLES if arm in runs]
    others = [arm for arm in TITLES if arm in runs and arm != "full"]
    if others:
        pairs = compare([runs["full"], *(runs[arm] for arm in others)], PIPELINE.metrics).pairs
        for metric, (title, digits) in METRICS.items():
            lines += ["", f"### {title}: arm minus full model [95 % interval]", "", header()]
            lines += [row(TITLES[arm], differences(pairs, arm, metric, digits)) for arm in others]
        lines += ["", cost_of_partial_labels(pairs)] if "four_zones" in runs else []
    return "\n".join(lines) + "\n"


def read(run: Path) -> dict[str, Any]:
    """The results of a run."""
    found: dict[str, Any] = json.loads((run / "evaluation" / "results.json").read_text())
    return found


def header(names: Sequence[str] = tuple(map(str.upper, ZONES))) -> str:
    """First lines of a table."""
    return row("", names) + "\n" + "|---" * (1 + len(names)) + "|"


def row(title: str, cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {title} | " + " | ".join(cells) + " |"


def cell(score: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
    """A value and its interval."""
    if score is None or score["value"] is None:
        return "-"
    value, low, high = (
        "-" if score[key] is None else f"{score[key]:{sign}.{digits}f}"
        for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def seeds(run: Path) -> list[str]:
    """Mean Dice of the worst and the best seed, by zone."""
    units = pl.read_parquet(run / "evaluation" / "units.parquet").filter(
        (pl.col("table") == "") & (pl.col("condition") == "") & (pl.col("method") == MODEL)
    )
    found = []
    for zone in ZONES:
        own = units.filter(pl.col("metric") == f"dice/{zone}")
        means = own.group_by("fit").agg(pl.col("value").mean())["value"].sort().to_list()
        found.append(f"{means[0]:.3f} to {means[-1]:.3f}")
    return found


def differences(pairs: Sequence[Pair], arm: str, metric: str, digits: int) -> list[str]:
    """What an arm has more than the full model, by zone; p for the metric that heads a report."""
    found = []
    for zone in ZONES:
        d = pair_of(pairs, arm, f"{metric}/{zone}").difference
        text = cell({"value": d.value, "low": d.low, "high": d.high}, digits, "+")
        tested = d.p is not None and PIPELINE.metrics[f"{metric}/{zone}"].headline
        found.append(f"{text}, p {d.p:.3f}" if tested else text)
    return found


def pair_of(pairs: Sequence[Pair], arm: str, metric: str) -> Pair:
    """An arm against the full model in the headline table."""
    return next(p for p in pairs if (p.table, p.metric, p.run) == ("", metric, arm))


def cost_of_partial_labels(pairs: Sequence[Pair]) -> str:
    """Whether training on two-zone labels too costs any zone more than it may."""
    lost = {z: pair_of(pairs, "four_zones", f"dice/{z}").difference.value or 0.0 for z in ZONES}
    worst = max(lost, key=lambda zone: lost[zone])
    word = "holds" if lost[worst] <= LARGEST_LOSS else "is broken"
    return (
        f"Two-zone studies may cost no zone more than {LARGEST_LOSS} of Dice: {word}; the largest "
        f"loss is {lost[worst]:+.3f} ({worst.upper()})."
    )


def reader_line(result: Mapping[str, Any], metric: str, digits: int) -> list[str] | None:
    """The second reader against the first, who is the truth; None where it was not scored."""
    for table in result["tables"]:
        for name, scores in table["methods"].items():
            if table["name"] == "readers" and name != MODEL:
                return [cell(scores.get(f"{metric}/{zone}"), digits) for zone in ZONES]
    return None


def phantoms() -> str:
    """Volumes, second reader and mean shape of the first generated prostates, without training."""
    made = [make_phantom(SEED, index) for index in range(REFERENCE_PHANTOMS)]
    labels, readers = ([p.label.array for p in made], [p.reader2.array for p in made])
    spacing, numbers = made[0].label.spacing, range(1, 1 + len(ZONES))
    volumes = np.mean([[zone_volumes(p.label)[zone] for zone in ZONES] for p in made], axis=0)
    first = labels[: 2 * REFERENCE_PHANTOMS // 3]
    shape = np.mean([np.stack([one == n for n in range(5)]) for one in first], axis=0).argmax(0)
    rest = labels[len(first) :]

    def mean(metric: Any, pairs: Sequence[tuple[ndarray, ndarray]]) -> list[float]:
        scores = [[metric(a == n, b == n) for n in numbers] for a, b in pairs]
        return list(np.nanmean(scores, axis=0))

    def distance(a: ndarray, b: ndarray) -> float:
        return masd(a, b, spacing)

    drawn = list(zip(readers, labels, strict=True))
    shaped = [(shape, one) for one in rest]
    lines = [f"### {len(made)} generated prostates, seed {SEED}, no training", "", header()]
    for title, values, digits in (
        ("volume, mL", list(volumes), 1),
        ("second reader, Dice", mean(dice, drawn), 3),
        ("second reader, MASD in mm", mean(distance, drawn), 2),
        (f"mean shape of {len(first)} on the other {len(rest)}, Dice", mean(dice, shaped), 2),
        ("the same, MASD in mm", mean(distance, shaped), 2),
    ):
        lines.append(row(title, [f"{value:.{digits}f}" for value in values]))
    return "\n".join(lines) + "\n"


class Gland(NamedTuple):
    """One real gland: its zones within a margin, voxel size and middle."""

    label: ndarray
    spacing: tuple[float, float, float]
    center: tuple[float, ...]


AREAS = ("Dice PZ", "Dice TZ", "Dice gland", "MASD PZ", "MASD TZ", "MASD gland")


def real_masks(folder: Path) -> str:
    """Agreement of two readers on public masks, and what shape alone reaches there."""
    names = sorted(path.name for path in (folder / READERS[0]).iterdir())
    both = [[reorient_lps(read_volume(folder / r / name)) for r in READERS] for name in names]
    pairs = [(a, b) for a, b in both if same_grid(a, b)]
    rows = {"second reader": [agreement(*pair) for pair in pairs]}
    glands = [gland_of(first) for first, _ in pairs]
    rows |= shapes_alone(glands)
    lines = [f"### {len(pairs)} public masks [95 % interval]", "", header(AREAS)]
    for title, scores in rows.items():
        found = [asdict(estimate) for estimate in mean_intervals(np.array(scores))]
        digits = [METRICS[area.split()[0].lower()][1] for area in AREAS]
        lines.append(row(title, [cell(f, d) for f, d in zip(found, digits, strict=True)]))
    return "\n".join(lines) + "\n"


def agreement(first: Volume, second: Volume) -> list[float]:
    """One reader against another."""
    found = evaluate_case(first, second, "pz_tz", "pz_tz")
    return [found[f"{metric}/{area}"] for metric in METRICS for area in ("pz", "tz", "gland")]


def gland_of(zones: Volume) -> Gland:
    """A gland with its surroundings."""
    margin = [int(np.ceil(MARGIN_MM / step)) for step in zones.spacing]
    box = bounding_box(zones.array > 0, margin)
    assert box is not None
    label = zones.array[box]
    return Gland(label, zones.spacing, ndimage.center_of_mass(label > 0))


def shapes_alone(glands: Sequence[Gland]) -> dict[str, list[list[float]]]:
    """Every gland from the shapes of all others."""
    shapes = [MeanShape.fit_labels([g.label], [g.spacing], [g.center]).frequencies for g in glands]
    boxes = [BoxAtlas.fit_labels([g.label]).frequencies for g in glands]
    all_shapes, all_boxes = np.sum(shapes, axis=0), np.sum(boxes, axis=0)
    others = len(glands) - 1
    rows: dict[str, list[list[float]]] = {}
    for n, one in enumerate(glands):
        shape = MeanShape((all_shapes - shapes[n]) / others, MEAN_SHAPE_SPACING)
        atlas = BoxAtlas((all_boxes - boxes[n]) / others)
        boxed = atlas.in_box(one.label > 0).argmax(0)
        # the published form of the known gland: what the atlas leaves to background is PZ
        known = np.where(one.label > 0, np.where(boxed == 2, 2, 1), 0)
        mean = shape.on_grid(one.label.shape, one.spacing, one.center).argmax(0)
        for title, found in (
            ("mean shape at the gland's middle", mean),
            ("box atlas in the gland's true box", boxed),
            ("box atlas within the true gland", known),
        ):
            rows.setdefault(title, []).append(overlap(found, one))
    return rows


def overlap(found: ndarray, one: Gland) -> list[float]:
    """Dice and MASD of PZ, TZ and gland."""
    pairs = [(found == n, one.label == n) for n in (1, 2)] + [(found > 0, one.label > 0)]
    return [dice(a, b) for a, b in pairs] + [masd(a, b, one.spacing) for a, b in pairs]


if __name__ == "__main__":
    main()
