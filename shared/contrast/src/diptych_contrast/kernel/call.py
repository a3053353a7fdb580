"""Calling an autograd function without the cost of inspecting its signature."""

from __future__ import annotations

from collections.abc import Sequence
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
