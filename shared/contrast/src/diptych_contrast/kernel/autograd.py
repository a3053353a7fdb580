"""The sweep as a differentiable function: the sums, their backward and the backward of that.

Three `torch.autograd.Function`s of one form, with ``setup_context`` and a looping ``vmap``, so that
double backward, `torch.func` and `torch.compile` work. While compiling, each calls the opaque
operator of `operators`, so that tiles are not unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from diptych_contrast.kernel import operators
from diptych_contrast.kernel.call import call, loop

# Positions in the flat arguments that all three functions begin with.
_A, _B, _SCALE, _ROW_BIAS, _COL_BIAS = range(5)
_INPUTS = 11


class Settings(NamedTuple):
    """What a sweep is told beside tensors.

    Attributes:
        expressions: Mask expressions, joined by commas.
        mode: ``rows``, ``both`` or ``symmetric``.
        tile: Rows and columns of a tile.
        unit: No row or column is longer than 1.
        fused: Accumulate the gradient of the rows in the forward sweep (mode ``rows``).
        keep: Keep the exponentials of a single tile for the backward sweep.
        peak: Also give the largest score of every row.
    """

    expressions: str
    mode: str
    tile: int
    unit: bool
    fused: bool
    keep: bool
    peak: bool


def sweep(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    biases: Sequence[Tensor | None],
    keys: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Run a sweep that can be differentiated twice.

    Args:
        a: Rows, shape (n, d), float32 or float64.
        b: Columns, shape (m, d), or None in symmetric mode.
        scale: ``1/temperature``, shape (1,) or (k,).
        biases: Bias of the rows and of the columns, each a vector or None.
        keys: The six keys in the order of `masks.KEYS`.
        settings: Masks, mode, tile.

    Returns:
        Log-sum-exp of every row, shape (k, n), in mode ``both`` (k, n + m); largest score, same
        shape, detached, empty unless asked for.
    """
    lse, peak, _ = call(PairSums, a, b, scale, *biases, *keys, *settings)
    return lse, peak


class PairSums(Function):
    """Log-sum-exp over the columns of every row."""

    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor | None,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        row_id: Tensor | None,
        row_view: Tensor | None,
        row_label: Tensor | None,
        col_id: Tensor | None,
        col_view: Tensor | None,
        col_label: Tensor | None,
        expressions: str,
        mode: str,
        tile: int,
        unit: bool,
        fused: bool,
        keep: bool,
        peak: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sweep; see `sweep` for the arguments."""
        keys = [row_id, row_view, row_label, col_id, col_view, col_label]
        settings = (expressions, mode, tile, unit, fused, keep, peak)
        result: tuple[Tensor, Tensor, Tensor] = _call(
            operators.sums, a, b, scale, row_bias, col_bias, keys, *settings
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep inputs and sums; the tiles are computed again."""
        lse, peak, extra = output
        ctx.mark_non_differentiable(peak, extra)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_INPUTS], lse, extra)
        ctx.settings = Settings(*inputs[_INPUTS:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pull the gradient of the sums back to the inputs."""
        *inputs, lse, extra = ctx.saved_tensors
        settings: Settings = ctx.settings
        if upstream[0] is None:
            return (None,) * (_INPUTS + len(settings))
        columns = ctx.needs_input_grad[_B] or ctx.needs_input_grad[_COL_BIAS]
        gradients = _apply(
            PairGradients,
            *inputs,
            upstream[0],
            lse,
            extra,
            columns,
            ctx.needs_input_grad[_SCALE],
            *settings[:5],
        )
        found = _present(gradients, inputs)
        return (*found, *(None,) * (6 + len(settings)))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Run one sweep for every element of the batch."""
        # Whether a tile can be kept depends on the values, so elements may differ in it.
        settings = Settings(*arguments[_INPUTS:])._replace(keep=False)
        return loop(PairSums, info.batch_size, dims, (*arguments[:_INPUTS], *settings))


class PairGradients(Function):
    """Gradients of `PairSums` for an upstream gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Sweep again, or read the gradient off what the forward sweep accumulated."""
        inputs, rest = arguments[:_INPUTS], arguments[_INPUTS:]
        result: tuple[Tensor, ...] = _call(
            operators.gradients, *inputs[:5], list(inputs[5:]), *rest
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep inputs and sums."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: _INPUTS + 2])
        ctx.where = inputs[-5:-1]
        ctx.shapes = [value.shape for value in output]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients: the second derivative of the sums."""
        *inputs, upstream, lse = ctx.saved_tensors
        given = [
            inputs[_A].new_zeros(shape) if value is None else value
            for value, shape in zip(cotangents, ctx.shapes, strict=True)
        ]
        scale = ctx.needs_input_grad[_SCALE]
        onto_upstream, *gradients = call(
            PairCurvature, *inputs, upstream, lse, *given, scale, *ctx.where
        )
        return (*_present(gradients, inputs), *(None,) * 6, onto_upstream, *(None,) * 9)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Run one sweep for every element of the batch."""
        return loop(PairGradients, info.batch_size, dims, arguments)


class PairCurvature(Function):
    """Gradients of `PairGradients`; the end of the chain."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Run the two sweeps of the second derivative."""
        inputs, (upstream, lse, *rest) = arguments[:_INPUTS], arguments[_INPUTS:]
        result: tuple[Tensor, ...] = _call(
            operators.curvature,
            *(*inputs[:5], list(inputs[5:])),
            *(upstream, lse, list(rest[:5]), *rest[5:]),
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no third derivative."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise RuntimeError(
            "pair_lse: third derivatives are not available: differentiate at most twice, or pass "
            "backend='dense', which autograd can differentiate any number of times"
        )

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Run one sweep for every element of the batch."""
        return loop(PairCurvature, info.batch_size, dims, arguments)


def _call(body: Callable[..., Any], *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return operators.OPAQUE[body](*arguments)
    return body(*arguments)


def _apply(function: Any, *arguments: Any) -> Any:
    # The compiler traces one backward, never two, and only plain calls inside it.
    if torch.compiler.is_compiling():
        return function.forward(*arguments)
    return call(function, *arguments)


def _present(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Give None for inputs that were not there or whose gradient was not computed."""
    return tuple(
        None if given is None or gradient.shape != given.shape else gradient
        for gradient, given in zip(gradients, inputs[:5], strict=True)
    )
