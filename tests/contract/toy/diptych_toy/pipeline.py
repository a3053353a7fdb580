"""Two Gaussian classes in the plane, a linear model: every arrow of the contract, no more."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diptych.config import EvaluateSection, OptimSection, PipelineConfig, SplitSection, TrainSection
from diptych.contract import Evaluation, Exportable, Fit, Metric, Picture, Pipeline
from diptych.errors import DataError
from diptych.findings import Finding, Findings
from diptych.split import Split, as_rows

COLUMNS = ["subject", "label", "x0", "x1"]


class ToyConfig(PipelineConfig):
    """The toy's configuration: what differs from the common sections."""

    optim: OptimSection = OptimSection(lr=0.05)
    train: TrainSection = TrainSection(epochs=6, batch=32, metric="loss_validation")
    split: SplitSection = SplitSection(folds=3)
    evaluate: EvaluateSection = EvaluateSection(baselines=("majority",))


def table(path: Path, label: bool = True) -> Any:
    import polars as pl

    file = path / "points.csv" if path.is_dir() else path
    frame = pl.read_csv(file, schema_overrides={"subject": pl.String})
    missing = {c for c in COLUMNS if c != "label" or label} - {*frame.columns}
    if missing:
        raise DataError(f"{file.name}: columns {sorted(missing)} are missing: add them")
    return frame


def check(config: Any, data: Path) -> Findings:
    try:
        frame = table(data)
    except (DataError, OSError, Exception) as error:  # polars raises a family of its own
        return Findings((Finding("error", "file.unreadable", data.name, str(error), "mend it"),))
    if frame["subject"].n_unique() < config.split.folds:
        text = f"{frame['subject'].n_unique()} subjects"
        return Findings((Finding("error", "subject.few", data.name, text, "add subjects"),))
    return Findings()


def prepare(config: Any, source: Path, target: Path) -> Any:
    from diptych.manifest import scan
    from diptych.prepared import prepare_parts

    files = scan([source / "points.csv" if source.is_dir() else source])
    facts = {"classes": ["a", "b"]}
    return prepare_parts(target, files, part, version="1", settings={}, facts=lambda _: facts)


def part(source: Any) -> Any:
    from diptych.prepared import Part
    from diptych.privacy import pseudonyms

    frame = table(source.path)
    names = pseudonyms({name: [source.digest] for name in frame["subject"].unique()})
    rows = frame.select("subject", "label").with_columns(frame["subject"].replace(names))
    return Part(rows, {"x": frame.select("x0", "x1").to_numpy().astype("float32")})


def plan(config: Any, prepared: Any) -> list[Fit]:
    subjects = sorted(prepared.index["subject"].unique())
    fold = prepared.index["subject"].replace_strict({s: i for i, s in enumerate(subjects)})
    fold = fold.to_numpy() % config.split.folds
    fits = []
    for seed in config.run.seeds:
        for test in range(config.split.folds):
            validation = (test + 1) % config.split.folds
            parts = (~np.isin(fold, [test, validation]), fold == validation, fold == test)
            rows = Split(*(as_rows(np.flatnonzero(chosen)) for chosen in parts))
            fits.append(Fit(f"seed-{seed}/fold-{test + 1}", rows, seed))
    everything = Split(as_rows(range(len(fold))))
    return [*fits, Fit("final", everything, config.run.seeds[0])]


def modules(config: Any, facts: Any, fit: Fit) -> Any:
    from torch import nn

    return {"net": nn.Sequential(nn.Dropout(0.1), nn.Linear(2, len(facts["classes"])))}


def build(config: Any, prepared: Any, fit: Fit, modules: Any, earlier: Any) -> Any:
    from diptych_toy.task import ToyTask

    return ToyTask(config, prepared, fit, modules, earlier)


def evaluate(config: Any, prepared: Any, trained: Any, method: str = "toy") -> Evaluation:
    import polars as pl
    import torch

    x, labels = torch.tensor(prepared.array("x")), prepared.index["label"].to_numpy()
    rows = []
    for fit in trained.fits:
        test = list(fit.split.test)
        if method == "toy" and test:
            guess = trained.modules(fit.name)["net"](x[test]).argmax(1).numpy()
        else:
            train = list(fit.split.train)
            guess = np.full(len(test), np.bincount(labels[train]).argmax() if train else 0)
        hits = zip(prepared.index[test].iter_rows(named=True), guess == labels[test], strict=True)
        seed = fit.name.split("/")[0]
        rows += [("", "", r["subject"], r["unit"], method, "accuracy", float(h), seed) for r, h in hits]
    names = ["table", "condition", "subject", "unit", "method", "metric", "value", "fit"]
    return Evaluation(rows=pl.DataFrame(rows, schema=names, orient="row"), notes=("alignment=none",))


def predict(config: Any, trained: Any, source: Path, out: Path) -> Findings:
    import torch

    from diptych.files import write_atomically

    frame = table(source, label=False)
    x = torch.tensor(frame.select("x0", "x1").to_numpy(), dtype=torch.float32)
    guess = trained.modules(trained.final)["net"](x).argmax(1).numpy()
    write_atomically(out, frame.with_columns(label=guess).write_csv)
    return Findings()


def pictures(config: Any, prepared: Any, evaluation: Evaluation) -> list[Picture]:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().scatter(*np.asarray(prepared.array("x")).T, s=4)
    return [Picture("points", "Points", "All prepared points.", figure)]


def export(config: Any, trained: Any, prepared: Any) -> dict[str, Exportable]:
    import torch

    net = trained.modules(trained.final)["net"]
    axes = {"x": {0: "batch"}}
    return {"net": Exportable(net, {"x": torch.randn(3, 2)}, ("logits",), dynamic_axes=axes)}


def sample(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 2, 240)
    x = generator.normal(size=(240, 2)) + 1.5 * (2 * label[:, None] - 1)
    lines = [f"p{i % 8},{k},{a:.6f},{b:.6f}" for i, (k, (a, b)) in enumerate(zip(label, x, strict=True))]
    (folder / "points.csv").write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")


PIPELINE = Pipeline(
    name="toy", title="Two Gaussian classes in the plane", subject="person", config=ToyConfig,
    metrics={"accuracy": Metric("Accuracy", "%", "higher", headline=True)},
    check=check, prepare=prepare, plan=plan, modules=modules, build=build, evaluate=evaluate,
    baselines={"majority": partial(evaluate, method="majority")}, predict=predict,
    pictures=pictures, export=export, sample=sample,
)  # fmt: skip
