"""Sums of a function of the scores: sigmoid losses, hinges, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from diptych_contrast.inputs import check_choice
from diptych_contrast.kernel.call import call, full_precision, loop
from diptych_contrast.kernel.masks import Masks, PairMask
from diptych_contrast.kernel.tiles import default_tile

Shape = Literal["identity", "softplus", "softplus_negative", "relu", "relu_squared", "exp"]


def _softplus(s: Tensor) -> Tensor:
    # The default switches to the identity at 20, which float64 can tell apart.
    return F.softplus(s, threshold=40)


# The function, its first and its second derivative.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "identity": (lambda s: s.clone(), torch.ones_like, torch.zeros_like),
    "softplus": (_softplus, torch.sigmoid, lambda s: s.sigmoid() * (-s).sigmoid()),
    "softplus_negative": (
        lambda s: _softplus(-s),
        lambda s: -(-s).sigmoid(),
        lambda s: s.sigmoid() * (-s).sigmoid(),
    ),
    "relu": (lambda s: s.relu(), lambda s: (s > 0).to(s.dtype), torch.zeros_like),
    "relu_squared": (
        lambda s: s.relu().square(),
        lambda s: 2.0 * s.relu(),
        lambda s: 2.0 * (s > 0).to(s.dtype),
    ),
    "exp": (torch.exp, torch.exp, torch.exp),
}


def pair_sum(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    fn: Shape,
    mask: PairMask,
    weight: tuple[Float[Tensor, "n c"], Float[Tensor, "m c"]] | None = None,
    *,
    tile: int | Literal["auto"] = "auto",
) -> Float[Tensor, " n"]:
    """Sum a function of the products over the columns of every row, in memory O((n + m) d).

    ``out_i = sum_j mask(i, j) w_ij fn(a_i.b_j)``. Scales, biases and margins are linear and go
    into the operands: ``[scale * a, bias]`` against ``[b, 1]``. Twice differentiable in a and b.

    Args:
        fn: One of `FUNCTIONS`; ``softplus_negative`` is softplus of minus the score.
        weight: Factors u, v of the weights ``w_ij = u_i.v_j``, taken as constants.

    Example:
        >>> pair_sum(torch.zeros(2, 4), torch.ones(3, 4), "exp", PairMask(expr="any")).tolist()
        [3.0, 3.0]
    """
    check_choice("pair_sum", "fn", fn, *FUNCTIONS)
    dtype = torch.float64 if torch.float64 in {a.dtype, b.dtype} else torch.float32
    size = default_tile(len(a), len(b), dtype.itemsize) if tile == "auto" else tile
    u, v = (None, None) if weight is None else (part.detach().to(dtype) for part in weight)
    (result,) = call(_Sum, 0, a.to(dtype), b.to(dtype), u, v, *mask.keys(), (fn, mask.expr, size))
    total: Tensor = result
    return total


def _sum(*inputs: Any) -> tuple[Tensor]:
    total: Tensor = inputs[0].new_zeros(len(inputs[0]))
    for rows, cols, scores, weigh in _tiles(inputs[:10], inputs[10]):
        total[rows] += weigh(FUNCTIONS[inputs[10][0]][0](scores), rows, cols).sum(1)
    return (total,)


def _first_order(*inputs: Any) -> tuple[Tensor, Tensor]:
    (a, b), upstream, where = inputs[:2], inputs[10], inputs[11]
    onto_a, onto_b = torch.zeros_like(a), torch.zeros_like(b)
    for rows, cols, scores, weigh in _tiles(inputs[:10], where):
        slope = weigh(FUNCTIONS[where[0]][1](scores), rows, cols) * upstream[rows, None]
        onto_a[rows].addmm_(slope, b[cols])
        onto_b[cols].addmm_(slope.t(), a[rows])
    return onto_a, onto_b


def _second_order(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    (a, b), (upstream, over_a, over_b, where) = inputs[:2], inputs[10:]
    onto_a, onto_b, onto_upstream = map(torch.zeros_like, (a, b, upstream))
    _, first, second = FUNCTIONS[where[0]]
    for rows, cols, scores, weigh in _tiles(inputs[:10], where):
        change = over_a[rows] @ b[cols].t() + a[rows] @ over_b[cols].t()
        slope = weigh(first(scores), rows, cols)
        onto_upstream[rows] += (slope * change).sum(1)
        slope = slope * upstream[rows, None]
        bend = weigh(second(scores), rows, cols) * change * upstream[rows, None]
        onto_a[rows] += bend @ b[cols] + slope @ over_b[cols]
        onto_b[cols] += bend.t() @ a[rows] + slope.t() @ over_a[rows]
    return onto_a, onto_b, onto_upstream


class _Sum(Function):
    """The sum (order 0), its derivatives in a and b (1) and the derivatives of these (2)."""

    @staticmethod
    def forward(order: int, *inputs: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = full_precision(_ORDERS[order], *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.order, *tensors, ctx.where = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return loop(_Sum, info.batch_size, dims, inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.order == 2:
            raise RuntimeError(
                "pair_sum: third derivatives are not available: differentiate at most twice"
            )
        given = (*ctx.saved_tensors, *upstream, ctx.where)
        onto_a, onto_b, *onto_upstream = call(_Sum, ctx.order + 1, *given)
        return None, onto_a, onto_b, *(None,) * 8, *onto_upstream, None


_ORDERS = (_sum, _first_order, _second_order)
_Weigh = Callable[[Tensor, slice, slice], Tensor]


def _tiles(
    inputs: tuple[Any, ...], where: tuple[str, str, int]
) -> Iterator[tuple[slice, slice, Tensor, _Weigh]]:
    a, b, u, v, *keys = inputs
    _, expression, size = where
    masks = Masks(expression, keys, (len(a), len(b)), size, a.device)

    def weigh(values: Tensor, rows: slice, cols: slice) -> Tensor:
        values = masks.hide(values, 0, rows, cols, 0.0)
        return values if u is None else values * (u[rows] @ v[cols].t())

    for i in range(0, len(a), size):
        rows = slice(i, min(i + size, len(a)))
        for j in range(0, len(b), size):
            cols = slice(j, min(j + size, len(b)))
            yield rows, cols, a[rows] @ b[cols].t(), weigh
