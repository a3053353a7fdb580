"""State that training carries along: queues of embeddings, momentum encoder, temperature.

Every module keeps all of its state in tensors and stores a version beside them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diptych_contrast.dist import gather_no_grad, gather_sizes
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice, check_generator, check_integers, check_least

STATE_VERSION = 1


def keep_version(module: nn.Module) -> None:
    """Store the state's version as a tensor and refuse a state of a later version by name."""
    module.register_buffer("version", torch.tensor(STATE_VERSION))
    name = type(module).__name__

    def check(_: nn.Module, state: Mapping[str, Any], prefix: str, *_rest: Any) -> None:
        found = state.get(prefix + "version")
        if found is not None and int(found) > STATE_VERSION:
            found = f"is {int(found)}, this package reads up to {STATE_VERSION}"
            fix = "update diptych-contrast"
            raise ContrastInputError(f"{name}.load_state_dict", f"{prefix}version", found, fix)

    module.register_load_state_dict_pre_hook(check)  # type: ignore[no-untyped-call]


class KeyQueue(nn.Module):
    """A ring buffer of the newest keys, used as negatives (He et al., 2020, MoCo).

    Empty slots are never negatives: `stored` leaves them out, `valid` marks them. Enqueue after
    the backward pass, because it overwrites keys in place.

    Args:
        labels: Whether a label is kept beside every key; ``ids``, a sample id; ``steps``, the
            training step of the enqueue.
        init: ``empty``, or ``random``: full of unit vectors of ``generator``, as the official code.

    Example:
        >>> queue = KeyQueue(4096, 128); queue.enqueue(torch.randn(256, 128)); len(queue.stored())
        256
    """

    keys: Tensor
    index: Tensor
    filled: Tensor
    labels: Tensor | None
    ids: Tensor | None
    steps: Tensor | None

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        labels: bool = False,
        ids: bool = False,
        steps: bool = False,
        init: Literal["empty", "random"] = "empty",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_least("KeyQueue", 1, size=size, dim=dim)
        self.size = size
        self.dim = dim
        self.register_buffer("keys", _first_keys(size, dim, init, generator))
        self.register_buffer("index", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(size if init == "random" else 0))
        for name, wanted in (("labels", labels), ("ids", ids), ("steps", steps)):
            self.register_buffer(name, torch.full((size,), -1) if wanted else None)
        keep_version(self)

    def stored(self) -> Float[Tensor, "filled dim"]:
        """The keys of the filled slots, oldest first until the ring wraps; a view, no copy.

        Reads the fill count, which waits for the device; use `valid` where that must not happen.
        """
        return self.keys[: int(self.filled)]

    def valid(self) -> Bool[Tensor, " size"]:
        """Which slots are filled, without waiting for the device."""
        return torch.arange(self.size, device=self.keys.device) < self.filled

    @torch.no_grad()
    def enqueue(
        self,
        keys: Float[Tensor, "n dim"],
        *,
        labels: Int[Tensor, " n"] | None = None,
        ids: Int[Tensor, " n"] | None = None,
        step: int | None = None,
        gather: bool = False,
        group: torch_dist.ProcessGroup | None = None,
    ) -> None:
        """Store a batch of keys, detached, over the oldest ones, with the marks the queue keeps.

        With ``gather`` these are the keys of all processes of the group (None: the default one),
        in rank order, so that all queues are equal.
        """
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            found = f"has shape {tuple(keys.shape)}, the queue holds rows of {self.dim}"
            fix = "build the queue with the dimension of the head's output"
            raise ContrastInputError("KeyQueue.enqueue", "keys", found, fix)
        columns = {"keys": keys.detach()} | self._marks(keys, labels, ids, step)
        if gather:
            sizes = gather_sizes(keys, group)
            columns = {name: gather_no_grad(x, group, sizes=sizes) for name, x in columns.items()}
        count = columns["keys"].shape[0]
        if count > self.size:
            found = f"has {count} rows, the queue has {self.size} slots"
            fix = "take a queue of at least one global batch"
            raise ContrastInputError("KeyQueue.enqueue", "keys", found, fix)
        slots = (self.index + torch.arange(count, device=self.keys.device)) % self.size
        for name, values in columns.items():
            buffer = getattr(self, name)
            buffer.index_copy_(0, slots, values.to(buffer))
        self.index.copy_((self.index + count) % self.size)
        self.filled.copy_((self.filled + count).clamp(max=self.size))

    def _marks(
        self, keys: Tensor, labels: Tensor | None, ids: Tensor | None, step: int | None
    ) -> dict[str, Tensor]:
        count = keys.shape[0]
        steps = None if step is None else torch.full((count,), step, device=keys.device)
        marks = {}
        for name, values in (("labels", labels), ("ids", ids), ("steps", steps)):
            argument = "step" if name == "steps" else name
            if (values is None) != (getattr(self, name) is None):
                missing = values is None
                found = "is missing" if missing else "is given, but the queue does not keep it"
                fix = f"pass {argument}=" if missing else f"build the queue with {name}=True"
                raise ContrastInputError("KeyQueue.enqueue", argument, found, fix)
            if values is None:
                continue
            check_integers("KeyQueue.enqueue", argument, values, count)
            marks[name] = values
        return marks


def _first_keys(size: int, dim: int, init: str, generator: torch.Generator | None) -> Tensor:
    check_choice("KeyQueue", "init", init, "empty", "random")
    if init == "empty":
        return torch.zeros(size, dim)
    generator = check_generator("KeyQueue", generator)
    return F.normalize(torch.randn(size, dim, generator=generator))


class CrossBatchMemory(nn.Module):
    """Embeddings of earlier batches with labels, as further rows of a supervised loss (XBM).

    Wang et al., CVPR 2020. The encoder moves on while embeddings wait, so the memory gives nothing
    before ``start_step``, and `drift` tells how far the stored ones lag behind. Rows of samples
    that are in the current batch are left out: a copy of its own row would be a positive that
    nothing can be learned from. Call `others` before the loss, `enqueue` after the backward pass.

    Example:
        >>> memory = CrossBatchMemory(1024, 8, start_step=0)
        >>> memory.enqueue(torch.eye(8), torch.arange(8), torch.arange(8))
        >>> memory.others(torch.tensor([0, 1]), step=0)[1].tolist()
        [2, 3, 4, 5, 6, 7]
    """

    def __init__(self, size: int, dim: int, start_step: int = 1000) -> None:
        super().__init__()
        self.queue = KeyQueue(size, dim, labels=True, ids=True)
        self.start_step = start_step

    def others(
        self, ids: Int[Tensor, " n"], step: int
    ) -> tuple[Float[Tensor, "m dim"], Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Embeddings, labels and ids of stored samples that are not in the batch, no gradient."""
        labels, stored = self.queue.labels, self.queue.ids
        assert labels is not None
        assert stored is not None
        wanted = self.queue.valid() & ~torch.isin(stored, ids) & (step >= self.start_step)
        # a copy: the graph of the loss must not see the slots being overwritten
        return self.queue.keys[wanted], labels[wanted], stored[wanted]

    def enqueue(
        self,
        z: Float[Tensor, "n dim"],
        labels: Int[Tensor, " n"],
        ids: Int[Tensor, " n"],
        *,
        gather: bool = False,
        group: torch_dist.ProcessGroup | None = None,
    ) -> None:
        """Store a batch over the oldest rows, as `KeyQueue.enqueue` does."""
        self.queue.enqueue(z, labels=labels, ids=ids, gather=gather, group=group)

    @torch.no_grad()
    def drift(self, z: Float[Tensor, "n dim"], ids: Int[Tensor, " n"]) -> float:
        """Mean cosine of stored embeddings and those of now; NaN where none of them is held."""
        assert self.queue.ids is not None
        held = (self.queue.ids == ids[:, None]) & self.queue.valid()
        age = (self.queue.index - 1 - torch.arange(self.queue.size, device=ids.device)) % (
            self.queue.size
        )
        newest = age.expand_as(held).masked_fill(~held, self.queue.size).argmin(1)
        found = held.any(1)
        return float(F.cosine_similarity(z, self.queue.keys[newest].to(z), dim=1)[found].mean())


class MomentumEncoder(nn.Module):
    """A frozen copy of a model that follows it as an exponential moving average (MoCo, BYOL).

    The model itself is referred to, not owned: its weights are in no state dict of this module.

    Args:
        m: Share of the old weights that an update keeps, in [0, 1].
        schedule: The same as a function of the step, such as `cosine_momentum`; replaces ``m``.
        buffers: ``copy`` the model's, or average floating-point ones too (``ema``).
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
        check_choice("MomentumEncoder", "buffers", buffers, "copy", "ema")
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
        """Move the copy towards the model; a second call for the same step changes nothing."""
        check_least("MomentumEncoder.update", 0, step=step)
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
        found = f"gained or lost {changed[:3]} since it was copied"
        fix = "build the momentum encoder after the model is complete"
        raise ContrastInputError("MomentumEncoder.update", "model", found, fix)
    return list(mine.values()), [theirs[name] for name in mine]


def _checked_momentum(momentum: float, argument: str) -> float:
    if not 0 <= momentum <= 1:
        found, fix = f"gives a momentum of {momentum}", "pass a momentum in [0, 1]"
        raise ContrastInputError("MomentumEncoder", argument, found, fix)
    return momentum


def cosine_momentum(m0: float, m1: float, steps: int) -> Callable[[int], float]:
    """Momentum that rises from ``m0`` to ``m1`` along half a cosine (Grill et al., 2020, BYOL)."""
    check_least("cosine_momentum", 1, steps=steps)
    _checked_momentum(m0, "m0")
    _checked_momentum(m1, "m1")

    def momentum(step: int) -> float:
        share = min(max(step / steps, 0.0), 1.0)
        return m1 - (m1 - m0) * (1 + math.cos(math.pi * share)) / 2

    return momentum


class Temperature(nn.Module):
    """A temperature, fixed or learned, that stays within bounds.

    The module stores ``log(1/tau)`` and clamps it in the forward pass. At a bound the gradient
    passes only if a descent step leads back inside, so a learned temperature can rest at a bound
    without running away from it or sticking to it. Leave it out of weight decay, which would draw
    it towards 1. A minimum of 0.01 caps the scale at 100, as CLIP does (Radford et al., 2021).

    Example:
        >>> round(Temperature(0.07)().item(), 4)
        0.07
    """

    def __init__(
        self, init: float, learnable: bool = False, min: float = 0.01, max: float = 1.0
    ) -> None:
        super().__init__()
        if not (0 < min <= max < math.inf):
            found, fix = f"is {min} with max {max}", "pass finite bounds with 0 < min <= max"
            raise ContrastInputError("Temperature", "min", found, fix)
        if not (min <= init <= max):
            found = f"is {init}, outside [{min}, {max}]"
            fix = "pass a temperature within the bounds, or widen them"
            raise ContrastInputError("Temperature", "init", found, fix)
        self.min = min
        self.max = max
        log_scale = torch.tensor(-math.log(init))
        self.log_scale: Tensor
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        keep_version(self)

    def forward(self) -> Float[Tensor, ""]:
        """The temperature, within ``[min, max]``, at least in float32."""
        wide = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        low, high = -math.log(self.max), -math.log(self.min)
        clamped: Tensor = _ClampInwards.apply(wide, low, high)  # type: ignore[no-untyped-call]
        return torch.exp(-clamped)

    def extra_repr(self) -> str:
        """Bounds and kind, for the printed module."""
        learnable = isinstance(self.log_scale, nn.Parameter)
        return f"min={self.min}, max={self.max}, learnable={learnable}"


class _ClampInwards(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outwards = ((x >= ctx.high) & (gradient < 0)) | ((x <= ctx.low) & (gradient > 0))
        return gradient * ~outwards, None, None
