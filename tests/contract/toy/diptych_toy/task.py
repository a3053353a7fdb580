"""The toy's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ToyTask:
    """Cross-entropy of a linear model on points with keyed noise."""

    def __init__(self, config: Any, prepared: Any, fit: Any, modules: Any, earlier: Any) -> None:
        self.config, self.split, self.modules = config, fit.split, modules
        self.optimizers = {"net": torch.optim.Adam(modules["net"].parameters(), config.optim.lr)}
        self.x = torch.tensor(prepared.array("x"))
        self.y = torch.tensor(prepared.index["label"].to_numpy())

    def epochs(self) -> int:
        epochs: int = self.config.train.epochs
        return epochs

    def batches(self, epoch: int, draw: Any) -> Sequence[Sequence[int]]:
        order, size = draw.permutation(self.split.train), self.config.train.batch
        return [order[i : i + size] for i in range(0, len(order), size)]

    def load(self, items: Sequence[int], epoch: int, draw: Any) -> Any:
        noise = draw.of("noise").normal(items, 2).astype("float32") * 0.1
        return self.x[list(items)] + torch.from_numpy(noise), self.y[list(items)]

    def train_step(self, batch: Any, ctx: Any) -> Mapping[str, Tensor]:
        x, y = batch
        loss = nn.functional.cross_entropy(self.modules["net"](x), y)
        ctx.backward(loss)
        ctx.step("net")
        return {"loss": loss}

    def validate(self, ctx: Any) -> Mapping[str, float]:
        rows = list(self.split.validation)
        if not rows:
            return {}
        with torch.no_grad():
            logits = self.modules["net"](self.x[rows])
        return {"loss_validation": float(nn.functional.cross_entropy(logits, self.y[rows]))}
