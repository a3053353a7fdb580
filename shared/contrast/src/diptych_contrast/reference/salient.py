"""Contrastive analysis, dense."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych_contrast.reference import unit


def sep_clr(
    common: Tensor,
    salient: Tensor,
    target: Tensor,
    weights: tuple[float, float, float] = (1.0, 10.0, 10.0),
) -> Tensor:
    """`diptych_contrast.sep_clr`, dense, for two or more targets; vectors of shape (2, n, d)."""
    c, s, y = unit(common), salient.double(), target.bool()
    kept = s * y[:, None]
    align = (c[0] - c[1]).square().sum(1).mean() + sum(_uniform(x) for x in c)
    attract = (s[0] - s[1])[y].square().sum(1).mean() + sum(_uniform(x) for x in kept)
    lost = s[:, ~y].square().sum(2).mean() if bool((~y).any()) else 0.0
    kernels = [torch.exp(-_squares(a) - _squares(b)) for a, b in zip(c, kept, strict=True)]
    shared = torch.stack([kernel.mean(1).log().mean() for kernel in kernels]).mean()
    return align + weights[0] * attract + weights[1] * lost + weights[2] * shared


def _squares(x: Tensor) -> Tensor:
    return (x[:, None] - x).square().sum(2)


def _uniform(x: Tensor) -> Tensor:
    pairs = torch.triu(torch.ones(len(x), len(x)), diagonal=1).bool()
    return (-_squares(x))[pairs].exp().mean().log()
