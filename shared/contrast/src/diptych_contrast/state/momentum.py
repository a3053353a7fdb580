"""A frozen copy of a model that follows it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.state.version import keep_version


class MomentumEncoder(nn.Module):
    """A frozen copy of a model that follows it as an exponential moving average (MoCo, BYOL).

    The model itself is referred to, not owned: its weights are in no state dict of this module.

    Args:
        model: The model to follow. The copy starts with its weights.
        m: Momentum in [0, 1]: the share of the old weights that is kept in an update.
        schedule: Momentum as a function of the step, such as `cosine_momentum`; replaces ``m``.
        buffers: ``"copy"`` takes the model's buffers as they are, ``"ema"`` averages the
            floating-point ones too.

    Raises:
        ContrastInputError: ``m`` outside [0, 1], or unknown ``buffers``.

    Example:
        >>> teacher = MomentumEncoder(nn.Linear(8, 4)); teacher.update(step=0)
    """

    last_step: Tensor

    def __init__(
        self,
        model: nn.Module,
        m: float = 0.996,
        schedule: Callable[[int], float] | None = None,
        *,
        buffers: Literal["copy", "ema"] = "copy",
    ) -> None:
        super().__init__()
        if buffers not in ("copy", "ema"):
            raise ContrastInputError(
                "MomentumEncoder", "buffers", f"is {buffers!r}", "pass 'copy' or 'ema'"
            )
        self.m = _checked_momentum(m, "m")
        self.schedule = schedule
        self.buffers_by = buffers
        self._model = (model,)  # a tuple keeps it out of the submodules
        self.encoder = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("last_step", torch.tensor(-1))
        keep_version(self)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy, without graph."""
        return self.encoder(*args, **kwargs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the copy towards the model; a second call for the same step changes nothing.

        Args:
            step: Number of the training step, at least 0.

        Raises:
            ContrastInputError: The model no longer has the copy's tensors, the step is negative,
                or the schedule gives a momentum outside [0, 1].
        """
        if step < 0:
            raise ContrastInputError("MomentumEncoder.update", "step", f"is {step}", "count from 0")
        if step == int(self.last_step):
            return
        momentum = (
            self.m if self.schedule is None else _checked_momentum(self.schedule(step), "schedule")
        )
        model = self._model[0]
        own, online = _paired(self.encoder.named_parameters(), model.named_parameters())
        own_buffers, online_buffers = _paired(self.encoder.named_buffers(), model.named_buffers())
        for target, source in zip(own_buffers, online_buffers, strict=True):
            if self.buffers_by == "ema" and target.is_floating_point():
                own.append(target)
                online.append(source)
            else:
                target.copy_(source)
        if own:
            torch._foreach_lerp_(own, online, 1.0 - momentum)
        self.last_step.fill_(step)


def _paired(own: Any, online: Any) -> tuple[list[Tensor], list[Tensor]]:
    mine, theirs = dict(own), dict(online)
    if mine.keys() != theirs.keys():
        changed = sorted(mine.keys() ^ theirs.keys())
        raise ContrastInputError(
            "MomentumEncoder.update",
            "model",
            f"gained or lost {changed[:3]} since it was copied",
            "build the momentum encoder after the model is complete",
        )
    return list(mine.values()), [theirs[name] for name in mine]


def _checked_momentum(momentum: float, argument: str) -> float:
    if not 0 <= momentum <= 1:
        raise ContrastInputError(
            "MomentumEncoder",
            argument,
            f"gives a momentum of {momentum}",
            "pass a momentum in [0, 1]",
        )
    return momentum


def cosine_momentum(m0: float, m1: float, steps: int) -> Callable[[int], float]:
    """Momentum that rises from ``m0`` to ``m1`` along half a cosine (Grill et al., 2020, BYOL).

    Args:
        m0: Momentum at step 0.
        m1: Momentum from step ``steps`` on.
        steps: Length of the schedule, at least 1.

    Returns:
        A function from step to momentum.

    Raises:
        ContrastInputError: ``steps`` below 1, or a momentum outside [0, 1].

    Example:
        >>> cosine_momentum(0.996, 1.0, 100)(100)
        1.0
    """
    if steps < 1:
        raise ContrastInputError("cosine_momentum", "steps", f"is {steps}", "pass at least 1")
    _checked_momentum(m0, "m0")
    _checked_momentum(m1, "m1")

    def momentum(step: int) -> float:
        share = min(max(step / steps, 0.0), 1.0)
        return m1 - (m1 - m0) * (1 + math.cos(math.pi * share)) / 2

    return momentum
