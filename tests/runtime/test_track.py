"""Training curves: the table is whole and consistent, the services get the same numbers."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from diptych.errors import UsageError
from diptych.track import open_trackers


def log_all(trackers, *rows):
    for tracker in trackers:
        for epoch, step, values in rows:
            tracker.log(epoch, step, values)
        tracker.close()


def test_the_table_has_a_row_an_epoch_with_exact_numbers_and_empty_cells(tmp_path):
    rows = [(1, 5, {"train/loss": 1 / 3}), (2, 10, {"train/loss": math.nan, "validation/a": 2})]
    log_all(open_trackers(("csv",), tmp_path, "final", 0), *rows)
    assert (tmp_path / "metrics.csv").read_text() == (
        "epoch,step,train/loss,validation/a\n1,5,0.3333333333333333,\n2,10,,2.0\n"
    )


def test_the_table_is_written_even_where_only_others_are_asked_for(tmp_path):
    log_all(open_trackers((), tmp_path, "final", 0), (1, 5, {"a": 1.0}))
    assert (tmp_path / "metrics.csv").is_file()


def test_rows_of_a_part_that_is_trained_again_are_dropped(tmp_path):
    three = [(epoch, 5 * epoch, {"a": float(epoch)}) for epoch in (1, 2, 3)]
    log_all(open_trackers(("csv",), tmp_path, "final", 0), *three)
    log_all(open_trackers(("csv",), tmp_path, "final", 1), (2, 10, {"a": 9.0}))
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,a\n1,5,1.0\n2,10,9.0\n"
    open_trackers(("csv",), tmp_path, "final", 0)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_row_is_never_half_written(tmp_path, monkeypatch):
    (tracker,) = open_trackers(("csv",), tmp_path, "final", 0)
    tracker.log(1, 5, {"a": 1.0})
    before = (tmp_path / "metrics.csv").read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        tracker.log(2, 10, {"a": 2.0})
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]


def test_tensorboard_holds_every_value(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [(1, 5, {"train/loss": 0.5}), (2, 10, {"train/loss": 0.25})]
    log_all(open_trackers(("csv", "tensorboard"), tmp_path, "final", 0), *rows)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert values == [(1, 0.5), (2, 0.25)]


def test_wandb_continues_the_run_it_began(tmp_path, monkeypatch):
    started, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=list)
    module = ModuleType("wandb")
    module.util = SimpleNamespace(generate_id=lambda: f"id{len(started)}")
    module.init = lambda **keywords: started.append(keywords) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    log_all(open_trackers(("wandb",), tmp_path, "fold-1", 0), (1, 5, {"a": 1.0}))
    log_all(open_trackers(("wandb",), tmp_path, "fold-1", 1), (2, 10, {"a": 2.0}))
    assert [keywords["id"] for keywords in started] == ["id0", "id0"]
    assert started[0]["name"] == "fold-1"
    assert logged == [(1, {"a": 1.0}), (2, {"a": 2.0})]


def test_mlflow_continues_the_run_it_began(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    log_all(open_trackers(("mlflow",), tmp_path, "fold-1", 0), (1, 5, {"train/a": 1.0}))
    again = (2, 10, {"train/a": 2.0, "b": math.nan})
    log_all(open_trackers(("mlflow",), tmp_path, "fold-1", 1), again)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("diptych")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "fold-1"
    history = client.get_metric_history(run.info.run_id, "train/a")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0)]


def test_a_service_that_fails_is_named_at_the_start_and_forgiven_on_the_way(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    module = ModuleType("wandb")
    module.util = SimpleNamespace(generate_id=lambda: "id")
    module.init = lambda **_: SimpleNamespace(log=fail, finish=list)
    monkeypatch.setitem(sys.modules, "wandb", module)
    trackers = open_trackers(("wandb",), tmp_path, "final", 0)
    with pytest.warns(UserWarning, match=r"wandb: epoch 1 is in metrics\.csv alone: no route"):
        log_all(trackers, (1, 5, {"a": 1.0}))
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,a\n1,5,1.0\n"
    module.init = fail
    with pytest.raises(UsageError, match="wandb cannot be started: no route"):
        open_trackers(("wandb",), tmp_path, "final", 1)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named_with_the_way_to_get_it(name, tmp_path, monkeypatch):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"run\.track: {name} .*diptych\[{name}\]"):
        open_trackers(("csv", name), tmp_path, "final", 0)
    assert not list(tmp_path.iterdir())
