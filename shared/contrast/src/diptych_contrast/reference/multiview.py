"""Multi-view losses, dense."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych_contrast.reference.pairwise import sup_con


def nt_xent_multi(views: Tensor, temperature: float = 0.5) -> Tensor:
    """`diptych_contrast.nt_xent_multi`, dense."""
    return sup_con(views, torch.arange(views.shape[1]), temperature)
