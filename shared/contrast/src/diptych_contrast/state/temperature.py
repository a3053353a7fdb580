"""The temperature of a loss, fixed or learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.state.version import keep_version


class Temperature(nn.Module):
    """A temperature, fixed or learned, that stays within bounds.

    The module stores ``log(1/tau)`` and clamps it in the forward pass. At a bound the gradient
    passes only if a descent step leads back inside, so a learned temperature can rest at a bound
    without running away from it or sticking to it. Leave it out of weight decay, which would draw
    it towards 1. A minimum of 0.01 caps the scale at 100, as CLIP does (Radford et al., 2021).

    Args:
        init: First temperature, within the bounds.
        learnable: Whether the temperature is a parameter.
        min: Lowest temperature, above 0.
        max: Highest temperature.

    Raises:
        ContrastInputError: ``init`` is outside the bounds, or the bounds are no interval above 0.

    Example:
        >>> round(Temperature(0.07)().item(), 4)
        0.07
    """

    def __init__(
        self, init: float, learnable: bool = False, min: float = 0.01, max: float = 1.0
    ) -> None:
        super().__init__()
        if not (0 < min <= max < math.inf):
            raise ContrastInputError(
                "Temperature",
                "min",
                f"is {min} with max {max}",
                "pass finite bounds with 0 < min <= max",
            )
        if not (min <= init <= max):
            raise ContrastInputError(
                "Temperature",
                "init",
                f"is {init}, outside [{min}, {max}]",
                "pass a temperature within the bounds, or widen them",
            )
        self.min = min
        self.max = max
        log_scale = torch.tensor(-math.log(init))
        self.log_scale: Tensor
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        keep_version(self)

    def forward(self) -> Float[Tensor, ""]:
        """The temperature, within ``[min, max]``.

        Returns:
            0-dim tensor, at least fp32, with gradient where the temperature is learned.
        """
        wide = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        low, high = -math.log(self.max), -math.log(self.min)
        clamped: Tensor = _ClampInwards.apply(wide, low, high)  # type: ignore[no-untyped-call]
        return torch.exp(-clamped)

    def extra_repr(self) -> str:
        """Bounds and kind, for the printed module."""
        learnable = isinstance(self.log_scale, nn.Parameter)
        return f"min={self.min}, max={self.max}, learnable={learnable}"


class _ClampInwards(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outwards = ((x >= ctx.high) & (gradient < 0)) | ((x <= ctx.low) & (gradient > 0))
        return gradient * ~outwards, None, None
