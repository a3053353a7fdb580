"""Columns sharded over processes: shards travel round the ring, and their gradients with them.

Memory is that of two shards, not of all columns; the result equals gathering. Every process of
the group has to call; results can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from diptych_contrast.dist import gather_sizes
from diptych_contrast.kernel.backward import first_order
from diptych_contrast.kernel.call import call, full_precision
from diptych_contrast.kernel.masks import PairMask
from diptych_contrast.kernel.sums import Shape, pair_sum
from diptych_contrast.kernel.tiles import Plan, sum_exponentials

# Of the eleven tensors of a sweep those that travel: columns, their bias, their keys.
_SHARD = (1, 4, 8, 9, 10)


def ring_sweep(plan: Plan, group: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `autograd.sweep` for the rows of this process over the columns of all."""
    lse, top = call(_RingSums, plan, group, *tensors)
    return lse, top


class _RingSums(Function):
    @staticmethod
    def forward(plan: Plan, group: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        sums, tops = [], []
        for shard in _travel([tensors[at] for at in _SHARD], group):
            lse, top, _ = full_precision(sum_exponentials, plan, *_visited(tensors, shard))
            sums.append(lse)
            tops.append(top)
        return torch.stack(sums).logsumexp(0), torch.stack(tops).amax(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, ctx.group, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[0], *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        lse, *tensors = ctx.saved_tensors
        nothing = lse.new_empty(0)
        totals = [None if x is None else torch.zeros_like(x) for x in tensors[:5]]
        own = [tensors[at] for at in _SHARD]
        sizes = gather_sizes(own[0], ctx.group)
        for hop, shard in enumerate(_travel(own, ctx.group)):
            found = full_precision(
                first_order, ctx.plan, upstream, lse, nothing, *_visited(tensors, shard)
            )
            totals = [
                None if total is None else total + part
                for total, part in zip(totals, found, strict=True)
            ]
            # The gradient of a shard travels behind it and comes home after the last hop.
            totals[1], totals[4] = _pass_on([totals[1], totals[4]], sizes, hop, ctx.group)
        return None, None, *totals, *(None,) * 6


def _visited(tensors: Sequence[Any], shard: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Put a shard that came by in the place of the own one."""
    arrived = dict(zip(_SHARD, shard, strict=True))
    return [arrived.get(at, tensor) for at, tensor in enumerate(tensors)]


def ring_sum(a: Tensor, b: Tensor, fn: Shape, tile: int | Literal["auto"], group: Any) -> Tensor:
    """Compute `sums.pair_sum` over all pairs, columns sharded over the processes."""
    total: Tensor = call(_RingSum, a, b, fn, tile, group)
    return total


class _RingSum(Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, fn: Shape, tile: int | Literal["auto"], group: Any) -> Tensor:
        total = a.new_zeros(len(a))
        for (shard,) in _travel([b], group):
            assert shard is not None
            total += pair_sum(a, shard, fn, PairMask(expr="any"), tile=tile)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.settings = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        a, own = ctx.saved_tensors
        fn, tile, group = ctx.settings
        onto_a, onto_b = torch.zeros_like(a), torch.zeros_like(own)
        sizes = gather_sizes(own, group)
        for hop, (shard,) in enumerate(_travel([own], group)):
            assert shard is not None
            with torch.enable_grad():
                leaves = (a.detach().requires_grad_(), shard.detach().requires_grad_())
                total = pair_sum(*leaves, fn, PairMask(expr="any"), tile=tile)
            part = torch.autograd.grad(total, leaves, upstream)
            onto_a += part[0]
            (onto_b,) = _pass_on([onto_b + part[1]], sizes, hop, group)  # type: ignore[assignment]
        return onto_a, onto_b, None, None, None


def _travel(shard: list[Tensor | None], group: Any) -> Iterator[list[Tensor | None]]:
    """Yield the own shard, then that of the process before, and so on round the ring."""
    assert shard[0] is not None
    sizes = gather_sizes(shard[0], group)
    for hop in range(len(sizes)):
        yield shard
        if hop < len(sizes) - 1:
            shard = _pass_on(shard, sizes, hop, group)


def _pass_on(
    shard: list[Tensor | None], sizes: list[int], hop: int, group: Any
) -> list[Tensor | None]:
    """Send a shard to the next process and receive that of the one before."""
    world, rank = len(sizes), dist.get_rank(group)
    if world == 1:
        return shard
    after = dist.get_global_rank(group, (rank + 1) % world)
    before = dist.get_global_rank(group, (rank - 1) % world)
    length = sizes[(rank - hop - 1) % world]
    received = [None if x is None else x.new_empty(length, *x.shape[1:]) for x in shard]
    operations = []
    for outgoing, incoming in zip(shard, received, strict=True):
        if outgoing is not None and incoming is not None:
            operations.append(dist.P2POp(dist.isend, outgoing.contiguous(), after, group))
            operations.append(dist.P2POp(dist.irecv, incoming, before, group))
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received
