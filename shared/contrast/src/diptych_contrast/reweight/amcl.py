"""AMCL: several heads, and a learned temperature for every pair."""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    read_options,
    read_views,
    reduce_rows,
)
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice
from diptych_contrast.reweight.cacr import Views
from diptych_contrast.rowwise import LOCAL, by_rows


class PairTemperature(nn.Module):
    """Temperature of every pair, one function a head: ``low + (high - low) sigmoid(phi(x, y))``.

    Kind ``bilinear`` is ``phi = p(x).p(y) + bias`` with p linear into ``rank`` dimensions; ``mlp``
    the two-layer network on the concatenation, whose first layer splits into a part for each
    side, so that a pair costs one addition, one ReLU and one product.

    Args:
        dim: Dimension of a head's output.
        heads: Number of heads.
        kind: ``bilinear`` or ``mlp``.
        low: Lowest temperature, > 0; the authors' 1e-5 overflows.
        high: Highest temperature.
        rank: Rank of ``bilinear``.
        hidden: Hidden units of ``mlp``.

    Example:
        >>> net = PairTemperature(8, heads=1)
        >>> net(0, torch.zeros(2, 8), torch.zeros(3, 8))[0, 0].isclose(torch.tensor(1.005))
        tensor(True)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 3,
        kind: Literal["bilinear", "mlp"] = "bilinear",
        low: float = 0.01,
        high: float = 2.0,
        *,
        rank: int = 16,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        check_choice("PairTemperature", "kind", kind, "bilinear", "mlp")
        if not 0 < low < high:
            found, fix = f"is {low}, 'high' is {high}", "pass 0 < low < high"
            raise ContrastInputError("PairTemperature", "low", found, fix)
        self.dim, self.heads, self.kind, self.low, self.high = dim, heads, kind, low, high
        width = rank if kind == "bilinear" else hidden
        self.width = 1 if kind == "bilinear" else hidden
        self.left = nn.Parameter(torch.randn(heads, width, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(heads))
        if kind == "mlp":
            self.right = nn.Parameter(torch.randn(heads, width, dim) / math.sqrt(dim))
            self.offset = nn.Parameter(torch.zeros(heads, width))
            self.out = nn.Parameter(torch.randn(heads, width) / math.sqrt(width))

    def forward(
        self, head: int, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]
    ) -> Float[Tensor, "n m"]:
        """Temperatures of all pairs of rows of ``x`` and ``y`` for one head."""
        return self.of_pairs(x, y, *self.weights(head, x))

    def weights(self, head: int, like: Tensor) -> tuple[Tensor, ...]:
        """Parameters of one head, in the dtype of the embeddings."""
        return tuple(parameter[head].to(like.dtype) for parameter in self.parameters())

    def of_pairs(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        """Temperatures of all pairs for the parameters of one head."""
        first, bias, *more = weights
        if self.kind == "bilinear":
            logits = F.linear(x, first) @ F.linear(y, first).t()
        else:
            other, offset, out = more
            logits = (F.linear(x, first, offset)[:, None] + F.linear(y, other)).relu() @ out
        temperature: Tensor = self.low + (self.high - self.low) * (logits + bias).sigmoid()
        return temperature


def amcl(
    heads_a: Views,
    heads_b: Views,
    temperature_net: PairTemperature,
    reg: float = 0.1,
    **common: Unpack[Common],
) -> LossResult:
    """Adaptive multi-head contrastive loss, a temperature for every pair (Wang et al., 2023, AMCL).

    ``log sum_{j != i} exp(s_ij / t_ij) - s_ii' / t_ii'``, summed over heads, plus ``reg`` times the
    mean over heads and pairs of ``(d/2) log t + 1/t``, whose minimum is at ``t = 2/d``. The
    authors' code does not run, so there is no parity.

    Args:
        heads_a: First view through every head, shape (heads, n, d).
        heads_b: Second view, same shape.
        temperature_net: `PairTemperature` of as many heads and dimensions.
        reg: Weight of the regulariser.
        **common: See `Common`.

    Example:
        >>> z = torch.ones(3, 4, 8)
        >>> round(amcl(z, z, PairTemperature(8), reg=0.0).div(3).exp().item())
        7
    """
    options = read_options("amcl", common, *LOCAL)
    first = read_views(options, "heads_a", heads_a)
    second = read_views(options, "heads_b", heads_b)
    expected = (temperature_net.heads, *first.shape[1:-1], temperature_net.dim)
    fix = f"pass shape ({expected[0]}, at least 2 samples as in 'heads_a', {expected[2]})"
    for name, value in (("heads_a", first), ("heads_b", second)):
        if value.shape != expected or value.shape[1] < 2:
            raise ContrastInputError("amcl", name, f"has shape {tuple(value.shape)}", fix)
    rows = [
        _amcl_rows(options, temperature_net, head, torch.cat([a, b]), reg)
        for head, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    return reduce_rows(options, torch.stack(rows).sum(0), None)


def _amcl_rows(options: Options, net: PairTemperature, head: int, z: Tensor, reg: float) -> Tensor:
    index = torch.arange(len(z), device=z.device)

    def block(x: Tensor, row: Tensor, partner: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        temperature = net.of_pairs(x, y, *weights)
        scores = (x @ y.t()) / temperature
        own = row[:, None] == index
        loss = scores.masked_fill(own, -math.inf).logsumexp(1)
        loss = loss - scores.gather(1, partner[:, None])[:, 0]
        prior = z.shape[1] / 2 * temperature.log() + temperature.reciprocal()
        prior = prior.masked_fill(own, 0.0).sum(1) / (len(z) - 1)
        rows: Tensor = loss + reg / net.heads * prior
        return rows

    rows = (z, index, index.roll(len(z) // 2))
    columns = (z, *net.weights(head, z))
    return by_rows(block, rows, columns, len(z) * net.width, options)
