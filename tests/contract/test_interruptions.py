"""A run survives its process: killed, terminated, split over two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import RECIPE, Subject
from .kills import train_with_kills
from .test_runs import weights


KILLS = int(os.environ.get("DIPTYCH_KILLS", "4"))  # 20 for a thorough look


def options(subject: Subject, *more: str) -> list[object]:
    return [*RECIPE, *subject.small(), "--set", "run.threads=1", "--no-evaluate", *more]


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    subject: Subject, tmp_path: Path
) -> None:
    start = time.monotonic()
    call = subject.call("train", subject.data, "--out", tmp_path / "whole", *options(subject))
    assert call.code == 0, call.err
    seconds = time.monotonic() - start
    train_with_kills(
        subject, tmp_path / "killed", options(subject), kills=KILLS, seconds=seconds, seed=1
    )
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_killed_end_with_the_same_weights(subject: Subject, tmp_path: Path) -> None:
    words = options(subject, "--set", "run.devices=2", "--set", "run.device=cpu")
    start = time.monotonic()
    call = subject.call("train", subject.data, "--out", tmp_path / "whole", *words)
    assert call.code == 0, call.err
    seconds = time.monotonic() - start
    kills = max(2, KILLS // 4)
    train_with_kills(subject, tmp_path / "killed", words, kills=kills, seconds=seconds, seed=2)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_terminated_run_says_how_to_go_on(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--set", "train.epochs=2000"]
    process = subject.start("train", subject.data, "--out", out, *RECIPE, *words)
    deadline = time.monotonic() + 120
    while not list(out.glob("fits/**/checkpoints/last")):
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 5, err
    assert "--resume" in err
    assert "Traceback" not in err
