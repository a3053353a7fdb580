"""First and second derivatives of the sweep: tiles are computed again, never stored.

With ``P_ij = exp(S_ij - lse_i)`` and upstream gradients g, every tile is weighted by
``W_ij = g_i P_ij`` (mode ``rows``), to which the other modes add the column's own term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diptych_contrast.kernel.tiles import (
    LOG2_E,
    Pairs,
    Plan,
    exponentials,
    exponents,
    open_pairs,
    scores,
)


class Gradients(NamedTuple):
    """Gradients of rows, columns, scale, row bias and column bias; empty where there are none.

    In symmetric mode rows and row bias hold both roles together.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    row_bias: Tensor
    col_bias: Tensor


class _Weights:
    """Turns tiles into softmax weights, times one coefficient a row and one a column."""

    def __init__(self, pairs: Pairs, lse: Tensor) -> None:
        self.pairs = pairs
        # A row without pairs has no weights: exp(-inf - inf) is 0 where exp(-inf + inf) is NaN.
        if pairs.bounded:
            self.inverse = _inverse(lse)
        else:
            self.shift = (lse * LOG2_E).masked_fill_(lse == -math.inf, math.inf)

    def scaled(self, coefficient: Tensor) -> Tensor:
        """Fold the normaliser into a coefficient of shape (k, sums) where exponentials are free."""
        return coefficient * self.inverse if self.pairs.bounded else coefficient

    def tiles(
        self, raw: Tensor, rows: slice, cols: slice
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield for each mask its index and the tiles that row and column coefficients multiply."""
        pairs = self.pairs
        if pairs.bounded:
            for k, tile in exponentials(pairs, raw, rows, cols):
                yield k, (tile, tile)
            return
        others = self.others(rows, cols)
        for k, exponent in exponents(pairs, raw, rows, cols):
            # A weight is at most 1, but large scores are rounded by more than their logarithms.
            left = right = (exponent - self.shift[k, rows, None]).clamp_max_(0.0).exp2_()
            pairs.masks.hide(left, k, rows, cols, 0.0)
            if others is not None:
                right = (exponent - self.shift[k, None, others]).clamp_max_(0.0).exp2_()
                pairs.masks.hide(right, k, rows, cols, 0.0)
            yield k, (left, right)

    def others(self, rows: slice, cols: slice) -> slice | None:
        """Where the columns' own terms are; in a diagonal symmetric tile these are the rows."""
        return cols if self.pairs.mode == "symmetric" else self.pairs.column_slots(rows, cols)

    def apply(
        self, tile: tuple[Tensor, Tensor], coefficient: Tensor, rows: slice, cols: slice
    ) -> Tensor:
        """Return ``tile * (coefficient of the row + coefficient of the column)``, a new tensor."""
        left, right = tile
        others = self.others(rows, cols)
        if others is None:
            return left * coefficient[rows, None]
        if left is right:
            return torch.add(coefficient[rows, None], coefficient[None, others]).mul_(left)
        return (left * coefficient[rows, None]).addcmul_(right, coefficient[None, others])


class _Sink:
    """Where weighted tiles add up to gradients."""

    def __init__(self, pairs: Pairs, *, columns: bool) -> None:
        a, b = pairs.a, pairs.b
        self.symmetric = pairs.mode == "symmetric"
        self.biased = pairs.row_bias is not None or pairs.col_bias is not None
        self.a, self.scale = torch.zeros_like(a), torch.zeros_like(pairs.scale)
        self.b = torch.zeros_like(b) if columns and not self.symmetric else b.new_empty(0)
        self.row_bias = a.new_zeros(len(a) if self.biased else 0)
        self.col_bias = a.new_zeros(len(b) if self.biased and not self.symmetric else 0)

    def spread(self, weight: Tensor, rows: slice, cols: slice, a: Tensor, b: Tensor) -> None:
        """Add a weighted tile times the columns to the rows, its transpose to the columns."""
        self.a[rows].addmm_(weight, b[cols])
        if self.symmetric:
            if rows.start != cols.start:
                self.a[cols].addmm_(weight.t(), a[rows])
        elif self.b.numel():
            self.b[cols].addmm_(weight.t(), a[rows])

    def add_biases(self, weight: Tensor, rows: slice, cols: slice) -> None:
        if not self.biased:
            return
        self.row_bias[rows] += weight.sum(1)
        if not self.symmetric:
            self.col_bias[cols] += weight.sum(0)
        elif rows.start != cols.start:
            self.row_bias[cols] += weight.sum(0)

    def add_scale(self, k: int, values: Tensor, rows: slice, cols: slice) -> None:
        """Add the sum of a tile; a diagonal symmetric tile holds every pair in both orders."""
        twice = self.symmetric and rows.start == cols.start
        self.scale[k if len(self.scale) > 1 else 0] += values.sum() * (0.5 if twice else 1.0)

    def gradients(self) -> Gradients:
        return Gradients(self.a, self.b, self.scale, self.row_bias, self.col_bias)


def first_order(
    plan: Plan, upstream: Tensor, lse: Tensor, extra: Tensor, *tensors: Tensor | None
) -> Gradients:
    """Pull the gradient of the log-sum-exp back to its inputs.

    ``extra`` is what the forward sweep left beside its sums ``lse``, ``upstream`` their gradient,
    both of shape (k, sums); ``tensors`` are those of `tiles.open_pairs`. Gradients
    not asked for are empty or zero.
    """
    if plan.fused and not plan.columns:
        return _fused(upstream, extra, *tensors)
    if extra.numel() and not plan.fused:
        return _kept(plan, upstream, lse, extra, *tensors)
    pairs = open_pairs(plan, *tensors)
    weights, sink = _Weights(pairs, lse), _Sink(pairs, columns=plan.columns)
    coefficient = weights.scaled(upstream)
    one_scale = len(pairs.scale) == 1
    for rows, cols, raw in scores(pairs):
        total: Tensor | None = None
        for k, tile in weights.tiles(raw, rows, cols):
            weight = weights.apply(tile, coefficient[k], rows, cols)
            sink.add_biases(weight, rows, cols)
            if not one_scale:
                if plan.scales:
                    sink.add_scale(k, weight * raw, rows, cols)
                weight.mul_(pairs.scale[k])
            total = weight if total is None else total.add_(weight)
        if total is not None:
            sink.spread(total, rows, cols, pairs.a, pairs.b)
    if one_scale:
        if plan.scales:
            # sum_ij W_ij a_i.b_j; the symmetric sum of the rows holds every pair in both orders.
            sink.scale[0] = (pairs.a * sink.a).sum() * (0.5 if sink.symmetric else 1.0)
        sink.a.mul_(pairs.scale)
        sink.b.mul_(pairs.scale)
    return sink.gradients()


def _fused(upstream: Tensor, products: Tensor, *tensors: Tensor | None) -> Gradients:
    """Read the gradients off what the forward sweep accumulated."""
    a, _, scale, row_bias, *_ = tensors
    assert a is not None
    assert scale is not None
    weighted = upstream[:, :, None] * products
    onto_scale = (weighted * a).sum((1, 2))
    onto_scale = onto_scale if len(scale) > 1 else onto_scale.sum(0, keepdim=True)
    onto_a = (weighted * scale[:, None, None]).sum(0)
    onto_bias = a.new_empty(0) if row_bias is None else upstream.sum(0)
    return Gradients(onto_a, a.new_empty(0), onto_scale, onto_bias, a.new_empty(0))


def _kept(
    plan: Plan, upstream: Tensor, lse: Tensor, tile: Tensor, *tensors: Tensor | None
) -> Gradients:
    """Weigh the only tile there is, which the forward sweep kept."""
    a, b, scale, *_ = tensors
    assert a is not None
    assert scale is not None
    n, other = len(a), a if b is None else b
    coefficient = (upstream * _inverse(lse)).mul_(scale)[0]
    weight = coefficient[:n, None]
    weight = (
        weight * tile if plan.mode == "rows" else (weight + coefficient[-len(other) :]).mul_(tile)
    )
    onto_a = weight @ other
    onto_b = a.new_empty(0) if b is None or not plan.columns else weight.t() @ a
    onto_scale = torch.zeros_like(scale)
    if plan.scales:
        onto_scale = (a * onto_a).sum().div(scale if b is not None else 2 * scale)
    return Gradients(onto_a, onto_b, onto_scale, a.new_empty(0), a.new_empty(0))


def _inverse(lse: Tensor) -> Tensor:
    """Return ``exp(-lse)``, 0 for rows without pairs."""
    return lse.neg().exp_().nan_to_num_(posinf=0.0)


def second_order(plan: Plan, upstream: Tensor, lse: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Differentiate `first_order`: two sweeps, memory O(nd).

    With cotangents a', b', h, r', c' of the gradients and
    ``T_ij = scale (a'_i.b_j + a_i.b'_j) + h a_i.b_j + r'_i + c'_j`` the first sweep gives
    ``m_i = sum_j P_ij T_ij``, the second weighs tiles by ``W_ij (T_ij - m_i)``.
    ``tensors`` are the five gradients of the results of `first_order`, empty ones zero, then those
    of `tiles.open_pairs`. Results are the gradient of ``upstream`` and of the inputs of the sweep.
    """
    pairs = open_pairs(plan, *tensors[5:])._replace(folded=False)
    weights = _Weights(pairs, lse)
    slopes = _Slopes(pairs, Gradients(*tensors[:5]))
    means = torch.zeros_like(lse)
    for rows, cols, raw in scores(pairs):
        slots = pairs.column_slots(rows, cols)
        cross = slopes.cross(rows, cols)
        for k, (left, right) in weights.tiles(raw, rows, cols):
            slope = slopes.tile(k, raw, cross, rows, cols)
            means[k, rows] += (left * slope).sum(1)
            if slots is not None:
                means[k, slots] += (right * slope).sum(0)
    means = weights.scaled(means)
    sink = _Sink(pairs, columns=True)
    coefficient, centre = weights.scaled(upstream), weights.scaled(upstream * means)
    for rows, cols, raw in scores(pairs):
        cross = slopes.cross(rows, cols)
        onto_inputs, onto_cotangents = torch.zeros_like(raw), torch.zeros_like(raw)
        for k, tile in weights.tiles(raw, rows, cols):
            weight = weights.apply(tile, coefficient[k], rows, cols)
            change = weight * slopes.tile(k, raw, cross, rows, cols)
            change -= weights.apply(tile, centre[k], rows, cols)
            sink.add_biases(change, rows, cols)
            if plan.scales:
                sink.add_scale(k, change * raw + weight * cross, rows, cols)
            onto_inputs.addcmul_(change, pairs.beta(k)).addcmul_(weight, slopes.h(k))
            onto_cotangents.addcmul_(weight, pairs.beta(k))
        sink.spread(onto_inputs, rows, cols, pairs.a, pairs.b)
        sink.spread(onto_cotangents, rows, cols, slopes.a, slopes.b)
    return means, *sink.gradients()


class _Slopes:
    """The tiles ``T_ij``: how the scores change along the cotangents."""

    def __init__(self, pairs: Pairs, cotangents: Gradients) -> None:
        self.pairs = pairs
        self.a, self.b, self.scale, self.row_bias, self.col_bias = cotangents
        if pairs.mode == "symmetric":
            self.b, self.col_bias = self.a, self.row_bias
        elif not self.b.numel():
            self.b = torch.zeros_like(pairs.b)
        self._left = torch.cat([self.a, pairs.a], 1)
        self._right = torch.cat([pairs.b, self.b], 1)

    def cross(self, rows: slice, cols: slice) -> Tensor:
        """Return ``a'_i.b_j + a_i.b'_j``."""
        return self._left[rows] @ self._right[cols].t()

    def h(self, k: int) -> Tensor:
        """Return the cotangent of the scale of mask k."""
        return self.scale[k if len(self.scale) > 1 else 0]

    def tile(self, k: int, raw: Tensor, cross: Tensor, rows: slice, cols: slice) -> Tensor:
        slope = (cross * self.pairs.beta(k)).addcmul_(raw, self.h(k))
        if self.row_bias.numel():
            slope.add_(self.row_bias[rows, None])
        if self.col_bias.numel():
            slope.add_(self.col_bias[None, cols])
        return slope
