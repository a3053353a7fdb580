"""What each part of MCLRec adds on shop, film and clinical histories, beside SASRec and counts.

    python tools/bench/mclrec_experiment.py DATA --out RUNS [--sets beauty,films,codes] [--seeds 1]

DATA holds amazon_beauty_sequences.parquet, ml_latest_small_ratings.parquet and the folder meds
(Synthea). Trains every arm over the same prepared data and prints the tables of
``docs/results/mclrec.md``. Finished runs are kept, interrupted ones go on: the same command can be
given again.

Sized for an hour of one core, so that much is cut: whole sequences instead of prefixes, one layer,
12 to 30 epochs in place of 100, sampled negatives on Beauty, one seed but for Synthea, no bilevel
schedule on Beauty. It compares arms with each other, not with published figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych import verbs
from diptych.compare import Pair, compare
from diptych.config import load
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.pipeline import PIPELINE

MODEL, BETA = PIPELINE.name, 0.05
COUNTS = ["popularity", "recency", "frequency", "markov1", "itemknn", "blend"]


@dataclass(frozen=True)
class DataSet:
    """One of the data sets.

    Args:
        source: Below DATA.
        title: For the table.
        recipe: The recipe of all its arms.
        values: What its arms have beside the recipe.
        seeds: How many seeds fit into the time.
        metrics: Columns of the table.
        table: Of the results; "" is the headline.
        without: Arms for which there is no time.
    """

    source: str
    title: str
    recipe: str
    values: tuple[str, ...]
    seeds: int
    metrics: tuple[str, ...]
    table: str = ""
    without: tuple[str, ...] = ()


SETS = {
    "beauty": DataSet(
        "amazon_beauty_sequences.parquet",
        "Amazon Beauty, leave-one-out",
        "fast",
        (
            "train.epochs=12",
            "train.bucket=true",
            "optim.lr=2e-3",
            "optim.augmenter_lr=2e-3",
            "objective.loss=sampled",
            "objective.negatives=512",
        ),
        1,
        ("hr@10", "ndcg@10", "ndcg@10_kept", "ndcg@10_masked"),
        without=("bilevel", "random_views_too"),
    ),
    "films": DataSet(
        "ml_latest_small_ratings.parquet",
        "MovieLens latest-small, leave-one-out",
        "fast",
        ("train.epochs=20", "train.batch=64", "optim.lr=2e-3", "optim.augmenter_lr=2e-3"),
        1,
        ("hr@10", "ndcg@10", "ndcg@10_kept", "ndcg@10_masked"),
        without=("random_views_too",),
    ),
    "codes": DataSet(
        "meds",
        "Synthea (MEDS), people held out, all steps",
        "clinical",
        (),
        2,
        ("recall@10", "ndcg@10", "recall@10_repeat", "recall@10_novel"),
        table="all steps",
    ),
}
# Arm -> what differs from the full model. The first one carries the counts.
ARMS: dict[str, list[str]] = {
    "full": [f"evaluate.baselines=[{', '.join(COUNTS)}]"],
    "no_contrast": ["objective.kind=sasrec"],
    "official": ["objective.schedule=official"],
    "bilevel": ["objective.schedule=bilevel"],
    "no_regulariser": ["objective.gamma=0"],
    "no_learnt_views": ["objective.beta=0", f"objective.lambda_={BETA}"],
    "random_views_too": [f"objective.lambda_={BETA}"],
}
TITLES = {
    "full": "MCLRec, two_stage",
    "no_contrast": "SASRec: the same without contrast",
    "official": "MCLRec, official (two encoder steps a batch)",
    "bilevel": "MCLRec, bilevel",
    "no_regulariser": "MCLRec without R",
    "no_learnt_views": "random views alone (no L_cl2, L_cl1 in its place)",
    "random_views_too": "MCLRec with L_cl1 too",
    "blend": "MCLRec mixed with the Markov table",
    "markov1": "Markov table",
    "itemknn": "item neighbours",
    "frequency": "own frequent items",
    "recency": "own last items",
    "popularity": "popularity",
}


def main() -> None:
    """Prepare each data set once, train every arm, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, help="seeds of every set; default: as time allows")
    parser.add_argument("--parallel", type=int, default=2, help="fits side by side")
    parser.add_argument("--quick", action="store_true", help="two epochs: does everything run?")
    options = parser.parse_args()
    for name in options.sets.split(","):
        chosen = SETS[name]
        prepared = prepare(options.data / chosen.source, options.out / name / "prepared", chosen)
        arms = [arm for arm in options.arms.split(",") if arm not in chosen.without]
        arms = ["full", *(arm for arm in arms if arm != "full")]
        runs = {arm: train(prepared, options, name, arm) for arm in arms}
        print(table(chosen, runs), flush=True)


def prepare(source: Path, out: Path, chosen: DataSet) -> Path:
    """The prepared folder of a data set."""
    if not (out / "config.yaml").is_file():
        verbs.prepare(PIPELINE, source, out, resolved(chosen, []))
    return out


def resolved(chosen: DataSet, values: list[str]) -> MCLRecConfig:
    """The recipe with values of the data set and of an arm; later ones win."""
    common = ["run.threads=1", "run.device=cpu", f"objective.beta={BETA}"]
    return load(MCLRecConfig, recipe=chosen.recipe, sets=[*common, *chosen.values, *values])


def train(prepared: Path, options: argparse.Namespace, name: str, arm: str) -> Path:
    """One arm with all seeds; returns its run folder."""
    run: Path = options.out / name / arm
    if (run / "evaluation" / "results.json").is_file():
        return run
    seeds = list(range(1, (options.seeds or SETS[name].seeds) + 1))
    values = ["evaluate.baselines=[]", *ARMS[arm], f"run.seeds={seeds}"]
    values += [f"run.parallel_fits={options.parallel}"]
    values += ["train.epochs=2"] if options.quick else []
    config = resolved(SETS[name], values)
    return verbs.train(PIPELINE, prepared, run, config, resume=(run / "run.json").is_file())


def table(chosen: DataSet, runs: Mapping[str, Path]) -> str:
    """Every row with its intervals, and the difference of the full model to it."""
    results = {
        arm: json.loads((run / "evaluation" / "results.json").read_text())
        for arm, run in runs.items()
    }
    tables = {arm: table_of(result, chosen.table) for arm, result in results.items()}
    full = results["full"]
    scores = {arm: found["methods"][MODEL] for arm, found in tables.items()}
    counts = tables["full"]["methods"]
    scores |= {name: counts[name] for name in TITLES if name in counts}
    metrics = [metric for metric in chosen.metrics if metric in scores["full"]]
    main_metric = metrics[0] if metrics[0] == "recall@10" else "ndcg@10"
    differences = {d["b"]: d for d in tables["full"]["differences"] if d["metric"] == main_metric}
    others = [run for arm, run in runs.items() if arm != "full"]
    if others:
        for pair in compare([runs["full"], *others], PIPELINE.metrics).pairs:
            if pair.table == chosen.table and pair.metric == main_metric:
                differences[Path(pair.run).name] = reversed_pair(pair)
    subjects, seeds = full["n_subjects"], len(full["seeds"])
    lines = [
        f"### {chosen.title}: {subjects} subjects, {seeds} seed{'s' if seeds > 1 else ''}",
        "",
        f"| method | {' | '.join(metrics)} | full minus this, {main_metric} [interval] | p |",
        "|---" * (len(metrics) + 3) + "|",
    ]
    for name, title in TITLES.items():
        if name in scores:
            cells = [cell(scores[name].get(metric)) for metric in metrics]
            lines.append(f"| {title} | {' | '.join(cells)} | {difference(differences.get(name))} |")
    notes = [note for note in full["notes"] if "=" not in note.split(" ")[0]]
    return "\n".join([*lines, "", *notes]) + "\n\n" + best_epochs(runs) + "\n"


def table_of(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of the results by its name."""
    if not name:
        return result
    found: Mapping[str, Any] = next(
        one for one in result["tables"] if one["name"] == name and not one["condition"]
    )
    return found


def reversed_pair(pair: Pair) -> dict[str, float | None]:
    """Full model minus the arm, where the comparison has arm minus full model."""
    d = pair.difference
    value, low, high = (None if one is None else -one for one in (d.value, d.high, d.low))
    return {"value": value, "low": low, "high": high, "p": d.p}


def cell(score: Mapping[str, Any] | None) -> str:
    """A value and its interval."""
    if score is None or score["value"] is None:
        return "-"
    if score["low"] is None:
        return f"{score['value']:.4f}"
    return f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"


def difference(pair: Mapping[str, Any] | None) -> str:
    """A paired difference and its p value as two cells."""
    if pair is None or pair["value"] is None:
        return " | "
    p = "" if pair["p"] is None else f"{pair['p']:.3f}"
    if pair["low"] is None:
        return f"{pair['value']:+.4f} | {p}"
    return f"{pair['value']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}] | {p}"


def best_epochs(runs: Mapping[str, Path]) -> str:
    """Which epoch each fit stopped at."""
    found = []
    for arm, run in runs.items():
        for file in sorted(run.glob("fits/**/fit.json")):
            result = json.loads(file.read_text())["result"]
            found.append(f"{arm}/{file.parent.relative_to(run / 'fits')} {result['best_epoch']}")
    return f"Best epochs: {', '.join(found)}."


if __name__ == "__main__":
    main()
