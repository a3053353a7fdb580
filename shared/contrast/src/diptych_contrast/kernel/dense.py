"""The plain reference: the same sums from a stored score matrix, by autograd alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych_contrast.kernel.masks import Masks


def dense_sweep(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    biases: Sequence[Tensor | None],
    keys: Sequence[Tensor | None],
    expressions: str,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Compute what `autograd.sweep` computes, in memory O(nm).

    Args:
        a: Rows, shape (n, d).
        b: Columns, shape (m, d), or None in symmetric mode.
        scale: ``1/temperature``, shape (1,) or (k,).
        biases: Bias of the rows and of the columns, each a vector or None.
        keys: The six keys in the order of `masks.KEYS`.
        expressions: Mask expressions, joined by commas.
        mode: ``rows``, ``both`` or ``symmetric``.

    Returns:
        Log-sum-exp and largest score, each of shape (k, n), in mode ``both`` (k, n + m).
    """
    row_bias, col_bias = biases
    if b is None:
        b, col_bias, keys = a, row_bias, (*keys[:3], *keys[:3])
    n, m = len(a), len(b)
    masks = Masks(expressions, keys, (n, m), max(n, m), a.device)
    products = a @ b.t()
    sums, peaks = [], []
    for k in range(len(masks.trees)):
        scores = products * scale[k if len(scale) > 1 else 0]
        scores = scores if row_bias is None else scores + row_bias[:, None]
        scores = scores if col_bias is None else scores + col_bias
        hidden = torch.zeros((n, m), dtype=torch.bool, device=a.device)
        masks.hide(hidden, k, slice(0, n), slice(0, m), True)
        row_sums, row_peaks = _log_sum(scores, hidden)
        if mode == "both":
            col_sums, col_peaks = _log_sum(scores.t(), hidden.t())
            row_sums, row_peaks = (
                torch.cat([row_sums, col_sums]),
                torch.cat([row_peaks, col_peaks]),
            )
        sums.append(row_sums)
        peaks.append(row_peaks)
    return torch.stack(sums), torch.stack(peaks)


def _log_sum(scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    empty = hidden.all(1)
    scores = scores.masked_fill(hidden, -math.inf)
    # A row of minus infinities has no finite derivative, so such rows go around the sum.
    sums = torch.logsumexp(scores.masked_fill(empty[:, None], 0.0), 1)
    return sums.masked_fill(empty, -math.inf), scores.detach().amax(1)
