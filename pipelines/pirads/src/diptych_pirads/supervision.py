"""Dice and cross-entropy where a voxel's label is the set of classes that it may have.

Sums run over the voxels of the whole batch, on all processes, so that every process has the loss
of one process alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.distributed import ProcessGroup

from diptych_contrast import gather_with_grad
from diptych_pirads.fusion import channel_of
from diptych_pirads.labels import ZONES

Group = ProcessGroup | None
Maps = Float[Tensor, "n k z y x"]
Sets = Bool[Tensor, "n k z y x"]


class Weighing(NamedTuple):
    """How supervision is summed.

    Args:
        classes: Weights of the five classes in the cross-entropy.
        meyer: Dice over all outputs and no cross-entropy, as in the code of Meyer et al. 2019.
        batch: Sums of Dice over the whole batch, or of each study.
        skip: Leave out zones that the batch does not hold.
    """

    classes: tuple[float, ...] = (1.0,) * len(ZONES)
    meyer: bool = False
    batch: bool = True
    skip: bool = True


def soft_dice(
    p: Maps,
    g: Maps,
    eps: float = 1e-5,
    batch: bool = True,
    present_only: bool = True,
    *,
    group: Group = None,
) -> Float[Tensor, ""]:
    """1 - mean Dice, with squares in the denominator (Meyer et al., ISBI 2019).

    Args:
        p: Probabilities of the zones that count.
        g: Their target, in [0, 1].
        eps: Added above and below.
        batch: Sum over all images, or take each image's own Dice.
        present_only: Leave out zones without target.
        group: Processes that share the batch.

    Returns:
        In [0, 1]; 0 where no zone counts.

    Example:
        >>> g = torch.eye(2)[None, :, :, None, None]
        >>> float(soft_dice(g, g))
        0.0
    """
    voxels = (2, 3, 4)
    parts = torch.stack([(p * g).sum(voxels), p.square().sum(voxels), g.square().sum(voxels)])
    if batch:
        overlap, of_p, of_g = summed(parts.sum(1), group)
    else:
        overlap, of_p, of_g = parts
    dice = (2 * overlap + eps) / (of_p + of_g + eps)
    counted = (of_g > 0).to(dice.dtype) if present_only else torch.ones_like(dice)
    lost = torch.stack([((1 - dice) * counted).sum(), counted.sum()])
    total, count = lost if batch else summed(lost, group)
    mean: Tensor = total / count.clamp(min=1)
    return mean


def meyer_loss(p: Maps, g: Maps, *, group: Group = None) -> Float[Tensor, ""]:
    """Sum over all outputs of minus the Dice coefficient, as in the code of Meyer et al. 2019.

    Args:
        p: Probabilities of all outputs, the background too.
        g: Their target.
        group: Processes that share the batch.

    Returns:
        From minus the number of outputs to 0.
    """
    overlap, of_p, of_g = summed(
        torch.stack([part.sum((0, 2, 3, 4)) for part in (p * g, p, g)]), group
    )
    dice: Tensor = (2 * overlap + 1) / (of_p + of_g + 1)
    return -dice.sum()


def allowed_classes(sets: UInt8[Tensor, "n z y x"]) -> Bool[Tensor, "n 5 z y x"]:
    """Sets as a mask for each class."""
    bits = torch.arange(len(ZONES), device=sets.device, dtype=torch.uint8)
    mask: Tensor = (sets[:, None] >> bits[None, :, None, None, None]) & 1
    return mask.bool()


def allowed_channels(allowed: Sets, path: Sequence[int]) -> Bool[Tensor, "n k z y x"]:
    """What five classes' masks allow the channels of a path: the rest stands for all others."""
    channels = channel_of(path)
    return torch.stack(
        [
            allowed[:, [c for c, channel in enumerate(channels) if channel == k]].any(1)
            for k in range(1 + len(path))
        ],
        1,
    )


def marginal_ce(
    logp: Maps,
    allowed: Sets,
    weights: Sequence[float] | None = None,
    *,
    group: Group = None,
) -> Float[Tensor, ""]:
    """Minus the logarithm of the probability that a voxel's class is an allowed one.

    Args:
        logp: Logarithms of class probabilities.
        allowed: Classes that each voxel may have, at least one.
        weights: Weight of each class; a set has that of its lightest. None: 1.
        group: Processes that share the batch.

    Returns:
        Weighted mean over the voxels about which something is known; 0 without any. With one
        class a voxel this is the weighted cross-entropy.
    """
    of_class = logp.new_ones(logp.shape[1]) if weights is None else logp.new_tensor(weights)
    lightest = torch.where(allowed, of_class[:, None, None, None], math.inf).amin(1)
    weight = torch.where(allowed.all(1), 0.0, lightest)
    loss = -torch.where(allowed, logp, -math.inf).logsumexp(1)
    total, count = summed(torch.stack([(weight * loss).sum(), weight.sum()]), group)
    return torch.where(count > 0, total / count.clamp(min=1e-12), 0.0 * total)


def responsibility_dice(
    p: Maps,
    allowed: Sets,
    eps: float = 1e-5,
    batch: bool = True,
    present_only: bool = True,
    *,
    group: Group = None,
) -> Float[Tensor, ""]:
    """`soft_dice` where the target of a voxel is divided among the classes that it may have.

    Args:
        p: Class probabilities, the background first.
        allowed: Classes that each voxel may have.
        eps: As in `soft_dice`.
        batch: As in `soft_dice`.
        present_only: As in `soft_dice`; a zone is there where a voxel about which something is
            known may have it.
        group: Processes that share the batch.

    Returns:
        Over all classes but the background. Voxels that may have every class do not count.
    """
    target, known = _responsibilities(p, allowed)
    return soft_dice((p * known)[:, 1:], target[:, 1:], eps, batch, present_only, group=group)


def supervised(
    logp: Maps, allowed: Sets, how: Weighing, *, group: Group = None
) -> Float[Tensor, ""]:
    """Dice and cross-entropy of one output.

    Args:
        logp: Logarithms of the output's probabilities, the background or the rest first.
        allowed: What each voxel may be.
        how: Weights (one a channel of the output) and sums.
        group: Processes that share the batch.

    Returns:
        The loss.
    """
    p = logp.exp()
    if how.meyer:
        target, known = _responsibilities(p, allowed)
        return meyer_loss(p * known, target, group=group)
    dice = responsibility_dice(p, allowed, batch=how.batch, present_only=how.skip, group=group)
    return dice + marginal_ce(logp, allowed, how.classes, group=group)


def _responsibilities(p: Maps, allowed: Sets) -> tuple[Maps, Float[Tensor, "n 1 z y x"]]:
    """Targets without gradient, 0 where every class is allowed; and where that is not so."""
    known = (~allowed.all(1, keepdim=True)).to(p.dtype)
    share = p.detach() * allowed
    target = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    # a class that the network excludes is still the target where it alone is allowed
    alone = allowed & (allowed.sum(1, keepdim=True) == 1)
    return torch.where(alone, 1.0, target) * known, known


def summed(parts: Float[Tensor, "*n"], group: Group) -> Float[Tensor, "*n"]:
    """The sum over processes, with gradient.

    Args:
        parts: This process's sums, of any shape.
        group: Processes that share the batch; None: this one alone.

    Returns:
        The same on all processes. Gradients that are averaged over the processes afterwards are
        those of one process with the whole batch.
    """
    return parts if group is None else gather_with_grad(parts[None], group).sum(0)
