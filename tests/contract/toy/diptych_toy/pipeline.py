"""Two Gaussian classes in the plane, a linear model: every arrow of the contract, no more."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl

from diptych.config import PipelineConfig, TrainSection
from diptych.contract import Evaluation, Exportable, Fit, Metric, Pipeline
from diptych.findings import Finding, Findings
from diptych.manifest import scan
from diptych.prepared import Part, prepare_parts
from diptych.privacy import pseudonyms
from diptych.split import Split, as_rows

COLUMNS = ["subject", "label", "x0", "x1"]
ROW = ["table", "condition", "subject", "unit", "method", "metric", "value", "fit"]


class ToyConfig(PipelineConfig):
    train: TrainSection = TrainSection(epochs=6, batch=32, metric="loss_validation")


def file_in(data: Path) -> Path:
    return data / "points.csv" if data.is_dir() else data


def check(config: Any, data: Path, columns: list[str] = COLUMNS) -> Findings:
    try:
        pl.read_csv(file_in(data), columns=columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        found = Finding("error", "file.table", data.name, str(error), f"give columns {columns}")
        return Findings((found,))
    return Findings()


def prepare(config: Any, source: Path, target: Path) -> Any:
    facts, sources = {"classes": ["a", "b"]}, scan([file_in(source)])
    return prepare_parts(target, sources, part, version="1", settings={}, facts=lambda _: facts)


def part(source: Any) -> Any:
    frame = pl.read_csv(source.path)
    names = pseudonyms({name: [source.digest] for name in frame["subject"].unique()})
    rows = frame.select("subject", "label").with_columns(frame["subject"].replace(names))
    return Part(rows, {"x": frame.select("x0", "x1").to_numpy().astype("float32")})


def plan(config: Any, prepared: Any) -> list[Fit]:
    _, subject = np.unique(prepared.index["subject"], return_inverse=True)
    fold, fits = subject % config.split.folds, []
    for seed in config.run.seeds:
        for test in range(config.split.folds):
            chosen = fold == (test + 1) % config.split.folds
            parts = (~chosen & (fold != test), chosen, fold == test)
            rows = Split(*(as_rows(np.flatnonzero(part)) for part in parts))
            fits.append(Fit(f"seed-{seed}/fold-{test + 1}", rows, seed))
    return [*fits, Fit("final", Split(as_rows(range(len(fold)))), config.run.seeds[0])]


def modules(config: Any, facts: Any, fit: Fit) -> Any:
    from torch import nn

    return {"net": nn.Linear(2, len(facts["classes"]))}


def build(config: Any, prepared: Any, fit: Fit, modules: Any, earlier: Any) -> Any:
    import torch

    net, size = modules["net"], config.train.batch
    x, y = torch.tensor(prepared.array("x")), torch.tensor(prepared.index["label"].to_numpy())

    def batches(epoch: int, draw: Any) -> Any:
        order = draw.permutation(fit.split.train)
        return [order[i : i + size] for i in range(0, len(order), size)]

    def load(items: Any, epoch: int, draw: Any) -> Any:
        noise = torch.from_numpy(draw.of("noise").normal(items, 2)).float()
        return x[list(items)] + 0.1 * noise, y[list(items)]

    def loss(points: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(net(points), labels)

    def train_step(batch: Any, ctx: Any) -> Any:
        value = loss(*batch)
        ctx.backward(value)
        ctx.step("net")
        return {"loss": value}

    def validate(ctx: Any) -> Any:
        rows = list(fit.split.validation)
        return {"loss_validation": float(loss(x[rows], y[rows]))} if rows else {}

    return SimpleNamespace(
        modules=modules, optimizers={"net": torch.optim.Adam(net.parameters(), config.optim.lr)},
        epochs=lambda: config.train.epochs, batches=batches, load=load, train_step=train_step,
        validate=validate,
    )  # fmt: skip


def evaluate(config: Any, prepared: Any, trained: Any, method: str = "toy") -> Evaluation:
    labels, rows = prepared.index["label"].to_numpy(), []
    for fit in trained.fits:
        common = np.bincount(labels[list(fit.split.train)], minlength=2).argmax()
        for row in fit.split.test:
            guess = classify(trained, fit.name, prepared.array("x")[row])
            hit = float((guess if method == "toy" else common) == labels[row])
            who = prepared.index.select("subject", "unit").row(row)
            rows.append(("", "", *who, method, "accuracy", hit, f"seed-{fit.seed}"))
    return Evaluation(rows=pl.DataFrame(rows, schema=ROW, orient="row"))


def classify(trained: Any, fit: str, points: Any) -> Any:
    import torch

    return trained.modules(fit)["net"](torch.tensor(points)).argmax(-1).numpy()


def predict(config: Any, trained: Any, source: Path, out: Path) -> Findings:
    findings = check(config, source, ["x0", "x1"])
    if not findings.errors:
        frame = pl.read_csv(file_in(source))
        points = frame["x0", "x1"].to_numpy().astype("float32")
        frame.with_columns(label=classify(trained, trained.final, points)).write_csv(out)
    return findings


def export(config: Any, trained: Any, prepared: Any) -> dict[str, Exportable]:
    import torch

    net, example = trained.modules(trained.final)["net"], {"x": torch.randn(3, 2)}
    return {"net": Exportable(net, example, ("logits",), dynamic_axes={"x": {0: "batch"}})}


def sample(folder: Path, seed: int) -> None:
    label = np.arange(240) % 2
    x = np.random.default_rng(seed).normal(size=(240, 2)) + 1.5 * (2 * label[:, None] - 1)
    columns = [[f"p{i // 30}" for i in range(240)], label, *x.T]
    pl.DataFrame(dict(zip(COLUMNS, columns, strict=True))).write_csv(folder / "points.csv")


PIPELINE = Pipeline(
    name="toy", title="Two Gaussian classes in the plane", subject="person", config=ToyConfig,
    metrics={"accuracy": Metric("Accuracy", "%", "higher", headline=True)}, check=check,
    prepare=prepare, plan=plan, modules=modules, build=build, evaluate=evaluate, predict=predict,
    baselines={"majority": partial(evaluate, method="majority")}, export=export, sample=sample,
)  # fmt: skip
