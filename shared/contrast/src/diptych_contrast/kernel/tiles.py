"""The forward sweep: masked log-sum-exp over tiles, in base 2, with or without a running maximum.

With ``S = scale * a.b + row_bias + column_bias`` a sweep visits the tiles of S one by one and
keeps three things only: sums, in some modes the product of the exponentials with the columns, and
for small inputs the one tile there is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel.masks import Masks

LOG2_E = math.log2(math.e)
SINGLE_TILE_BYTES = 4 * 2**20
# exp(S) must neither overflow nor leave the normal numbers, also once summed over all columns.
_SAFE_EXPONENT = {torch.float32: 87.0, torch.float64: 700.0}
# Stands for minus infinity where a difference of two of them would be NaN.
_FLOOR = -1e30


@dataclass(frozen=True)
class Pairs:
    """Rows, columns and what is said about their pairs.

    Attributes:
        a: Rows, shape (n, d), float32 or float64.
        b: Columns, shape (m, d); the rows themselves in symmetric mode.
        scale: ``1/temperature``, shape (1,) for all masks or (k,) one for each mask.
        row_bias: Added to the scores of a row, shape (n,).
        col_bias: Added to the scores of a column, shape (m,); the row bias in symmetric mode.
        masks: The k masks.
        mode: ``rows`` sums over columns, ``both`` also over rows, ``symmetric`` both at once over
            the tiles on and above the diagonal.
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

    @property
    def sums(self) -> int:
        """Number of sums: rows, and in mode ``both`` also columns."""
        return len(self.a) + (len(self.b) if self.mode == "both" else 0)

    @property
    def has_biases(self) -> bool:
        """Whether any bias is added to the scores."""
        return self.row_bias is not None or self.col_bias is not None

    def column_slots(self, rows: slice, cols: slice) -> slice | None:
        """Where the column sums of a tile belong, None where it gives none."""
        if self.mode == "both":
            return slice(len(self.a) + cols.start, len(self.a) + cols.stop)
        return cols if self.mode == "symmetric" and rows.start != cols.start else None


def open_pairs(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    biases: Sequence[Tensor | None],
    keys: Sequence[Tensor | None],
    expressions: str,
    mode: str,
    tile: int,
    unit: bool,
) -> Pairs:
    """Gather the flat arguments of a sweep, and choose bound or running maximum.

    Args:
        a: Rows, shape (n, d).
        b: Columns, shape (m, d), or None in symmetric mode.
        scale: ``1/temperature``, shape (1,) or (k,).
        biases: Bias of the rows and of the columns, each a vector or None.
        keys: The six keys in the order of `masks.KEYS`.
        expressions: Mask expressions, joined by commas.
        mode: ``rows``, ``both`` or ``symmetric``.
        tile: Rows and columns of a tile.
        unit: No row or column is longer than 1.

    Returns:
        The pairs.
    """
    row_bias, col_bias = biases
    if b is None:
        b, col_bias = a, row_bias
        keys = (*keys[:3], *keys[:3])
    masks = Masks(expressions, keys, (len(a), len(b)), tile, a.device)
    bounded = _is_bounded(a, b, scale, (row_bias, col_bias), unit)
    folded = len(scale) == 1
    return Pairs(a, b, scale, row_bias, col_bias, masks, mode, tile, bounded, folded)


def unfold(pairs: Pairs) -> Pairs:
    """Return the same pairs with scores that do not yet hold the scale."""
    return replace(pairs, folded=False)


def _is_bounded(
    a: Tensor, b: Tensor, scale: Tensor, biases: Sequence[Tensor | None], unit: bool
) -> bool:
    if a.device.type != "cpu":  # pragma: no cover - CUDA only: reading would wait for the device
        return False
    most = float(scale.abs().amax())
    if not unit:
        longest = float(torch.linalg.vector_norm(a, dim=1).amax())
        other = longest if b is a else float(torch.linalg.vector_norm(b, dim=1).amax())
        most *= longest * other
    for bias in biases:
        most += 0.0 if bias is None else float(bias.abs().amax())
    return most + math.log(max(len(a), len(b), 1)) <= _SAFE_EXPONENT[a.dtype]


def default_tile(rows: int = 0, columns: int = 0, itemsize: int = 4) -> int:
    """Return the tile that ``tile="auto"`` stands for.

    Small inputs take a single tile; larger ones 512 rows and columns, which with their operands
    stay in the second-level cache of one core, or on a GPU 2,048. ``DIPTYCH_TILE`` wins over both.

    Args:
        rows: Number of rows, 0 for the tile of large inputs.
        columns: Number of columns.
        itemsize: Bytes of one score.

    Returns:
        Rows and columns of a tile.

    Raises:
        ContrastInputError: ``DIPTYCH_TILE`` is not a positive whole number.
    """
    wish = os.environ.get("DIPTYCH_TILE")
    if wish is not None:
        if not wish.isdecimal() or int(wish) < 1:
            raise ContrastInputError(
                "default_tile",
                "DIPTYCH_TILE",
                f"is {wish!r}",
                "set the environment variable to a positive whole number, such as 512",
            )
        return int(wish)
    if 0 < rows * columns * itemsize <= SINGLE_TILE_BYTES:
        return max(rows, columns)
    return 512


def tiles(pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of every tile; in symmetric mode on and above the diagonal."""
    n, m, size = len(pairs.a), len(pairs.b), pairs.tile
    for i in range(0, n, size):
        for j in range(i if pairs.mode == "symmetric" else 0, m, size):
            yield slice(i, min(i + size, n)), slice(j, min(j + size, m))


def scores(pairs: Pairs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield every tile of products, times ``scale * log2(e)`` where the scale is folded in.

    The tile is one buffer: it is overwritten by the next.
    """
    n, m = min(pairs.tile, len(pairs.a)), min(pairs.tile, len(pairs.b))
    buffer = pairs.a.new_empty(n * m)
    factor = pairs.scale * LOG2_E if pairs.folded else None
    block, start = pairs.a[:0], -1
    for rows, cols in tiles(pairs):
        if rows.start != start:
            block, start = pairs.a[rows], rows.start
            block = block if factor is None else block * factor
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        tile = buffer[: shape[0] * shape[1]].view(shape)
        yield rows, cols, torch.mm(block, pairs.b[cols].t(), out=tile)


def exponents(
    pairs: Pairs, products: Tensor, rows: slice, cols: slice
) -> Iterator[tuple[int, Tensor]]:
    """Yield for each mask its index and the base-2 exponents of the tile, not yet masked.

    With one scale for several masks the tile is the same for all; the last user may overwrite it.
    """
    if pairs.folded:
        tile = products
        if pairs.row_bias is not None:
            tile.add_(pairs.row_bias[rows, None], alpha=LOG2_E)
        if pairs.col_bias is not None:
            tile.add_(pairs.col_bias[None, cols], alpha=LOG2_E)
        for index in range(len(pairs.masks.trees)):
            yield index, tile
        return
    for index in range(len(pairs.masks.trees)):
        tile = products * (pairs.scale[index if len(pairs.scale) > 1 else 0] * LOG2_E)
        if pairs.row_bias is not None:
            tile.add_(pairs.row_bias[rows, None], alpha=LOG2_E)
        if pairs.col_bias is not None:
            tile.add_(pairs.col_bias[None, cols], alpha=LOG2_E)
        yield index, tile


def exponentials(
    pairs: Pairs, products: Tensor, rows: slice, cols: slice
) -> Iterator[tuple[int, Tensor]]:
    """Yield for each mask its index and the masked ``exp(S)`` of the tile (bounded pairs only)."""
    count = len(pairs.masks.trees)
    shared: Tensor | None = None
    for index, tile in exponents(pairs, products, rows, cols):
        if pairs.folded:
            shared = tile.exp2_() if shared is None else shared
            own = shared if index == count - 1 else shared.clone()
        else:
            own = tile.exp2_()
        yield index, pairs.masks.hide(own, index, rows, cols, 0.0)


@dataclass(frozen=True)
class Sums:
    """What a forward sweep leaves.

    Attributes:
        lse: Natural log of the sums, minus infinity where nothing counts, shape (k, n) or, in
            mode ``both``, (k, n + m).
        peak: Largest score that counts, same shape; empty unless asked for.
        extra: ``sum_j exp(S_ij - lse_i) b_j``, shape (k, n, d), where asked for; or the
            exponentials themselves, shape (k, n, m), where kept; else empty.
    """

    lse: Tensor
    peak: Tensor
    extra: Tensor


def sum_exponentials(pairs: Pairs, *, fused: bool, keep: bool, peak: bool) -> Sums:
    """Sweep over all tiles and sum their exponentials.

    Args:
        pairs: Rows, columns, masks.
        fused: Also accumulate the product with the columns, so that no backward sweep is needed.
        keep: Keep the exponentials where there is a single bounded tile.
        peak: Also keep the largest score of every row.

    Returns:
        The sums.
    """
    if pairs.bounded:
        return _sum_bounded(pairs, fused, keep, peak)
    return _sum_streaming(pairs, fused, peak)


def _sum_bounded(pairs: Pairs, fused: bool, keep: bool, peak: bool) -> Sums:
    a, b, count = pairs.a, pairs.b, len(pairs.masks.trees)
    totals = a.new_zeros(count, pairs.sums)
    tops = a.new_zeros(count, pairs.sums) if peak else a.new_empty(0)
    products = a.new_zeros(count, len(a), a.shape[1]) if fused else a.new_empty(0)
    single = pairs.tile >= max(len(a), len(b)) and not fused
    fits = count * len(a) * len(b) * a.element_size() <= SINGLE_TILE_BYTES
    kept: list[Tensor] = []
    for rows, cols, raw in scores(pairs):
        slots = pairs.column_slots(rows, cols)
        for k, tile in exponentials(pairs, raw, rows, cols):
            totals[k, rows] += tile.sum(1)
            if slots is not None:
                totals[k, slots] += tile.sum(0)
            if peak:
                tops[k, rows] = torch.maximum(tops[k, rows], tile.amax(1))
                if slots is not None:
                    tops[k, slots] = torch.maximum(tops[k, slots], tile.amax(0))
            if fused:
                products[k, rows].addmm_(tile, b[cols])
            if keep and single and fits:
                kept.append(tile)
    if fused:
        products /= totals[:, : len(a), None].clamp_min(torch.finfo(a.dtype).tiny)
    if kept:
        products = kept[0][None] if count == 1 else torch.stack(kept)
    return Sums(totals.log(), tops.log() if peak else tops, products)


def _sum_streaming(pairs: Pairs, fused: bool, peak: bool) -> Sums:
    a, b, count = pairs.a, pairs.b, len(pairs.masks.trees)
    totals = a.new_zeros(count, pairs.sums)
    tops = a.new_full((count, pairs.sums), _FLOOR)
    products = a.new_zeros(count, len(a), a.shape[1]) if fused else a.new_empty(0)
    for rows, cols, raw in scores(pairs):
        slots = pairs.column_slots(rows, cols)
        for k, exponent in exponents(pairs, raw, rows, cols):
            tile = pairs.masks.hide(exponent.clone(), k, rows, cols, -math.inf)
            if slots is not None:
                _absorb(totals[k, slots], tops[k, slots], tile, 0)
            shrink, exponential = _absorb(totals[k, rows], tops[k, rows], tile, 1)
            if fused:
                products[k, rows] *= shrink[:, None]
                products[k, rows].addmm_(exponential, b[cols])
    if fused:
        products /= totals[:, : len(a), None].clamp_min(torch.finfo(a.dtype).tiny)
    lse = torch.where(totals > 0, totals.log() + tops / LOG2_E, -math.inf)
    tops = torch.where(totals > 0, tops / LOG2_E, -math.inf) if peak else a.new_empty(0)
    return Sums(lse, tops, products)


def _absorb(total: Tensor, top: Tensor, tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Add a tile of exponents to running sums that are relative to a running maximum."""
    higher = torch.maximum(top, tile.amax(dim))
    exponential = (tile - higher.unsqueeze(dim)).exp2_()
    shrink = (top - higher).exp2_()
    total.mul_(shrink).add_(exponential.sum(dim))
    top.copy_(higher)
    return shrink, exponential
