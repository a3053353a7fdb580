"""A fit sees the studies that its stage allows, in keyed crops, and goes on bit-identically."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pirads.studies import prepared_of

from diptych.config import RunSection, merge
from diptych.contract import Fit
from diptych.errors import DataError, InterruptedRun
from diptych.loop import Settings, fit
from diptych.prepared import Prepared
from diptych.randomness import Draw, seed_globals
from diptych.split import Split
from diptych_pirads.config import PiradsConfig
from diptych_pirads.labels import SCHEMES, UNSEEN
from diptych_pirads.model import AnisoUNet, DualPathNet
from diptych_pirads.optimization import follow, schedules
from diptych_pirads.prepare import PreparedStudy
from diptych_pirads.store import study
from diptych_pirads.task import (
    AVERAGE,
    MODEL,
    PiradsTask,
    build,
    modules,
    rows_of,
    zone_scores,
)

torch.set_num_threads(1)
SCHEMES_OF_ROWS = ["zones4"] * 5 + ["pz_tz"] * 2 + [None] * 3 + ["zones4"]
TRAIN, VALIDATION = tuple(range(10)), (10,)
SIZE = (8, 32, 32)
SMALL: dict[str, Any] = {
    "model.base": 2,
    "train.epochs": 4,
    "train.ema": 0.9,
    "objective.co.per_step": 2,
    "data.geometry.size": list(SIZE),
    "run.device": "cpu",
}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepared_of(SCHEMES_OF_ROWS, SIZE)


def config_of(**changes: Any) -> PiradsConfig:
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return merge(PiradsConfig(), SMALL | values)


def task_of(
    prepared: Prepared,
    stage: str = "stage-1",
    name: str = "dualpath",
    train: Sequence[int] = TRAIN,
    **changes: Any,
) -> PiradsTask:
    config = config_of(model__name=name, **changes)
    split = Split(train=tuple(train), validation=VALIDATION)
    one = Fit("final", split, 1, stage=stage)
    seed_globals(1, stage, 0)
    return build(config, prepared, one, modules(config, prepared.facts, one), {})


def settings(task: PiradsTask) -> Settings:
    return Settings(
        task.config.train, RunSection(device="cpu"), seed=1, stage=task.stage, better="higher"
    )


def kinds(task: PiradsTask, items: Sequence[int]) -> list[int]:
    return [task._kind[item % len(SCHEMES_OF_ROWS)] for item in items]


def test_each_name_has_its_network(prepared: Prepared) -> None:
    assert isinstance(task_of(prepared).network, DualPathNet)
    assert isinstance(task_of(prepared, name="aniso").network, AnisoUNet)
    assert type(task_of(prepared, name="unet").network).__name__ == "UNet"
    without = task_of(prepared, objective__tasks__sdf=0, objective__tasks__reconstruct=0.1).network
    assert isinstance(without, DualPathNet)
    assert without.path_a.sdf is None
    assert without.path_a.presence is not None
    assert without.path_b.reconstruct is not None


def test_partly_labelled_studies_join_late_and_unlabelled_ones_in_stage_two(
    prepared: Prepared,
) -> None:
    task, draw = task_of(prepared), Draw(1)
    for epoch in range(4):
        batches = task.batches(epoch, draw.at(epoch))
        assert len(batches) == 3
        seen = [item for batch in batches for item in batch if kinds(task, [item]) == [0]]
        assert sorted(seen) == [0, 1, 2, 3, 4]
        assert [kinds(task, batch).count(1) for batch in batches] == [int(epoch >= 2)] * 3
        assert all(2 not in kinds(task, batch) for batch in batches)
    second = task_of(prepared, "stage-2").batches(0, draw)
    assert [[kinds(task, batch).count(k) for k in range(3)] for batch in second] == [
        [2, 1, 2],
        [2, 1, 2],
        [1, 1, 2],
    ]
    alone = task_of(prepared, "stage-2", objective__co__unlabelled=False).batches(0, draw)
    assert all(2 not in kinds(task, batch) for batch in alone)
    single = task_of(prepared, "stage-2", name="aniso").batches(0, draw)
    assert all(2 not in kinds(task, batch) for batch in single)


def test_a_study_seen_again_in_an_epoch_gets_another_crop(prepared: Prepared) -> None:
    task = task_of(prepared, "stage-2")
    items = [item for batch in task.batches(0, Draw(1)) for item in batch]
    assert len(set(items)) == len(items) == 14
    height = len(SCHEMES_OF_ROWS)
    again = next(item for item in items if item >= height)
    both = task.load([0, again, again - height], 0, Draw(1))
    assert not torch.allclose(both.image[1], both.image[2])


def test_batches_are_keyed_and_every_process_gets_labelled_crops(prepared: Prepared) -> None:
    task = task_of(prepared, "stage-2", train__batch=4)
    batches = task.batches(1, Draw(1).at(1))
    assert batches == task.batches(1, Draw(1).at(1)) != task.batches(2, Draw(1).at(2))
    first = batches[0]
    assert len(first) == 7
    for share in (first[:4], first[4:]):
        assert kinds(task, share).count(0) == 2


def test_a_crop_depends_on_its_item_alone(prepared: Prepared) -> None:
    task = task_of(prepared, "stage-2")
    together, alone = task.load([8, 3, 5, 1], 1, Draw(1)), task.load([3, 8], 1, Draw(1))
    assert together.counts == (2, 1, 1)
    assert alone.counts == (1, 0, 1)
    assert alone.image.shape == (2, 1, *SIZE)
    assert torch.allclose(together.image[[0, 3]], alone.image, atol=1e-6)
    assert torch.equal(together.sets[[0, 3]], alone.sets)
    later = task.load([3, 8], 1, Draw(1).at(2))
    assert not torch.allclose(later.image, alone.image)


def test_the_paths_see_the_same_crop_with_other_intensities_in_stage_two(
    prepared: Prepared,
) -> None:
    batch = task_of(prepared, "stage-2").load([0, 1], 0, Draw(1))
    assert batch.other is not None
    assert not torch.allclose(batch.image, batch.other)
    for one, other in zip(batch.image, batch.other, strict=True):
        known = (one != 0) & (other != 0)
        assert np.corrcoef(one[known], other[known])[0, 1] > 0.9
    assert task_of(prepared).load([0, 1], 0, Draw(1)).other is None
    same = task_of(prepared, "stage-2", objective__co__views="none")
    assert same.load([0, 1], 0, Draw(1)).other is None


class Context:
    """What `train_step` needs of the loop."""

    group, progress, step_index = None, 0.5, 3

    def __init__(self, net: torch.nn.Module) -> None:
        self.optimizer = torch.optim.SGD(net.parameters(), 1e-2)

    def zero(self, name: str) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, weighted: bool) -> None:
        assert weighted
        loss.backward()

    def step(self, name: str) -> None:
        self.optimizer.step()


@pytest.mark.parametrize(
    ("name", "stage", "changes"),
    [
        ("dualpath", "stage-1", {}),
        ("dualpath", "stage-2", {"objective__tasks__reconstruct": 0.1}),
        ("dualpath", "stage-2", {"objective__kind": "meyer", "model__share": "none"}),
        ("aniso", "stage-2", {}),
        ("unet", "stage-1", {}),
    ],
)
def test_every_network_takes_a_step(
    prepared: Prepared, name: str, stage: str, changes: dict[str, Any]
) -> None:
    task = task_of(prepared, stage, name, **changes)
    before = [p.detach().clone() for p in task.network.parameters()]
    batch = task.load([0, 5, 1, 7], 3, Draw(1).at(3))
    losses = task.train_step(batch, Context(task.network))  # type: ignore[arg-type]
    assert all(loss.isfinite() for loss in losses.values())
    assert ("partial" in losses) == (batch.counts[1] > 0)
    assert ("co" in losses) == (stage == "stage-2" and name == "dualpath")
    moved = [
        (p - old).abs().max() > 0 for p, old in zip(task.network.parameters(), before, strict=True)
    ]
    assert np.mean(moved) > 0.7  # biases before a normalisation stay


@pytest.mark.parametrize(
    ("name", "share"), [("dualpath", "encoder"), ("dualpath", "none"), ("aniso", "none")]
)
def test_one_kind_of_crops_after_the_other_has_the_gradient_of_all_together(
    prepared: Prepared, name: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych_pirads.task._LARGE", 1)
    task = task_of(
        prepared,
        "stage-2",
        name,
        model__dropout=0,
        model__share=share,
        train__ema=None,
        objective__tasks__reconstruct=0.1,
    )
    net = task.network.double()
    loaded = task.load([0, 5, 1, 7], 3, Draw(1).at(3))
    other = None if loaded.other is None else loaded.other.double()
    batch = loaded._replace(image=loaded.image.double(), other=other)
    ctx: Any = Context(net)
    assert len(task._passes(batch, ctx)) == 2
    together = task._losses(batch, ctx)
    together["total"].backward()
    expected = [p.grad for p in net.parameters()]
    apart = task.train_step(batch, ctx)
    for name, loss in together.items():
        assert apart[name].item() == pytest.approx(loss.item(), rel=1e-6), name
    for p, gradient in zip(net.parameters(), expected, strict=True):
        assert p.grad is not None
        assert gradient is not None
        assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-6)


def test_batch_statistics_are_those_of_all_crops(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych_pirads.task._LARGE", 1)
    task = task_of(prepared, "stage-2", model__norm="batch")
    batch = task.load([0, 5, 1, 7], 3, Draw(1).at(3))
    assert len(task._passes(batch, Context(task.network))) == 1  # type: ignore[arg-type]


def test_partly_labelled_crops_move_the_network_by_their_weight(prepared: Prepared) -> None:
    task = task_of(prepared, model__dropout=0)
    whole = task._losses(task.load([0, 5], 3, Draw(1).at(3)), Context(task.network))  # type: ignore
    alone = task._losses(task.load([0], 0, Draw(1).at(3)), Context(task.network))  # type: ignore
    expected = alone["total"] + 0.3 * whole["partial"]
    assert whole["total"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_process_without_labelled_crops_has_every_term_and_none_of_its_weight(
    prepared: Prepared,
) -> None:
    task = task_of(prepared, "stage-2", objective__tasks__reconstruct=0.1)
    whole = task._losses(task.load([0, 5, 7], 3, Draw(1)), Context(task.network))  # type: ignore
    rest = task._losses(task.load([7], 3, Draw(1)), Context(task.network))  # type: ignore
    assert set(rest) == set(whole)
    assert all(rest[name].item() == 0 for name in rest if name not in ("co", "total"))
    rest["total"].backward()


def test_averaged_weights_follow_and_predict(prepared: Prepared) -> None:
    a, b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.9 * a.weight + 0.1 * b.weight
    follow(a, b, 0.9)
    assert torch.allclose(a.weight, expected)
    task = task_of(prepared, train__epochs=1)
    average = task.modules[AVERAGE]
    fit(task, settings(task))
    for name, value in task.modules[MODEL].state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    assert AVERAGE not in task_of(prepared, train__ema=None).modules


@pytest.mark.parametrize("stage", ["stage-1", "stage-2"])
def test_an_interrupted_fit_goes_on_bit_identically(
    prepared: Prepared, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych_pirads.task._LARGE", 1)  # one kind of crops after the other
    whole, cut, again = (task_of(prepared, stage, train__epochs=2) for _ in range(3))
    result = fit(whole, settings(whole), tmp_path / "whole")
    step = PiradsTask.train_step

    def interrupted(task: PiradsTask, batch: Any, ctx: Any) -> Any:
        if task is cut and ctx.step_index == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, ctx)

    monkeypatch.setattr(PiradsTask, "train_step", interrupted)
    with pytest.raises(InterruptedRun):
        fit(cut, settings(cut), tmp_path / "cut")
    resumed = fit(again, settings(again), tmp_path / "cut")
    np.testing.assert_equal(vars(resumed), vars(result))
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, again.modules[name].state_dict()[key]), key


def test_validation_sees_its_own_studies_alone(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(prepared)
    seen: list[int] = []

    def remembered(prepared: Prepared, row: int) -> PreparedStudy:
        seen.append(row)
        return study(prepared, row)

    monkeypatch.setattr("diptych_pirads.task.study", remembered)

    class Epoch:
        device = torch.device("cpu")

    task.network.eval()
    with torch.no_grad():
        found = task.validate(Epoch())  # type: ignore[arg-type]
    assert seen == [10]
    assert 0 <= found["dice"] <= 1
    assert found["loss"] > 0


def test_scores_are_dice_where_a_label_is_known() -> None:
    values = np.array([0, 1, 1, 2, 3, UNSEEN], np.uint8).reshape(1, 1, 6)
    label = np.array([0, 1, 2, 2, 0, 4]).reshape(1, 1, 6)
    found = zone_scores(label, values, SCHEMES["zones4"])
    assert found[:3] == pytest.approx([2 / 3, 2 / 3, 0])
    assert np.isnan(found[3])
    two = np.array([0, 1, 1, 2, 2, 0], np.uint8).reshape(1, 1, 6)
    label = np.array([0, 1, 1, 4, 2, 2]).reshape(1, 1, 6)
    assert zone_scores(label, two, SCHEMES["pz_tz"])[1] == pytest.approx(4 / 5)
    gland = np.array([0, 1, 1, 1, 1, 0], np.uint8).reshape(1, 1, 6)
    assert zone_scores(label, gland, SCHEMES["gland"]) == pytest.approx([8 / 9])


def test_studies_without_four_zones_take_their_place_where_there_are_no_others(
    prepared: Prepared,
) -> None:
    rows = rows_of(prepared, [5, 6, 7])
    assert rows == ((5, 6), (), (7,))
    notes = task_of(prepared, train=[5, 6, 7]).artifacts()["training"]["notes"]
    assert any("no training study has four zones" in note for note in notes)
    assert not task_of(prepared).artifacts()["training"]["notes"]
    with pytest.raises(DataError, match="none of the 2 training studies has a label"):
        rows_of(prepared, [7, 8])


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "plateau", "constant"])
def test_learning_rates_follow_their_schedule(schedule: str) -> None:
    config = config_of(optim__schedule=schedule, optim__lr=0.01, train__epochs=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    found = schedules(optimizer, config, 40)
    rates = []
    for step in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for one in found.values():
            if one.every == "step":
                one.scheduler.step()
            elif step % 10 == 9:
                one.scheduler.step(1.0)
    expected = {"constant": 0.01, "plateau": 0.01, "cosine": 0.0, "onecycle": 0.0}[schedule]
    assert rates[-1] == pytest.approx(expected, abs=2e-4)
    assert max(rates) == pytest.approx(0.01, rel=0.02)
    assert (rates[0] < 0.002) == (schedule == "onecycle")
