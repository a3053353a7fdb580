"""First and second derivatives of the sweep: tiles are computed again, never stored.

With ``P_ij = exp(S_ij - lse_i)`` and upstream gradients g, every tile is weighted by
``W_ij = g_i P_ij`` (mode ``rows``), to which the other modes add the column's own term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych_contrast.kernel.tiles import LOG2_E, Pairs, exponentials, exponents, scores, unfold


@dataclass(frozen=True)
class Gradients:
    """Gradients of the inputs of a sweep.

    Attributes:
        a: Of the rows; in symmetric mode of both roles together.
        b: Of the columns, zero in symmetric mode.
        scale: Of the scales, shape (1,) or (k,).
        row_bias: Of the row bias; in symmetric mode of both roles together.
        col_bias: Of the column bias.
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
        empty = lse == -math.inf
        # A row without pairs has no weights: exp(-inf - inf) is 0 where exp(-inf + inf) is NaN.
        self.shift = lse if pairs.bounded else (lse * LOG2_E).masked_fill_(empty, math.inf)
        self.inverse = (-lse).exp_().masked_fill_(empty, 0.0) if pairs.bounded else lse

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
            left = (exponent - self.shift[k, rows, None]).exp2_()
            pairs.masks.hide(left, k, rows, cols, 0.0)
            right = left
            if others is not None:
                right = (exponent - self.shift[k, None, others]).exp2_()
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
        self.biases = biases = pairs.has_biases
        self.symmetric = pairs.mode == "symmetric"
        self.a = torch.zeros_like(pairs.a)
        self.b = torch.zeros_like(pairs.b) if columns else pairs.b.new_empty(0)
        self.scale = torch.zeros_like(pairs.scale)
        self.row_bias = pairs.a.new_zeros(len(pairs.a) if biases else 0)
        self.col_bias = pairs.a.new_zeros(len(pairs.b) if biases and not self.symmetric else 0)

    def spread(
        self, weight: Tensor, rows: slice, cols: slice, factors: tuple[Tensor, Tensor]
    ) -> None:
        """Add a weighted tile times the columns to the rows, its transpose to the columns."""
        self.a[rows].addmm_(weight, factors[1][cols])
        if self.symmetric:
            if rows.start != cols.start:
                self.a[cols].addmm_(weight.t(), factors[0][rows])
        elif self.b.numel():
            self.b[cols].addmm_(weight.t(), factors[0][rows])

    def add_biases(self, weight: Tensor, rows: slice, cols: slice) -> None:
        if not self.biases:
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
    pairs: Pairs,
    lse: Tensor,
    upstream: Tensor,
    kept: Tensor | None,
    *,
    columns: bool,
    scale: bool,
) -> Gradients:
    """Sweep again and pull the gradient of the log-sum-exp back to its inputs.

    Args:
        pairs: Rows, columns, masks.
        lse: Result of the forward sweep, shape (k, sums).
        upstream: Gradient of the result, shape (k, sums).
        kept: Exponentials of a single tile, shape (k, n, m), where the forward sweep kept them.
        columns: Whether the columns need their gradient.
        scale: Whether the scale needs its.

    Returns:
        The gradients; those not asked for are empty or zero.
    """
    weights, sink = _Weights(pairs, lse), _Sink(pairs, columns=columns)
    coefficient = weights.scaled(upstream)
    one_scale = len(pairs.scale) == 1
    for rows, cols, raw, parts in _tiles(weights, kept):
        total: Tensor | None = None
        for k, tile in parts:
            weight = weights.apply(tile, coefficient[k], rows, cols)
            sink.add_biases(weight, rows, cols)
            if not one_scale:
                if scale:
                    sink.add_scale(k, weight * raw, rows, cols)
                weight.mul_(pairs.scale[k])
            total = weight if total is None else total.add_(weight)
        if total is not None:
            sink.spread(total, rows, cols, (pairs.a, pairs.b))
    if one_scale:
        if scale:
            # sum_ij W_ij a_i.b_j; the symmetric sum of the rows holds every pair in both orders.
            sink.scale[0] = (pairs.a * sink.a).sum() * (0.5 if sink.symmetric else 1.0)
        sink.a.mul_(pairs.scale)
        sink.b.mul_(pairs.scale)
    return sink.gradients()


def _tiles(
    weights: _Weights, kept: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Iterator[tuple[int, tuple[Tensor, Tensor]]]]]:
    pairs = weights.pairs
    if kept is not None:
        rows, cols = slice(0, len(pairs.a)), slice(0, len(pairs.b))
        raw = pairs.a @ pairs.b.t() if len(pairs.scale) > 1 else kept
        yield rows, cols, raw, ((k, (kept[k], kept[k])) for k in range(len(kept)))
        return
    for rows, cols, raw in scores(pairs):
        yield rows, cols, raw, weights.tiles(raw, rows, cols)


def second_order(
    pairs: Pairs, lse: Tensor, upstream: Tensor, cotangents: Gradients, *, scale: bool
) -> tuple[Tensor, Gradients]:
    """Differentiate `first_order`: two sweeps, memory O(nd).

    With cotangents a', b', h, r', c' of the gradients and
    ``T_ij = scale (a'_i.b_j + a_i.b'_j) + h a_i.b_j + r'_i + c'_j`` the first sweep gives
    ``m_i = sum_j P_ij T_ij``, the second weighs tiles by ``W_ij (T_ij - m_i)``.

    Args:
        pairs: Rows, columns, masks.
        lse: Result of the forward sweep, shape (k, sums).
        upstream: Gradient that `first_order` took, shape (k, sums).
        cotangents: Gradients of the results of `first_order`; empty ones are zero.
        scale: Whether the scale needs its gradient.

    Returns:
        Gradient of ``upstream``, shape (k, sums), and of the inputs of the sweep.
    """
    pairs = unfold(pairs)
    weights = _Weights(pairs, lse)
    slopes = _Slopes(pairs, cotangents)
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
    sink = _Sink(pairs, columns=pairs.mode != "symmetric")
    coefficient, centre = weights.scaled(upstream), weights.scaled(upstream * means)
    for rows, cols, raw in scores(pairs):
        cross = slopes.cross(rows, cols)
        onto_inputs, onto_cotangents = torch.zeros_like(raw), torch.zeros_like(raw)
        for k, tile in weights.tiles(raw, rows, cols):
            weight = weights.apply(tile, coefficient[k], rows, cols)
            change = weight * slopes.tile(k, raw, cross, rows, cols)
            change -= weights.apply(tile, centre[k], rows, cols)
            sink.add_biases(change, rows, cols)
            if scale:
                sink.add_scale(k, change * raw + weight * cross, rows, cols)
            beta, h = slopes.factors(k)
            onto_inputs.addcmul_(change, beta).addcmul_(weight, h)
            onto_cotangents.addcmul_(weight, beta)
        sink.spread(onto_inputs, rows, cols, (pairs.a, pairs.b))
        sink.spread(onto_cotangents, rows, cols, (slopes.a, slopes.b))
    return means, sink.gradients()


class _Slopes:
    """The tiles ``T_ij``: how the scores change along the cotangents."""

    def __init__(self, pairs: Pairs, cotangents: Gradients) -> None:
        symmetric = pairs.mode == "symmetric"
        self.pairs, self.scale = pairs, cotangents.scale
        self.a = cotangents.a
        self.b = cotangents.b if cotangents.b.numel() else torch.zeros_like(pairs.b)
        self.b = self.a if symmetric else self.b
        self.row_bias = cotangents.row_bias
        self.col_bias = cotangents.row_bias if symmetric else cotangents.col_bias
        self._left = torch.cat([self.a, pairs.a], 1)
        self._right = torch.cat([pairs.b, self.b], 1)

    def cross(self, rows: slice, cols: slice) -> Tensor:
        """Return ``a'_i.b_j + a_i.b'_j``."""
        return self._left[rows] @ self._right[cols].t()

    def factors(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the scale of mask k and its cotangent."""
        k = k if len(self.scale) > 1 else 0
        return self.pairs.scale[k], self.scale[k]

    def tile(self, k: int, raw: Tensor, cross: Tensor, rows: slice, cols: slice) -> Tensor:
        beta, h = self.factors(k)
        slope = (cross * beta).addcmul_(raw, h)
        if self.row_bias.numel():
            slope.add_(self.row_bias[rows, None])
        if self.col_bias.numel():
            slope.add_(self.col_bias[None, cols])
        return slope
