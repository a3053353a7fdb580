"""Columns sharded over processes: shards travel round the ring, and their gradients with them.

Memory is that of two shards, not of all columns; the result equals gathering.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from diptych_contrast.kernel import operators
from diptych_contrast.kernel.call import call
from diptych_contrast.kernel.masks import PairMask
from diptych_contrast.kernel.sums import Shape, pair_sum

_KEYS = slice(5, 11)


def ring_sweep(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    biases: Sequence[Tensor | None],
    keys: Sequence[Tensor | None],
    settings: Sequence[Any],
    group: Any,
) -> tuple[Tensor, Tensor]:
    """Compute `autograd.sweep` for the rows of this process over the columns of all.

    Every process of the group has to call it. It can be differentiated once.

    Args:
        a: Rows of this process, shape (n, d).
        b: Columns of this process, shape (m, d); m may differ between processes.
        scale: ``1/temperature``, shape (1,) or (k,).
        biases: Bias of the rows and of the columns, each a vector or None.
        keys: The six keys, unique over all processes.
        settings: `autograd.Settings`; mode ``rows``.
        group: Process group.

    Returns:
        Log-sum-exp and largest score, each of shape (k, n).
    """
    expressions, _, tile, unit, _, _, peak = settings
    lse, top = call(_RingSums, a, b, scale, *biases, *keys, expressions, tile, unit, peak, group)
    return lse, top


class _RingSums(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        a, _, scale, row_bias = arguments[:4]
        expressions, tile, unit, peak, group = arguments[11:]
        row_keys, shard = _shard(arguments)
        lse: Tensor | None = None
        top = a.new_empty(0)
        for b, col_bias, *col_keys in _travel(shard, group):
            part, highest, _ = operators.sums(
                a,
                b,
                scale,
                row_bias,
                col_bias,
                [*row_keys, *col_keys],
                expressions,
                "rows",
                tile,
                unit,
                False,
                False,
                peak,
            )
            top = highest if lse is None else torch.maximum(top, highest)
            lse = part if lse is None else torch.logaddexp(lse, part)
        assert lse is not None
        return lse, top

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:11], output[0])
        ctx.settings = inputs[11:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse = ctx.saved_tensors
        expressions, tile, unit, _, group = ctx.settings
        a, own, scale, row_bias, own_bias = inputs[:5]
        row_keys, shard = _shard(inputs)
        onto_a, onto_scale = torch.zeros_like(a), torch.zeros_like(scale)
        onto_rows = None if row_bias is None else torch.zeros_like(row_bias)
        # The gradient of a shard travels behind it and comes home after the last hop.
        onto_b: Tensor | None = torch.zeros_like(own)
        onto_cols = None if own_bias is None else torch.zeros_like(own_bias)
        nothing = a.new_empty(0)
        for hop, (b, col_bias, *col_keys) in enumerate(_travel(shard, group)):
            part = operators.gradients(
                a,
                b,
                scale,
                row_bias,
                col_bias,
                [*row_keys, *col_keys],
                upstream,
                lse,
                nothing,
                True,
                True,
                expressions,
                "rows",
                tile,
                unit,
                False,
            )
            onto_a += part[0]
            onto_b = part[1] if onto_b is None else onto_b + part[1]
            onto_scale += part[2]
            onto_rows = None if onto_rows is None else onto_rows + part[3]
            onto_cols = None if onto_cols is None else onto_cols + part[4]
            onto_b, onto_cols = _pass_on([onto_b, onto_cols], _sizes(own, group), hop, group)
        return onto_a, onto_b, onto_scale, onto_rows, onto_cols, *(None,) * 11


def ring_sum(a: Tensor, b: Tensor, fn: Shape, tile: int | Literal["auto"], group: Any) -> Tensor:
    """Compute `sums.pair_sum` over all pairs, columns sharded over the processes.

    Every process of the group has to call it. It can be differentiated once.

    Args:
        a: Rows of this process, shape (n, d).
        b: Columns of this process, shape (m, d); m may differ between processes.
        fn: Name of the function in `sums.FUNCTIONS`.
        tile: Rows and columns of a tile, or ``auto``.
        group: Process group.

    Returns:
        Shape (n,).
    """
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
        onto_a = torch.zeros_like(a)
        onto_b: Tensor | None = torch.zeros_like(own)
        sizes = _sizes(own, group)
        for hop, (shard,) in enumerate(_travel([own], group)):
            assert shard is not None
            with torch.enable_grad():
                leaves = (a.detach().requires_grad_(), shard.detach().requires_grad_())
                total = pair_sum(*leaves, fn, PairMask(expr="any"), tile=tile)
            part = torch.autograd.grad(total, leaves, upstream)
            onto_a += part[0]
            (onto_b,) = _pass_on(
                [part[1] if onto_b is None else onto_b + part[1]], sizes, hop, group
            )
        return onto_a, onto_b, None, None, None


def _shard(arguments: Sequence[Any]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    keys = list(arguments[_KEYS])
    return keys[:3], [arguments[1], arguments[4], *keys[3:]]


def _travel(shard: list[Tensor | None], group: Any) -> Iterator[list[Tensor | None]]:
    """Yield the own shard, then that of the process before, and so on round the ring."""
    assert shard[0] is not None
    sizes = _sizes(shard[0], group)
    for hop in range(len(sizes)):
        yield shard
        if hop < len(sizes) - 1:
            shard = _pass_on(shard, sizes, hop, group)


def _sizes(own: Tensor, group: Any) -> list[int]:
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device), group=group)
    return [int(size) for size in sizes]


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
