"""The three sweeps on flat arguments, as plain functions and as opaque operators for compiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from diptych_contrast.kernel.backward import Gradients, first_order, second_order
from diptych_contrast.kernel.tiles import open_pairs, sum_exponentials

P = ParamSpec("P")
R = TypeVar("R")


def _full_precision(body: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside ``body``, whose first argument is a tensor."""

    @wraps(body)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        first = arguments[0]
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return body(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return body(*arguments, **named)

    return run


@_full_precision
def sums(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    keys: Sequence[Tensor | None],
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
    fused: bool,
    keep: bool,
    peak: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the exponentials: `tiles.sum_exponentials`."""
    pairs = open_pairs(a, b, scale, (row_bias, col_bias), keys, expressions, mode, tile, unit)
    result = sum_exponentials(pairs, fused=fused, keep=keep, peak=peak)
    return result.lse, result.peak, result.extra


@_full_precision
def gradients(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    keys: Sequence[Tensor | None],
    upstream: Tensor,
    lse: Tensor,
    extra: Tensor,
    columns: bool,
    scale_gradient: bool,
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pull gradients back: `backward.first_order`, or what a fused forward sweep left."""
    if fused and not columns:
        result = _fused_gradients(a, scale, row_bias, upstream, extra)
    else:
        pairs = open_pairs(a, b, scale, (row_bias, col_bias), keys, expressions, mode, tile, unit)
        kept = extra if extra.numel() and not fused else None
        columns = columns and mode != "symmetric"
        result = first_order(pairs, lse, upstream, kept, columns=columns, scale=scale_gradient)
    return result.a, result.b, result.scale, result.row_bias, result.col_bias


def _fused_gradients(
    a: Tensor, scale: Tensor, row_bias: Tensor | None, upstream: Tensor, products: Tensor
) -> Gradients:
    weighted = upstream[:, :, None] * products
    onto_scale = (weighted * a).sum((1, 2))
    onto_a = (weighted * scale[:, None, None]).sum(0)
    onto_bias = a.new_empty(0) if row_bias is None else upstream.sum(0)
    onto_scale = onto_scale if len(scale) > 1 else onto_scale.sum(0, keepdim=True)
    return Gradients(onto_a, a.new_empty(0), onto_scale, onto_bias, a.new_empty(0))


@_full_precision
def curvature(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    keys: Sequence[Tensor | None],
    upstream: Tensor,
    lse: Tensor,
    cotangents: Sequence[Tensor],
    scale_gradient: bool,
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the gradients: `backward.second_order`."""
    pairs = open_pairs(a, b, scale, (row_bias, col_bias), keys, expressions, mode, tile, unit)
    onto_upstream, result = second_order(
        pairs, lse, upstream, Gradients(*cotangents), scale=scale_gradient
    )
    return (onto_upstream, result.a, result.b, result.scale, result.row_bias, result.col_bias)


_sums_operator = torch.library.custom_op("diptych_contrast::pair_sums", mutates_args=())(sums)
_gradients_operator = torch.library.custom_op("diptych_contrast::pair_gradients", mutates_args=())(
    gradients
)
_curvature_operator = torch.library.custom_op("diptych_contrast::pair_curvature", mutates_args=())(
    curvature
)
OPAQUE: dict[Callable[..., object], Callable[..., object]] = {
    sums: _sums_operator,
    gradients: _gradients_operator,
    curvature: _curvature_operator,
}


@_sums_operator.register_fake
def _(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    keys: Sequence[Tensor | None],
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
    fused: bool,
    keep: bool,
    peak: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = expressions.count(",") + 1
    length = a.shape[0] + (b.shape[0] if mode == "both" and b is not None else 0)
    lse = a.new_empty(count, length)
    top = a.new_empty(count, length) if peak else a.new_empty(0)
    return lse, top, a.new_empty(count, *a.shape) if fused else a.new_empty(0)


@_gradients_operator.register_fake
def _(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    keys: Sequence[Tensor | None],
    upstream: Tensor,
    lse: Tensor,
    extra: Tensor,
    columns: bool,
    scale_gradient: bool,
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like_inputs(a, b if columns else None, scale, row_bias, col_bias)


@_curvature_operator.register_fake
def _(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    keys: Sequence[Tensor | None],
    upstream: Tensor,
    lse: Tensor,
    cotangents: Sequence[Tensor],
    scale_gradient: bool,
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(lse), *_like_inputs(a, b, scale, row_bias, col_bias))


def _like_inputs(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = a.new_empty(0)
    biases = row_bias is not None or col_bias is not None
    return (
        torch.empty_like(a),
        nothing if b is None else torch.empty_like(b),
        torch.empty_like(scale),
        a.new_empty(a.shape[0]) if biases else nothing,
        a.new_empty(b.shape[0]) if biases and b is not None else nothing,
    )
