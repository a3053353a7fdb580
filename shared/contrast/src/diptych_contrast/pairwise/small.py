"""Two views whose pairs fit into one tile: lengths, positives and sums in one function.

At a few hundred rows a loss costs what its calls cost, so here there are few of them. A second
derivative goes through the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diptych_contrast.common import Options
from diptych_contrast.inputs import readable
from diptych_contrast.kernel.normalize import SMALLEST
from diptych_contrast.kernel.tiles import LOG2_E, SAFE_EXPONENT, default_tile
from diptych_contrast.statistics import PairInfo, reaches

# Of views (n, d) and 1/temperature: sums over the denominators (2, n), scaled positives (n,).
Sums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def is_small(options: Options, x: Tensor, y: Tensor) -> bool:
    """Tell whether `SmallViews` gives what the options ask for."""
    plain = options.normalize and options.group is None
    plain = plain and options.backend == "auto" and options.tile == "auto"
    wide = x.dtype == y.dtype and x.dtype in SAFE_EXPONENT
    plain = plain and not torch.is_autocast_enabled("cpu")
    if not (plain and wide and x.dim() == 2 and readable(x)):
        return False
    rows = 2 * len(x)
    return default_tile(rows, rows, x.element_size()) >= rows


class SmallViews(Function):
    """Log-sum-exp and positives of `nt_xent`, or of `dcl`, from embeddings as they come."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, decoupled: bool, told: bool, again: Sums
    ) -> tuple[Tensor, ...]:
        """Give sums, positives, unit rows; where told the largest scores and the tile's length."""
        n, rows = len(x), torch.cat([x, y])
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        inverse = length.clamp_min_(SMALLEST).reciprocal_().to(x.dtype)
        z = rows.mul_(inverse)
        positive = torch.linalg.vecdot(z[:n], z[n:]).mul_(scale)
        tile = torch.addmm(scale, z, z.t(), beta=0.0, alpha=scale.item() * LOG2_E)
        norm = torch.linalg.vector_norm(tile) if told else z.new_empty(0)
        tile.exp2_()
        tile.fill_diagonal_(0.0)
        if decoupled:
            tile.diagonal(n).fill_(0.0)
            tile.diagonal(-n).fill_(0.0)
        sums = tile.sum(1)
        peak = tile.amax(1).log_() if told else z.new_empty(0)
        ctx.save_for_backward(x, y, scale, z, inverse, tile, sums)
        ctx.again = again
        ctx.mark_non_differentiable(z, peak, norm)
        ctx.set_materialize_grads(False)
        return sums.log().view(2, n), positive, z, peak, norm

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Weigh the tile; where the gradient shall be differentiated again, use the kernel."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return SmallViews.backward(ctx, *upstream)
        x, y, scale, z, inverse, tile, sums = ctx.saved_tensors
        n = len(x)
        over_sums = tile.new_zeros(2, n) if upstream[0] is None else upstream[0]
        pull = tile.new_zeros(n) if upstream[1] is None else upstream[1]
        if torch.is_grad_enabled():
            needed = [value for value in (x, y, scale) if value.requires_grad]
            outputs = ctx.again(x, y, scale)
            found = iter(torch.autograd.grad(outputs, needed, (over_sums, pull), create_graph=True))
            slopes = [next(found) if value.requires_grad else None for value in (x, y, scale)]
            return *slopes, None, None, None
        share = over_sums.reshape(-1) / sums
        onto = torch.add(share[:, None], share).mul_(tile) @ z
        pull = pull[:, None]
        onto_scale = None
        if ctx.needs_input_grad[2]:
            onto_scale = 0.5 * (onto * z).sum() + (pull * z[:n] * z[n:]).sum()
        onto[:n].addcmul_(pull, z[n:])
        onto[n:].addcmul_(pull, z[:n])
        along = torch.linalg.vecdot(z, onto)[:, None]
        onto.addcmul_(z, along, value=-1.0).mul_(inverse * (inverse < 1 / SMALLEST)).mul_(scale)
        return onto[:n], onto[n:], onto_scale, None, None, None


@torch.no_grad()
def small_info(
    lse: Tensor, positive: Tensor, z: Tensor, scale: Tensor, own: bool, peak: Tensor, norm: Tensor
) -> PairInfo:
    """Statistics of the pairs of `SmallViews`, by numbers: each small tensor costs a call."""
    beta, n = scale.item(), len(positive)
    score, length, total = positive.double() / beta, torch.linalg.vecdot(z, z), z.sum(0)
    peak = peak if own else torch.maximum(peak.view(2, n), positive).flatten()
    hits = int(reaches(positive, peak.view(2, n)).sum())
    pulled, pulled_squares = 2 * float(score.sum()), 2 * float(torch.dot(score, score))
    count = 2 * n * (2 * n - 2)
    pushed = float(torch.dot(total, total)) - float(length.sum()) - pulled
    squares = (float(norm) / (beta * LOG2_E)) ** 2 - float(torch.dot(length, length))
    exponentials = float(lse.exp().sum()) - own * 2 * float(positive.exp().sum())
    means = pulled / (2 * n), pushed / count
    variances = (
        max(pulled_squares / (2 * n) - means[0] ** 2, 0.0),
        max((squares - pulled_squares) / count - means[1] ** 2, 0.0),
    )
    shares = exponentials / count, hits / (2 * n), float(peak.amax()), 1.0 / beta
    counts = torch.tensor([2 * n, 2 * n, 2 * n - int(torch.count_nonzero(length))])
    both = zip(means, variances, strict=True)
    numbers = torch.tensor([*(x for pair in both for x in pair), *shares], dtype=torch.float64)
    return PairInfo(2 * n, *[*counts.unbind(), *numbers.unbind()])
