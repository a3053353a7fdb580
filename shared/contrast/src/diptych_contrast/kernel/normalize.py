"""Rows of unit length, with defined derivatives at zero and at any size."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from diptych_contrast.kernel.call import call, full_precision

SMALLEST = 1e-12
_PART = 4096  # rows at once: a norm in float64 copies its input


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide every row by its length, ``x / max(|x|, 1e-12)``, at least in float32.

    A zero row stays zero; rows shorter than 1e-12 get zero gradient. Lengths are accumulated in
    float64, so rows of length 1e20 are safe. Differentiable any number of times.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    wide = x if x.dtype in {torch.float32, torch.float64} else x.float()
    unit: Tensor = call(_UnitRows, wide)[0]
    return unit


class _UnitRows(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) <= _PART:
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
        else:
            length = torch.cat(
                [
                    torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float64)
                    for part in torch.split(x, _PART)
                ]
            )
        inverse = length.clamp_min_(SMALLEST).reciprocal_().to(x.dtype)
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, onto_inverse: Tensor | None) -> Tensor:
        onto_x: Tensor = full_precision(_onto_rows, *ctx.saved_tensors, upstream, onto_inverse)
        return onto_x


def _onto_rows(
    unit: Tensor, inverse: Tensor, upstream: Tensor | None, onto_inverse: Tensor | None
) -> Tensor:
    if upstream is None:
        upstream = torch.zeros_like(unit)
    slope = inverse * (inverse < 1.0 / SMALLEST)
    along = torch.linalg.vecdot(unit, upstream)[:, None]
    if onto_inverse is not None:
        along = along + onto_inverse * inverse
    return torch.addcmul(upstream, unit, along, value=-1.0).mul_(slope)
