"""Small tasks of every kind, and a program that trains one: FOLDER KIND [field=value ...]."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau

from diptych.config import RunSection, TrainSection
from diptych.contract import Schedule
from diptych.loop import EpochContext, Settings, StepContext, fit
from diptych.randomness import Draw, isolated_globals, seed_globals

ITEMS = 37


def data(kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ITEMS + 20, 6, generator=generator, dtype=kind)
    return x, (x[:, 0] * x[:, 1] + 0.3 * x[:, 2] > 0).to(torch.int64)


@dataclass
class Plain:
    """One network, one optimizer, schedules of both kinds, keyed noise, validation."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer] = field(init=False)
    schedules: Mapping[str, Schedule] = field(init=False)
    length: int = 4
    batch: int = 8
    delay: float = 0.0
    hook: Any = None  # called with (task, ctx) after each step
    before: Any = None  # called with (task, batch, ctx) before each step
    order: list[list[int]] = field(default_factory=list)
    accumulates: bool = True

    def __post_init__(self) -> None:
        self.x, self.y = data(next(self.modules["net"].parameters()).dtype)
        self.optimizers = {"main": torch.optim.Adam(self.modules["net"].parameters(), lr=0.02)}
        main = self.optimizers["main"]
        self.schedules = {
            "warm": Schedule(LinearLR(main, 0.5, total_iters=7), every="step"),
            "plateau": Schedule(ReduceLROnPlateau(main, patience=0), metric="loss"),
        }

    def epochs(self) -> int:
        return self.length

    def batches(self, epoch: int, draw: Draw) -> list[list[int]]:
        order = draw.of("order").permutation(range(ITEMS)).tolist()
        return [order[start : start + self.batch] for start in range(0, ITEMS, self.batch)]

    def load(self, items: Sequence[int], epoch: int, draw: Draw) -> dict[str, Tensor]:
        noise = torch.from_numpy(draw.of("noise").normal(items, 6)).to(self.x.dtype)
        jitter = torch.zeros(())
        if self.x.dtype is torch.float32:  # from the global generator: per process
            jitter = 1e-3 * torch.rand(len(items), 6)
        where = torch.tensor(items)
        return {"x": self.x[where] + 0.1 * noise + jitter, "y": self.y[where], "items": where}

    def train_step(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        self.order.append(batch["items"].tolist())
        if self.before:
            self.before(self, batch, ctx)
        if self.delay:
            time.sleep(self.delay)
        ctx.zero("main")
        loss = F.cross_entropy(self.modules["net"](batch["x"]), batch["y"])
        ctx.backward(loss)
        ctx.step("main")
        if self.hook:
            self.hook(self, ctx)
        return {"loss": loss}

    def validate(self, ctx: EpochContext) -> dict[str, float]:
        logits = self.modules["net"](self.x[ITEMS:])
        loss = float(F.cross_entropy(logits, self.y[ITEMS:]))
        return {
            "loss": loss,
            "accuracy": float((logits.argmax(1) == self.y[ITEMS:]).float().mean()),
        }

    def artifacts(self) -> dict[str, Any]:
        return {"mean": self.x.mean(0).numpy()}


@dataclass
class Adversarial(Plain):
    """Two optimizers that take turns; the discriminator steps twice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizers = {
            name: torch.optim.AdamW(module.parameters(), lr=0.01)
            for name, module in self.modules.items()
        }
        self.schedules = {"net": Schedule(CosineAnnealingLR(self.optimizers["net"], 4))}
        self.accumulates = False

    def train_step(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        self.order.append(batch["items"].tolist())
        net, judge = self.modules["net"], self.modules["judge"]
        for _ in range(2):
            ctx.zero("judge")
            against = judge(batch["x"][:, :2]).mean() - judge(net(batch["x"]).detach()).mean()
            ctx.backward(against + judge(batch["x"][:, 2:4]).square().mean())
            ctx.step("judge", clip_value=0.1)
        ctx.zero("net")
        loss = judge(net(batch["x"])).mean() + F.cross_entropy(net(batch["x"]), batch["y"])
        ctx.backward(loss)
        ctx.step("net")
        if self.hook:
            self.hook(self, ctx)
        return {"loss": loss, "against": against}


@dataclass
class Meta(Plain):
    """A gradient through an inner step, and a moving average of weights as buffers."""

    def train_step(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        self.order.append(batch["items"].tolist())
        net = self.modules["net"]
        names, values = zip(*net.named_parameters(), strict=True)
        inner = F.cross_entropy(net(batch["x"]), batch["y"])
        slopes = torch.autograd.grad(inner, values, create_graph=True)
        fast = {n: v - 0.1 * s for n, v, s in zip(names, values, slopes, strict=True)}
        again = torch.func.functional_call(net, fast, (batch["x"].flip(1),))
        loss = F.cross_entropy(again, batch["y"])
        ctx.backward(loss + 0.5 * inner)
        ctx.step("main", clip=0.5)
        average = self.modules["average"]
        with torch.no_grad():
            for slow, now in zip(average.buffers(), net.parameters(), strict=True):
                slow.lerp_(now, 0.1)
        if self.hook:
            self.hook(self, ctx)
        return {"loss": loss}


@dataclass
class Coupled(Plain):
    """A loss over the whole global batch beside one over single items."""

    def train_step(self, batch: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        from diptych_contrast import nt_xent

        net = self.modules["net"]
        contrast = nt_xent(net(batch["x"]), net(batch["x"].flip(1)), group=ctx.group)
        entropy = F.cross_entropy(net(batch["x"]), batch["y"])
        ctx.backward(contrast + ctx.weight * entropy, weighted=True)
        ctx.step("main")
        if self.hook:
            self.hook(self, ctx)
        return {"loss": entropy}


class Average(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for index, parameter in enumerate(module.parameters()):
            self.register_buffer(f"slow_{index}", parameter.detach().clone())


def network(kind: str) -> nn.Module:
    if kind == "exact":  # nothing that depends on how a batch is cut
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
    )


def task(kind: str, seed: int = 1, **fields: Any) -> Plain:
    """plain, adversarial, meta or coupled; "-exact" is float64 without batch statistics."""
    word, _, form = kind.partition("-")
    with isolated_globals():
        seed_globals(seed, "train", 0)
        net = network(form)
        if word == "adversarial":
            judge = nn.Linear(2, 1).to(next(net.parameters()).dtype)
            return Adversarial({"net": net, "judge": judge}, **fields)
        if word == "meta":
            return Meta({"net": net, "average": Average(net)}, **fields)
        return {"plain": Plain, "coupled": Coupled}[word]({"net": net}, **fields)


def settings(seed: int = 1, **changes: Any) -> Settings:
    run = {name: changes.pop(name) for name in list(changes) if name in RunSection.model_fields}
    run = {"device": "cpu", **run}
    train = {name: changes.pop(name) for name in list(changes) if name in TrainSection.model_fields}
    return Settings(TrainSection(**train), RunSection(**run), seed, **changes)


def digest(modules: Mapping[str, nn.Module]) -> str:
    found = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in module.state_dict().items():
            found.update(f"{name}/{key}".encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def require_equal_processes(known: Plain, ctx: StepContext) -> None:
    flat = torch.cat(
        [p.detach().reshape(-1) for m in known.modules.values() for p in m.parameters()]
    )
    rows = ctx.gather(flat[None])
    assert len(rows) == int(known.processes)  # type: ignore[attr-defined]
    assert bool((rows == rows[0]).all()), "parameters differ between processes"


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    values: dict[str, Any] = {}
    for word in sys.argv[3:]:
        name, _, text = word.partition("=")
        values[name] = float(text) if "." in text else int(text)
    torch.set_num_threads(1)
    fields = {name: values.pop(name) for name in ("length", "batch", "delay") if name in values}
    processes = values.get("devices", 1)
    known = task(kind, hook=require_equal_processes, **fields)
    known.processes = processes  # type: ignore[attr-defined]
    chosen = settings(metric="loss", better="lower", threads=1, **values)
    result = fit(known, chosen, folder)
    line = f"{digest(known.modules)} {result.best_epoch} {result.best_metric}\n"
    os.write(1, line.encode())  # in one piece, as several processes share the output


if __name__ == "__main__":
    main()
