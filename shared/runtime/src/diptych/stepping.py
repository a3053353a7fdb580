"""What a task may do inside one training step, and inside a validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych import distributed
from diptych.contract import Batch
from diptych.loading import to_device
from diptych.randomness import Draw

_KEPT_VALUES = 1 << 16  # larger buffers (queues) are not copied at every step
_SMALLEST_SCALE = 1.0  # below it, overflow is no matter of fp16 scaling any more


@dataclass
class RunningMeans:
    """Means of logged values over an epoch, weighted by items and read only at its end."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor | float, items: int) -> None:
        """Count a mean over some items."""
        if isinstance(value, Tensor):
            value = value.detach()
            value = value if value.device.type == "mps" else value.double()
        self.sums[name] = self.sums.get(name, 0.0) + value * items
        self.items[name] = self.items.get(name, 0) + items

    def stored(self) -> dict[str, tuple[float | None, int]]:
        """Sums and items as JSON; a sum that is not finite is null."""
        sums = {name: float(total) for name, total in self.sums.items()}
        return {
            name: (total if math.isfinite(total) else None, self.items[name])
            for name, total in sums.items()
        }

    def restore(self, stored: Mapping[str, Sequence[Any]]) -> None:
        """Add sums and items that :meth:`stored` gave."""
        for name, (total, items) in stored.items():
            self.sums[name] = self.sums.get(name, 0.0) + (math.nan if total is None else total)
            self.items[name] = self.items.get(name, 0) + items

    def means(self) -> dict[str, float]:
        """The means so far."""
        return {name: float(self.sums[name]) / items for name, items in self.items.items()}


class Machinery:
    """The optimizers of a fit and everything that their steps need.

    Args:
        fabric: Launched.
        modules: All modules of the task.
        optimizers: Of the task, by name.
        clip: Largest gradient norm where a step names none.
        precision: The config's ``run.precision``.
    """

    def __init__(
        self,
        fabric: Fabric,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        clip: float | None,
        precision: str,
    ) -> None:
        self.fabric = fabric
        self.optimizers = optimizers
        self.clip = clip
        self.group = distributed.group_of(fabric)
        self.scaler: torch.amp.GradScaler | None = None
        if precision == "16-mixed":
            self.scaler = torch.amp.GradScaler(fabric.device.type)
        self.parameters = {
            name: [p for part in optimizer.param_groups for p in part["params"] if p.requires_grad]
            for name, optimizer in optimizers.items()
        }
        own = [p for module in modules.values() for p in module.parameters()]
        self.with_gradient = list(
            dict.fromkeys([*own, *(p for known in self.parameters.values() for p in known)])
        )
        # owner and name, because a module may put another tensor in a buffer's place
        self._buffers = [
            (part, name)
            for module in modules.values()
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
        ]
        self._kept: list[Tensor] = []

    def buffers(self) -> list[Tensor]:
        """All buffers of the modules as they are now, each once."""
        found = (part._buffers[name] for part, name in self._buffers)
        return list(dict.fromkeys(buffer for buffer in found if buffer is not None))

    def keep_buffers(self) -> None:
        """Remember the small buffers, after making all buffers those of the first process."""
        buffers = self.buffers()
        distributed.broadcast_tensors(buffers, self.fabric)
        small = _small(buffers)
        if [kept.shape for kept in self._kept] == [buffer.shape for buffer in small]:
            if small:
                torch._foreach_copy_(self._kept, small)
        else:
            self._kept = [buffer.detach().clone() for buffer in small]

    def restore_buffers(self) -> None:
        """Take back what a skipped step did to batch statistics and counters."""
        small = _small(self.buffers())
        if small:
            with torch.no_grad():
                torch._foreach_copy_(small, self._kept)

    def broadcast(self) -> None:
        """Make all parameters and buffers those of the first process."""
        distributed.broadcast_tensors([*self.with_gradient, *self.buffers()], self.fabric)

    def clear_gradients(self) -> None:
        """Forget all gradients, so that nothing passes from one step to the next unseen."""
        for parameter in self.with_gradient:
            parameter.grad = None


def _small(buffers: Sequence[Tensor]) -> list[Tensor]:
    return [buffer for buffer in buffers if buffer.numel() <= _KEPT_VALUES]


@dataclass
class Group:
    """Batches that share one optimizer step.

    Args:
        total: Items of all its batches, on all processes.
    """

    total: int
    losses: list[Tensor] = field(default_factory=list)
    scaled: set[str] = field(default_factory=set)  # optimizers that the scaler has served
    stepped: bool = False
    skipped: bool = False


class StepContext:
    """The loop as ``Task.train_step`` sees it.

    Gradients are empty when a step begins. With ``train.accumulate`` several batches form one
    step: ``zero`` acts in the first of them and ``step`` in the last.

    Attributes:
        epoch: Epoch, counted from 0.
        step_index: Batches of this fit before this one.
        progress: How much of the fit is done, from 0 to 1.
        group: For the ``group=`` of losses; None with a single process.
        device: Where the batch and the modules are.
        weight: Turns a mean over this process's items of the batch into this process's share of
            the mean over all items: 1 but for batches that do not divide evenly.
    """

    def __init__(
        self,
        machinery: Machinery,
        shared: Group,
        draw: Draw,
        *,
        step_index: int,
        progress: float,
        items: int,
        batch_items: int,
        first: bool,
        last: bool,
    ) -> None:
        self.epoch = draw.epoch
        self.step_index = step_index
        self.progress = progress
        self.group = machinery.group
        self.device = machinery.fabric.device
        self.logged: list[tuple[str, Tensor | float]] = []
        self._machinery, self._shared, self._draw = machinery, shared, draw
        self.weight = items * machinery.fabric.world_size / batch_items
        self._part = batch_items / shared.total
        self._first, self._last = first, last

    def backward(self, loss: Tensor, retain_graph: bool = False, *, weighted: bool = False) -> None:
        """Add a loss's gradients.

        Args:
            loss: A scalar, the mean over this process's items of the batch. It is multiplied by
                ``weight``, so that the mean over processes is the mean over all items.
            retain_graph: Whether another backward pass follows through the same graph.
            weighted: Whether the loss has that weight already, as losses with ``group=`` have;
                in a sum with them, multiply the other terms by ``weight``.
        """
        self._shared.losses.append(loss.detach())
        factor = self._part if weighted else self._part * self.weight
        if factor != 1.0:
            loss = loss * factor
        if self._machinery.scaler is not None:
            loss = self._machinery.scaler.scale(loss)
        torch.autograd.backward(loss, retain_graph=retain_graph)

    def zero(self, name: str) -> None:
        """Forget the gradients of an optimizer's parameters.

        Args:
            name: Key of ``Task.optimizers``.
        """
        if self._first:
            for parameter in self._parameters(name):
                parameter.grad = None

    def step(self, name: str, clip: float | None = None, clip_value: float | None = None) -> None:
        """Average gradients over the processes, clip them, and let an optimizer step.

        A loss or gradient norm that is not finite leaves the parameters as they are.

        Args:
            name: Key of ``Task.optimizers``.
            clip: Largest gradient norm; None takes ``train.clip``.
            clip_value: Largest absolute value of a gradient.
        """
        parameters = self._parameters(name)
        if not self._last:
            return
        machinery, optimizer = self._machinery, self._machinery.optimizers[name]
        losses_finite = self._exchange(parameters)
        scaler = machinery.scaler
        if scaler is not None:
            if name in self._shared.scaled:  # a second step of the same optimizer
                scaler.update()
            scaler.unscale_(optimizer)
            self._shared.scaled.add(name)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if not (losses_finite and self._is_finite(norm)):
            overflow = scaler is not None and scaler.get_scale() >= _SMALLEST_SCALE
            self._shared.skipped |= not (overflow and losses_finite and self._losses_finite())
            if scaler is not None and gradients:
                scaler.step(optimizer)  # steps not, but counts the overflow
            for parameter in parameters:
                parameter.grad = None
            return
        bound = machinery.clip if clip is None else clip
        if bound is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, clip_value)
        if scaler is not None and gradients:
            scaler.step(optimizer)
        else:
            optimizer.step()
        self._shared.stepped = True

    def draw(self, purpose: str) -> Draw:
        """The fit's keyed draws for a purpose in this epoch."""
        return self._draw.of(purpose)

    def gather(self, tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "total ..."]:
        """Rows of all processes in rank order, without gradient; their number may differ."""
        return distributed.gather(tensor, self._machinery.fabric)

    def log(self, name: str, value: Tensor | float) -> None:
        """Log a value; its mean over the epoch, weighted by items, is written down."""
        self.logged.append((name, value))

    def _parameters(self, name: str) -> list[nn.Parameter]:
        try:
            return self._machinery.parameters[name]
        except KeyError:
            known = ", ".join(self._machinery.parameters)
            raise ValueError(f"no optimizer {name!r} in the task (there are: {known})") from None

    def _exchange(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Average gradients over processes; whether all processes have finite losses."""
        fabric = self._machinery.fabric
        if fabric.world_size == 1:
            return True
        missing = not self._losses_finite()
        flags = [missing, *(parameter.grad is not None for parameter in parameters)]
        missing, *present = distributed.any_process(flags, fabric)
        distributed.average_gradients(parameters, present, fabric)
        return not missing

    def _is_finite(self, norm: Tensor) -> bool:
        """One read of the device: a sum is finite where all of its parts are."""
        return math.isfinite(sum((loss.float() for loss in self._shared.losses), norm).item())

    def _losses_finite(self) -> bool:
        return math.isfinite(float(sum(self._shared.losses)))


class EpochContext:
    """The loop as ``Task.validate`` and ``Task.finish`` see it; all modules are in eval mode.

    ``validate`` runs without gradients (``torch.enable_grad`` switches them on), ``finish`` with.

    Attributes:
        epoch: Epochs done so far; 0 before the first step.
        device: Where the modules are.
        group: For the ``group=`` of losses; None with a single process.
    """

    def __init__(self, fabric: Fabric, draw: Draw) -> None:
        self.epoch = draw.epoch
        self.device = fabric.device
        self.group = distributed.group_of(fabric)
        self.logged: dict[str, float] = {}
        self._fabric, self._draw = fabric, draw

    def draw(self, purpose: str) -> Draw:
        """The fit's keyed draws for a purpose at this epoch."""
        return self._draw.of(purpose)

    def gather(self, tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "total ..."]:
        """Rows of all processes in rank order, without gradient; their number may differ."""
        return distributed.gather(tensor, self._fabric)

    def log(self, name: str, value: Tensor | float) -> None:
        """Write a value down beside the metrics."""
        self.logged[name] = float(value)

    def to_device(self, batch: Batch) -> Batch:
        """The tensors of a batch on the device of the modules."""
        return to_device(batch, self.device)


@contextmanager
def evaluation_mode(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each part in the mode it was in."""
    parts = [(part, part.training) for module in modules.values() for part in module.modules()]
    for module in modules.values():
        module.eval()
    try:
        yield
    finally:
        for part, training in parts:
            part.training = training
