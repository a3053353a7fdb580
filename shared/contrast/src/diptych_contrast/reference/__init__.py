"""Every loss once more in a few dense lines of float64: to read, and to compare against.

One function a loss, named as the loss, from where `registry` takes it. Each takes the arguments of
its loss that matter for the value, parity aside, stores all scores, and gives the mean over valid
rows; queues are tensors.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def unit(x: Tensor) -> Tensor:
    """Rows of length 1 in float64."""
    return F.normalize(x.double(), dim=-1)


def log_sum(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp of every row over the pairs of a stored mask."""
    return scores.masked_fill(~mask, -math.inf).logsumexp(1)
