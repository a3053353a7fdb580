"""Steps on the grids of the recipes fit into memory; each is measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PUBLISHED = """
import resource, sys, torch
from diptych_pirads.model import AnisoUNet, DualPathNet
x = torch.rand(1, 1, 32, 168, 168)
if sys.argv[1] == "single":
    out = AnisoUNet(1, 5, 16, up_kernel="meyer", norm="batch")(x)
    assert out.shape == (1, 5, 32, 168, 168)
    loss = out.square().mean()
else:
    net = DualPathNet(base=16, share="none", up_kernel="meyer", norm="batch")
    out = net(x)
    assert out.a.shape == out.b.shape == (1, 4, 32, 168, 168)
    assert out.sdf_a.shape == (1, 3, 32, 168, 168)
    loss = sum(part.square().mean() for part in out if part is not None)
loss.backward()
"""
FAST = """
import resource, torch
from tests.pirads.test_task import Context
from tests.pirads.studies import prepared_of
from diptych.config import load
from diptych.contract import Fit
from diptych.memory import keep_freed_memory
from diptych.randomness import Draw
from diptych.split import Split
from diptych_pirads.config import PiradsConfig
from diptych_pirads.task import build, modules
keep_freed_memory()
torch.set_num_threads(1)
config = load(PiradsConfig, recipe="fast")
prepared = prepared_of(["zones4"] * 3 + ["pz_tz"] + [None] * 2, config.data.geometry.size)
fit = Fit("final", Split(train=tuple(range(6)), validation=()), 1, stage="stage-2")
task = build(config, prepared, fit, modules(config, prepared.facts, fit), {})
items = task.batches(0, Draw(1))[0]
assert sorted(task._kind[item % 6] for item in items) == [0, 0, 1, 2]
task.train_step(task.load(items, 0, Draw(1)), Context(task.network))
"""
PEAK = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def peak_gigabytes(program: str, *words: str) -> float:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", program + PEAK, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert ended.returncode == 0, ended.stderr
    each = 1024 if sys.platform == "linux" else 1
    return int(ended.stdout.split()[-1]) * each / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("network", ["single", "dual"])
def test_both_networks_learn_on_the_published_grid(network: str) -> None:
    assert peak_gigabytes(PUBLISHED, network) < 12


@pytest.mark.slow
def test_a_step_of_the_recipe_fast_needs_less_than_four_gigabytes() -> None:
    assert peak_gigabytes(FAST) < 4.0
