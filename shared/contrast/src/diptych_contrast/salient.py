"""Contrastive analysis: what varies in a target group alone, apart from what all share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.common import Common, Parity, Views, read_options
from diptych_contrast.diagnostics import uniformity
from diptych_contrast.dist import gather_no_grad, gather_with_grad
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import (
    check_choice,
    check_pair,
    check_positive,
    check_rows,
    check_squares,
    readable,
)
from diptych_contrast.kernel import pair_lse


@dataclass(frozen=True)
class SepWeights:
    """Weights of the terms of `sep_clr` beside the common one; the defaults are CheXpert's.

    CIFAR-MNIST and CelebA: 1000, 1000, 10; ODIR: 1, 100, 10; dSprites: 100, 100, 10.
    """

    salient: float = 1.0
    information_less: float = 10.0
    independence: float = 10.0


@dataclass(frozen=True)
class SepParts:
    """Detached terms of `sep_clr` before their weights, and how many samples of each kind."""

    common: Tensor
    salient: Tensor
    information_less: Tensor
    independence: Tensor
    n_target: Tensor
    n_background: Tensor


def sep_clr(
    common: Views,
    salient: Views,
    target: Int[Tensor, " n"],
    *,
    weights: SepWeights = SepWeights(),
    parity: Parity = None,
    **options: Unpack[Common],
) -> tuple[Float[Tensor, ""], SepParts]:
    """Separate what all samples share from what only targets have (Louiset et al., 2024, SepCLR).

    With ``t = 0.5`` and s' the salient vectors, zero for backgrounds: the common term
    ``mean ||c1 - c2||^2 / 2t + unif(c1) + unif(c2)`` of unit vectors, ``unif = log mean_{i<j}
    exp(-||x_i - x_j||^2 / 2t)``; the salient term, the same of s' with the alignment of targets
    alone; the information-less term ``mean ||s||^2 / 2t`` of backgrounds; and the independence
    term, `joint_entropy` of c and s'. The authors' code gives NaN without targets; ours leaves
    the salient term out below two.

    Args:
        common: Common vectors of two views, shape (2, n, c).
        salient: Salient vectors of the same views, shape (2, n, s), never normalised; values whose
            squares might overflow are refused.
        target: 1 for a target, 0 for a background sample, shape (n,).
        parity: ``official``: also take the salient term of a single target.
        **options: See `Common`. With ``group`` every process gives the loss of all samples.

    Example:
        >>> z, target = torch.eye(4).repeat(2, 1, 1), torch.tensor([0, 0, 1, 1])
        >>> sep_clr(z, z, target)[1].n_target.item()
        2
    """
    settings = read_options("sep_clr", options, "ring", "return_info", parity=parity)
    check_choice("sep_clr", "reduction", settings.reduction, "mean")
    c = settings.views("common", common)
    s = replace(settings, normalize=False).views("salient", salient)
    if c.shape[:2] != s.shape[:2] or len(c) != 2:
        found = f"has shape {tuple(s.shape)}, 'common' has {tuple(c.shape)}"
        raise ContrastInputError("sep_clr", "salient", found, "pass two views of the same samples")
    y = settings.labels("target", target, c[0], lowest=0)
    if settings.group is not None:
        c, s = (gather_with_grad(x.transpose(0, 1), settings.group).transpose(0, 1) for x in (c, s))
        y = gather_no_grad(y, settings.group)
    if len(y) < 2 or (readable(y) and int(y.max()) > 1):
        fix = "pass two samples or more, 1 for a target and 0 for a background sample"
        raise ContrastInputError("sep_clr", "target", f"holds {y[:5].tolist()}", fix)
    n_target, n_background = y.sum(), (1 - y).sum()
    kept = s.masked_fill((y == 0)[:, None], 0.0)
    spread = sum((uniformity(x, 1.0, normalize=False) for x in c), start=c.new_zeros(()))
    common_term = (c[0] - c[1]).square().sum(1).mean() + spread
    spread = sum((uniformity(x, 1.0, normalize=False) for x in kept), start=c.new_zeros(()))
    salient_term = (kept[0] - kept[1]).square().sum() / n_target.clamp_min(1) + spread
    enough = n_target >= (1 if parity == "official" else 2)
    if settings.empty == "error" and readable(y) and not enough:
        fix = "sample more targets, or pass empty='skip'"
        raise ContrastInputError("sep_clr", "target", f"holds {int(n_target)} targets", fix)
    salient_term = torch.where(enough, salient_term, 0.0)
    information_less = (s - kept).square().sum() / (2 * n_background.clamp_min(1))
    independence = (joint_entropy(c[0], kept[0]) + joint_entropy(c[1], kept[1])) / 2
    loss = common_term + weights.salient * salient_term
    loss = loss + weights.information_less * information_less + weights.independence * independence
    terms = (common_term, salient_term, information_less, independence)
    common_part, salient_part, lost, shared = (term.detach() for term in terms)
    return loss, SepParts(common_part, salient_part, lost, shared, n_target, n_background)


def joint_entropy(
    c: Float[Tensor, "n c"], s: Float[Tensor, "n s"], t: float = 0.5
) -> Float[Tensor, ""]:
    """Negative entropy of (c, s) by a Gaussian kernel; lower, less is shared (SepCLR's k-JEM).

    ``mean_i log mean_j exp(-||c_i - c_j||^2 / 2t) exp(-||s_i - s_j||^2 / 2t)``, j = i included:
    one sweep over the joined vectors.
    The vectors are of shape (n, c) and (n, s), the kernel is t > 0 wide.

    Example:
        >>> abs(joint_entropy(torch.ones(4, 2), torch.ones(4, 3)).item()) < 1e-6
        True
    """
    check_positive("joint_entropy", t=t)
    check_rows("joint_entropy", "c", c)
    check_rows("joint_entropy", "s", s)
    if len(c) != len(s):
        found = f"has {len(s)} rows, 'c' has {len(c)}"
        raise ContrastInputError("joint_entropy", "s", found, "pass the same samples")
    c, s = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (c, s))
    check_squares("joint_entropy", "c", c)
    check_squares("joint_entropy", "s", s)
    x = torch.cat([c, s], 1)
    potentials = pair_lse(
        x, None, 1 / t, ("any",), row_bias=-x.square().sum(1) / (2 * t), symmetric=True
    )
    return potentials.mean() - math.log(len(x))


def sup_alignment(
    s: Float[Tensor, "n k"], y: Float[Tensor, "n k"], t: float = 0.025
) -> Float[Tensor, ""]:
    """Tie each salient dimension to one attribute (SepCLR's disentangling variant).

    The mean over dimensions d of ``mean_{i<j} exp(-(y_id - y_jd)^2 / 2t) (s_id - s_jd)^2``: samples
    of like attribute attract. Stores n x n x k weights; pair it with `uniformity` of each s_d.

    Args:
        s: Salient vectors of targets, shape (n, k), n >= 2.
        y: Their attributes, shape (n, k), on a scale of 1.
        t: Width of the kernel, above 0; 5e-6 for discrete attributes.

    Example:
        >>> sup_alignment(torch.eye(2), torch.ones(2, 2)).item()
        1.0
    """
    check_positive("sup_alignment", t=t)
    check_pair("sup_alignment", 2, s=s, y=y)
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    check_squares("sup_alignment", "s", wide)
    weights = torch.exp((y[:, None] - y).to(wide).square() / (-2 * t))
    total = (weights * (wide[:, None] - wide).square()).sum()
    return total / (len(s) * (len(s) - 1) * s.shape[1])
