"""Losses over two or more views of each sample."""

from __future__ import annotations

from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    TemperatureLike,
    read_options,
    read_scale,
    read_views,
    sample_ids,
)
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.pairwise.sup_con import class_contrast

__all__ = ["nt_xent_multi"]


def nt_xent_multi(
    views: Float[Tensor, "v n d"] | tuple[Tensor, ...],
    temperature: TemperatureLike = 0.5,
    **common: Unpack[Common],
) -> LossResult:
    """NT-Xent for two or more views: SupCon with the sample as the class.

    The mean over embeddings i of ``log sum_{a != i} exp(s_ia / t) - mean_p s_ip / t``, p over the
    other views of the same sample. With two views it equals `nt_xent`.

    Args:
        views: Views of the same samples in the same order, shape (v, n, d), v >= 2.
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        **common: See `Common`.

    Returns:
        Shape (), or (v n,) view-major with ``reduction="none"``; with ``return_info`` also
        `PairInfo`.

    Raises:
        ContrastInputError: Fewer than two views, or views that do not fit together.

    Example:
        >>> round(nt_xent_multi(torch.ones(3, 4, 8)).exp().item())
        11
    """
    options = read_options("nt_xent_multi", common)
    stacked = read_views(options, "views", views)
    if len(stacked) < 2:
        raise ContrastInputError("nt_xent_multi", "views", "is one view", "pass two or more")
    scale = read_scale(options, temperature, stacked)
    classes = sample_ids(options, stacked[0]).repeat(len(stacked))
    loss, info = class_contrast(
        options, stacked.flatten(0, 1), classes, scale, mode="out", info=options.return_info
    )
    return loss if info is None else (loss, info)
