"""Embeddings of earlier batches: negatives for this one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as torch_dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diptych_contrast.dist import gather_no_grad, gather_sizes
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.state.version import keep_version


class KeyQueue(nn.Module):
    """A ring buffer of the newest keys, used as negatives (He et al., 2020, MoCo).

    Empty slots are never negatives: `stored` leaves them out, `valid` marks them. Enqueue after
    the backward pass, because it overwrites keys in place.

    Args:
        size: Number of slots.
        dim: Length of a key.
        labels: Whether a label is kept beside every key.
        ids: Whether a sample id is kept beside every key.
        steps: Whether the training step of the enqueue is kept beside every key.
        init: ``"empty"``, or ``"random"``: full of random unit vectors, as the official code.
        generator: Source of the random vectors; needed with ``init="random"``.

    Raises:
        ContrastInputError: ``size`` or ``dim`` below 1, unknown ``init``, no generator.

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
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ContrastInputError("KeyQueue", name, f"is {value}", "pass at least 1")
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
        """Store a batch of keys over the oldest ones.

        Args:
            keys: The batch; detached and cast to the queue's dtype.
            labels: Their labels, exactly when the queue keeps labels.
            ids: Their sample ids, exactly when the queue keeps ids.
            step: The training step, exactly when the queue keeps steps.
            gather: Store the keys of all processes, in rank order, so that all queues are equal.
            group: Process group of ``gather``; None is the default group.

        Raises:
            ContrastInputError: Keys of another dimension, a batch larger than the queue, or
                labels, ids or step that do not fit what the queue keeps. Nothing is stored then.
        """
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ContrastInputError(
                "KeyQueue.enqueue",
                "keys",
                f"has shape {tuple(keys.shape)}, the queue holds rows of {self.dim}",
                "build the queue with the dimension of the head's output",
            )
        columns = {"keys": keys.detach()} | self._marks(keys, labels, ids, step)
        if gather:
            sizes = gather_sizes(keys, group)
            columns = {name: gather_no_grad(x, group, sizes=sizes) for name, x in columns.items()}
        count = columns["keys"].shape[0]
        if count > self.size:
            raise ContrastInputError(
                "KeyQueue.enqueue",
                "keys",
                f"has {count} rows, the queue has {self.size} slots",
                "take a queue of at least one global batch",
            )
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
                raise ContrastInputError(
                    "KeyQueue.enqueue",
                    argument,
                    "is missing" if missing else "is given, but the queue does not keep it",
                    f"pass {argument}=" if missing else f"build the queue with {name}=True",
                )
            if values is None:
                continue
            if values.shape != (count,) or values.is_floating_point():
                raise ContrastInputError(
                    "KeyQueue.enqueue",
                    argument,
                    f"has shape {tuple(values.shape)} and dtype {values.dtype}",
                    f"pass {count} integers, one a key",
                )
            marks[name] = values
        return marks


def _first_keys(size: int, dim: int, init: str, generator: torch.Generator | None) -> Tensor:
    if init == "empty":
        return torch.zeros(size, dim)
    if init != "random":
        raise ContrastInputError("KeyQueue", "init", f"is {init!r}", "pass 'empty' or 'random'")
    if generator is None:
        raise ContrastInputError(
            "KeyQueue",
            "generator",
            "is missing with init='random'",
            "pass a seeded torch.Generator",
        )
    return F.normalize(torch.randn(size, dim, generator=generator))


class CrossBatchMemory(nn.Module):
    """Embeddings of earlier batches with labels, as further rows of a supervised loss (XBM).

    Wang et al., CVPR 2020. The encoder moves on while embeddings wait, so the memory gives nothing
    before ``start_step``, and `drift` tells how far the stored ones lag behind. Rows of samples
    that are in the current batch are left out: a copy of its own row would be a positive that
    nothing can be learned from. Call `others` before the loss, `enqueue` after the backward pass.

    Args:
        size: Number of slots.
        dim: Length of an embedding.
        start_step: First step at which `others` gives rows; let the encoder settle first.

    Raises:
        ContrastInputError: ``size`` or ``dim`` below 1.

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
        """Stored rows of samples that are not in the batch.

        Args:
            ids: Samples of the batch.
            step: The training step.

        Returns:
            Embeddings without gradient, labels and ids; no rows before ``start_step``.
        """
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
        """Store a batch over the oldest rows, as `KeyQueue.enqueue` does.

        Raises:
            ContrastInputError: Another dimension, or a batch larger than the memory.
        """
        self.queue.enqueue(z, labels=labels, ids=ids, gather=gather, group=group)

    @torch.no_grad()
    def drift(self, z: Float[Tensor, "n dim"], ids: Int[Tensor, " n"]) -> float:
        """Mean cosine of stored embeddings and those that the encoder gives now.

        Args:
            z: The embeddings now.
            ids: Their samples; those that the memory does not hold are left out.

        Returns:
            1 where nothing moved; NaN where the memory holds none of the samples.
        """
        assert self.queue.ids is not None
        held = (self.queue.ids == ids[:, None]) & self.queue.valid()
        age = (self.queue.index - 1 - torch.arange(self.queue.size, device=ids.device)) % (
            self.queue.size
        )
        newest = age.expand_as(held).masked_fill(~held, self.queue.size).argmin(1)
        found = held.any(1)
        return float(F.cosine_similarity(z, self.queue.keys[newest].to(z), dim=1)[found].mean())
