"""The optimizer of a fit, its learning rate over training, and averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from diptych.contract import Schedule
from diptych_pirads.config import PiradsConfig

MAIN = "main"  # name of the optimizer
_FACTOR, _PATIENCE, _LOWEST_RATE = 0.8, 25, 1e-8  # on a plateau; Meyer et al., ISBI 2019


def optimizer(net: nn.Module, config: PiradsConfig) -> Optimizer:
    """The optimizer that the section ``optim`` names."""
    settings = config.optim
    parameters, rate, decay = net.parameters(), settings.lr, settings.weight_decay
    if settings.name == "sgd":
        return SGD(parameters, rate, momentum=0.99, nesterov=True, weight_decay=decay)
    kind: type[Adam] = AdamW if settings.name == "adamw" else Adam
    return kind(parameters, rate, weight_decay=decay)


def schedules(optimizer: Optimizer, config: PiradsConfig, steps: int) -> dict[str, Schedule]:
    """The learning rate over training.

    Args:
        optimizer: Whose rate.
        config: Sections ``optim`` and ``train``.
        steps: Optimizer steps of the fit.

    Returns:
        "onecycle" rises to ``optim.lr`` and falls again; "plateau" falls where the validation
        loss does not, as in Meyer et al. (ISBI 2019).
    """
    kind = config.optim.schedule
    if kind == "constant" or not steps:
        return {}
    if kind == "onecycle":
        rising = OneCycleLR(optimizer, config.optim.lr, total_steps=steps + 1)
        return {MAIN: Schedule(rising, "step")}
    if kind == "cosine":
        return {MAIN: Schedule(CosineAnnealingLR(optimizer, steps), "step")}
    falling = ReduceLROnPlateau(optimizer, "min", _FACTOR, _PATIENCE, min_lr=_LOWEST_RATE)
    return {MAIN: Schedule(falling, "epoch", "loss")}


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move averaged weights a step towards the network's; buffers are copied."""
    targets: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(targets, list[Tensor](net.parameters()), 1 - decay)
    for target, value in zip(average.buffers(), net.buffers(), strict=True):
        target.copy_(value)
