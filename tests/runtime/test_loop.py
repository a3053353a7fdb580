"""The loop: what it does in a step, how it judges, and that a resumed fit is the same fit."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych import checkpoint
from diptych.errors import DataError, InterruptedRun, TrainingError, UsageError
from diptych.loop import fit

PROGRAM = Path(__file__).with_name("fits.py")
KINDS = ["plain", "adversarial", "meta"]


def _load_fits():
    spec = importlib.util.spec_from_file_location("fits", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fits"] = module
    spec.loader.exec_module(module)
    return module


fits = sys.modules.get("fits") or _load_fits()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stop(Exception):
    pass


def stop_at(step):
    def hook(task, ctx):
        if ctx.step_index == step:
            raise Stop

    return hook


def interrupt_at(step):
    def hook(task, ctx):
        if ctx.step_index == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


def chosen(**changes):
    return fits.settings(**{"metric": "loss", "better": "lower", **changes})


def trained(kind="plain", folder=None, **changes):
    task = fits.task(kind, **{n: changes.pop(n) for n in list(changes) if n in ("hook", "length")})
    return task, fit(task, chosen(**changes), folder)


def files(folder):
    names = ("metrics.csv", "checkpoints/best")
    contents = {name: (folder / name).read_text() for name in names}
    best = checkpoint.best(folder)
    return contents, (best / "model.safetensors").read_bytes()


def rows(folder):
    with (folder / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", KINDS)
def test_two_fits_with_one_seed_are_identical_in_memory_and_in_a_folder(kind, tmp_path):
    first, result = trained(kind)
    second, stored = trained(kind, tmp_path)
    assert fits.digest(first.modules) == fits.digest(second.modules)
    assert (result.best_epoch, result.best_metric) == (stored.best_epoch, stored.best_metric)
    other = fits.task(kind)
    fit(other, chosen(seed=2))
    assert fits.digest(other.modules) != fits.digest(first.modules)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 9, 13])
def test_a_fit_interrupted_in_the_middle_of_an_epoch_goes_on_bit_identically(kind, step, tmp_path):
    trained(kind, tmp_path / "whole")
    with pytest.raises(InterruptedRun, match=f"state after step {step + 1} is saved"):
        trained(kind, tmp_path / "cut", hook=interrupt_at(step))
    task, _ = trained(kind, tmp_path / "cut")
    assert task.order  # it did go on, and from where it stood
    assert len(task.order) == 20 - (step + 1)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_that_broke_off_goes_on_from_the_last_epoch_bit_identically(kind, tmp_path):
    trained(kind, tmp_path / "whole")
    with pytest.raises(Stop):
        trained(kind, tmp_path / "cut", hook=stop_at(12))
    trained(kind, tmp_path / "cut")
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_checkpoints_by_the_clock_change_nothing(tmp_path):
    trained("plain", tmp_path / "whole")
    with pytest.raises(Stop):
        trained("plain", tmp_path / "cut", hook=stop_at(8), checkpoint_minutes=1e-9)
    last = (tmp_path / "cut/checkpoints/last").read_text().strip()
    assert last == "step-00000008"
    trained("plain", tmp_path / "cut")
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.parametrize("accumulate", [2, 3])
def test_an_accumulated_fit_resumes_between_optimizer_steps_bit_identically(accumulate, tmp_path):
    trained("plain", tmp_path / "whole", accumulate=accumulate)
    with pytest.raises(InterruptedRun):
        trained("plain", tmp_path / "cut", accumulate=accumulate, hook=interrupt_at(5))
    name = (tmp_path / "cut/checkpoints/last").read_text().strip()
    within = int(name.removeprefix("step-")) % 5
    assert within % accumulate == 0
    trained("plain", tmp_path / "cut", accumulate=accumulate)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_workers_load_the_same_numbers(tmp_path):
    alone, _ = trained("plain", length=2)
    helped, _ = trained("plain", length=2, workers=2)
    assert fits.digest(alone.modules) == fits.digest(helped.modules)
    with pytest.raises(InterruptedRun):
        trained("plain", tmp_path, length=2, workers=2, hook=interrupt_at(2))
    resumed, _ = trained("plain", tmp_path, length=2)
    assert fits.digest(resumed.modules) == fits.digest(alone.modules)


def test_an_error_for_the_user_in_a_worker_arrives_as_itself():
    task = fits.task("plain")

    def load(items, epoch, draw):
        raise DataError("recording 3 cannot be read")

    task.load = load
    with pytest.raises(DataError, match=r"^recording 3 cannot be read$"):
        fit(task, chosen(workers=1))


def test_accumulated_batches_have_the_gradient_of_one_large_batch():
    large, small = fits.task("plain-exact", batch=12), fits.task("plain-exact", batch=4)
    for task in (large, small):
        task.schedules = {}
    fit(large, fits.settings())
    fit(small, fits.settings(accumulate=3))
    for one, other in zip(
        large.modules["net"].parameters(), small.modules["net"].parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_accumulation_is_refused_where_a_loss_couples_the_batch():
    with pytest.raises(UsageError, match=r"train\.accumulate"):
        trained("adversarial", accumulate=2)


def test_the_gradient_norm_is_clipped_before_the_step():
    seen = []

    def hook(task, ctx):
        gradients = [p.grad for p in task.modules["net"].parameters()]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))

    trained("plain-exact", hook=hook, clip=0.05)
    assert max(seen) == pytest.approx(0.05, rel=1e-4)
    assert all(norm <= 0.05 * (1 + 1e-9) for norm in seen)


def test_gradients_never_pass_from_one_step_to_the_next():
    left = []

    def before(task, batch, ctx):
        left.extend(p.grad for m in task.modules.values() for p in m.parameters())

    task = fits.task("adversarial", before=before)
    task.train_step = lambda batch, ctx: fits.Plain.train_step(task, batch, _renamed(ctx))
    fit(task, fits.settings())
    assert left
    assert all(gradient is None for gradient in left)


def _renamed(ctx):
    return SimpleNamespace(
        step_index=ctx.step_index,
        zero=lambda name: None,
        backward=ctx.backward,
        step=lambda name: ctx.step("net"),
    )


def spoil(steps):
    def before(task, batch, ctx):
        if ctx.step_index in steps:
            batch["x"][0, 0] = math.nan

    return before


def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count(tmp_path):
    task = fits.task("plain", length=1)
    before = {}

    def watch(known, batch, ctx):
        spoil({3})(known, batch, ctx)
        before[ctx.step_index] = fits.digest(known.modules)

    task.before = watch
    fit(task, chosen(), tmp_path)
    assert before[3] == before[4]  # weights, batch statistics and their counter
    assert before[2] != before[3]
    items = ", ".join(str(item) for item in task.order[3])
    assert (
        f"skipped: loss or gradient norm not finite (loss); items {items}\n"
        in (tmp_path / "log.txt").read_text()
    )
    assert all(math.isfinite(float(row["train/loss"])) for row in rows(tmp_path))


def test_the_third_step_in_a_row_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    task = fits.task("plain", before=spoil({5, 7, 8, 10, 11, 12}))
    with pytest.raises(TrainingError, match=r"\(loss\).*last good checkpoint is step-00000010"):
        fit(task, chosen(), tmp_path)
    assert len(task.order) == 13
    found, _ = checkpoint.newest_intact(tmp_path)
    assert all(tensor.isfinite().all() for tensor in found.tensors["net"].values())


def test_debugging_names_the_module_that_gives_the_first_nan():
    task = fits.task("plain", before=spoil({2}))
    with pytest.raises(TrainingError, match=r"NaN in the output of net\.0 \(Linear\)"):
        fit(task, chosen(debug=True))
    assert len(task.order) == 3


def test_the_best_weights_are_kept_and_patience_ends_the_fit(tmp_path):
    task = fits.task("plain", length=9)
    metrics = iter([0.5, 0.3, 0.4, 0.3, 0.35, 0.1])
    seen = []

    def validate(ctx):
        seen.append((ctx.epoch, fits.digest(task.modules)))
        assert not any(part.training for part in task.modules["net"].modules())
        assert not torch.is_grad_enabled()
        return {"loss": next(metrics)}

    task.validate = validate
    result = fit(task, chosen(patience=3), tmp_path)
    assert (result.best_epoch, result.last_epoch, result.best_metric) == (2, 5, 0.3)
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5]
    assert fits.digest(task.modules) == seen[1][1]
    again = fits.task("plain", seed=7)
    checkpoint.load_modules(tmp_path, again.modules)
    assert fits.digest(again.modules) == seen[1][1]
    assert task.modules["net"].training
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1


def test_without_validation_the_last_weights_are_the_best(tmp_path):
    task = fits.task("plain", length=3)
    task.validate = lambda ctx: {}
    result = fit(task, chosen(patience=1), tmp_path)
    assert (result.best_epoch, result.last_epoch, result.best_metric) == (3, 3, None)


def test_metrics_that_are_never_finite_leave_the_last_weights():
    task = fits.task("plain", length=3)
    task.validate = lambda ctx: {"loss": math.nan}
    assert fit(task, chosen()).best_epoch == 3
    assert fit(fits.task("plain"), chosen(better="higher")).best_metric > 0


def test_weights_from_an_earlier_fit_are_validated_before_the_first_step(tmp_path):
    task = fits.task("plain", length=2)
    metrics = iter([0.1, 0.5, 0.4])
    task.validate = lambda ctx: {"loss": next(metrics)}
    before = fits.digest(task.modules)
    result = fit(task, chosen(validate_first=True), tmp_path)
    assert (result.best_epoch, result.best_metric) == (0, 0.1)
    assert fits.digest(task.modules) == before
    assert [row["epoch"] for row in rows(tmp_path)] == ["0", "1", "2"]


def test_a_fit_of_no_epochs_finishes_and_is_kept(tmp_path):
    task = fits.task("plain", length=0)

    def finish(ctx):
        assert torch.is_grad_enabled()
        with torch.no_grad():
            task.modules["net"][0].weight.fill_(2.0)

    task.finish = finish
    result = fit(task, chosen(), tmp_path)
    assert (result.best_epoch, result.last_epoch) == (0, 0)
    again = fits.task("plain")
    checkpoint.load_modules(tmp_path, again.modules)
    assert (again.modules["net"][0].weight == 2.0).all()


def test_a_finished_fit_is_opened_and_not_trained_again(tmp_path):
    task, result = trained("plain", tmp_path)
    again = fits.task("plain", seed=9)
    stored = fit(again, chosen(), tmp_path)
    assert not again.order
    assert (stored.best_epoch, stored.best_metric) == (result.best_epoch, result.best_metric)
    assert (stored.artifacts["mean"] == result.artifacts["mean"]).all()
    assert fits.digest(again.modules) == fits.digest(task.modules)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "accurac"}, "nearest: 'accuracy'"),
        ({"better": None}, "whether a higher 'loss' is better"),
        ({"metric": None, "patience": 2}, "needs train.metric"),
        ({"precision": "16-mixed"}, "needs a CUDA device"),
        ({"device": "mps"}, "run.device=mps"),
        ({"track": ("wandb",)}, "wandb is not installed"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has what the refusal is about")
    with pytest.raises(UsageError, match=says):
        trained("plain", tmp_path, **changes)


def test_an_unknown_optimizer_and_an_empty_batch_are_named():
    task = fits.task("plain")
    task.train_step = lambda batch, ctx: ctx.step("mian")
    with pytest.raises(ValueError, match=r"no optimizer 'mian'.*main"):
        fit(task, chosen())
    task = fits.task("plain")
    task.batches = lambda epoch, draw: [[1, 2], []]
    with pytest.raises(UsageError, match="batch 1 of epoch 0 has 0 items"):
        fit(task, chosen())


def test_a_fit_in_memory_is_silent_and_gives_the_global_generators_back(capfd):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    handler = signal.getsignal(signal.SIGTERM)
    trained("plain", threads=1)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert signal.getsignal(signal.SIGTERM) is handler
    assert capfd.readouterr() == ("", "")


def test_a_second_signal_ends_at_once_and_handlers_are_given_back(tmp_path):
    def hook(task, ctx):
        if ctx.step_index == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRun, match="interrupted twice"):
        trained("plain", tmp_path, hook=hook)
    assert (tmp_path / "checkpoints/last").read_text().strip() == "step-00000005"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_signal_in_the_last_validation_interrupts_after_the_fit_was_kept(tmp_path):
    task = fits.task("plain")
    task.finish = lambda ctx: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(InterruptedRun):
        fit(task, chosen(), tmp_path)
    again = fits.task("plain")
    fit(again, chosen(), tmp_path)
    assert not again.order


def test_rows_after_the_checkpoint_are_dropped_from_the_curves(tmp_path):
    trained("plain", tmp_path / "whole")
    with pytest.raises(Stop):
        trained("plain", tmp_path / "cut", hook=stop_at(12))
    file = tmp_path / "cut/metrics.csv"
    file.write_text(file.read_text() + "3,15,0.1,0.1,0.1,0.1\n")
    trained("plain", tmp_path / "cut")
    assert file.read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_the_logged_mean_of_an_epoch_is_weighted_by_items(tmp_path):
    task = fits.task("plain", length=1)
    task.hook = lambda known, ctx: ctx.log("index", float(ctx.step_index))
    fit(task, chosen(), tmp_path)
    expected = (8 * (0 + 1 + 2 + 3) + 5 * 4) / 37
    assert float(rows(tmp_path)[0]["train/index"]) == pytest.approx(expected, rel=1e-12)


def test_progress_and_draws_follow_the_epochs():
    seen = []
    task = fits.task("plain", length=2)

    def hook(known, ctx):
        seen.append((ctx.epoch, ctx.step_index, ctx.progress))
        assert ctx.group is None
        assert ctx.draw("a").epoch == ctx.epoch
        assert ctx.draw("a").purpose == "a"
        assert (ctx.gather(torch.arange(3)) == torch.arange(3)).all()

    task.hook = hook
    fit(task, chosen())
    assert seen[0] == (0, 0, 0.0)
    assert seen[5] == (1, 5, 0.5)
    assert seen[-1] == (1, 9, pytest.approx(0.9))


def test_a_resumed_fit_notes_what_changed(tmp_path, caplog):
    with pytest.raises(InterruptedRun):
        trained("plain", tmp_path, hook=interrupt_at(3))
    torch.set_num_threads(2)
    trained("plain", tmp_path)
    for text in (caplog.text, (tmp_path / "log.txt").read_text()):
        assert "resumed with threads 2 instead of 1" in text


def test_a_damaged_best_checkpoint_is_named_and_the_fit_goes_on(tmp_path, caplog):
    with pytest.raises(InterruptedRun):
        trained("plain", tmp_path, hook=interrupt_at(13))  # the best was after epoch 1
    (tmp_path / "checkpoints/step-00000005/model.safetensors").write_bytes(b"")
    _, result = trained("plain", tmp_path)
    assert "best checkpoint step-00000005 is damaged" in caplog.text
    assert result.best_epoch == 3


def test_another_task_cannot_take_over_a_checkpoint(tmp_path):
    with pytest.raises(InterruptedRun):
        trained("plain", tmp_path, hook=interrupt_at(3))
    with pytest.raises(DataError, match="'judge'"):
        trained("adversarial", tmp_path)


def test_bf16_trains_in_autocast():
    kinds = []
    task = fits.task("plain", length=1)
    task.hook = lambda known, ctx: kinds.append(F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype)
    fit(task, chosen(precision="bf16-mixed"))
    assert set(kinds) == {torch.bfloat16}
    assert next(task.modules["net"].parameters()).dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
def test_a_killed_process_goes_on_bit_identically(kind, tmp_path):
    command = [sys.executable, str(PROGRAM)]
    whole = subprocess.run(
        [*command, str(tmp_path / "whole"), kind], capture_output=True, text=True, check=True
    )
    wait = random.Random(kind)
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command, str(tmp_path / "cut"), kind, "delay=0.05", "checkpoint_minutes=0.0001"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        log = tmp_path / "cut/checkpoints"
        seen = set(log.glob("step-*"))
        for _ in range(3000):
            if process.poll() is not None or set(log.glob("step-*")) - seen:
                break
            time.sleep(0.01)
        time.sleep(wait.uniform(0, 0.3))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    words = [*command, str(tmp_path / "cut"), kind]
    last = subprocess.run(words, capture_output=True, text=True, check=True)
    assert killed >= 2
    assert last.stdout == whole.stdout
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
