"""The forward sweep: masked log-sum-exp over tiles, in base 2, with or without a running maximum.

With ``S = scale * a.b + row_bias + column_bias`` a sweep visits the tiles of S one by one and
keeps three things only: sums, in some modes the product of the exponentials with the columns, and
for small inputs the one tile there is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel.masks import Masks

LOG2_E = math.log2(math.e)
SINGLE_TILE_BYTES = 4 * 2**20
# exp(S) must neither overflow nor leave the normal numbers, also once summed over all columns.
SAFE_EXPONENT = {torch.float32: 87.0, torch.float64: 700.0}
# Stands for minus infinity where a difference of two of them would be NaN.
_FLOOR = -1e30


class Plan(NamedTuple):
    """What a sweep is told beside tensors.

    Attributes:
        expressions: Mask expressions, joined by commas.
        mode: ``rows`` sums over columns, ``both`` also over rows, ``symmetric`` both at once over
            the tiles on and above the diagonal.
        tile: Rows and columns of a tile.
        unit: No row or column is longer than 1.
        fused: Accumulate the gradient of the rows in the forward sweep (mode ``rows``).
        keep: Keep the exponentials of a single plain tile for the backward sweep.
        peak: Also give the largest score of every row.
        columns: Backward: the columns need their gradient.
        scales: Backward: the scale needs its gradient.
    """

    expressions: str
    mode: str
    tile: int
    unit: bool = False
    fused: bool = False
    keep: bool = False
    peak: bool = False
    columns: bool = True
    scales: bool = True


class Pairs(NamedTuple):
    """Rows, columns and what is said about their pairs.

    Attributes:
        a: Rows, shape (n, d), float32 or float64.
        b: Columns, shape (m, d); the rows themselves in symmetric mode.
        scale: ``1/temperature``, shape (1,) for all masks or (k,) one for each mask.
        row_bias: Added to the scores of a row, shape (n,).
        col_bias: Added to the scores of a column, shape (m,); the row bias in symmetric mode.
        masks: The k masks.
        mode: As in `Plan`.
        tile: Rows and columns of a tile.
        bounded: True where exponentials need no running maximum.
        folded: True where the scale is multiplied into the rows before the product.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    masks: Masks
    mode: str
    tile: int
    bounded: bool
    folded: bool

    def beta(self, k: int) -> Tensor:
        """Scale of mask k."""
        return self.scale[k if len(self.scale) > 1 else 0]

    def column_slots(self, rows: slice, cols: slice) -> slice | None:
        """Where the column sums of a tile belong, None where it gives none."""
        if self.mode == "both":
            return slice(len(self.a) + cols.start, len(self.a) + cols.stop)
        return cols if self.mode == "symmetric" and rows.start != cols.start else None


def open_pairs(plan: Plan, *tensors: Tensor | None) -> Pairs:
    """Read the arguments of a sweep, and choose bound or running maximum.

    ``tensors`` are rows (n, d); columns (m, d), None in symmetric mode; scale (1,) or (k,); bias of
    the rows and of the columns, or None; the six keys in the order of `masks.KEYS`.
    """
    a, b, scale, row_bias, col_bias, *keys = tensors
    assert a is not None
    assert scale is not None
    if b is None:
        b, col_bias, keys = a, row_bias, [*keys[:3], *keys[:3]]
    masks = Masks(plan.expressions, keys, (len(a), len(b)), plan.tile, a.device)
    bounded = _is_bounded(a, b, scale, (row_bias, col_bias), plan.unit)
    folded = len(scale) == 1
    return Pairs(a, b, scale, row_bias, col_bias, masks, plan.mode, plan.tile, bounded, folded)


def _is_bounded(
    a: Tensor, b: Tensor, scale: Tensor, biases: tuple[Tensor | None, ...], unit: bool
) -> bool:
    if a.device.type != "cpu":  # pragma: no cover - CUDA only: reading would wait for the device
        return False
    most: float = max(abs(value) for value in scale.tolist())
    if not unit:
        longest = float(torch.linalg.vector_norm(a, dim=1).amax())
        other = longest if b is a else float(torch.linalg.vector_norm(b, dim=1).amax())
        most *= longest * other
    for bias in biases:
        most += 0.0 if bias is None else float(bias.abs().amax())
    return most + math.log(max(len(a), len(b), 1)) <= SAFE_EXPONENT[a.dtype]


def default_tile(rows: int = 0, columns: int = 0, itemsize: int = 4) -> int:
    """Return the tile that ``tile="auto"`` stands for.

    Small inputs take a single tile; larger ones 512 rows and columns, which with their operands
    stay in the second-level cache of one core. ``DIPTYCH_TILE`` wins over both. Without rows it is
    the tile of large inputs.
    """
    wish = os.environ.get("DIPTYCH_TILE")
    if wish is not None:
        if not wish.isdecimal() or int(wish) < 1:
            found = f"is {wish!r}"
            fix = "set the environment variable to a positive whole number, such as 512"
            raise ContrastInputError("default_tile", "DIPTYCH_TILE", found, fix)
        return int(wish)
    if 0 < rows * columns * itemsize <= SINGLE_TILE_BYTES:
        return max(rows, columns)
    return 512


def scores(pairs: Pairs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield every tile of products, times ``scale * log2(e)`` where the scale is folded in.

    In symmetric mode these are the tiles on and above the diagonal. The tile is one buffer: it is
    overwritten by the next.
    """
    n, m, size = len(pairs.a), len(pairs.b), pairs.tile
    buffer = pairs.a.new_empty(min(size, n) * min(size, m))
    factor = pairs.scale * LOG2_E if pairs.folded else None
    for i in range(0, n, size):
        rows = slice(i, min(i + size, n))
        block = pairs.a[rows] if factor is None else pairs.a[rows] * factor
        for j in range(i if pairs.mode == "symmetric" else 0, m, size):
            cols = slice(j, min(j + size, m))
            shape = (rows.stop - rows.start, cols.stop - cols.start)
            tile = buffer[: shape[0] * shape[1]].view(shape)
            yield rows, cols, torch.mm(block, pairs.b[cols].t(), out=tile)


def exponents(
    pairs: Pairs, products: Tensor, rows: slice, cols: slice
) -> Iterator[tuple[int, Tensor]]:
    """Yield for each mask its index and the base-2 exponents of the tile, not yet masked.

    With one scale for several masks the tile is the same for all; the last user may overwrite it.
    """
    for k in range(len(pairs.masks.trees)):
        tile = products if pairs.folded else products * (pairs.beta(k) * LOG2_E)
        if k == 0 or not pairs.folded:
            if pairs.row_bias is not None:
                tile.add_(pairs.row_bias[rows, None], alpha=LOG2_E)
            if pairs.col_bias is not None:
                tile.add_(pairs.col_bias[None, cols], alpha=LOG2_E)
        yield k, tile


def exponentials(
    pairs: Pairs, products: Tensor, rows: slice, cols: slice
) -> Iterator[tuple[int, Tensor]]:
    """Yield for each mask its index and the masked ``exp(S)`` of the tile (bounded pairs only)."""
    last = len(pairs.masks.trees) - 1
    for k, tile in exponents(pairs, products, rows, cols):
        if k == 0 or not pairs.folded:
            tile.exp2_()
        own = tile.clone() if pairs.folded and k < last else tile
        yield k, pairs.masks.hide(own, k, rows, cols, 0.0)


def sum_exponentials(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep over all tiles and sum their exponentials.

    Returns:
        Natural log of the sums, minus infinity where nothing counts, shape (k, n), in mode
        ``both`` (k, n + m); the largest scores, same shape, empty unless asked for; and
        ``sum_j exp(S_ij - lse_i) b_j``, shape (k, n, d), where fused, or the exponentials
        themselves, shape (n, m), where kept, else empty.
    """
    pairs = open_pairs(plan, *tensors)
    if _is_kept(plan, pairs):
        return _sum_kept(pairs, plan.peak)
    a, b, count = pairs.a, pairs.b, len(pairs.masks.trees)
    sums = len(a) + (len(b) if pairs.mode == "both" else 0)
    totals = a.new_zeros(count, sums)
    extra = a.new_zeros(count, *a.shape) if plan.fused else a.new_empty(0)
    wanted = plan.peak or not pairs.bounded
    tops = a.new_full((count, sums), 0.0 if pairs.bounded else _FLOOR) if wanted else a.new_empty(0)
    sweep = _sum_bounded if pairs.bounded else _sum_streaming
    sweep(pairs, plan, totals, tops, extra)
    if plan.fused:
        extra /= totals[:, : len(a), None].clamp_min(torch.finfo(a.dtype).tiny)
    if pairs.bounded:
        return totals.log_(), tops.log_() if plan.peak else tops, extra
    lse = torch.where(totals > 0, totals.log() + tops / LOG2_E, -math.inf)
    tops = torch.where(totals > 0, tops / LOG2_E, -math.inf) if plan.peak else a.new_empty(0)
    return lse, tops, extra


def _is_kept(plan: Plan, pairs: Pairs) -> bool:
    n, m = len(pairs.a), len(pairs.b)
    single = pairs.tile >= max(n, m) and n * m * pairs.a.element_size() <= SINGLE_TILE_BYTES
    plain = pairs.bounded and pairs.folded and len(pairs.masks.trees) == 1
    unbiased = pairs.row_bias is None and pairs.col_bias is None
    return plan.keep and not plan.fused and single and plain and unbiased


def _sum_kept(pairs: Pairs, peak: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the only tile there is and keep it: small batches are bound by the number of calls."""
    nothing, factor = pairs.a.new_empty(0), pairs.scale.item() * LOG2_E
    tile = torch.addmm(pairs.scale[0], pairs.a, pairs.b.t(), beta=0.0, alpha=factor).exp2_()
    pairs.masks.hide(tile, 0, slice(0, len(pairs.a)), slice(0, len(pairs.b)), 0.0)
    sides = (1, 0) if pairs.mode == "both" else (1,)
    sums = torch.cat([tile.sum(side) for side in sides])[None].log_()
    tops = torch.cat([tile.amax(side) for side in sides])[None].log_() if peak else nothing
    return sums, tops, tile


def _sum_bounded(pairs: Pairs, plan: Plan, totals: Tensor, tops: Tensor, products: Tensor) -> None:
    for rows, cols, raw in scores(pairs):
        slots = pairs.column_slots(rows, cols)
        for k, tile in exponentials(pairs, raw, rows, cols):
            for dim, where in ((1, rows), (0, slots)):
                if where is None:
                    continue
                totals[k, where].add_(tile.sum(dim))
                if plan.peak:
                    top = tops[k, where]
                    torch.maximum(top, tile.amax(dim), out=top)
            if plan.fused:
                products[k, rows].addmm_(tile, pairs.b[cols])


def _sum_streaming(
    pairs: Pairs, plan: Plan, totals: Tensor, tops: Tensor, products: Tensor
) -> None:
    for rows, cols, raw in scores(pairs):
        slots = pairs.column_slots(rows, cols)
        for k, exponent in exponents(pairs, raw, rows, cols):
            tile = pairs.masks.hide(exponent.clone(), k, rows, cols, -math.inf)
            if slots is not None:
                _absorb(totals[k, slots], tops[k, slots], tile, 0)
            shrink, exponential = _absorb(totals[k, rows], tops[k, rows], tile, 1)
            if plan.fused:
                products[k, rows].mul_(shrink[:, None]).addmm_(exponential, pairs.b[cols])


def _absorb(total: Tensor, top: Tensor, tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Add a tile of exponents to running sums that are relative to a running maximum."""
    higher = torch.maximum(top, tile.amax(dim))
    exponential = (tile - higher.unsqueeze(dim)).exp2_()
    shrink = (top - higher).exp2_()
    total.mul_(shrink).add_(exponential.sum(dim))
    top.copy_(higher)
    return shrink, exponential
