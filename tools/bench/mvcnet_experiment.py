"""The public experiment of mvcnet: what alignment, views and contrast each contribute.

    python tools/bench/mvcnet_experiment.py DATA --out RUNS [--protocols loso,co] [--seeds 1,2,3]

Trains every arm over the same prepared data and prints the tables of ``docs/results/mvcnet.md``.
Finished runs are kept, interrupted ones go on: the same command can be given again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from diptych import verbs
from diptych.compare import compare
from diptych.config import default_recipe, load
from diptych.contract import Config, Fit
from diptych.prepared import Prepared
from diptych.training import is_final
from diptych_mvcnet.pipeline import PIPELINE

PATTERN = "S{subject:03d}R{run:02d}.edf"
CLOSED = ["majority", "logvar_lda", "csp_lda", "tangent_lr", "mdm", "fgmdm"]
BASELINES = [*CLOSED, "ifnet", "ifnet_views"]
# Arm -> what differs from the full model. The first one carries the baselines of its protocol.
ARMS: dict[str, list[str]] = {
    "full": [f"evaluate.baselines=[{', '.join(BASELINES)}]"],
    "cross_view": ["objective.lambda_cmc=0", "evaluate.baselines=[]"],
    "cross_model": ["objective.lambda_cvc=0", "evaluate.baselines=[]"],
}
ROWS = {
    "ifnet": "IFNet alone (cross-entropy, raw trials)",
    "ifnet_views": "+ augmented views, no contrast",
    "cross_view": "+ views and cross-view contrast",
    "cross_model": "+ views and cross-model contrast",
    "full": "MVCNet, full",
    "csp_lda": "CSP + LDA",
    "tangent_lr": "tangent space + logistic regression",
    "fgmdm": "filtered minimum distance to mean",
    "mdm": "minimum distance to mean",
    "logvar_lda": "log band power + LDA",
    "fbcsp_lda": "filter-bank CSP + LDA (4-40 Hz)",
    "majority": "majority class",
}


def main() -> None:
    """Prepare once, train every arm, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--protocols", default="loso,co,cross_run,within_cv")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--parallel", type=int, default=2, help="fits side by side")
    options = parser.parse_args()
    narrow = prepare(options.data, options.out / "prepared", [])
    wide = prepare(options.data, options.out / "prepared-wide", ["data.filter.band=[4, 40]"])
    for protocol in options.protocols.split(","):
        runs = {}
        for arm, values in ARMS.items():
            runs[arm] = train(narrow, options, protocol, arm, [*values, *recipe(protocol)])
        bank = ["data.filter.band=[4, 40]", "evaluate.baselines=[fbcsp_lda]", "train.epochs=0"]
        runs["wide"] = train(wide, options, protocol, "wide", bank)
        print(table(protocol, runs), flush=True)


def recipe(protocol: str) -> list[str]:
    """What the recipe of a protocol sets beside the protocol."""
    return ["train.epochs=12"] if protocol == "loso" else []


def plan(config: Config, prepared: Prepared) -> list[Fit]:
    """The fits of the protocol; the final model, which no table shows, is left out."""
    return [fit for fit in PIPELINE.plan(config, prepared) if not is_final(fit)]


EXPERIMENT = replace(PIPELINE, plan=plan)


def prepare(data: Path, out: Path, values: list[str]) -> Path:
    """The prepared folder of the experiment."""
    if not (out / "manifest.json").is_file():
        verbs.prepare(EXPERIMENT, data, out, resolved(values))
    return out


def train(
    data: Path, options: argparse.Namespace, protocol: str, arm: str, values: list[str]
) -> Path:
    """One arm of one protocol; returns its run folder."""
    run = Path(options.out, protocol, arm)
    if (run / "evaluation" / "results.json").is_file():
        return run
    common = [
        f"split.kind={protocol}",
        f"run.seeds=[{options.seeds}]",
        f"run.parallel_fits={options.parallel}",
        "run.threads=1",
    ]
    config = resolved([*common, *values])
    return verbs.train(EXPERIMENT, data, run, config, resume=(run / "run.json").is_file())


def resolved(values: list[str]) -> Config:
    """The default configuration with values of the experiment."""
    recipe = default_recipe(PIPELINE.config)
    config: Config = load(PIPELINE.config, recipe=recipe, sets=[f"data.pattern={PATTERN}", *values])
    return config


def table(protocol: str, runs: dict[str, Path]) -> str:
    """Accuracy of every row with its interval, and the difference to the full model."""
    results = {
        arm: json.loads((run / "evaluation/results.json").read_text()) for arm, run in runs.items()
    }
    methods = {name: results["full"]["methods"][name] for name in BASELINES}
    methods |= {arm: results[arm]["methods"]["mvcnet"] for arm in ARMS}
    methods["fbcsp_lda"] = results["wide"]["methods"]["fbcsp_lda"]
    pairs = {d["b"]: d for d in results["full"]["differences"] if d["metric"] == "accuracy"}
    found = compare([runs["full"], runs["cross_view"], runs["cross_model"]], PIPELINE.metrics)
    for pair in found.pairs:
        if pair.metric == "accuracy":
            d = pair.difference
            value, low, high = -(d.value or 0), -(d.high or 0), -(d.low or 0)
            pairs[pair.run.split("/")[-1]] = {"value": value, "low": low, "high": high, "p": d.p}
    lines = [
        f"### {protocol}: seeds {results['full']['seeds']}, {results['full']['n_subjects']} people",
        "",
        "| method | accuracy % [95 % interval] | full model minus this [interval] | p |",
        "|---|---|---|---|",
    ]
    for name, title in ROWS.items():
        score = methods[name]["accuracy"]
        cell = f"{percent(score['value'])} [{percent(score['low'])}, {percent(score['high'])}]"
        lines.append(f"| {title} | {cell} | {difference(pairs.get(name))} |")
    return "\n".join(lines) + "\n"


def difference(pair: dict[str, float] | None) -> str:
    """A paired difference and its p value as two cells."""
    if pair is None:
        return " | "
    interval = f"[{percent(pair['low'], '+')}, {percent(pair['high'], '+')}]"
    return f"{percent(pair['value'], '+')} {interval} | {pair['p']:.3f}"


def percent(value: float | None, sign: str = "") -> str:
    """A fraction in per cent with one decimal."""
    return "-" if value is None else f"{100 * value:{sign}.1f}"


if __name__ == "__main__":
    main()
