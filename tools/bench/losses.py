"""Time and memory of the losses against their floor, dense forms and other libraries.

    python tools/bench/losses.py [--sizes 256,4096] [--cases nt_xent,dcl] [--threads 2]
                                 [--against dense,lightly] [--json FILE]

prints a Markdown table. Up to 4,096 pairs all forms of a case run in turn, round after round, and
the fastest round counts; above, each form takes one step in a process of its own. All forms have
to give the same loss. The floor is the matrix products alone, over tiles. Only ratios within one
run mean anything. A form that would take more than 4 GB is left out.
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
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import diptych_contrast as dc

TEMPERATURE = 0.1
TILE = 512
LARGEST_IN_TURN = 4096
SMALLEST_TOLD = 1024  # pairs whose memory is worth telling
MOST_BYTES = 4 * 2**30
LINUX = sys.platform.startswith("linux")  # where a process tells its peak
CASES = "nt_xent,sup_con,dcl,clip_loss,mv_dhel,swav_loss,info_nce"
# Score matrices that a form holds at a time; times rows squared of a matrix.
MATRICES = {"dense": 5, "compiled": 5, "lightly": 5, "pml": 11}
Form = Callable[[], Tensor]


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


def lightly_loss(module: str, name: str) -> Callable[..., Tensor] | None:
    """A loss of lightly, which asks for torchvision; a stub stands in where it is missing."""
    for _ in range(30):
        try:
            loss = getattr(importlib.import_module(f"lightly.loss.{module}"), name)(TEMPERATURE)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.split(".")[0] != "torchvision":
                print(f"lightly: skipped ({error})", file=sys.stderr)
                return None
            sys.modules[missing] = _Stub(missing)
            sys.modules[missing].__path__ = []
        else:
            return loss  # type: ignore[no-any-return]
    return None


def metric_learning_loss() -> Callable[..., Tensor] | None:
    """SupCon of pytorch-metric-learning over both views."""
    try:
        losses = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError as error:
        print(f"pml: skipped ({error})", file=sys.stderr)
        return None
    loss = losses.SupConLoss(TEMPERATURE)
    return lambda x, y, labels: loss(torch.cat([x, y]), labels.repeat(2))


def embeddings(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.randint(0, 100, (n,))


def forms_of(case: str, n: int, d: int, against: set[str]) -> tuple[list[Tensor], dict[str, Form]]:
    """Leaves and forms of a case; the first form is ours."""
    x, y, labels = embeddings(n, d)
    both = torch.cat([x, y]).detach()
    leaves, forms = [x, y], dict[str, Form]()
    if case in {"nt_xent", "sup_con", "dcl"}:
        forms["floor"] = lambda: products(both, both, symmetric=True, backward=2)
    if case == "nt_xent":
        compiled = torch.compile(dense_nt_xent, dynamic=False)
        forms |= {
            "ours": lambda: dc.nt_xent(x, y, TEMPERATURE),
            "ours with info": lambda: dc.nt_xent(x, y, TEMPERATURE, return_info=True)[0],
            "dense": lambda: dense_nt_xent(x, y),
            "compiled": lambda: compiled(x, y),
        }
    elif case == "sup_con":
        forms["ours"] = lambda: dc.sup_con((x, y), labels, TEMPERATURE)
        forms["dense"] = lambda: dense_sup_con(x, y, labels)
    elif case == "dcl":
        forms["ours"] = lambda: dc.dcl(x, y, TEMPERATURE)
        forms["dense"] = lambda: dense_dcl(x, y)
    elif case == "clip_loss":
        rows, columns = both[:n], both[n:]
        forms["floor"] = lambda: products(rows, columns, symmetric=False, backward=2)
        forms["ours"] = lambda: dc.clip_loss(x, y, TEMPERATURE)
        forms["dense"] = lambda: dense_clip(x, y)
    elif case == "mv_dhel":
        views = F.normalize(torch.randn(4, n, d), dim=2)
        leaves = [views.clone().requires_grad_()]
        each = [partial(products, v, v, symmetric=True, backward=2) for v in views]
        forms["floor"] = lambda: torch.stack([floor() for floor in each]).sum()
        forms["ours"] = lambda: dc.mv_dhel(leaves[0], TEMPERATURE)
        forms["dense"] = lambda: dense_mv_dhel(leaves[0])
    elif case == "swav_loss":
        forms["ours"] = lambda: dc.swav_loss((x, y), temperature=TEMPERATURE)
    else:  # a momentum queue of 65,536 keys
        queue, key = F.normalize(torch.randn(65536, d), dim=1), y.detach()
        leaves, rows = [x], x.detach()
        forms = {
            "floor": lambda: products(rows, queue, symmetric=False, backward=1),
            "ours": lambda: dc.info_nce(x, key, TEMPERATURE, negatives="queue", queue=queue),
            "dense": lambda: dense_queue(x, key, queue),
        }
    add_peers(forms, case, against, (x, y, labels))
    kept = {"ours", "ours with info", "floor"}
    kept |= {name for name in against if matrix_bytes(case, name, n) <= MOST_BYTES}
    return leaves, {name: forms[name] for name in sorted(forms, key=order) if name in kept}


def order(name: str) -> int:
    return ("ours", "ours with info", "floor", *MATRICES).index(name)


def matrix_bytes(case: str, form: str, n: int) -> float:
    rows = {"clip_loss": n, "mv_dhel": 2 * n, "swav_loss": 0, "info_nce": 4096}.get(case, 2 * n)
    return 4.0 * rows**2 * MATRICES.get(form, 0)


def add_peers(
    forms: dict[str, Form], case: str, against: set[str], given: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, labels = given
    peers = {
        "nt_xent": ("ntx_ent_loss", "NTXentLoss"),
        "dcl": ("dcl_loss", "DCLLoss"),
        "swav_loss": ("swav_loss", "SwaVLoss"),
    }
    if case in peers and "lightly" in against:
        loss = lightly_loss(*peers[case])
        if loss is not None and case == "swav_loss":
            forms["lightly"] = lambda: loss([x, y], []).squeeze()
        elif loss is not None:
            forms["lightly"] = partial(loss, x, y)
    metric = metric_learning_loss() if case == "sup_con" and "pml" in against else None
    if metric is not None:
        forms["pml"] = partial(metric, x, y, labels)


def step(leaves: list[Tensor], form: Form) -> tuple[float, float]:
    """Loss, and CPU and wall time in ms, of one step forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    value = form()
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    return value.item(), (time.perf_counter() - start) * 1e3


def in_turn(leaves: list[Tensor], forms: Mapping[str, Form], rounds: int) -> dict[str, list[float]]:
    """Loss and fastest time of every form, rounds taken in turn after one to warm up."""
    best = {name: [0.0, math.inf] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            loss, spent = step(leaves, form)
            best[name] = [loss, min(best[name][1], spent) if turn else math.inf]
    return best


def one_step(case: str, form: str, n: int, d: int, against: set[str], threads: int) -> None:
    """Print loss, time in ms and extra peak memory in MB of one step, after a small one."""
    torch.set_num_threads(threads)
    leaves, forms = forms_of(case, 256, d, against)
    step(leaves, forms[form])
    leaves, forms = forms_of(case, n, d, against)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    loss, spent = step(leaves, forms[form])
    print(loss, spent, resident("VmHWM") - before)


def resident(key: str) -> float:
    """Memory of this process in MB, now (``VmRSS``) or at its peak (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def alone(*arguments: object) -> list[float]:
    """Run `one_step` in a process of its own."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import losses; losses.one_step{arguments}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in run.stdout.splitlines()[-1].split()]


def measure(case: str, n: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Loss, time and memory of all forms of one case and size, by form."""
    against = set(given.against.split(","))
    leaves, forms = forms_of(case, n, given.dim, against)
    times = in_turn(leaves, forms, max(3, 20000 // n)) if n <= LARGEST_IN_TURN else {}
    found = {}
    for name in forms:
        if name == "ours with info" and n > LARGEST_IN_TURN:
            continue
        row = times.get(name, [])
        told = n >= SMALLEST_TOLD and LINUX
        if told and name not in {"ours with info", "compiled"}:
            single = alone(case, name, n, given.dim, against, given.threads)
            row = (row or single[:2]) + single[2:]
        found[name] = dict(zip(("loss", "ms", "mb"), row, strict=False))
    expected = found["ours"]["loss"]
    for name, result in found.items():
        if name != "floor" and abs(result["loss"] - expected) > 1e-4 * abs(expected):
            raise SystemExit(f"{case}: {name} gives {result['loss']}, ours {expected}")
    return found


def second_order(d: int) -> float:
    """Time of a gradient of a gradient over that of a single step, 1,024 pairs."""
    x, y, _ = embeddings(1024, d)

    def slopes(twice: bool) -> Tensor:
        parts = torch.autograd.grad(dc.nt_xent(x, y, TEMPERATURE), [x, y], create_graph=twice)
        return torch.stack([part.square().sum() for part in parts]).sum()

    times = in_turn([x, y], {"single": lambda: slopes(False), "double": lambda: slopes(True)}, 8)
    return times["double"][1] / times["single"][1]


HEAD = """
| loss | pairs | ours, ms | floor / ours | dense / ours | lightly / ours | PML / ours | ours, MB | \
dense, MB | lightly, MB | PML, MB |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line(case: str, n: int, found: Mapping[str, Mapping[str, float]]) -> str:
    """One row of the table: times over ours, then extra peak memory."""
    ours = found["ours"]
    dense = min((found[name]["ms"] for name in ("dense", "compiled") if name in found), default=0.0)
    peers = [found.get(name, {}).get("ms", 0.0) for name in ("lightly", "pml")]
    ratios = [found.get("floor", {}).get("ms", 0.0), dense, *peers]
    cells = [f"{value / ours['ms']:.2f}" if value else "" for value in ratios]
    sizes = [found.get(name, {}).get("mb") for name in ("ours", "dense", "lightly", "pml")]
    cells += ["" if size is None else f"{size:,.0f}" for size in sizes]
    return f"| `{case}` | {n:,} | {ours['ms']:,.2f} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="64,256,1024,4096,16384,65536")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--against", default=",".join(MATRICES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {given.threads} thread(s), {given.dim} dimensions, wall time"
    )
    print(HEAD, flush=True)
    table, notes = [], []
    for case in given.cases.split(","):
        for n in map(int, given.sizes.split(",")):
            large = n > LARGEST_IN_TURN
            if n != 256 if case == "info_nce" else large and (case == "swav_loss" or not LINUX):
                continue
            found = measure(case, n, given)
            table += [{"case": case, "pairs": n, "form": key, **row} for key, row in found.items()]
            print(line(case, n, found), flush=True)
            if "ours with info" in found:
                share = found["ours with info"]["ms"] / found["ours"]["ms"] - 1
                notes.append(f"{share:.0%} at {n:,} pairs")
    if notes:
        print("\n`return_info` adds " + ", ".join(notes) + ".")
        print(f"A second derivative takes {second_order(given.dim):.1f} times a step, 1,024 pairs.")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
