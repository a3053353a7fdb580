"""Trainings that are killed and resumed."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from .conftest import Subject


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL a command and everything it started."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    process.kill()
    for child in tree:
        if child.is_running():
            child.kill()
    process.communicate()


def train_with_kills(
    subject: Subject, out: Path, words: list[object], *, kills: int, seed: int
) -> None:
    """Train, killing the command again and again; ends with an undisturbed resume.

    Every other kill comes while the command starts, the rest soon after it wrote a checkpoint of
    its own, so that every kill meets a living process however fast the machine is.

    Args:
        subject: The pipeline.
        out: The run folder.
        words: Options of the training, which has to write more checkpoints than there are kills.
        kills: Number of SIGKILLs.
        seed: Seed of the moments.
    """
    moments = random.Random(seed)
    for number in range(kills):
        process = start(subject, out, words)
        if number % 2:
            _until_a_checkpoint(process, out)
            time.sleep(moments.uniform(0, 0.05))
        else:
            time.sleep(moments.uniform(0, 1))
        assert process.poll() is None, f"kill {number + 1} came late: {process.communicate()}"
        kill_tree(process)
    process = start(subject, out, words)
    _, err = process.communicate()
    assert process.returncode == 0, err


def start(subject: Subject, out: Path, words: list[object]) -> subprocess.Popen[str]:
    """Start a training, or go on with it."""
    resume = ["--resume"] if (out / "run.json").is_file() else []
    return subject.start("train", subject.data, "--out", out, *words, *resume)


def _until_a_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    before = _checkpoints(out)
    while _checkpoints(out) == before and process.poll() is None:
        time.sleep(0.005)


def _checkpoints(out: Path) -> set[Path]:
    return set(out.glob("fits/**/checkpoints/*/state.json"))
