"""The suite that every pipeline passes: installed ones, and the toy that lives beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest

TOY = Path(__file__).parent / "toy"
INSTALLED = sorted(point.name for point in entry_points(group="diptych.pipelines"))
NAMES = ["toy", *(name for name in INSTALLED if name != "toy")]
SMALL = {  # values that make a training short enough to be repeated
    "toy": [],
    "mclrec": ["train.epochs=2", "evaluate.baselines=[markov1, sasrec]"],
    "mvcnet": ["train.epochs=2", "evaluate.baselines=[csp_lda]"],
    "pirads": [
        "train.epochs=1",
        "stages={stage-2: {train.epochs: 1}}",
        "evaluate.baselines=[mean_shape]",
        "predict.passes=1",
    ],
}
ONE_INPUT = {"pirads": "P01_t2.nii.gz"}  # of a sample that is described by a table
# the model that predicts has not seen what the run tests: other people, or later events
FINAL_IS_TESTED = {"mclrec", "pirads"}
RECIPE = ["--recipe", "demo"]


@dataclass(frozen=True)
class Call:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Subject:
    """A pipeline under test and its command line."""

    name: str
    demo: Path
    environment: dict[str, str] = field(repr=False)

    @property
    def data(self) -> Path:
        return self.demo / "data"

    @property
    def run(self) -> Path:
        return self.demo / "run"

    @property
    def one_input(self) -> Path:
        """Something to predict."""
        if self.name in ONE_INPUT:
            return self.data / ONE_INPUT[self.name]
        return max(path for path in self.data.iterdir() if path.suffix != ".json")

    def copy_some(self, target: Path) -> bool:
        """Copy a part of the demo's data; False where they are one file and cannot be parted."""
        shutil.copytree(self.data, target)
        table = target / "studies.csv"
        if table.is_file():
            lines = table.read_text().splitlines(keepends=True)
            table.write_text("".join(lines[: len(lines) * 2 // 3]))
            return True
        files = sorted(path for path in target.iterdir() if path.suffix != ".json")
        for path in files[len(files) * 2 // 3 + 1 :]:
            path.unlink()
        return len(files) > 1

    def start(self, *words: object, **more: str) -> subprocess.Popen[str]:
        """Start ``diptych NAME words``."""
        command = [sys.executable, "-m", "diptych", self.name, *map(str, words)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | more,
        )

    def call(self, *words: object, timeout: float = 600) -> Call:
        """Run ``diptych NAME words`` to its end."""
        start, before = time.monotonic(), os.times()
        process = self.start(*words)
        peak = 0
        while True:
            try:
                out, err = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, tree_bytes(process.pid))
                if time.monotonic() - start > timeout:
                    process.kill()
                    raise
        seconds, after = time.monotonic() - start, os.times()
        cpu = after.children_user + after.children_system
        cpu -= before.children_user + before.children_system
        return Call(process.returncode, out, err, seconds, cpu, peak)

    def train(self, out: Path, *words: object) -> Call:
        """Train shortly on the demo's data."""
        return self.call("train", self.data, "--out", out, *RECIPE, *self.small(), *words)

    def small(self) -> list[str]:
        return [word for value in SMALL.get(self.name, []) for word in ("--set", value)]


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    try:
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TOY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(
    scope="session",
    params=[pytest.param(n, marks=[] if n == "toy" else pytest.mark.slow) for n in NAMES],
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A pipeline whose demo has run once."""
    out = tmp_path_factory.mktemp(request.param) / "demo"
    found = Subject(request.param, out, environment())
    call = found.call("demo", "--out", out)
    assert call.code == 0, call.err
    seen = {"seconds": call.seconds, "cpu_seconds": call.cpu_seconds, "peak": call.peak_bytes}
    (out / "call.json").write_text(json.dumps(seen))
    return found
