"""Masked log-sum-exp, the first of the four primitives, and how it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel.autograd import sweep
from diptych_contrast.kernel.call import products
from diptych_contrast.kernel.masks import Masks, PairMask
from diptych_contrast.kernel.ring import ring_sweep
from diptych_contrast.kernel.tiles import Plan, default_tile

Backend = Literal["auto", "tiled", "dense", "triton"]


@dataclass(frozen=True)
class Engine:
    """How a sweep is run.

    Attributes:
        backend: ``auto`` and ``tiled`` sweep over tiles, ``dense`` stores all scores.
        tile: Rows and columns of a tile, or ``auto``.
        group: Processes over which the columns are sharded, None for one process.
        ring: Let column shards travel from process to process (needs ``group``).
        unit: No row or column is longer than 1, so that scores need not be bounded by looking.
    """

    backend: Backend = "auto"
    tile: int | Literal["auto"] = "auto"
    group: Any = None
    ring: bool = False
    unit: bool = False


def check_engine(function: str, engine: Engine) -> None:
    """Refuse an unknown or missing back end, and a tile below 1, with `ContrastInputError`."""
    if engine.backend not in _BACKENDS:
        found = ", which this version does not have" if engine.backend == "triton" else ""
        found, fix = f"is {engine.backend!r}{found}", "pass 'auto', 'tiled' or 'dense'"
        raise ContrastInputError(function, "backend", found, fix)
    if engine.tile != "auto" and (not isinstance(engine.tile, int) or engine.tile < 1):
        fix = "pass 'auto' or a positive whole number"
        raise ContrastInputError(function, "tile", f"is {engine.tile!r}", fix)


_BACKENDS = ("auto", "tiled", "dense")


def log_sums(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    scale: Tensor,
    masks: Sequence[str],
    *,
    keys: PairMask | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    both: bool = False,
    peak: bool = False,
    engine: Engine = Engine(),
) -> tuple[Float[Tensor, "k sums"], Tensor]:
    """Run one sweep: what all losses call.

    Args:
        a: Rows, shape (n, d), float32 or float64.
        b: Columns, shape (m, d), same dtype; None in symmetric mode, where the rows are both.
        scale: ``1/temperature``, shape () or (k,).
        masks: The k mask expressions.
        keys: Keys of rows and columns, None for positions.
        biases: Bias of the rows, shape (n,), and of the columns, shape (m,).
        both: Also sum over the rows of every column.
        peak: Also return the largest score of every row.

    Returns:
        Log-sum-exp, shape (k, n), with ``both`` (k, n + m), and the largest scores, same shape,
        detached, empty unless asked for.
    """
    given = (None,) * 6 if keys is None else keys.keys()
    tensors = (a, b, scale.to(a.dtype).reshape(-1), *biases, *given)
    expressions = ",".join(masks)
    mode = "symmetric" if b is None else "both" if both else "rows"
    rings = engine.ring and b is not None
    if engine.backend == "dense" and not rings:
        lse, top = _dense_sweep(Plan(expressions, mode, 0), *tensors)
        return lse, top if peak else top.new_empty(0)
    columns = len(a) if b is None else len(b)
    size = default_tile(len(a), columns, a.element_size()) if engine.tile == "auto" else engine.tile
    graph = torch.is_grad_enabled()
    fused = graph and a.requires_grad and mode == "rows" and b is not None and not b.requires_grad
    fused = fused and (biases[1] is None or not biases[1].requires_grad) and not rings
    keep = graph and not torch.compiler.is_compiling() and not rings
    plan = Plan(expressions, mode, size, engine.unit, fused, keep, peak)
    return ring_sweep(plan, engine.group, *tensors) if rings else sweep(plan, *tensors)


def _dense_sweep(plan: Plan, *tensors: Any) -> tuple[Tensor, Tensor]:
    """Compute what `autograd.sweep` computes from a stored score matrix, by autograd alone."""
    a, b, scale, row_bias, col_bias, *keys = tensors
    if b is None:
        b, col_bias, keys = a, row_bias, [*keys[:3], *keys[:3]]
    n, m = len(a), len(b)
    masks = Masks(plan.expressions, keys, (n, m), max(n, m), a.device)
    raw = products(a, b.t())
    sums, peaks = [], []
    for k in range(len(masks.trees)):
        scores = raw * scale[k if len(scale) > 1 else 0]
        scores = scores if row_bias is None else scores + row_bias[:, None]
        scores = scores if col_bias is None else scores + col_bias
        hidden = torch.zeros((n, m), dtype=torch.bool, device=a.device)
        masks.hide(hidden, k, slice(0, n), slice(0, m), True)
        sides = [_log_sum(scores, hidden)]
        if plan.mode == "both":
            sides.append(_log_sum(scores.t(), hidden.t()))
        sums.append(torch.cat([side[0] for side in sides]))
        peaks.append(torch.cat([side[1] for side in sides]))
    return torch.stack(sums), torch.stack(peaks)


def _log_sum(scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    empty = hidden.all(1)
    scores = scores.masked_fill(hidden, -math.inf)
    # A row of minus infinities has no finite derivative, so such rows go around the sum.
    sums = torch.logsumexp(scores.masked_fill(empty[:, None], 0.0), 1)
    return sums.masked_fill(empty, -math.inf), scores.detach().amax(1)


def pair_lse(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    beta: float | Tensor,
    masks: Sequence[str] = ("not_self",),
    keys: PairMask | None = None,
    row_bias: Float[Tensor, " n"] | None = None,
    col_bias: Float[Tensor, " m"] | None = None,
    *,
    symmetric: bool = False,
    backend: Backend = "auto",
    tile: int | Literal["auto"] = "auto",
) -> Float[Tensor, "n k"]:
    """Masked log-sum-exp of the scores of every row, in memory O((n + m) d).

    ``out[i, k] = log sum_j mask_k(i, j) exp(beta_k a_i.b_j + row_bias_i + col_bias_j)``, minus
    infinity where a mask leaves nothing; such rows get zero gradient. Twice differentiable.

    Args:
        b: Columns, shape (m, d); in symmetric mode ``a`` itself or None.
        beta: ``1/temperature``, one for all masks or one for each, shape (k,).
        masks: One to three expressions of `PairMask`.
        keys: Keys the masks read; its own expression is not used. None: positions are the ids.
        row_bias: Added to the scores of a row, shape (n,); in symmetric mode to both sides.
        col_bias: Added to the scores of a column, shape (m,); in symmetric mode None.
        symmetric: Columns are the rows: two products in all instead of three.
        backend: ``tiled``, ``dense`` (stores all scores) or ``auto``.

    Example:
        >>> pair_lse(torch.zeros(3, 2), None, 1.0, symmetric=True).exp()[0].item()
        2.0
    """
    name = "pair_lse"
    engine = Engine(backend, tile)
    check_engine(name, engine)
    a, other = operands(name, a, a if b is None else b)
    scale = torch.as_tensor(beta, dtype=a.dtype, device=a.device)
    if not 1 <= len(masks) <= 3:
        raise ContrastInputError(name, "masks", f"has {len(masks)} entries", "pass one to three")
    if scale.dim() > 1 or (scale.dim() == 1 and len(scale) not in {1, len(masks)}):
        found = f"has shape {tuple(scale.shape)} for {len(masks)} masks"
        fix = "pass one number, or one for each mask"
        raise ContrastInputError(name, "beta", found, fix)
    own_columns = b is not None and b.shape != a.shape
    if symmetric and (col_bias is not None or own_columns):
        found = "is True with columns or a column bias of their own"
        fix = "pass b=None, and the bias as row_bias: it counts on both sides"
        raise ContrastInputError(name, "symmetric", found, fix)
    if keys is None and not symmetric and b is None:
        raise ContrastInputError(name, "b", "is None", "pass the columns, or symmetric=True")
    lse, _ = log_sums(
        a,
        None if symmetric else other,
        scale,
        masks,
        keys=keys,
        biases=(_bias(name, "row_bias", row_bias, a), _bias(name, "col_bias", col_bias, other)),
        engine=engine,
    )
    return lse.t()


def operands(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Check rows and columns and bring them to one dtype, float32 or float64."""
    for argument, value in (("a", a), ("b", b)):
        if value.dim() != 2 or not value.is_floating_point():
            found = f"has shape {tuple(value.shape)} and dtype {value.dtype}"
            fix = "pass a matrix of floating-point embeddings"
            raise ContrastInputError(name, argument, found, fix)
    if a.shape[1] != b.shape[1]:
        found = f"has shape {tuple(b.shape)}, 'a' has {tuple(a.shape)}"
        fix = "pass the same number of dimensions"
        raise ContrastInputError(name, "b", found, fix)
    dtype = torch.float64 if torch.float64 in {a.dtype, b.dtype} else torch.float32
    return a.to(dtype), b.to(dtype)


def _bias(name: str, argument: str, bias: Tensor | None, rows: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != rows.shape[:1]:
        found = f"has shape {tuple(bias.shape)}"
        fix = f"pass one value for each of the {len(rows)} rows or columns"
        raise ContrastInputError(name, argument, found, fix)
    return bias.to(rows.dtype)
