"""Training steps of MCLRec beside a straight port of the official step: time and memory.

    python tools/bench/mclrec_step.py SEQUENCES [--batches 6] [--json FILE]

SEQUENCES is a Parquet file with a list column item_ids, such as Amazon Beauty. The port does what
the official code does, written from its formulas: every row padded to 50 columns, three encodings
apart in each of three stages, a backward pass through the encoder for the augmenters, masks of
negatives by loops, views row by row. Equal parameters after a step are asserted before anything is
timed. One thread, CPU time; only ratios mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.config import load
from diptych.randomness import Draw
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import learn
from diptych_mclrec.metrics import tiled_ranks
from diptych_mclrec.schedules import Batch, Networks
from diptych_mclrec.sequences import Catalogue, Sequences
from diptych_mclrec.split import Split, split_sequences
from diptych_mclrec.task import MCLRecTask
from diptych_mclrec.views import crop, mask, reorder, two_views
from diptych_mclrec.windows import StepTable, encode_histories

BATCH, WIDTH, BETA, GAMMA = 256, 50, 0.05, 0.1
OFFICIAL = (
    "objective.schedule=official",
    "objective.regulariser=official",
    "objective.augmenter_gamma=0.1",
    "objective.mask_same_subject=false",
    "objective.pad_in_softmax=true",
)
GOALS = {"official": 3.5, "bucket": 5.0, "views": 4.0, "sequence": 8.0}
DRAW = Draw(1)


def read(path: Path) -> Sequences:
    """Sequences with ids by first appearance."""
    lists = pl.read_parquet(path)["item_ids"]
    items = lists.explode().to_numpy()
    _, first, inverse = np.unique(items, return_index=True, return_inverse=True)
    ids = (np.argsort(np.argsort(first)) + 1)[inverse]
    offsets = np.r_[0, np.cumsum(lists.list.len().to_numpy())]
    names = np.arange(len(lists)).astype(np.str_)
    return Sequences(names, offsets.astype(np.int64), ids.astype(np.int32))


def task_of(sequences: Sequences, split: Split, *sets: str) -> MCLRecTask:
    """Our task on the training part."""
    size = int(sequences.items.max())
    names = tuple(str(number) for number in range(1, size + 1))
    counts = np.bincount(sequences.items, minlength=size + 1)[1:]
    fitted = learn(split.train, Catalogue(names, tuple(counts.tolist())), "interactions")
    config = load(MCLRecConfig, sets=[f"model.items={size}", f"train.batch={BATCH}", *sets])
    torch.manual_seed(0)
    return MCLRecTask(config, fitted, train=split.train)


def context(optimizers: dict[str, torch.optim.Optimizer]) -> Any:
    """What a step asks of the loop."""
    return SimpleNamespace(
        group=None,
        device=torch.device("cpu"),
        step_index=0,
        zero=lambda name: optimizers[name].zero_grad(),
        backward=lambda loss, weighted=False: loss.backward(),
        step=lambda name: optimizers[name].step(),
    )


def negatives_by_loop(rows: int) -> Tensor:
    """Which scores are negatives, set one by one as the official code does."""
    chosen = torch.ones(rows, rows, dtype=torch.bool)
    for row in range(rows):
        chosen[row, row] = False
    for row in range(rows // 2):
        chosen[row, row + rows // 2] = chosen[row + rows // 2, row] = False
    return chosen


def pair_terms(x1: Tensor, x2: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """InfoNCE and the official regulariser of a pair of views."""
    z = torch.cat([x1, x2])
    rows, scores = len(z), z @ z.t() / tau
    positive = torch.cat([scores.diagonal(rows // 2), scores.diagonal(-rows // 2)])[:, None]
    negative = scores[negatives_by_loop(rows)].reshape(rows, -1)
    logits = torch.cat([positive, negative], 1)
    loss = F.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64))
    chosen = negatives_by_loop(rows)  # the regulariser makes its own
    hardest = scores[chosen].reshape(rows, -1).amax(1, keepdim=True)
    low, high = torch.minimum(positive, hardest), torch.maximum(positive, hardest)
    return loss, (positive - low).relu().mean() + (high - negative).relu().mean()


def padded(items: Tensor) -> Tensor:
    """Histories in 50 columns."""
    return F.pad(items, (0, WIDTH - items.shape[1]))


class Port:
    """The official step.

    Args:
        networks: Starts from copies of these.
    """

    def __init__(self, networks: Networks) -> None:
        assert networks.augmenters is not None
        self.encoder = deepcopy(networks.encoder)
        self.augmenters = deepcopy(networks.augmenters)
        phi = [p for one in self.augmenters for p in one.parameters()]
        self.theta = torch.optim.Adam(self.encoder.parameters(), 1e-3)
        self.phi = torch.optim.Adam(phi, 1e-3)

    def meta(self, h1: Tensor, h2: Tensor, gamma: float) -> Tensor:
        """The contrast of data views with model views."""
        z1, z2 = self.augmenters[0](h1), self.augmenters[1](h2)
        pairs = [pair_terms(a, b) for a, b in ((h1, z2), (h2, z1), (z1, z2))]
        return torch.stack([nce + gamma * reg for nce, reg in pairs]).sum()

    def step(self, batch: Batch) -> None:
        """Stages A, B and A again."""
        views = batch.views
        assert views is not None
        for stage in "ABA":
            h = self.encoder(padded(batch.items), batch.lengths, hidden=True)
            h1 = self.encoder(padded(views.first), views.first_lengths, hidden=True)
            h2 = self.encoder(padded(views.second), views.second_lengths, hidden=True)
            self.theta.zero_grad()
            self.phi.zero_grad()
            if stage == "A":
                logits = h @ self.encoder.item_embedding.weight.t()
                loss = F.cross_entropy(logits, batch.targets) + 0.0 * pair_terms(h1, h2)[0]
                torch.autograd.backward(loss + BETA * self.meta(h1, h2, GAMMA))
                self.theta.step()
            else:
                loss = self.meta(h1, h2, 0.1) + 0.0 * pair_terms(h1, h2)[0]
                torch.autograd.backward(loss)
                self.phi.step()


def views_by_row(items: Tensor, lengths: Tensor, rng: np.random.Generator) -> list[Tensor]:
    """Both views, a tensor of 50 columns a row as the official code makes them, then stacked."""
    ways = ((crop, 0.5), (mask, 0.5), (reorder, 0.8))
    found: list[list[Tensor]] = [[], [], [], []]
    for row, length in zip(items, lengths, strict=True):
        history = row.numpy()[: int(length)]
        for number, way in enumerate(rng.permutation(3)[:2]):
            change, ratio = ways[way]
            view = change(history, ratio, rng) if length > 1 else history
            whole = np.zeros(WIDTH)
            whole[: len(view)] = view
            found[2 * number].append(torch.tensor(whole, dtype=torch.int64))
            found[2 * number + 1].append(torch.tensor(len(view)))
    return [torch.stack(one) for one in found]


def assert_equal_steps(sequences: Sequences, split: Split) -> float:
    """The port's parameters after an official step are ours; largest difference."""
    sets = ("model.dropout=0", "model.attn_dropout=0", *OFFICIAL)
    task = task_of(sequences, split, *sets)
    for module in task.modules.values():
        module.double()
    port = Port(task.networks)
    batch = task.load(list(range(5000, 5000 + 4 * 32, 4)), 0, DRAW)
    task.train_step(batch, context(task.optimizers))
    port.step(batch)
    ours = [p for module in task.modules.values() for p in module.parameters()]
    theirs = [*port.encoder.parameters()]
    theirs += [p for one in port.augmenters for p in one.parameters()]
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-9, worst
    return worst


def seconds(side: Callable[[int], object], times: int) -> float:
    """Mean CPU seconds of a call after one that warms up; the argument counts the calls."""
    side(0)
    start = time.process_time()
    for number in range(times):
        side(number + 1)
    return (time.process_time() - start) / times


def stepper(task: MCLRecTask) -> Callable[[int], object]:
    """A step of a task with everything that belongs to it: histories, views, stages."""
    batches, ctx = task.batches(0, DRAW), context(task.optimizers)
    stride = max(len(batches) // 16, 1)
    return lambda number: task.train_step(
        task.load(batches[number * stride % len(batches)], 0, DRAW), ctx
    )


def peak_megabytes(path: Path) -> dict[str, float]:
    """Seconds of an evaluation of all users and growth of the resident peak, in a fresh process."""
    command = [sys.executable, __file__, str(path), "--evaluation"]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(told.stdout)
    return found


def print_evaluation(path: Path) -> None:
    """Child process: encode and rank every user's last step."""
    sequences = read(path)
    split = split_sequences(sequences, "leave_one_out")
    encoder = task_of(sequences, split).networks.encoder.eval()
    table = StepTable.of(split.test)
    ends = split.test.step_counts - 1
    rows = np.arange(len(ends))
    scale = 1 / 1024 if sys.platform != "darwin" else 1 / 1024**2
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    queries = encode_histories(encoder, table, rows, ends)
    tiled_ranks(queries, encoder.item_weight(), table.sets(table.steps[1:] - 1)[:, 0])
    used = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale
    print(json.dumps({"seconds": used, "megabytes": grown}))


def measure(path: Path, batches: int) -> Iterator[dict[str, Any]]:
    """The lines of the table, one after the other."""
    evaluation = peak_megabytes(path)  # first: a child may inherit the peak of this process
    sequences = read(path)
    split = split_sequences(sequences, "leave_one_out")
    yield {"what": "largest difference of a parameter after an official step (float64)",
           "value": assert_equal_steps(sequences, split)}  # fmt: skip
    task = task_of(sequences, split, *OFFICIAL)
    port, chosen = Port(task.networks), task.batches(0, DRAW)

    def port_step(number: int) -> None:
        batch = task.load(chosen[number], 0, DRAW)  # its views are timed apart
        port.step(batch)

    straight = seconds(port_step, batches)
    ours = {
        "official": seconds(stepper(task), batches),
        "bucket": seconds(stepper(task_of(sequences, split, *OFFICIAL, "train.bucket=true")), 16),
    }
    for name, taken in ours.items():
        yield {"what": f"{name} step", "seconds": {"port": straight, "ours": taken},
               "ratio": straight / taken, "goal": GOALS[name]}  # fmt: skip
    yield view_times(task)
    loop = seconds(lambda number: [negatives_by_loop(2 * BATCH) for _ in range(21)], 2)
    yield {"what": "21 masks of negatives by loops; ours makes none", "seconds": {"port": loop}}
    yield {"what": "evaluation of every user's last step", **evaluation}
    for loss in ("full", "sampled"):  # the full softmax costs both units the same
        yield epochs(sequences, split, batches, loss)
    yield memory(split.train)


def view_times(task: MCLRecTask) -> dict[str, Any]:
    """Both views of a batch: keyed draws against row by row."""
    chosen, rng = task.batches(0, DRAW), np.random.default_rng(0)
    prefixes = []
    for ids in chosen[:20]:
        batch = task.load(ids, 0, DRAW)
        prefixes.append((batch.items, batch.lengths, np.asarray(ids)))
    rows = seconds(lambda number: views_by_row(*prefixes[number % 20][:2], rng), 40)

    def keyed(number: int) -> None:
        items, lengths, ids = prefixes[number % 20]
        views = two_views(items.numpy(), lengths.numpy(), DRAW.at(number), ids=ids)
        [torch.from_numpy(one) for one in views]

    taken = seconds(keyed, 200)
    return {"what": "views of a batch", "seconds": {"port": rows, "ours": taken},
            "ratio": rows / taken, "goal": GOALS["views"]}  # fmt: skip


def epochs(sequences: Sequences, split: Split, batches: int, loss: str) -> dict[str, Any]:
    """An epoch by prefixes and by whole sequences, from the mean of some of its steps."""
    taken = {}
    for unit, times in (("prefix", batches), ("sequence", max(batches, 8))):
        sets = (f"objective.unit={unit}", f"objective.loss={loss}")
        task = task_of(sequences, split, *sets)
        taken[unit] = seconds(stepper(task), times) * len(task.batches(0, DRAW))
    return {"what": f"epoch (two_stage, {loss} softmax), from some steps", "seconds": taken,
            "ratio": taken["prefix"] / taken["sequence"], "goal": GOALS["sequence"]}  # fmt: skip


def memory(train: Sequences) -> dict[str, Any]:
    """Megabytes of the training set as it is held, and as dense prefixes."""
    table = StepTable.of(train)
    prefixes = int(np.maximum(train.step_counts - 1, 0).sum())
    held = [train.items, train.offsets, table.events, table.steps]
    ours = sum(array.nbytes for array in held) + 3 * 8 * prefixes
    dense = prefixes * WIDTH * 8 / 1e6
    return {"what": "training set, megabytes", "value": {"dense": dense, "ours": ours / 1e6},
            "goal": 10.0}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--batches", type=int, default=6, help="steps of each side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--evaluation", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.evaluation:
        print_evaluation(options.sequences)
        return
    lines = []
    for line in measure(options.sequences, options.batches):
        print(json.dumps(line), flush=True)
        lines.append(line)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
