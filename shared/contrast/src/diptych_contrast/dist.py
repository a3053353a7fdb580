"""Gathering embeddings from all processes, with and without gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from jaxtyping import Shaped
from torch import Tensor

from diptych_contrast.errors import ContrastInputError


def world(group: torch_dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Rank and number of processes of a group; (0, 1) where nothing is distributed."""
    if not (torch_dist.is_available() and torch_dist.is_initialized()):
        return 0, 1
    return torch_dist.get_rank(group), torch_dist.get_world_size(group)


def gather_sizes(
    x: Shaped[Tensor, "n ..."], group: torch_dist.ProcessGroup | None = None
) -> list[int]:
    """Number of rows of every process, in rank order; all must agree on the trailing shape."""
    if x.ndim == 0:
        raise ContrastInputError("gather_sizes", "x", "has no dimension", "pass rows, x[None]")
    _, size = world(group)
    if size == 1:
        return [x.shape[0]]
    own = torch.tensor([x.shape[0], math.prod(x.shape[1:])], device=x.device)
    table = own.new_empty(size, 2)
    torch_dist.all_gather(list(table), own, group=group)
    rows = table.tolist()
    widths = {width for _, width in rows}
    if len(widths) > 1:
        found = f"has rows of {sorted(widths)} values on different processes"
        fix = "give every process embeddings of the same dimension"
        raise ContrastInputError("gather_sizes", "x", found, fix)
    return [count for count, _ in rows]


def gather_with_grad(
    x: Shaped[Tensor, "n ..."],
    group: torch_dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> Shaped[Tensor, "total ..."]:
    """Rows of all processes in rank order, with gradient to the process they came from.

    Forward is an all-gather, backward a reduce-scatter of the *sum* over processes, so a loss
    that every process computes on its own rows against all columns has, after the gradient
    averaging of data-parallel training, exactly the gradient of one process with the whole batch.
    Differentiable twice. Each process may hold another number of rows; ``sizes`` are what
    `gather_sizes` gives, where that is known already. A single process gets ``x`` itself.
    """
    _, size = world(group)
    if size == 1:
        return x
    known = tuple(gather_sizes(x, group) if sizes is None else sizes)
    gathered: Tensor = _Exchange.apply(x, known, group, False)  # type: ignore[no-untyped-call]
    return gathered


@torch.no_grad()
def gather_no_grad(
    x: Shaped[Tensor, "n ..."],
    group: torch_dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> Shaped[Tensor, "total ..."]:
    """Rows of all processes in rank order, detached: labels, ids, keys for a queue."""
    _, size = world(group)
    if size == 1:
        return x.detach()
    known = tuple(gather_sizes(x, group) if sizes is None else sizes)
    if x.dtype is torch.bool:
        return _all_gather(x.to(torch.uint8), known, group).to(torch.bool)
    return _all_gather(x, known, group)


class _Exchange(torch.autograd.Function):
    """All-gather, or transposed the scatter of the sum: each is the other's backward pass."""

    @staticmethod
    def forward(
        x: Tensor, sizes: tuple[int, ...], group: torch_dist.ProcessGroup | None, transposed: bool
    ) -> Tensor:
        return (_reduce_scatter if transposed else _all_gather)(x, sizes, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.how, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        result: Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
            gradient, *ctx.how, not ctx.transposed
        )
        return result, None, None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def _all_gather(x: Tensor, sizes: tuple[int, ...], group: torch_dist.ProcessGroup | None) -> Tensor:
    longest = max(sizes)
    padded = _padded(x, longest)
    table = padded.new_empty(len(sizes), longest, *x.shape[1:])
    torch_dist.all_gather(list(table), padded, group=group)
    if min(sizes) == longest:
        return table.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(table, sizes, strict=True)])


def _reduce_scatter(
    gradient: Tensor, sizes: tuple[int, ...], group: torch_dist.ProcessGroup | None
) -> Tensor:
    rank, _ = world(group)
    if torch_dist.get_backend(group) == "nccl":  # pragma: no cover - CUDA only
        longest = max(sizes)
        parts = [_padded(part, longest) for part in gradient.split_with_sizes(sizes)]
        own = torch.empty_like(parts[0])
        torch_dist.reduce_scatter(own, parts, group=group)
        return own[: sizes[rank]]
    # gloo offers no reduce-scatter in torch 2.6
    total = gradient.clone(memory_format=torch.contiguous_format)
    torch_dist.all_reduce(total, group=group)
    return total.split_with_sizes(sizes)[rank].clone()
