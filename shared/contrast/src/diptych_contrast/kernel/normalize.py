"""Rows of unit length, with defined derivatives at zero and at any size."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from diptych_contrast.kernel.call import call

_SMALLEST = 1e-12


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide every row by its length, ``x / max(|x|, 1e-12)``.

    A zero row stays zero and gets zero gradient. Lengths are accumulated in float64, so rows of
    length 1e-20 or 1e20 are safe. Differentiable any number of times.

    Args:
        x: Shape (n, d), float32 or float64.

    Returns:
        Shape (n, d).

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    unit: Tensor = call(_UnitRows, x)[0]
    return unit


class _UnitRows(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
        inverse = length.clamp_min(_SMALLEST).reciprocal_().mul_(length > 0).to(x.dtype)
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, onto_inverse: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        # The inverse length is constant, so nothing is projected out, below the smallest length.
        along = (unit * upstream).sum(1, keepdim=True) + onto_inverse * inverse
        along = along * (inverse < 1.0 / _SMALLEST)
        onto_x: Tensor = (upstream - unit * along) * inverse
        return onto_x
