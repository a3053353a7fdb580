"""A run folder as a finished training leaves it: ten subjects, four methods."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib import pyplot

from diptych.contract import Evaluation, Metric, Picture
from diptych.evaluate import Setting, write
from diptych.findings import Finding, Findings
from diptych.report import save_pictures

mpl.use("Agg")

SUBJECTS = [f"S-{17 * k + 0x3A91C0:08x}" for k in range(10)]
METHODS = {"": 0.74, "csp_lda": 0.69, "tangent_lr": 0.72, "majority": 0.50}
METRICS = {
    "accuracy": Metric("Accuracy", "%", "higher", headline=True),
    "kappa": Metric("Cohen's kappa", "", "higher"),
    "auc": Metric("ROC AUC", "", "higher", headline=True),
    "nll": Metric("Log-likelihood loss", "nat", "lower"),
    "itr": Metric("Transfer rate", "bit/min", "higher"),
}
PIPELINE = SimpleNamespace(
    name="mvcnet", title="Motor-imagery EEG decoding", subject="participant", metrics=METRICS
)
LOSSES = {"loss": 3.1, "loss_ce": 2.6, "loss_cvc": 0.9}


def rows(seed: int, shift: float = 0.0) -> pl.DataFrame:
    """Scores with subjects that differ much more than the methods."""
    rng = np.random.default_rng(seed)
    easy = np.random.default_rng(7).normal(0, 0.09, len(SUBJECTS))
    entries: list[tuple[Any, ...]] = []
    for condition, loss in (("", 0.0), ("noise 10 uV", 0.05), ("noise 20 uV", 0.12)):
        for method, level in METHODS.items():
            for fit in ("seed-1", "seed-2"):
                for subject, skill in zip(SUBJECTS, easy, strict=True):
                    if method == "majority":
                        accuracy = 0.5
                    else:
                        accuracy = level + skill - loss + rng.normal(0, 0.025)
                        accuracy += shift if method == "" else 0.0
                    accuracy = float(np.clip(accuracy, 0, 1))
                    values = {
                        "accuracy": accuracy,
                        "kappa": 2 * accuracy - 1,
                        "auc": None if method == "majority" else min(1.0, accuracy + 0.06),
                        "nll": 1.3 - accuracy,
                        "itr": 20 * max(0.0, accuracy - 0.5) ** 2,
                    }
                    entries += [
                        ("", condition, subject, "all trials", method, metric, value, fit)
                        for metric, value in values.items()
                    ]
    columns = ["table", "condition", "subject", "unit", "method", "metric", "value", "fit"]
    return pl.DataFrame(entries, schema=columns, orient="row")


def pictures() -> list[Picture]:
    """One figure of lines, one that holds an image."""
    lines, axes = pyplot.subplots(figsize=(8, 3.2))
    for place, subject in enumerate(SUBJECTS):
        axes.plot([0.6 + 0.02 * place], [place], "o", color="#2f6bb3")
        axes.text(0.5, place, subject, va="center", fontsize=8)
    axes.set_xlabel("accuracy")
    image, axes = pyplot.subplots(figsize=(4, 3.4))
    axes.imshow([[31, 14], [12, 33]], cmap="Blues")
    axes.set_xlabel("predicted")
    return [
        Picture("subjects", "Accuracy of each participant", "Dots: participants.", lines),
        Picture("confusion", "Confusion", "Rows: true class, columns: predicted class.", image),
    ]


def write_fits(run: Path) -> None:
    """``split.json`` and the fits' small files: leave one subject out, two seeds, one network."""
    splits, fits = {}, []
    for fold in range(10):
        test = list(range(45 * fold, 45 * fold + 45))
        train = [row for row in range(450) if row not in test]
        splits[f"{fold:016x}"] = {
            **{"disjoint_by": "subject", "train": train, "validation": [], "test": test}
        }
    for seed in (1, 2):
        for fold in range(10):
            for method in ("", "ifnet"):
                name = f"seed-{seed}/fold-{fold}" + (f"/{method}" if method else "")
                fits.append({"name": name, "split": f"{fold:016x}", "seed": seed, "stage": "train"})
                fits[-1] |= {"method": method, "overrides": {}, "starts_from": None, "carries": []}
                folder = run / "fits" / name
                folder.mkdir(parents=True)
                facts = {"classes": ["left_hand", "right_hand"], "sfreq": 100.0, "channels": 21}
                (folder / "fit.json").write_text(json.dumps({"facts": facts, "result": {}}))
                rng = np.random.default_rng(100 * seed + fold)
                lines = ["epoch,step," + ",".join(LOSSES)]
                for epoch in range(12):
                    decay = np.exp(-epoch / 4) + 0.25 + rng.normal(0, 0.03)
                    values = [f"{start * decay:.5f}" for start in LOSSES.values()]
                    if method:
                        values[2] = ""
                    lines.append(",".join([str(epoch), str(7 * epoch + 7), *values]))
                (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "split.json").write_text(json.dumps({"splits": splits, "fits": fits}))


CONFIG = """data: {window: [0.5, 3.5], manifest: /home/jane/eeg/files.csv}
objective: {lambda_cvc: 0.1, lambda_cmc: 0.1}
split: {kind: loso, allow_leakage: false, transductive: false}
train: {epochs: 12, batch: 64}
run: {seeds: [1, 2]}
"""


def write_run(run: Path, seed: int = 0, *, config: str = CONFIG, shift: float = 0.0) -> Path:
    """Write a whole run folder, without checkpoints."""
    run.mkdir(parents=True)
    write_fits(run)
    (run / "config.yaml").write_text(config)
    (run / "run.json").write_text('{"format": 1, "pipeline": "mvcnet", "version": "0.1.0"}')
    sources = [{"size": 812_345, "sha256": f"{k:064x}", "rows": 45} for k in range(10)]
    manifest = {"version": "1", "settings": "x", "digest": "8f3c0d5e11aa27b4", "sources": sources}
    (run / "manifest.json").write_text(json.dumps(manifest))
    command = "diptych mvcnet train DATA --out RUN --recipe loso"
    environment = {
        **{"command": command, "python": "3.11.9", "system": "Linux", "threads": 2},
        "packages": {"diptych": "0.1.0", "torch": "2.13.0"},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    found = [
        Finding("warning", "channel.flat", f"file {k:012x}", "Oz below 0.1 uV", "interpolate it")
        for k in range(5)
    ]
    found.append(Finding("note", "sfreq.differs", "2 files", "160 Hz", "resampled to 100 Hz"))
    (run / "findings.json").write_text(json.dumps(Findings(tuple(found)).to_json()))
    worst = pl.DataFrame(
        {"subject": SUBJECTS[:3], "trial": [12, 3, 40], "true": ["left_hand"] * 3, "p": [0.01] * 3}
    )
    evaluation = Evaluation(
        rows=rows(seed, shift),
        files={"worst": worst},
        notes=(
            "One standard error of the mean over participants is about 0.03.",
            *("alignment=online", "chance_bound=0.644", "transductive=no"),
        ),
    )
    setting = Setting(METRICS, "mvcnet", "loso", "participant", [1, 2])
    write(evaluation, run / "evaluation", setting)
    save_pictures(pictures(), run / "evaluation" / "pictures")
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that tests copy; never to be changed itself."""
    return write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def make_run(tmp_path: Path, finished_run: Path) -> Callable[..., Path]:
    """Write a run folder below the test's own folder: ``make_run("a", seed=1)``."""

    def make(name: str = "run", *arguments: Any, **keywords: Any) -> Path:
        if arguments or keywords:
            return write_run(tmp_path / name, *arguments, **keywords)
        return Path(shutil.copytree(finished_run, tmp_path / name))

    return make


@pytest.fixture
def pipeline() -> Any:
    """What the report needs of a pipeline."""
    return PIPELINE
