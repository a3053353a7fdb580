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
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train_with_kills(subject, whole, killed, options(subject), kills=KILLS, seed=1)
    assert done >= KILLS // 2
    assert weights(killed) == weights(whole)


@pytest.mark.slow
def test_two_processes_killed_end_with_the_same_weights(subject: Subject, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = options(subject, "--set", "run.devices=2", "--set", "run.device=cpu")
    kills = max(2, KILLS // 4)
    done = train_with_kills(subject, whole, killed, words, kills=kills, seed=2)
    assert done >= 1
    assert weights(killed) == weights(whole)


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
