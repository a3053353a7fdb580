"""Several processes: one global batch, equal parameters, one that writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych import checkpoint
from diptych.config import RunSection
from diptych.distributed import is_first_process, launch
from diptych.errors import UsageError
from diptych.loading import require_items, share

PROGRAM = Path(__file__).with_name("fits.py")
FREE = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}


def run_program(folder, kind, *words):
    command = [sys.executable, str(PROGRAM), str(folder), kind, *words]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=FREE, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done


def weights(folder):
    return load_file(checkpoint.best(folder) / "model.safetensors")


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_cover_a_batch_once_in_order_and_differ_by_one_item_at_most(processes):
    for count in range(processes, 40):
        parts = [share(count, rank, processes) for rank in range(processes)]
        assert [parts[0][0], parts[-1][1]] == [0, count]
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        sizes = {stop - start for start, stop in parts}
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_that_leaves_a_process_without_items_is_refused_before_the_epoch():
    with pytest.raises(UsageError, match="batch 1 of epoch 3 has 1 items for 2 process"):
        require_items([[1, 2], [3]], 3, 2)


def test_one_device_starts_no_process_group():
    fabric = launch(RunSection(device="cpu"))
    assert fabric.world_size == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_process_is_known_before_the_launch(variables, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain-exact", "adversarial-exact", "coupled-exact"])
def test_two_processes_train_on_the_same_global_batches_as_one(kind, tmp_path):
    """The program itself asserts equal parameters on both processes after each step."""
    run_program(tmp_path / "one", kind)
    done = run_program(tmp_path / "two", kind, "devices=2")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-12)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]  # both processes end with the same
    assert "Initializing" not in done.stderr


@pytest.mark.slow
def test_two_processes_keep_equal_parameters_with_batch_statistics_and_inner_gradients(tmp_path):
    for kind in ("plain", "meta"):
        run_program(tmp_path / kind, kind, "devices=2", "length=2")


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_in_the_same_bits(tmp_path):
    words = ["devices=2", "workers=1"]
    run_program(tmp_path / "whole", "plain", *words)
    command = [sys.executable, str(PROGRAM), str(tmp_path / "cut"), "plain", *words]
    command += ["delay=0.1", "checkpoint_minutes=0.0001"]
    process = subprocess.Popen(
        command,
        env=FREE,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "cut/checkpoints", "step-0000000[2-9]")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cut/checkpoints").glob("*-finished"))
    run_program(tmp_path / "cut", "plain", *words)
    for file in ("metrics.csv", "checkpoints/best"):
        assert (tmp_path / "cut" / file).read_text() == (tmp_path / "whole" / file).read_text()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_the_state_saved(tmp_path):
    command = [sys.executable, str(PROGRAM), str(tmp_path), "plain", "devices=2", "delay=0.2"]
    process = subprocess.Popen(command, env=FREE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "checkpoints", "step-*")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("is saved: go on with --resume") == 2
    found, skipped = checkpoint.newest_intact(tmp_path)
    assert skipped == []
    assert 5 <= found.state["state"]["step"] < 20


def wait_for(folder, pattern):
    for _ in range(6000):
        if list(folder.glob(pattern)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no {pattern} came")
