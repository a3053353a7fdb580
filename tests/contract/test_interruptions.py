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
EPOCHS = {"toy": 40, "mclrec": 3, "mvcnet": 5, "pirads": 4}


def options(subject: Subject, *more: str) -> list[object]:
    epochs = f"train.epochs={EPOCHS.get(subject.name, 5)}"
    words = ["--set", epochs, "--set", "run.threads=1", "--no-evaluate"]
    return [*RECIPE, *subject.small(), *words, *more]


def trained(subject: Subject, out: Path, words: list[object]) -> dict[str, str]:
    call = subject.call("train", subject.data, "--out", out, *words)
    assert call.code == 0, call.err
    return weights(out)


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    subject: Subject, tmp_path: Path
) -> None:
    killed, words = tmp_path / "killed", options(subject)
    train_with_kills(subject, killed, words, kills=KILLS, seed=1)
    assert weights(killed) == trained(subject, tmp_path / "whole", words)


@pytest.mark.slow
def test_two_processes_killed_end_with_the_same_weights(subject: Subject, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    words = options(subject, "--set", "run.devices=2", "--set", "run.device=cpu")
    train_with_kills(subject, killed, words, kills=max(2, KILLS // 4), seed=2)
    assert weights(killed) == trained(subject, tmp_path / "whole", words)


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
