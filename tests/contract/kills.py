"""Trainings that are killed and resumed."""

from __future__ import annotations

import random
import subprocess
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
    subject: Subject, whole: Path, out: Path, words: list[object], *, kills: int, seed: int
) -> int:
    """Train, killing the command at random moments; ends with an undisturbed resume.

    Args:
        subject: The pipeline.
        whole: Where the same training runs undisturbed first, which tells how long it takes.
        out: The run folder of the disturbed training.
        words: Options of the training.
        kills: How many SIGKILLs to spread over the training.
        seed: Seed of the moments.

    Returns:
        Number of kills that met a living process.
    """

    def train(run: Path) -> float:
        resume = ["--resume"] if (run / "run.json").is_file() else []
        call = subject.call("train", subject.data, "--out", run, *words, *resume)
        assert call.code == 0, call.err
        return call.seconds

    seconds, start = train(whole), train(whole)  # the second one finds all fits finished
    moments = random.Random(seed)
    done = 0
    while done < kills:
        resume = ["--resume"] if (out / "run.json").is_file() else []
        process = subject.start("train", subject.data, "--out", out, *words, *resume)
        try:
            process.communicate(timeout=moments.uniform(0, start + 2 * (seconds - start) / kills))
        except subprocess.TimeoutExpired:
            kill_tree(process)
            done += 1
            continue
        break
    train(out)
    return done
