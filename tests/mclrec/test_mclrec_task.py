"""Fits of the pipeline: who trains on what, and that a batch follows from its instances alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych import loop
from diptych.config import load, merge
from diptych.contract import Fit
from diptych.errors import DataError, InterruptedRun, TrainingError, UsageError
from diptych.randomness import Draw, seed_globals
from diptych.split import Split
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import Divided, divide, from_artifacts
from diptych_mclrec.queries import queries_of
from diptych_mclrec.sequences import Catalogue, Sequences
from diptych_mclrec.store import Events
from diptych_mclrec.task import MCLRecTask, modules

torch.set_num_threads(1)
ITEMS, SUBJECTS = 12, 20
SMALL = [
    "model.dim=8", "model.inner=8", "model.layers=1", "model.max_len=6", "train.batch=16",
    "train.epochs=2", "train.length_groups=2", "optim.lr=1e-2", "data.min_item_events=1",
    "data.min_subject_events=1",
]  # fmt: skip


def settings(*sets: str, recipe: str | None = None) -> MCLRecConfig:
    return load(MCLRecConfig, recipe=recipe, sets=[*SMALL, *sets])


def events(*, baskets: bool = False, seed: int = 0, kind: str = "interactions") -> Events:
    """Histories of 5 to 12 events; every item occurs at once, so that the last decide no id."""
    draw = np.random.default_rng(seed)
    lists = [
        np.r_[draw.permutation(ITEMS)[:3] + 1, draw.integers(1, ITEMS + 1, n)]
        for n in draw.integers(2, 10, SUBJECTS)
    ]
    lists[0] = np.r_[np.arange(1, ITEMS + 1), 3, 4, 5, 6]
    found = Sequences.from_lists(lists, [f"S-{row:02d}" for row in range(SUBJECTS)])
    times = np.arange(len(found.items), dtype=np.int64)
    numbers = (found.steps // 2).astype(np.int32) if baskets else None
    found = Sequences(found.subjects, found.offsets, found.items, times, numbers)
    names = tuple(f"item-{item}" for item in range(1, ITEMS + 1))
    return Events(found, Catalogue(names, (1,) * ITEMS), kind)


def task(config: MCLRecConfig, given: Events | None = None) -> MCLRecTask:
    parts = divide(given or events(), config)
    seed_globals(1, "train", 0, 0)
    valid = queries_of(parts.split.valid, parts.split.valid_start)
    return MCLRecTask(config, parts.fitted, train=parts.split.train, validation=valid)


def run(made: MCLRecTask, config: MCLRecConfig, folder=None, **changes) -> loop.FitResult:
    given = loop.Settings(config.train, config.run, 1, better="higher", **changes)
    return loop.fit(made, given, folder)


def digest(value) -> str:
    """Of every tensor of a batch."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    fields = vars(value) if hasattr(value, "__dict__") else {}
    return "".join(digest(part) for part in fields.values() if part is not None)


def all_batches(made: MCLRecTask) -> str:
    draw = Draw(1).at(0)
    return "".join(digest(made.load(items, 0, draw)) for items in made.batches(0, draw))


def weights(made: MCLRecTask) -> list[torch.Tensor]:
    return [value for part in made.modules.values() for value in part.state_dict().values()]


@pytest.mark.parametrize("unit", ["prefix", "sequence"])
@pytest.mark.parametrize("baskets", [False, True])
def test_held_out_events_reach_no_training_tensor(unit, baskets):
    given = events(baskets=baskets)
    whole = given.sequences
    held = whole.steps >= (whole.step_counts - 2)[whole.rows]
    items = whole.items.copy()
    items[held] = np.random.default_rng(5).permutation(items[held])
    other = replace(given, sequences=whole.with_items(items))
    config = settings(f"objective.unit={unit}", "objective.lambda_=0.1")
    assert all_batches(task(config, given)) == all_batches(task(config, other))
    items[np.flatnonzero(~held)[-1]] = items[np.flatnonzero(~held)[-1]] % ITEMS + 1
    changed = replace(given, sequences=whole.with_items(items))
    assert all_batches(task(config, given)) != all_batches(task(config, changed))


@pytest.mark.parametrize("unit", ["prefix", "sequence"])
@pytest.mark.parametrize("baskets", [False, True])
def test_every_step_but_a_subjects_first_is_a_target_once_after_what_came_before(unit, baskets):
    config = settings(f"objective.unit={unit}", "model.max_len=3")
    given = events(baskets=baskets)
    made = task(config, given)
    train = divide(given, config).split.train
    wanted = sorted(
        tuple(sorted(train[row][train.steps[train.rows == row] == step].tolist()))
        for row in range(len(train))
        for step in range(1, train.step_counts[row])
    )
    found, draw = [], Draw(1).at(0)
    for items in made.batches(0, draw):
        batch = made.load(items, 0, draw)
        assert batch.items.shape[1] <= 3
        targets = batch.targets.reshape(
            len(items), -1, *batch.targets.shape[1 + (unit[0] == "s") :]
        )
        rows = targets.reshape(-1, batch.targets.shape[-1] if baskets else 1).tolist()
        found += [tuple(sorted(item for item in row if item)) for row in rows if any(row)]
        if unit == "sequence":  # the next step's input is this step's target
            ends = torch.arange(batch.items.shape[1] - 1) < (batch.lengths - 1)[:, None]
            after = batch.items[:, 1:].flatten(2).sort(-1).values if baskets else batch.items[:, 1:]
            before = batch.targets[:, :-1]
            before = before.flatten(2).sort(-1).values if baskets else before
            width = min(after.shape[-1], before.shape[-1]) if baskets else None
            same = after[..., -width:] == before[..., -width:] if baskets else after == before
            assert same[ends].all()
    assert sorted(found) == wanted


@pytest.mark.parametrize("unit", ["prefix", "sequence"])
def test_an_instance_has_the_same_views_in_any_batch(unit):
    made, draw = task(settings(f"objective.unit={unit}")), Draw(3).at(2)
    whole = made.load([4, 1, 7], 2, draw).views
    alone = made.load([7], 2, draw).views
    steps = int(alone.first_lengths[0])
    assert steps == int(whole.first_lengths[2])
    assert torch.equal(alone.first[0, :steps], whole.first[2, :steps])
    assert torch.equal(alone.subjects, whole.subjects[2:])


def test_views_are_of_prefixes_that_may_end_anywhere():
    made = task(
        settings("objective.unit=sequence", "views.crop=0", "views.mask=0", "views.reorder=0")
    )
    lengths = {
        int(made.load([0], epoch, Draw(1).at(epoch)).views.first_lengths[0]) for epoch in range(60)
    }
    assert lengths == set(range(1, 7))


@pytest.mark.parametrize("schedule", ["two_stage", "official", "joint", "bilevel"])
@pytest.mark.parametrize("unit", [pytest.param("prefix", marks=pytest.mark.slow), "sequence"])
def test_every_schedule_learns_to_predict_what_follows(schedule, unit):
    """Item i is followed by i + 1: after some epochs the rank of the target has risen."""
    cycle = [np.arange(start, start + 8) % ITEMS + 1 for start in range(ITEMS)] * 3
    names = tuple(f"item-{item}" for item in range(1, ITEMS + 1))
    given = Events(Sequences.from_lists(cycle), Catalogue(names, (1,) * ITEMS))
    config = settings(
        f"objective.schedule={schedule}", f"objective.unit={unit}", "train.epochs=6",
        "train.length_groups=1", "train.batch=30", "optim.lr=5e-2", "objective.beta=0.01",
        "model.dropout=0", "model.attn_dropout=0",
    )  # fmt: skip
    made = task(config, given)
    before = made.validate(None)["mrr"]
    result = run(made, config)
    assert made.validate(None)["mrr"] > before + 0.2
    assert result.artifacts["training"]["loss"] == "full"


@pytest.mark.parametrize("unit", ["prefix", "sequence"])
def test_an_interrupted_fit_ends_with_the_weights_of_an_unbroken_one(tmp_path, unit):
    config = settings(f"objective.unit={unit}", "objective.lambda_=0.1", "train.epochs=3")
    whole = task(config)
    run(whole, config, tmp_path / "whole")
    broken = task(config)
    learn = broken.train_step

    def interrupted(batch, ctx):
        if ctx.step_index == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return learn(batch, ctx)

    broken.train_step = interrupted
    with pytest.raises(InterruptedRun):
        run(broken, config, tmp_path / "broken")
    again = task(config)
    run(again, config, tmp_path / "broken")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_what_is_not_finite_is_named():
    config = settings("objective.lambda_=0.1", "train.batch=20")
    made = task(config)
    with torch.no_grad():
        made.modules["augmenter_1"].layers[0].weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"reg.*lower optim\.lr"):
        run(made, config)


@pytest.mark.parametrize("sets", [("train.batch=1", "objective.unit=sequence"), ()])
def test_batches_of_one_subject_learn_without_contrast(recwarn, sets):
    """One history, or several prefixes of one subject, which are no negatives of each other."""
    config = settings("train.epochs=1", *sets)
    made = task(config)
    if not sets:
        made.batches = lambda epoch, draw: [np.flatnonzero(made._owner == 0).tolist()]
    untouched = [value.clone() for value in made.modules["augmenter_1"].state_dict().values()]
    assert run(made, config).last_epoch == 1
    after = made.modules["augmenter_1"].state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(untouched, after, strict=True))
    assert not [w for w in recwarn if "negatives" in str(w.message)]


def test_contrast_on_every_second_batch_leaves_the_augmenters_alone_in_between():
    config = settings("objective.contrast_every=2", "train.epochs=1", "train.batch=40")
    made, seen = task(config), []
    learn = made.train_step

    def watched(batch, ctx):
        terms = learn(batch, ctx)
        seen.append("cl2" in terms)
        return terms

    made.train_step = watched
    run(made, config)
    assert seen[:3] == [True, False, True]


@pytest.mark.parametrize("loss", ["sampled", "gbce"])
@pytest.mark.parametrize("unit", ["prefix", "sequence"])
@pytest.mark.parametrize("sampler", ["uniform", "in_batch"])
def test_losses_that_sample_train(loss, unit, sampler):
    config = settings(
        f"objective.loss={loss}", f"objective.unit={unit}", f"objective.sampler={sampler}",
        "objective.negatives=5", "train.epochs=1",
    )  # fmt: skip
    made = task(config)
    batch = made.load([0, 1, 2], 0, Draw(1).at(0))
    assert batch.negatives.min() >= 1
    assert batch.negatives.max() <= ITEMS
    share = batch.log_q.exp()[1:].sum() / len(batch.negatives)
    assert share == pytest.approx(1, abs=1e-5)
    assert run(made, config).last_epoch == 1


def test_baskets_cannot_be_sampled():
    with pytest.raises(UsageError, match="sampled knows no baskets"):
        task(settings("objective.loss=sampled"), events(baskets=True))


def test_batches_of_like_length_hold_like_lengths():
    made = task(settings("train.bucket=true", "train.batch=8"))
    draw = Draw(1).at(0)
    batches = made.batches(0, draw)
    assert sorted(item for batch in batches for item in batch) == list(range(len(made._first)))
    spread = [np.ptp((made._last - made._first)[batch]) for batch in batches]
    assert max(spread) <= 1


class TestSplits:
    def divided(self, *sets: str, given: Events | None = None) -> Divided:
        return divide(given or events(), settings(*sets))

    def test_the_last_step_is_tested_and_rows_stand_in_every_part(self):
        parts = self.divided()
        assert parts.rows.disjoint_by == "time"
        assert parts.rows.train == parts.rows.test == tuple(range(SUBJECTS))

    def test_people_of_the_test_part_decide_nothing(self):
        given = events()
        sets = ("split.kind=subject", "split.fractions=[0.5, 0.2, 0.3]")
        one = self.divided(*sets, given=given)
        tested = np.isin(given.sequences.rows, one.rows.test)
        items = np.where(tested, 1, given.sequences.items)
        late = replace(given, sequences=given.sequences.with_items(items))
        other = self.divided(*sets, given=late)
        assert one.rows == other.rows
        assert one.rows.disjoint_by == "subject"
        assert one.fitted.catalogue == other.fitted.catalogue
        assert np.array_equal(one.fitted.counts, other.fitted.counts)
        assert one.split.train.equals(other.split.train)

    def test_a_split_that_comes_with_the_data_is_used(self):
        parts = ("train",) * 15 + ("validation",) * 2 + ("test",) * 2 + (None,)
        found = self.divided(given=replace(events(kind="clinical"), parts=parts))
        assert found.rows.train == tuple(range(15))
        assert found.rows.test == (17, 18)

    def test_nothing_later_than_the_cut_decides(self):
        given = events()
        cut = int(np.quantile(given.sequences.times, 0.7, method="higher"))
        items = np.where(given.sequences.times >= cut, 2, given.sequences.items)
        sets = ("split.kind=global_time",)
        one = self.divided(*sets, given=given)
        late = replace(given, sequences=given.sequences.with_items(items))
        other = self.divided(*sets, given=late)
        assert one.fitted.catalogue == other.fitted.catalogue
        assert one.split.train.equals(other.split.train)
        assert one.rows.disjoint_by == "time"
        assert one.split.cold.any()  # times rise from subject to subject here

    def test_a_split_without_training_people_is_refused(self):
        given = replace(events(), parts=("test",) * SUBJECTS)
        with pytest.raises(DataError, match="no subject is for training"):
            self.divided(given=given)


class TestFitted:
    def test_artifacts_give_everything_back(self):
        found = divide(events(), settings()).fitted
        again = from_artifacts(found.artifacts())
        assert again.catalogue == found.catalogue
        assert vars(again).keys() == vars(found).keys()
        for name, value in vars(found).items():
            assert np.array_equal(value, vars(again)[name]) if name != "catalogue" else True

    def test_a_changed_catalogue_is_refused(self):
        artifacts = divide(events(), settings()).fitted.artifacts()
        artifacts["catalogue"] = artifacts["catalogue"].reverse()
        with pytest.raises(DataError, match="not the one that the model was trained with"):
            from_artifacts(artifacts)

    def test_seen_items_are_masked_only_where_a_thousand_targets_never_repeat(self):
        names = tuple(f"item-{item}" for item in range(1, 51))
        lists = [np.random.default_rng(row).permutation(50) + 1 for row in range(30)]

        def policy(lists, kind="interactions"):
            sequences = Sequences.from_lists(lists)
            given = Events(sequences, Catalogue(names, (1,) * 50), kind)
            sets = ("split.kind=leave_one_out",)
            return divide(given, settings(*sets)).fitted.seen

        assert policy(lists) == "mask"
        assert policy(lists, "clinical") == "keep"
        assert policy(lists[:20]) == "keep"  # too few targets to be sure
        lists[3][5] = lists[3][2]
        assert policy(lists) == "keep"


def test_networks_are_built_from_the_configuration_alone():
    config = merge(settings(), {"model.items": 30})
    fit = Fit("final", Split(()), 1)
    assert set(modules(config, {}, fit)) == {"encoder", "augmenter_1", "augmenter_2"}
    assert modules(config, {}, fit)["encoder"].n_items == 30
    plain = merge(config, {"objective.kind": "sasrec"})
    assert set(modules(plain, {}, fit)) == {"encoder"}
    with pytest.raises(UsageError, match="number of items is not known"):
        modules(settings(), {}, fit)
