"""SigLIP: every pair is a binary question of its own."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    local_engine,
    read_embeddings,
    read_options,
    reduce_rows,
)
from diptych_contrast.dist import gather_with_grad
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel import PairMask, log_sums, pair_sum
from diptych_contrast.kernel.ring import ring_sum
from diptych_contrast.statistics import (
    moments_between,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)

LOG_10 = math.log(10.0)


def siglip(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    log_scale: float | Tensor = LOG_10,
    bias: float | Tensor = -10.0,
    *,
    positives: Shaped[Tensor, "n m"] | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Pairwise sigmoid loss (Zhai et al., 2023).

    ``-(1/n) sum_ij log sigmoid(y_ij (exp(log_scale) s_ij + bias))`` with y = 1 on positives and
    -1 elsewhere; the sum is divided by n, not by n^2.

    Args:
        x: First modality, shape (n, d).
        y: Second modality of the same samples, shape (n, d).
        log_scale: Natural logarithm of the scale, a number or a 0-dim parameter.
        bias: Added to every score, a number or a 0-dim parameter.
        positives: Probability that a pair is a positive, shape (n, m) over the m columns of all
            processes, in [0, 1] or bool; None: pairs of equal position.
        **common: See `Common`.

    Returns:
        Shape (), or (n,) with ``reduction="none"``; with ``return_info`` also `PairInfo`, whose
        positives are pairs of equal position.

    Raises:
        ContrastInputError: Inputs that do not fit together.

    Example:
        >>> x = torch.eye(2)
        >>> round(siglip(x, x, 0.0, 0.0).item(), 4)
        1.0064
    """
    options = read_options("siglip", common)
    first, second = read_embeddings(options, x=x, y=y).unbind(0)
    scale = torch.as_tensor(log_scale, dtype=first.dtype, device=first.device).exp()
    offset = torch.as_tensor(bias, dtype=first.dtype, device=first.device)
    # log sigmoid(-S) = -softplus(S) and log sigmoid(S) = S - softplus(S): positives are linear.
    rows = torch.cat([first * scale, offset.expand(len(first), 1)], 1)
    columns = torch.cat([second, torch.ones_like(second[:, :1])], 1)
    with torch.autocast(first.device.type, enabled=False):
        losses = _softplus_sums(options, rows, columns)
        losses = losses - _positive_scores(options, rows, columns, positives)
    loss = reduce_rows(options, losses, None)
    if not options.return_info:
        return loss
    with torch.no_grad():
        lse, peak = log_sums(
            first, second, scale, ("any",), peak=True, engine=local_engine(options)
        )
        diagonal = (first * second).sum(1)
    own = moments_of(diagonal)
    info = pair_info(
        rows=len(first),
        valid=None,
        zero_rows=(x == 0).all(1).sum() + (y == 0).all(1).sum(),
        positives=own,
        negatives=moments_between(first, second) - own,
        negative_lse=subtract_exp(lse[0], diagonal * scale),
        hits=reaches(diagonal * scale, peak[0]),
        peak=peak[0],
        scale=scale,
    )
    return loss, info


def _softplus_sums(options: Options, rows: Tensor, columns: Tensor) -> Tensor:
    if options.backend == "dense" and options.group is None:
        return torch.nn.functional.softplus(rows @ columns.t(), threshold=40).sum(1)
    if options.ring:
        return ring_sum(rows, columns, "softplus", options.tile, options.group)
    if options.group is not None:
        columns = gather_with_grad(columns, options.group)
    return pair_sum(rows, columns, "softplus", PairMask(expr="any"), tile=options.tile)


def _positive_scores(
    options: Options, rows: Tensor, columns: Tensor, positives: Tensor | None
) -> Tensor:
    if positives is None:
        return (rows * columns).sum(1)
    if options.group is not None:
        columns = gather_with_grad(columns, options.group)
    if positives.shape != (len(rows), len(columns)):
        raise ContrastInputError(
            "siglip",
            "positives",
            f"has shape {tuple(positives.shape)}",
            f"pass one value for each pair, shape ({len(rows)}, {len(columns)})",
        )
    return (rows * (positives.to(rows.dtype) @ columns)).sum(1)
