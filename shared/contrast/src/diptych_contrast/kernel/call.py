"""Calling autograd functions: cheaply, over a batch, in full precision whatever autocast says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def call(function: type[Function], *arguments: Any) -> Any:
    """Apply a function that defines ``setup_context`` to all of its arguments by position.

    ``Function.apply`` binds default arguments by `inspect` at every call, which for small batches
    costs more than the sweep. Only functional transforms and the compiler need that way.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def loop(
    function: Any, size: int, dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply a function to every element of a batch and stack the results: a ``vmap`` rule."""
    results = [
        function.apply(
            *(
                value.select(dim, index) if isinstance(dim, int) else value
                for value, dim in zip(arguments, dims, strict=True)
            )
        )
        for index in range(size)
    ]
    stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def full_precision(body: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with autocast switched off for the device of its first tensor.

    Autocast reaches into backward passes that run under it, so these need it as well.
    """
    device = next(x for x in arguments if isinstance(x, Tensor)).device.type
    if not torch.is_autocast_enabled(device):
        return body(*arguments)
    with torch.autocast(device, enabled=False):
        return body(*arguments)


def products(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product, of batches too, whose derivatives keep the precision of its factors."""
    result: Tensor = call(_Products, x, y)
    return result


class _Products(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = full_precision(torch.matmul, x, y)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        needed = ctx.needs_input_grad
        onto_x = products(upstream, y.mT) if needed[0] else None
        return onto_x, products(x.mT, upstream) if needed[1] else None
