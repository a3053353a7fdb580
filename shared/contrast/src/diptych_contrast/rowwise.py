"""Losses that need whole rows of pairs at once: block by block, in the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diptych_contrast.common import Options

BLOCK_PAIRS = 2**18
# What losses that compute block by block cannot honour.
LOCAL = ("group", "ring", "return_info")


def by_rows(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    pairs: int,
    options: Options,
) -> Tensor:
    """Apply a function of rows and columns to blocks of rows, and never store more pairs.

    The backward pass computes every block again; differentiable as often as the function is.

    Args:
        function: Of a block of each of the rows, then of all columns; gives one result a row.
            What it takes by closure gets no gradient. It multiplies by `products`, which keeps
            the precision of both passes.
        columns: What all rows meet: columns, parameters.
        pairs: Values that the function holds for one row.
        options: ``tile`` sets the rows of a block; ``backend="dense"`` takes one block.
    """
    size = max(1, BLOCK_PAIRS // pairs) if options.tile == "auto" else options.tile
    if size >= len(rows[0]) or options.backend == "dense":
        return function(*rows, *columns)
    result: Tensor = _ByRows.apply(  # type: ignore[no-untyped-call]
        function, size, len(rows), *rows, *columns
    )
    return result


class _ByRows(Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], size: int, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.how = function, size, count
        blocks = zip(*(torch.split(part, size) for part in tensors[:count]), strict=True)
        result = torch.empty(0)
        for at, block in enumerate(blocks):
            part = function(*block, *tensors[count:])
            # Small results kept between large temporaries would leave the memory in pieces.
            result = result if at else part.new_empty(len(tensors[0]), *part.shape[1:])
            result[at * size : at * size + size] = part
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        function, size, count = ctx.how
        again = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[3:]
        # Aliases, because one tensor may be rows and columns, with a gradient for each role.
        tensors = [x.view_as(x) if again else x.detach() for x in ctx.saved_tensors]
        totals = [
            torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            for x, need in zip(tensors, needed, strict=True):
                if need and not again:
                    x.requires_grad_()
            for start in range(0, len(upstream), size):
                block = [x[start : start + size] for x in tensors[:count]] + tensors[count:]
                slopes = torch.autograd.grad(
                    function(*block),
                    [x for x, need in zip(block, needed, strict=True) if need],
                    upstream[start : start + size],
                    create_graph=again,
                    materialize_grads=True,
                )
                found = iter(slopes)
                for at, total in enumerate(totals):
                    if total is not None:
                        part = total[start : start + size] if at < count else total
                        part += next(found)
        return None, None, None, *totals
