"""Time and memory of the losses against their floor, dense forms and other libraries.

    python tools/bench/losses.py [--sizes 64,256,4096] [--against dense,lightly] [--threads 1]
                                 [--cases nt_xent,dcl] [--rounds 5] [--memory] [--json FILE]

Every form is run in turn, round after round, and its fastest round counts; all forms have to give
the same loss first. Only ratios within one run mean anything. Forms that store all scores are left
out where one matrix of them takes more than a gigabyte.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import diptych_contrast as dc

TEMPERATURE = 0.1
TILE = 512
Form = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """Fastest round of one form of one case."""

    case: str
    form: str
    cpu_ms: float
    wall_ms: float
    peak_mb: float | None = None


# Floors: the matrix products alone, over tiles.


def products(rows: Tensor, columns: Tensor, *, symmetric: bool, backward: int) -> Tensor:
    """Score tiles once forward, once backward, and ``backward`` products with each tile."""
    n, m = len(rows), len(columns)
    size = max(n, m) if n * m * 4 <= 2**22 else TILE
    own, other = torch.zeros_like(rows), torch.zeros_like(columns)
    single = size >= max(n, m)
    for sweep in range(2):
        for i in range(0, n, size):
            for j in range(i if symmetric else 0, m, size):
                a, b = rows[i : i + size], columns[j : j + size]
                if sweep == 0 or not single:
                    tile = a @ b.t()
                if sweep == 1 or backward == 1:
                    own[i : i + size].addmm_(tile, b)
                    if backward == 2 and not (symmetric and i == j):
                        other[j : j + size].addmm_(tile.t(), a)
        if backward == 1:
            break
    return own.sum()


# Dense forms, as they are commonly written.


def dense_nt_xent(x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(torch.cat([x, y]), dim=1)
    scores = z @ z.t() / TEMPERATURE
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(x)))


def dense_sup_con(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(torch.cat([x, y]), dim=1)
    labels = labels.repeat(2)
    logits = z @ z.t() / TEMPERATURE
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z))
    same = (labels[:, None] == labels).float() * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((same * log_probability).sum(1) / same.sum(1)).mean()


def dense_queue(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.t()], 1) / TEMPERATURE
    return F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.int64))


def dense_clip(x: Tensor, y: Tensor) -> Tensor:
    scores = F.normalize(x, dim=1) @ F.normalize(y, dim=1).t() / TEMPERATURE
    target = torch.arange(len(x))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def dense_dcl(x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(torch.cat([x, y]), dim=1)
    n = len(x)
    scores = z @ z.t() / TEMPERATURE
    hidden = torch.eye(n, dtype=torch.bool).repeat(2, 2)
    positive = scores.diagonal(n).repeat(2)
    return (scores.masked_fill(hidden, -math.inf).logsumexp(1) - positive).mean()


def dense_mv_dhel(views: Tensor) -> Tensor:
    u = F.normalize(views, dim=2)
    hidden = torch.eye(u.shape[1], dtype=torch.bool)
    apart = sum(((v @ v.t()) / TEMPERATURE).masked_fill(hidden, -math.inf).logsumexp(1) for v in u)
    own = torch.einsum("lnd,mnd->nlm", u, u) / TEMPERATURE
    itself = torch.eye(len(u), dtype=torch.bool)
    together = own.masked_fill(itself, -math.inf).flatten(1).logsumexp(1)
    loss: Tensor = (apart - together).mean()
    return loss


# Other libraries: skipped by name where they do not import.


class _Stub(types.ModuleType):
    """Stands in for a module that is imported but, for a loss, never used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def lightly_loss(module: str, name: str, against: set[str]) -> Callable[..., Tensor] | None:
    """A loss of lightly, which asks for torchvision; a stub stands in where it is missing."""
    for _ in range(30 if "lightly" in against else 0):
        try:
            loss = getattr(importlib.import_module(f"lightly.loss.{module}"), name)(TEMPERATURE)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.split(".")[0] != "torchvision":
                print(f"lightly: skipped ({error})")
                return None
            sys.modules[missing] = _Stub(missing)
            sys.modules[missing].__path__ = []
        else:
            return loss  # type: ignore[no-any-return]
    return None


def metric_learning_loss(against: set[str]) -> Callable[..., Tensor] | None:
    """SupCon of pytorch-metric-learning over both views."""
    if "pml" not in against:
        return None
    try:
        losses = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError as error:
        print(f"pml: skipped ({error})")
        return None
    loss = losses.SupConLoss(TEMPERATURE)
    return lambda x, y, labels: loss(torch.cat([x, y]), labels.repeat(2))


def embeddings(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.randint(0, 100, (n,))


def cases(
    n: int, d: int, against: set[str], wanted: set[str]
) -> dict[str, tuple[list[Tensor], dict[str, Form]]]:
    """All forms of the wanted cases of one size; the first form of a case is ours."""
    x, y, labels = embeddings(n, d)
    both = torch.cat([x, y]).detach()
    more = F.normalize(torch.randn(4, n, d), dim=2).requires_grad_()
    compiled = torch.compile(dense_nt_xent, dynamic=False)
    forms: dict[str, dict[str, Form]] = {
        "nt_xent": {
            "ours": lambda: dc.nt_xent(x, y, TEMPERATURE),
            "ours with info": lambda: dc.nt_xent(x, y, TEMPERATURE, return_info=True)[0],
            "floor": lambda: products(both, both, symmetric=True, backward=2),
            "dense": lambda: dense_nt_xent(x, y),
            "compiled": lambda: compiled(x, y),
        },
        "sup_con": {
            "ours": lambda: dc.sup_con((x, y), labels, TEMPERATURE),
            "floor": lambda: products(both, both, symmetric=True, backward=2),
            "dense": lambda: dense_sup_con(x, y, labels),
        },
        "dcl": {
            "ours": lambda: dc.dcl(x, y, TEMPERATURE),
            "floor": lambda: products(both, both, symmetric=True, backward=2),
            "dense": lambda: dense_dcl(x, y),
        },
        "clip_loss": {
            "ours": lambda: dc.clip_loss(x, y, TEMPERATURE),
            "floor": lambda: products(x.detach(), y.detach(), symmetric=False, backward=2),
            "dense": lambda: dense_clip(x, y),
        },
        "mv_dhel": {
            "ours": lambda: dc.mv_dhel(more, TEMPERATURE),
            "floor": lambda: sum(
                (products(v, v, symmetric=True, backward=2) for v in more.detach()),
                start=torch.zeros(()),
            ),
            "dense": lambda: dense_mv_dhel(more),
        },
    }
    for case, loss in (
        ("nt_xent", lightly_loss("ntx_ent_loss", "NTXentLoss", against)),
        ("dcl", lightly_loss("dcl_loss", "DCLLoss", against)),
    ):
        if loss is not None:
            forms[case]["lightly"] = partial(loss, x, y)
    metric = metric_learning_loss(against)
    if metric is not None:
        forms["sup_con"]["pml"] = partial(metric, x, y, labels)
    if n == 256:
        forms["info_nce"] = queue_case(x, y, d)
    leaves = {"mv_dhel": [more], "info_nce": [x]}
    kept = against | {"ours", "ours with info", "floor"}
    if (2 * n) ** 2 * 4 > 2**30:
        kept = {"ours", "floor"}
    return {
        case: (leaves.get(case, [x, y]), {k: form for k, form in variants.items() if k in kept})
        for case, variants in forms.items()
        if case in wanted
    }


def queue_case(q: Tensor, k: Tensor, d: int) -> dict[str, Form]:
    """A momentum queue of 65,536 keys."""
    queue, key = F.normalize(torch.randn(65536, d), dim=1), k.detach()
    return {
        "ours": lambda: dc.info_nce(q, key, TEMPERATURE, negatives="queue", queue=queue),
        "floor": lambda: products(q.detach(), queue, symmetric=False, backward=1),
        "dense": lambda: dense_queue(q, key, queue),
    }


def measure(leaves: list[Tensor], forms: Mapping[str, Form], rounds: int) -> dict[str, list[float]]:
    """Fastest CPU and wall time of forward and backward, rounds taken in turn."""
    best = {name: [math.inf, math.inf] for name in forms}
    expected: float | None = None
    for turn in range(rounds + 1):
        for name, form in forms.items():
            for leaf in leaves:
                leaf.grad = None
            cpu, wall = time.process_time(), time.perf_counter()
            value = form()
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            if turn == 0 and name != "floor":
                expected = value.item() if expected is None else expected
                if abs(value.item() - expected) > 1e-4 * abs(expected):
                    raise SystemExit(f"{name} gives {value.item()}, ours {expected}")
            if turn > 0:
                best[name] = [min(a, b * 1e3) for a, b in zip(best[name], spent, strict=True)]
    return best


def second_order(n: int, d: int, rounds: int) -> list[Row]:
    """A gradient of a gradient against a single step."""
    x, y, _ = embeddings(n, d)

    def step(twice: bool) -> Tensor:
        slopes = torch.autograd.grad(dc.nt_xent(x, y, TEMPERATURE), [x, y], create_graph=twice)
        return sum((s.square().sum() for s in slopes), start=torch.zeros(()))

    forms: dict[str, Form] = {"single": lambda: step(False), "double": lambda: step(True)}
    best = {name: [math.inf, math.inf] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            cpu, wall = time.process_time(), time.perf_counter()
            value = form()
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            best[name] = [min(a, b * 1e3) for a, b in zip(best[name], spent, strict=True)]
    return [
        Row(f"second order {n} x {d}", name, times[0], times[1]) for name, times in best.items()
    ]


PEAK = """
import resource, sys
sys.path.insert(0, {folder!r})
import losses, torch
torch.set_num_threads(1)
def step(n):
    leaves, forms = losses.cases(n, {d}, {against!r}, {{{case!r}}})[{case!r}]
    value = forms[{form!r}]()
    if value.requires_grad:
        value.backward()
    return leaves
step(64)
kept = losses.embeddings({n}, {d})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({n})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak(case: str, form: str, n: int, d: int, against: set[str]) -> float | None:
    """Extra peak memory in MB of one form, in a process of its own (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    code = PEAK.format(
        folder=str(Path(__file__).parent), d=d, n=n, against=against, case=case, form=form
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def main() -> None:
    """Run the cases and print a table of times and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="64,256,4096")
    parser.add_argument("--dims", default="128")
    parser.add_argument("--cases", default="nt_xent,sup_con,dcl,clip_loss,mv_dhel,info_nce")
    parser.add_argument("--against", default="floor,dense,compiled,lightly,pml")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    against, wanted = set(given.against.split(",")), set(given.cases.split(","))
    rows: list[Row] = []
    for d in map(int, given.dims.split(",")):
        for n in map(int, given.sizes.split(",")):
            rounds = max(1, given.rounds * 1024 // n) if n != 4096 else given.rounds
            for case, (leaves, forms) in cases(n, d, against, wanted).items():
                for name, times in measure(leaves, forms, rounds).items():
                    memory = None
                    if given.memory and name not in {"floor", "ours with info"}:
                        memory = peak(case, name, n, d, against)
                    rows.append(Row(f"{case} {n} x {d}", name, times[0], times[1], memory))
        if "nt_xent" in wanted:
            rows += second_order(1024, d, given.rounds)
    report(rows, given.threads)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def report(rows: list[Row], threads: int) -> None:
    """Print every form beside the first of its case."""
    print(f"torch {torch.__version__}, {threads} thread(s), fastest round, forward + backward")
    first: Row | None = None
    for row in rows:
        if first is None or first.case != row.case:
            first = row
            print(f"\n{row.case}")
        memory = "" if row.peak_mb is None else f"  extra peak {row.peak_mb:7.0f} MB"
        print(
            f"  {row.form:15} cpu {row.cpu_ms:9.2f} ms  wall {row.wall_ms:9.2f} ms  "
            f"{first.form} / this {first.cpu_ms / row.cpu_ms:5.2f}{memory}"
        )


if __name__ == "__main__":
    main()
