"""The sweep as a differentiable function: the sums, their backward and the backward of that.

Three `torch.autograd.Function`s of one form, with ``setup_context`` and a looping ``vmap``, so that
double backward, `torch.func` and `torch.compile` work. While compiling, sums and gradients are
opaque operators, so that tiles are not unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diptych_contrast.kernel.backward import first_order, second_order
from diptych_contrast.kernel.call import call, full_precision, loop
from diptych_contrast.kernel.tiles import Plan, sum_exponentials

# Positions among the eleven tensors of a sweep: rows, columns, scale, two biases, six keys.
_B, _SCALE, _COL_BIAS, _KEYS = 1, 2, 4, 5


def sweep(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a sweep that can be differentiated twice.

    Returns:
        Log-sum-exp of every row, shape (k, n), in mode ``both`` (k, n + m); largest score, same
        shape, detached, empty unless asked for.
    """
    lse, peak, _ = call(PairSums, plan, *tensors)
    return lse, peak


class PairSums(Function):
    """Log-sum-exp over the columns of every row."""

    @staticmethod
    def forward(
        plan: Plan,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Spelled out because the compiler cannot trace ``*tensors`` here.
        row, column = (row_id, row_view, row_label), (col_id, col_view, col_label)
        tensors = (a, b, scale, row_bias, col_bias, *row, *column)
        result: tuple[Tensor, Tensor, Tensor]
        if torch.compiler.is_compiling():  # pragma: no cover - traced, not run
            result = _opaque_sums(tensors, *_words(plan))
        else:
            result = full_precision(sum_exponentials, plan, *tensors)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        lse, peak, extra = output
        ctx.mark_non_differentiable(peak, extra)
        ctx.set_materialize_grads(False)
        ctx.plan = inputs[0]
        ctx.save_for_backward(lse, extra, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        lse, extra, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if upstream[0] is None:
            return (None,) * (1 + len(tensors))
        plan = ctx.plan._replace(columns=needed[_B] or needed[_COL_BIAS], scales=needed[_SCALE])
        # The compiler traces one backward, never two, and only plain calls inside it.
        given = (upstream[0], lse, extra, *tensors)
        if torch.compiler.is_compiling():  # pragma: no cover - traced, not run
            gradients = _opaque_gradients(given, *_words(plan))
        elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            gradients = call(PairGradients, plan, *given)
        else:
            gradients = full_precision(first_order, plan, *given)
        return None, *_present(gradients, tensors), *(None,) * 6

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], plan: Plan, *tensors: Any) -> tuple[Any, Any]:
        # Whether a tile can be kept depends on the values, so elements may differ in it.
        return loop(PairSums, info.batch_size, dims, (plan._replace(keep=False), *tensors))


class PairGradients(Function):
    """Gradients of `PairSums` for an upstream gradient."""

    @staticmethod
    def forward(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(full_precision(first_order, plan, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        plan, upstream, lse, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.shapes = plan, [value.shape for value in output]
        ctx.save_for_backward(upstream, lse, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, lse, *tensors = ctx.saved_tensors
        given = [
            lse.new_zeros(shape) if value is None else value
            for value, shape in zip(cotangents, ctx.shapes, strict=True)
        ]
        plan = ctx.plan._replace(scales=ctx.needs_input_grad[4 + _SCALE])
        onto_upstream, *gradients = call(PairCurvature, plan, upstream, lse, *given, *tensors)
        return None, onto_upstream, None, None, *_present(gradients, tensors), *(None,) * 6

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return loop(PairGradients, info.batch_size, dims, arguments)


class PairCurvature(Function):
    """Gradients of `PairGradients`; the end of the chain."""

    @staticmethod
    def forward(plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(full_precision(second_order, plan, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass  # there is no third derivative

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "pair_lse: third derivatives are not available: differentiate at most twice, or pass "
            "backend='dense', which autograd can differentiate any number of times"
        )

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return loop(PairCurvature, info.batch_size, dims, arguments)


def _words(  # pragma: no cover - traced, not run
    plan: Plan,
) -> tuple[str, str, int, list[bool]]:
    """Give a plan as an operator takes it."""
    flags = [plan.unit, plan.fused, plan.keep, plan.peak, plan.columns, plan.scales]
    return plan.expressions, plan.mode, plan.tile, flags


def _present(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Give None for inputs that were not there or whose gradient was not computed."""
    return tuple(
        None if given is None or gradient.shape != given.shape else gradient
        for gradient, given in zip(gradients, inputs[:_KEYS], strict=True)
    )


@torch.library.custom_op("diptych_contrast::pair_sums", mutates_args=())
def _opaque_sums(
    tensors: Sequence[Tensor | None], expressions: str, mode: str, tile: int, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = full_precision(
        sum_exponentials, Plan(expressions, mode, tile, *flags), *tensors
    )
    return result


@_opaque_sums.register_fake
def _(
    tensors: Sequence[Tensor | None], expressions: str, mode: str, tile: int, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    plan, a, b = Plan(expressions, mode, tile, *flags), tensors[0], tensors[1]
    assert a is not None
    length = a.shape[0] + (b.shape[0] if mode == "both" and b is not None else 0)
    lse = a.new_empty(expressions.count(",") + 1, length)
    nothing = a.new_empty(0)
    top = torch.empty_like(lse) if plan.peak else nothing
    return lse, top, a.new_empty(len(lse), *a.shape) if plan.fused else a.new_empty(0)


@torch.library.custom_op("diptych_contrast::pair_gradients", mutates_args=())
def _opaque_gradients(
    tensors: Sequence[Tensor | None], expressions: str, mode: str, tile: int, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = full_precision(first_order, Plan(expressions, mode, tile, *flags), *tensors)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = tuple(found)
    return result


@_opaque_gradients.register_fake
def _(
    tensors: Sequence[Tensor | None], expressions: str, mode: str, tile: int, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, scale, row_bias, col_bias = tensors[3:8]
    assert a is not None
    assert scale is not None
    columns = b is not None and Plan(expressions, mode, tile, *flags).columns
    biased = row_bias is not None or col_bias is not None
    nothing = a.new_empty(0)
    return (
        torch.empty_like(a),
        torch.empty_like(b) if columns and b is not None else nothing,
        torch.empty_like(scale),
        a.new_empty(a.shape[0]) if biased else a.new_empty(0),
        a.new_empty(b.shape[0]) if biased and b is not None else a.new_empty(0),
    )
