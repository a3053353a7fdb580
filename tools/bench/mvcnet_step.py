"""Training steps of MVCNet beside a straight port of the official step: time and peak memory.

    python tools/bench/mvcnet_step.py [--rounds 1] [--threads 1] [--json FILE]

The port does what the official code does, written from its formulas: views in numpy on every
batch, four separate passes, cosine similarities by broadcasting, four Adam optimizers. Equal
losses are asserted before anything is timed; then both sides run in turn. Only ratios mean
anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from scipy.signal import hilbert
from torch import Tensor

from diptych.config import load
from diptych.contract import Fit
from diptych.memory import keep_freed_memory
from diptych.prepared import Prepared
from diptych.randomness import Draw
from diptych.split import Split
from diptych_mvcnet import config as config_module
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.model import MVCNet
from diptych_mvcnet.objective import cross_model_loss, mvcnet_loss
from diptych_mvcnet.task import MVCNetTask, build, modules
from diptych_mvcnet.views import build_views, mirror_index

BATCH, TAU, WEIGHT = 64, 0.2, 0.1
NAMES = [
    *("Fz", "FC3", "FC1", "FCz", "FC2", "FC4", "C5", "C3", "C1", "Cz", "C2"),
    *("C4", "C6", "CP3", "CP1", "CPz", "CP2", "CP4", "P1", "Pz", "P2", "POz"),
]
SHAPES = {"official": (22, 1001, 250.0), "fast": (21, 300, 100.0)}
RECIPES = Path(config_module.__file__).parent / "recipes"


def config_of(recipe: str, *sets: str) -> MVCNetConfig:
    """A recipe with a batch of 64 and other changes."""
    sets = (f"train.batch={BATCH}", *sets)
    return load(MVCNetConfig, recipe=recipe, recipes=RECIPES, file=None, sets=sets)


def ntx_by_broadcasting(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent through all cosine similarities at once, (2n, 2n, D) numbers."""
    pool, n = torch.cat([first, second]), len(first)
    similarity = F.cosine_similarity(pool[:, None], pool[None], dim=2) / TAU
    positive = torch.cat([similarity.diag(n), similarity.diag(-n)])
    others = ~torch.eye(2 * n, dtype=torch.bool, device=pool.device)
    for row in range(n):
        others[row, row + n] = others[row + n, row] = False
    negative = similarity[others].reshape(2 * n, -1)
    logits = torch.cat([positive[:, None], negative], dim=1)
    return F.cross_entropy(logits, torch.zeros(2 * n, dtype=torch.long))


class Port:
    """The official step.

    Args:
        recipe: Whose shapes.
        net: Network in the official form, or None for a fresh one.
    """

    def __init__(self, recipe: str, net: MVCNet | None = None) -> None:
        n_chans, n_times, self.sfreq = SHAPES[recipe]
        official = config_of("official", *lengths(recipe))
        self.net = net or MVCNet(n_chans, n_times, 2, sfreq=self.sfreq, config=official)
        parts = [self.net.cnn, self.net.head, self.net.transformer.encoder]
        parts.append(self.net.transformer.projector)
        self.optimizers = [torch.optim.Adam(part.parameters(), 1e-3) for part in parts]
        self.mirror = mirror_index(NAMES[:n_chans], allow_partial=True).numpy()

    def views(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of a batch, trial by trial in numpy."""
        trials = x.numpy()
        n_times = trials.shape[-1]
        length = 2 ** int(np.ceil(np.log2(n_times)))
        turn = np.exp(2j * np.pi * 0.1 * np.arange(n_times) * 0.004)
        shifted = np.stack(
            [(hilbert(trial, N=length)[:, :n_times] * turn).real for trial in trials]
        )
        mirrored = trials[:, self.mirror]
        views = (trials, -trials, shifted, mirrored)
        labels = (y, y, y, 1 - y)
        return [
            (torch.from_numpy(view.astype(np.float32)), label)
            for view, label in zip(views, labels, strict=True)
        ]

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Its terms, by separate passes and broadcast similarities."""
        views = self.views(x, y)
        passes = [self.net(view) for view, _ in views]
        ce = torch.stack(
            [F.cross_entropy(one.logits, y) for one, (_, y) in zip(passes, views, strict=True)]
        ).sum()
        raw = torch.cat([passes[0].z_cnn, passes[0].z_tr])
        cvc = torch.stack(
            [ntx_by_broadcasting(raw, torch.cat([one.z_cnn, one.z_tr])) for one in passes[1:]]
        ).mean()
        cmc = ntx_by_broadcasting(
            torch.cat([one.z_cnn for one in passes]), torch.cat([one.z_tr for one in passes])
        )
        return {"total": ce + WEIGHT * cvc + WEIGHT * cmc, "ce": ce, "cvc": cvc, "cmc": cmc}

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of all optimizers."""
        for one in self.optimizers:
            one.zero_grad()
        torch.autograd.backward(self.losses(x, y)["total"])
        for one in self.optimizers:
            one.step()


def lengths(recipe: str) -> tuple[str, ...]:
    """Kernel and pool of a recipe's sampling rate, for the official network on its shapes."""
    return () if recipe == "official" else ("model.cnn.kernel=25", "model.cnn.pool=50")


def data_of(recipe: str, n: int = BATCH) -> tuple[Tensor, Tensor]:
    """Noise in the shape of a recipe's data."""
    n_chans, n_times, _ = SHAPES[recipe]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, n_chans, n_times, generator=generator), torch.arange(n) % 2


def task_of(recipe: str, n: int = BATCH, *sets: str) -> MVCNetTask:
    """Our task on the same data."""
    n_chans, n_times, sfreq = SHAPES[recipe]
    x, y = data_of(recipe, n)
    index = pl.DataFrame({"subject": ["S"] * n, "session": ["1"] * n, "y": y.numpy()})
    facts = {
        "ch_names": NAMES[:n_chans],
        "sfreq": sfreq,
        "n_times": n_times,
        "classes": ["left_hand", "right_hand"],
        "class_mirror": {"left_hand": "right_hand"},
    }
    sets = ("align.train=false", "views.reflect.allow_partial=true", *sets)
    config = config_of(recipe, *sets)
    fit = Fit("bench", Split(train=tuple(range(n))), 1)
    prepared = Prepared.from_arrays(index, facts, {"epochs": x.numpy()})
    return build(config, prepared, fit, modules(config, facts, fit), {})


def stepper(task: MVCNetTask) -> Callable[[], None]:
    """A function that does one step of a task, without the loop."""
    optimizer = task.optimizers["main"]
    ctx: Any = SimpleNamespace(
        group=None,
        weight=1.0,
        zero=lambda name: optimizer.zero_grad(),
        backward=lambda loss, weighted=False: loss.backward(),
        step=lambda name: optimizer.step(),
    )
    rows = list(range(BATCH))
    return lambda: (task.train_step(task.load(rows, 0, Draw(1)), ctx), None)[1]


def assert_equal_losses(recipe: str) -> None:
    """The port and our official form give the same losses on a smaller batch."""
    without_dropout = ("model.cnn.dropout=0", "model.transformer.dropout=0")
    sets = (*lengths(recipe), *without_dropout)
    n_chans, n_times, sfreq = SHAPES[recipe]
    official = config_of("official", *sets)
    net = MVCNet(n_chans, n_times, 2, sfreq=sfreq, config=official)
    x, y = data_of(recipe, 8)
    port = Port(recipe, net)
    expected = port.losses(x, y)
    views, labels = build_views(
        x, y, official.views.use, sfreq=sfreq, mirror=torch.from_numpy(port.mirror),
        settings=official.views,
    )  # fmt: skip
    found = mvcnet_loss([net(view) for view in views], labels, official)
    for name, value in expected.items():
        difference = abs(float(value.detach()) - float(found[name].detach()))
        assert difference < 1e-5 * max(1.0, float(value.detach())), (recipe, name, difference)


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turn; what takes under a second is run ten times."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            for _ in range(10):
                start = time.perf_counter()
                side()
                times[name].append(time.perf_counter() - start)
                if times[name][-1] > 1:
                    break
    return {name: median(taken) for name, taken in times.items()}


def contrast_sides(n: int = BATCH, width: int = 512) -> dict[str, Callable[[], None]]:
    """CMC alone, forward and backward, in the official form."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, n, width, generator=generator).requires_grad_()

    def port() -> None:
        z.grad = None
        torch.autograd.backward(ntx_by_broadcasting(z[0].flatten(0, 1), z[1].flatten(0, 1)))

    def ours() -> None:
        z.grad = None
        torch.autograd.backward(cross_model_loss(list(z[0]), list(z[1]), negatives="all"))

    return {"port": port, "ours": ours}


def side_of(name: str) -> Callable[[], Any]:
    """One timed side by its name, such as "official/port" or "cmc/ours"."""
    what, side = name.split("/")
    if what == "cmc":
        return contrast_sides()[side]
    if side == "ours":
        return stepper(task_of(what))
    port, (x, y) = Port(what), data_of(what)
    return lambda: port.step(x, y)


def peak_megabytes(name: str, threads: int) -> float:
    """Growth of the resident peak of a fresh process during one run of a side."""
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", name]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(told.stdout)


def print_peak(name: str) -> None:
    """Child process: print the growth of the resident peak in MB."""
    side = side_of(name)
    scale = 1 / 1024 if sys.platform != "darwin" else 1 / 1024**2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale)


def kept_memory(threads: int, pairs: int = 3) -> dict[str, float]:
    """Seconds of a step in fresh processes that return freed memory to the system, or keep it."""
    times: dict[str, list[float]] = {"returned": [], "kept": []}
    weights = set()
    for _ in range(pairs):
        for name, taken in times.items():
            command = [sys.executable, __file__, "--threads", str(threads), "--memory", name]
            told = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, total = told.stdout.split()
            taken.append(float(seconds))
            weights.add(total)
    assert len(weights) == 1, "the same steps gave other weights"
    return {name: median(taken) for name, taken in times.items()}


def print_steps(memory: str) -> None:
    """Child process: print the median seconds of a step, and what the weights became."""
    if memory == "kept" and not keep_freed_memory():
        raise SystemExit("this C library does not keep freed memory")
    torch.manual_seed(0)
    task = task_of("fast")
    step = stepper(task)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    total = sum(float(p.detach().double().sum()) for p in task.network.parameters())
    print(median(times[2:]), total)


def view_share(steps: float, rounds: int) -> float:
    """Part of a training of the recipe ``fast`` that computing all views takes.

    Args:
        steps: Seconds of a step.
        rounds: Repetitions.
    """
    config = config_of("fast")
    x, y = data_of("fast", 4 * BATCH)
    mirror = mirror_index(NAMES[:21], allow_partial=True)
    once = in_turn(
        {"views": lambda: build_views(x, y, config.views.use, sfreq=100.0, mirror=mirror)}, rounds
    )["views"]
    return once / (4 * steps * config.train.epochs)


def decoding_sides() -> dict[str, Callable[[], Any]]:
    """One trial through both branches of the official network, and through the decoder."""
    net = Port("official").net.eval().requires_grad_(False)
    x = data_of("official", 1)[0]
    return {"both branches": lambda: net(x), "decoder": lambda: net.decode(x)}


def measure(rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """The lines of the table, one after the other."""
    goals = {"cmc": 50.0, "official": 1.5, "fast": 5.0}
    # first, because a child may inherit the peak of the process that starts it
    peaks = {
        what: {side: peak_megabytes(f"{what}/{side}", threads) for side in ("port", "ours")}
        for what in goals
    }
    steps = {}
    for what, goal in goals.items():
        if what != "cmc":
            assert_equal_losses(what)
        taken = in_turn({side: side_of(f"{what}/{side}") for side in ("port", "ours")}, rounds)
        steps[what] = taken["ours"]
        yield {
            "what": f"{what} step" if what != "cmc" else "CMC, B 64, D 512",
            "seconds": taken,
            "ratio": taken["port"] / taken["ours"],
            "goal": goal,
            "peak_mb": peaks[what],
        }
    taken = in_turn(decoding_sides(), rounds)
    ratio = taken["both branches"] / taken["decoder"]
    yield {"what": "decoding one trial", "seconds": taken, "ratio": ratio}
    taken = kept_memory(threads)
    ratio = taken["returned"] / taken["kept"]
    yield {"what": "freed memory kept, fast step", "seconds": taken, "ratio": ratio}
    yield {"what": "views in a fast training", "share": view_share(steps["fast"], rounds)}


def show(line: dict[str, Any]) -> None:
    """Print a line of the table."""
    if "share" in line:
        print(f"{line['what']:28} {line['share']:.3%} of its time (goal < 1 %)", flush=True)
        return
    times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in line["seconds"].items())
    goal = f" (goal {line['goal']:g})" if "goal" in line else ""
    peak = ", ".join(f"{name} {value:.0f} MB" for name, value in line.get("peak_mb", {}).items())
    print(f"{line['what']:28} {line['ratio']:7.1f}x{goal}  {times}  {peak}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        print_peak(chosen.peak)
        return
    if chosen.memory:
        print_steps(chosen.memory)
        return
    lines = []
    for line in measure(chosen.rounds, chosen.threads):
        show(line)
        lines.append(line)
    if chosen.json:
        chosen.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
