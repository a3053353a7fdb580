"""Where training curves go: always ``metrics.csv``, on wish TensorBoard, MLflow or W&B too."""

from __future__ import annotations

import csv
import importlib
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UsageError
from diptych.files import read_json, write_json, write_text

Values = Mapping[str, float]


@dataclass(frozen=True)
class Tracker:
    """One place for training curves.

    Args:
        log: Takes the epochs done, the steps done and the values of the last epoch.
        close: Ends it, after training or when it is interrupted.
    """

    log: Callable[[int, int, Values], None]
    close: Callable[[], None]


def open_trackers(names: Sequence[str], folder: Path, label: str, epoch: int) -> list[Tracker]:
    """Open the trackers of a fit, or go on with them.

    Args:
        names: The config's ``run.track``; "csv" is always among them.
        folder: Folder of the fit; run names of the services are kept in ``track.json``.
        label: Name of the fit for the services.
        epoch: Epochs done; rows after it belong to a part that is trained again.

    Returns:
        One tracker a name.

    Raises:
        UsageError: A package is not installed, or its service cannot be started.
    """
    openers = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
    others = [name for name in dict.fromkeys(names) if name != "csv"]
    modules = {name: _imported(name) for name in others}
    trackers = [_csv(folder / "metrics.csv", epoch)]
    for name in others:
        try:
            opened = openers[name](modules[name], folder, label, epoch)
        except Exception as error:
            raise UsageError(
                f"run.track: {name} cannot be started: {error}: see its own settings, or take it "
                "out of run.track"
            ) from error
        trackers.append(_tolerant(opened, name))
    return trackers


def _tolerant(tracker: Tracker, name: str) -> Tracker:
    """A service that fails on the way must not end a training: the table has all values."""

    def log(epoch: int, step: int, values: Values) -> None:
        try:
            tracker.log(epoch, step, values)
        except Exception as error:
            warnings.warn(
                f"run.track: {name}: epoch {epoch} is in metrics.csv alone: {error}", stacklevel=2
            )

    return Tracker(log, tracker.close)


def _csv(path: Path, epoch: int) -> Tracker:
    """A table with one row an epoch, written whole each time: it is never half a row long."""
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if _number(row.get("epoch")) <= epoch]

    def write() -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

    def log(epoch: int, step: int, values: Values) -> None:
        rows.append({"epoch": str(epoch), "step": str(step)})
        rows[-1] |= {n: repr(float(v)) if math.isfinite(v) else "" for n, v in values.items()}
        write()

    if rows:
        write()
    else:
        path.unlink(missing_ok=True)
    return Tracker(log, lambda: None)


def _tensorboard(module: Any, folder: Path, label: str, epoch: int) -> Tracker:
    writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def log(epoch: int, step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, global_step=epoch)
        writer.flush()

    return Tracker(log, writer.close)


def _mlflow(module: Any, folder: Path, label: str, epoch: int) -> Tracker:
    """A run on the server that MLflow's own environment variables name."""
    client = module.MlflowClient()
    known = _known(folder).get("mlflow")
    if known is None:
        experiment = client.get_experiment_by_name("diptych")
        number = experiment.experiment_id if experiment else client.create_experiment("diptych")
        known = client.create_run(number, run_name=label).info.run_id
        _remember(folder, "mlflow", known)
    else:
        client.update_run(known, status="RUNNING")

    def log(epoch: int, step: int, values: Values) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                client.log_metric(known, name, value, step=epoch)

    return Tracker(log, lambda: client.set_terminated(known))


def _wandb(module: Any, folder: Path, label: str, epoch: int) -> Tracker:
    """A run of the account that wandb's own environment variables or login name."""
    known = _known(folder).get("wandb") or module.util.generate_id()
    _remember(folder, "wandb", known)
    run = module.init(
        project="diptych", name=label, id=known, resume="allow", dir=str(folder), reinit=True
    )

    def log(epoch: int, step: int, values: Values) -> None:
        run.log(dict(values), step=epoch)

    return Tracker(log, run.finish)


def _imported(name: str) -> Any:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"run.track: {name} is not installed ({error}): pip install 'diptych[{name}]', or "
            "take it out of run.track"
        ) from error


def _known(folder: Path) -> dict[str, str]:
    file = folder / "track.json"
    stored: dict[str, str] = read_json(file) if file.is_file() else {}
    return stored


def _remember(folder: Path, name: str, run: str) -> None:
    write_json(folder / "track.json", {**_known(folder), name: run})


def _number(text: str | None) -> float:
    try:
        return float(text or "inf")
    except ValueError:
        return math.inf
