import numpy as np
import polars as pl
import pytest
import torch

from diptych.config import RunSection
from diptych.contract import Fit, FitResult
from diptych.loop import Settings, fit
from diptych.prepared import Prepared
from diptych.randomness import Draw, seed_globals
from diptych.split import Split
from diptych_mvcnet.align import align_test
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.model import MVCNet
from diptych_mvcnet.networks import IFNet
from diptych_mvcnet.task import (
    MODEL,
    aligned_test_trials,
    build,
    decode,
    epochs_of,
    modules,
    optimizer,
)

torch.set_num_threads(1)
NAMES = ["C3", "C1", "Cz", "C2", "C4"]
SMALL = {
    "model": {"cnn": {"filters": 8}, "transformer": {"embed_dim": 8}, "projector": {"rank": 4}},
    "train": {"epochs": 3, "batch": 16},
}


def config_of(**sections):
    return MVCNetConfig.model_validate({**SMALL, **sections})


def prepared_of(subjects=2, trials=24, seed=0, **columns):
    """Trials whose 12 Hz power is on the left or on the right, per person at another amplitude."""
    rng = np.random.default_rng(seed)
    n = subjects * trials
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 5, 150))
    time = np.arange(150) / 100
    x[np.arange(n), np.where(y, 0, 4)] += 3 * np.sin(
        2 * np.pi * 12 * time + rng.uniform(0, 6, size=(n, 1))
    )
    index = pl.DataFrame({
        "subject": [f"S-{k // trials}" for k in range(n)],
        "session": ["1"] * n,
        "run": ["1"] * n,
        "trial": np.arange(n) % trials,
        "y": y,
        "label": np.array(["left_hand", "right_hand"])[y],
        **columns,
    })  # fmt: skip
    facts = {
        "ch_names": NAMES,
        "sfreq": 100.0,
        "n_times": 150,
        "classes": ["left_hand", "right_hand"],
        "class_mirror": {"left_hand": "right_hand"},
    }
    scale = np.repeat(10.0 ** np.arange(subjects), trials)[:, None, None]
    return Prepared.from_arrays(index, facts, {"epochs": (scale * x).astype(np.float32)})


LOSO = Split(train=tuple(range(24)), test=tuple(range(24, 48)))


def task_of(config=None, prepared=None, split=LOSO, earlier=None, **fit_values):
    config, prepared = config or config_of(), prepared or prepared_of()
    one = Fit("fold-1", split, 1, **fit_values)
    seed_globals(1, "train", 0)
    return build(config, prepared, one, modules(config, prepared.facts, one), earlier or {})


def train(task, config):
    return fit(task, Settings(config.train, RunSection(), seed=1, better="lower"))


@pytest.mark.parametrize(
    ("method", "kind", "views"),
    [("", MVCNet, 4), ("ifnet", IFNet, 1), ("ifnet_views", IFNet, 4), ("eegnet", None, 1)],
)
def test_each_method_sees_its_views(method, kind, views):
    task = task_of(method=method)
    batch = task.load([3, 5, 11], 0, Draw(1))
    assert [view.shape for view in batch.views] == [(3, 5, 150)] * views
    assert batch.ids.tolist() == [3, 5, 11]
    assert kind is None or isinstance(task.network, kind)


def test_views_are_those_of_aligned_trials():
    batch = task_of().load([4, 7], 0, Draw(1))
    x = prepared_of().array("epochs")[:24].astype(np.float64)
    values, vectors = np.linalg.eigh(np.mean([np.cov(one) for one in x], axis=0))
    shrunk = 0.99 * values + 0.01 * values.mean()
    raw = (vectors / np.sqrt(shrunk) @ vectors.T @ x)[[4, 7]]
    np.testing.assert_allclose(batch.views[0], raw, atol=1e-4)
    np.testing.assert_allclose(batch.views[1], -raw, atol=1e-4)
    np.testing.assert_allclose(batch.views[3], raw[:, [4, 3, 2, 1, 0]], atol=1e-4)
    assert [label.tolist() for label in batch.labels] == [[0, 1], [0, 1], [0, 1], [1, 0]]


def test_views_computed_once_are_those_computed_for_the_batch(monkeypatch):
    kept = task_of().load([4, 7], 0, Draw(1))
    monkeypatch.setattr("diptych_mvcnet.task.KEPT_BYTES", 0)
    fresh = task_of().load([4, 7], 0, Draw(1))
    for one, other in zip(kept.views, fresh.views, strict=True):
        assert one.allclose(other, atol=1e-5)


def test_random_views_change_with_the_epoch():
    task = task_of(config_of(views={"use": ["freq_shift"], "freq_shift": {"random": True}}))
    first, again, later = (task.load([4], e, Draw(1).at(e)).views[1] for e in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(later)


def test_a_batch_holds_every_trial_once_and_its_order_is_keyed():
    task = task_of()
    batches = task.batches(2, Draw(1).at(2))
    assert [len(batch) for batch in batches] == [16, 8]
    assert sorted(row for batch in batches for row in batch) == list(range(24))
    assert batches == task.batches(2, Draw(1).at(2)) != task.batches(3, Draw(1).at(3))


@pytest.mark.parametrize(
    ("kind", "drop_last", "train_rows", "sizes"),
    [
        ("within_cv", "auto", 24, [16, 8]),
        ("loso", "auto", 24, [16]),
        ("loso", False, 24, [16, 8]),
        ("within_cv", True, 24, [16]),
        ("loso", "auto", 9, [9]),
        ("within_cv", "auto", 17, [16]),
    ],
)
def test_a_smaller_last_batch_is_kept_or_dropped(kind, drop_last, train_rows, sizes):
    config = config_of(split={"kind": kind}, train={"batch": 16, "drop_last": drop_last})
    task = task_of(config, split=Split(train=tuple(range(train_rows))))
    assert [len(batch) for batch in task.batches(0, Draw(1))] == sizes
    said = any("one trial" in note for note in task.artifacts()["training"]["notes"])
    assert said == (train_rows == 17)


def test_training_learns_and_validation_scores_it():
    config = config_of(train={"epochs": 20, "batch": 16}, optim={"lr": 0.005})
    split = Split(train=tuple(range(18)), validation=tuple(range(18, 24)), disjoint_by="item")
    task = task_of(config, split=split)
    result = train(task, config)
    assert result.best_metric < 0.4  # chance is log 2
    references = result.artifacts["alignment"]
    test = align_test(
        prepared_of().array("epochs")[24:], "S-1", "1", references,
        config_of(align={"test": "online"}),
    )  # fmt: skip
    logits = decode(task.modules[MODEL], torch.from_numpy(test))
    assert float((logits.argmax(1) == torch.arange(24) % 2).float().mean()) > 0.9


def test_equal_seeds_give_equal_weights():
    config = config_of()
    first, second = (task_of(config) for _ in range(2))
    train(first, config), train(second, config)
    for one, other in zip(
        first.network.state_dict().values(), second.network.state_dict().values(), strict=True
    ):
        assert one.equal(other)


def test_test_labels_and_test_trials_never_reach_training():
    prepared = prepared_of()
    other = Prepared.from_arrays(
        prepared.index.with_columns(y=pl.when(pl.col("subject") == "S-1").then(0).otherwise("y")),
        prepared.facts,
        {"epochs": np.concatenate([prepared.array("epochs")[:24], np.ones((24, 5, 150), "f4")])},
    )
    config = config_of(train={"epochs": 1, "batch": 16})
    tasks = [task_of(config, one) for one in (prepared, other)]
    for task in tasks:
        train(task, config)
    weights = [task.network.state_dict().values() for task in tasks]
    assert all(one.equal(two) for one, two in zip(*weights, strict=True))


def test_test_trials_are_aligned_session_by_session_in_their_order():
    prepared, config = prepared_of(), config_of(align={"test": "block", "shrinkage": 0.0})
    references = task_of().artifacts()["alignment"]
    index = prepared.index.with_row_index("row")[[*range(30, 40), *range(5)]]
    trials = aligned_test_trials(prepared.array("epochs"), index, references, config)
    for part in (slice(0, 10), slice(10, 15)):
        cov = np.mean([np.cov(one) for one in trials.x[part].double().numpy()], axis=0)
        np.testing.assert_allclose(cov, np.eye(5), atol=1e-4)
    assert trials.y.tolist() == index["y"].to_list()


def test_the_reflection_is_left_out_for_lesions_and_the_run_says_why():
    prepared = prepared_of(lesion_side=["left"] * 24 + [None] * 24)
    with_lesion = task_of(prepared=prepared).artifacts()["training"]
    assert with_lesion["views"] == ["flip", "freq_shift"]
    assert "keep_with_lesion" in with_lesion["notes"][0]
    healthy = task_of(prepared=prepared, split=Split(train=tuple(range(24, 48))))
    assert healthy.artifacts()["training"]["views"] == ["flip", "freq_shift", "reflect"]


def result(best):
    return FitResult(best, 60, None)


EARLIER = {
    "seed-1/S-a/fold-1/inner": result(10),
    "seed-1/S-a/fold-2/inner": result(20),
    "seed-1/S-b/fold-1/inner": result(50),
    "seed-1/S-b/fold-1/ifnet/inner": result(2),
    "seed-1/S-b/fold-1/braindecode-EEGNet/inner": result(3),
}


@pytest.mark.parametrize(
    ("name", "method", "epochs"),
    [
        ("seed-1/S-a/fold-2", "", 20),
        ("seed-1/S-b/fold-1/ifnet", "ifnet", 2),
        ("seed-1/S-a/fold-2/inner", "", 60),
        ("final", "", 20),
        ("final-S-a", "", 15),
        ("final/ifnet", "ifnet", 2),
        ("final/braindecode-EEGNet", "braindecode:EEGNet", 3),
    ],
)
def test_inner_validation_chooses_the_number_of_epochs(name, method, epochs):
    config = MVCNetConfig.model_validate({"train": {"inner_validation": True}})
    assert epochs_of(config, Fit(name, LOSO, 1, method=method), EARLIER) == epochs
    assert epochs_of(MVCNetConfig(), Fit(name, LOSO, 1, method=method), EARLIER) == 60


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weight_decay_spares_biases_and_normalisation(name):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    built = optimizer(net, config_of(optim={"name": name, "weight_decay": 0.1, "lr": 0.01}))
    decay = {id(p): g["weight_decay"] for g in built.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in net.parameters()] == [0.1, 0.0, 0.0, 0.0]
    assert type(built).__name__.lower() == name


def test_a_cosine_schedule_ends_at_zero():
    config = config_of(optim={"schedule": "cosine"})
    task = task_of(config)
    train(task, config)
    assert task.optimizers["main"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
