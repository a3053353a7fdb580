"""Ranking of two modalities, and boosting a target branch over an anchor branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diptych_contrast.common import Common, LossResult, Options, Parity, read_options
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice, check_device, check_least
from diptych_contrast.kernel import products
from diptych_contrast.rowwise import LOCAL

Scores = Float[Tensor, "n n"] | tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]
# Stands for minus infinity where a difference of two of them would be NaN.
_LOW = -1e30
_SHARPNESS = 10.0


def birank(
    S: Scores,
    margin: float = 0.2,
    hardest: bool = True,
    *,
    negatives: Bool[Tensor, "n n"] | None = None,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Bidirectional ranking of two modalities (Faghri et al., 2018, VSE++; Diao et al., 2023, DBL).

    ``[m + max_j S_ij - S_ii]_+ + [m + max_j S_ji - S_ii]_+`` for a pair i, j over negatives; the
    authors sum over the batch.

    Args:
        S: Scores, or two embeddings for their cosines.
        hardest: The hardest negative alone; False: the sum over all.
        negatives: Where column j is a negative of row i; the diagonal never is. None: elsewhere.

    Example:
        >>> round(birank(torch.zeros(4, 4), margin=0.5).item(), 4)
        1.0
    """
    options, scores, _, mask = _read_scores("birank", common, S, None, negatives, margin, parity)
    diagonal = scores.diagonal()
    rows = _hinges(margin + scores - diagonal[:, None], mask, 1, hardest)
    columns = _hinges(margin + scores - diagonal, mask, 0, hardest)
    return options.reduce(rows + columns, _has_negative(mask))


def boost_abs(
    S: Scores,
    S_anchor: Scores,
    margin: float = 0.2,
    beta: float = 1.0,
    gamma: float = 0.5,
    *,
    negatives: Bool[Tensor, "n n"] | None = None,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Absolute boosting over an anchor branch (Diao et al., 2023, DBL).

    ``2 [gamma m + A_ii - S_ii]_+ + max_j [(1 - gamma) m + S_ij - A_ij]_+`` for a pair i, the latter
    of its row and of its column, ``m = beta margin``, gamma in [0, 1] the share of the margin that
    positives take. The anchor A is constant, else like S of `birank`.

    Example:
        >>> round(boost_abs(torch.zeros(4, 4), torch.zeros(4, 4)).item(), 4)
        0.4
    """
    options, scores, anchor, mask = _read_scores(
        "boost_abs", common, S, S_anchor, negatives, margin, parity
    )
    margin = margin * beta
    positive = 2.0 * (gamma * margin + anchor.diagonal() - scores.diagonal()).relu()
    costs = (1.0 - gamma) * margin + scores - anchor
    return options.reduce(positive + _hinges(costs, mask, 1) + _hinges(costs, mask, 0), None)


def boost_rel(
    S: Scores,
    S_anchor: Scores,
    margin: float = 0.2,
    beta: float = 1.0,
    *,
    negatives: Bool[Tensor, "n n"] | None = None,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Relative boosting: the gap to the negatives grows over the anchor's (Diao et al., 2023, DBL).

    ``max_j [beta m + (A_ii - A_ij) - (S_ii - S_ij)]_+`` for a pair i, of its row and of its column.
    """
    options, scores, anchor, mask = _read_scores(
        "boost_rel", common, S, S_anchor, negatives, margin, parity
    )
    gain = scores - anchor
    costs = margin * beta + gain
    rows = _hinges(costs - gain.diagonal()[:, None], mask, 1)
    columns = _hinges(costs - gain.diagonal(), mask, 0)
    return options.reduce(rows + columns, _has_negative(mask))


def boost_kl(
    S: Scores,
    S_anchor: Scores,
    *,
    negatives: Bool[Tensor, "n n"] | None = None,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Follow the anchor's ranking (Diao et al., 2023, DBL).

    ``KL(softmax(10 A) || softmax(10 S))`` of row and of column i, added; pairs that are neither own
    nor negative leave the softmax. The official form is the same.
    """
    check_choice("boost_kl", "parity", parity, None, "official")
    options, scores, anchor, mask = _read_scores("boost_kl", common, S, S_anchor, negatives)
    losses = torch.zeros_like(scores[0])
    for dim in (1, 0):
        target, own = (_log_softmax(part, mask, dim) for part in (anchor, scores))
        losses = losses + (target.exp() * (target - own)).sum(dim)
    return options.reduce(losses, _has_negative(mask))


def boost_pro(
    S: Scores,
    S_anchor: Scores,
    *,
    negatives: Bool[Tensor, "n n"] | None = None,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Gain most on the own pair (Diao et al., 2023, DBL).

    ``-log softmax(10 (S - A))_ii`` of row and of column i, added.
    """
    check_choice("boost_pro", "parity", parity, None, "official")
    options, scores, anchor, mask = _read_scores("boost_pro", common, S, S_anchor, negatives)
    gain = scores - anchor
    rows, columns = (_log_softmax(gain, mask, dim).diagonal() for dim in (1, 0))
    return options.reduce(-(rows + columns), _has_negative(mask))


def _read_scores(
    function: str,
    common: Common,
    target: Scores,
    anchor: Scores | None,
    negatives: Tensor | None,
    margin: float = 0.0,
    parity: Parity = None,
) -> tuple[Options, Tensor, Tensor, Tensor]:
    """Options, scores of target and anchor (detached), and which pairs are negatives."""
    options = read_options(function, common, *LOCAL, parity=parity)
    check_least(function, 0, margin=margin)
    if parity == "official" and options.reduction == "mean":
        options = replace(options, reduction="sum")
    scores = _one(options, "S", target)
    other = scores.detach() if anchor is None else _one(options, "S_anchor", anchor).detach()
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    mask = ~own if negatives is None else negatives
    for name, value in (("S_anchor", other), ("negatives", mask)):
        if value.shape != scores.shape or (name == "negatives" and value.dtype != torch.bool):
            found = f"has shape {tuple(value.shape)} and dtype {value.dtype}"
            words = "bool" if name == "negatives" else "scores"
            fix = f"pass {words} of shape {tuple(scores.shape)}, as 'S'"
            raise ContrastInputError(function, name, found, fix)
        check_device(function, name, value, "S", scores)
    return options, scores, other, mask & ~own


def _one(options: Options, name: str, given: Scores) -> Tensor:
    if not isinstance(given, Tensor):
        x, y = options.embeddings(**{f"{name}[0]": given[0], f"{name}[1]": given[1]})
        return products(x, y.t())
    square = given.dim() == 2 and given.shape[0] == given.shape[1] > 0
    if not square or not given.is_floating_point():
        found = f"has shape {tuple(given.shape)} and dtype {given.dtype}"
        fix = "pass floating-point scores of shape (n, n), or two embeddings as a tuple"
        raise ContrastInputError(options.function, name, found, fix)
    return given if given.dtype == torch.float64 else given.float()


def _hinges(costs: Tensor, mask: Tensor, dim: int, hardest: bool = True) -> Tensor:
    costs = costs.relu().masked_fill(~mask, 0.0)
    return costs.max(dim).values if hardest else costs.sum(dim)


def _has_negative(mask: Tensor) -> Tensor:
    return mask.any(1) | mask.any(0)


def _log_softmax(scores: Tensor, mask: Tensor, dim: int) -> Tensor:
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    logits = (_SHARPNESS * scores).masked_fill(~(mask | own), _LOW)
    return torch.log_softmax(logits, dim)
