"""The experiment of pirads on generated prostates: what two paths and co-training each add.

    python tools/bench/pirads_experiment.py --out RUNS [--seeds 1,2,3] [--arms single,dual,...]

Draws the prostates, trains every arm on the same prepared data and prints the tables of
``docs/results/pirads.md``; intervals are over the test prostates. Finished arms are kept,
interrupted ones go on: the same command can be given again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych import verbs
from diptych.compare import Pair, compare
from diptych.config import load
from diptych_pirads.config import PiradsConfig
from diptych_pirads.pipeline import PIPELINE
from diptych_pirads.sample import write_cases

STUDIES = (  # label scheme, part, number of prostates
    ("zones4", "train", 12),
    ("zones4", "validation", 4),
    ("zones4", "test", 24),
    ("pz_tz", "train", 4),
    (None, "train", 12),
)
SEED = 0  # of the prostates
ZONES = ("pz", "tz", "dpu", "afs")
METRICS = {"dice": ("Dice", 3), "masd": ("MASD, mm", 2)}  # title, decimals
COMMON = [
    "data.geometry.spacing=[3.0, 1.5, 1.5]",
    "data.geometry.size=[16, 48, 48]",
    "data.crop.jitter_mm=[3.0, 4.0, 4.0]",
    "train.epochs=16",
    "stages={stage-2: {train.epochs: 10}}",
    "objective.co.per_step=1",
    "predict.passes=1",  # the grid holds the whole image
    "run.threads=1",
    "run.device=cpu",
]
# Arm -> what differs. The first carries the baselines that look at no image.
ARMS: dict[str, list[str]] = {
    "full": ["evaluate.baselines=[mean_shape, box_atlas]"],
    "single": ["model.name=aniso", "train.stages=[stage-1]", "train.epochs=26"],
    "dual": ["objective.co.weight=0"],
    "separate": ["model.share=none"],
    "four_zones": ["objective.partial.weight=0"],
}
TITLES = {
    "mean_shape": "mean shape, no image",
    "box_atlas": "box atlas, no image but the model's gland",
    "single": "single path (AnisoUNet)",
    "dual": "dual path, shared encoder, no co-training",
    "full": "dual path, shared encoder, co-training",
    "separate": "dual path, nothing shared, co-training",
    "four_zones": "as the full model, but four-zone labels alone",
}
MODEL = PIPELINE.name


def main() -> None:
    """Draw and prepare once, train every arm, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--parallel", type=int, default=2, help="fits side by side")
    options = parser.parse_args()
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}: choose among {', '.join(ARMS)}")
    arms = ["full", *(arm for arm in arms if arm != "full")]
    prepared = prepare(options.out)
    runs = {arm: train(prepared, options, arm) for arm in arms}
    print(tables(runs))


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
    """One table a metric, and the differences to the full model."""
    results = {
        arm: json.loads((run / "evaluation" / "results.json").read_text())
        for arm, run in runs.items()
    }
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
    others = [arm for arm in runs if arm != "full"]
    if others:
        pairs = compare([runs["full"], *(runs[arm] for arm in others)], PIPELINE.metrics).pairs
        for metric, (title, digits) in METRICS.items():
            lines += ["", f"### {title}: arm minus full model [interval]", "", header()]
            lines += [row(TITLES[arm], differences(pairs, arm, metric, digits)) for arm in others]
    return "\n".join(lines) + "\n"


def header() -> str:
    """First lines of a table."""
    return row("", [zone.upper() for zone in ZONES]) + "\n" + "|---" * (1 + len(ZONES)) + "|"


def row(title: str, cells: list[str]) -> str:
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


def differences(pairs: tuple[Pair, ...], arm: str, metric: str, digits: int) -> list[str]:
    """What an arm has more than the full model, by zone; p where the metric is tested."""
    found = []
    for zone in ZONES:
        pair = next(
            p
            for p in pairs
            if p.table == "" and p.metric == f"{metric}/{zone}" and Path(p.run).name == arm
        )
        d = pair.difference
        text = cell({"value": d.value, "low": d.low, "high": d.high}, digits, "+")
        found.append(text if d.p is None else f"{text}, p {d.p:.3f}")
    return found


def reader_line(result: Mapping[str, Any], metric: str, digits: int) -> list[str] | None:
    """The second reader against the first, who is the truth; None where it was not scored."""
    for table in result["tables"]:
        for name, scores in table["methods"].items():
            if table["name"] == "readers" and name != MODEL:
                return [cell(scores.get(f"{metric}/{zone}"), digits) for zone in ZONES]
    return None


if __name__ == "__main__":
    main()
