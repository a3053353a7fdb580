"""CACR, which weighs pairs by distance, and feature transformation, which mixes them."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.common import Common, LossResult, Options, Parity, Views, read_options
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import (
    check_choice,
    check_device,
    check_generator,
    check_least,
    check_positive,
    check_shape,
    check_share,
)
from diptych_contrast.kernel import PairMask, log_sums, pair_expect, products, unit_rows
from diptych_contrast.rowwise import LOCAL, by_rows
from diptych_contrast.state import KeyQueue

_RBF_SHARPNESS = 2.0


def cacr(
    views: Views,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    kernel: Literal["euclid", "rbf"] = "euclid",
    detach_weights: bool = True,
    queue: KeyQueue | Float[Tensor, "m d"] | None = None,
    tau_plus: float = 0.0,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Contrastive attraction and contrastive repulsion (Zheng et al., 2021, eqs. 6 to 8, CACR).

    ``alpha sum_p w+_ip d2_ip - beta sum_j w-_ij d2_ij`` for a row i, ``d2`` the squared distance,
    ``w+ = softmax_p(t_pos d2)`` over the
    other views of the sample, ``w- = softmax_j(-t_neg d2)`` over all views of other samples.
    Kernel ``rbf`` repels by ``beta log mean_i sum_j w-_ij exp(-2 d2_ij)``.

    The authors' small-scale code differentiates the weights, compares every pair of views in one
    direction only, and gives the debiasing term the sign that rewards distant positives;
    ``parity="official"`` computes that.

    Args:
        t_pos: Sharpness of the attraction, >= 0.
        t_neg: Sharpness of the repulsion, >= 0.
        kernel: Cost of the repulsion; ``rbf`` has one value a batch, so only the mean.
        detach_weights: Take the weights as constants.
        queue: Further negatives without gradient, `KeyQueue` or shape (m, d).
        tau_plus: Share of negatives that are positives, in [0, 1), taken out of the repulsion r:
            ``(r + tau_plus mean_p d2_ip) / (1 - tau_plus)`` (``euclid``).

    Example:
        >>> round(cacr(torch.eye(4).repeat(2, 1, 1)).item(), 4)
        -2.0
    """
    options = read_options("cacr", common, *LOCAL, parity=parity)
    stack = options.views("views", views)
    check_least("cacr", 0, t_pos=t_pos, t_neg=t_neg)
    _check_forms(options, stack, tau_plus, kernel, parity, queue)
    freeze = detach_weights and parity is None
    squares, rows = stack.square().sum(2), stack.transpose(0, 1)
    close = squares[:, None] + squares - 2.0 * products(rows, rows.mT).permute(1, 2, 0)
    own = torch.eye(len(stack), dtype=torch.bool, device=stack.device)[:, :, None]
    weights = (t_pos * close).masked_fill(own, -math.inf).softmax(1)
    attraction = ((weights.detach() if freeze else weights) * close).sum(1)
    samples = torch.arange(stack.shape[1], device=stack.device)
    if parity == "official":
        terms = []
        for x, y in combinations(range(len(stack)), 2):
            rows = _repulsion(
                options, (stack[x], samples), (stack[y], samples), t_neg, kernel, freeze
            )
            rows = rows if kernel == "rbf" else (rows - tau_plus * close[x, y]) / (1 - tau_plus)
            terms.append(_log_mean(rows) if kernel == "rbf" else rows.mean())
        return alpha * attraction.mean() + beta * torch.stack(terms).mean()
    keyed = stack.flatten(0, 1), samples.repeat(len(stack))
    columns = keyed
    if queue is not None:
        stored = stored_keys(options, queue, stack)
        columns = torch.cat([keyed[0], stored]), F.pad(keyed[1], (0, len(stored)), value=-1)
    if freeze and kernel == "euclid" and queue is None and t_neg > 0:
        repulsion = _constant_weights(options, *keyed, t_neg)
    else:
        repulsion = _repulsion(options, keyed, columns, t_neg, kernel, freeze)
    if kernel == "rbf":
        return alpha * attraction.mean() + beta * _log_mean(repulsion)
    mean = close.masked_fill(own, 0.0).sum(1).flatten() / (len(stack) - 1)
    repulsion = (repulsion + tau_plus * mean) / (1 - tau_plus)
    return options.reduce(alpha * attraction.flatten() + beta * repulsion, None)


def _check_forms(
    options: Options, stack: Tensor, tau_plus: float, kernel: str, parity: str | None, queue: object
) -> None:
    check_choice("cacr", "kernel", kernel, "euclid", "rbf")
    check_share("cacr", "tau_plus", tau_plus)
    if kernel == "rbf" or parity is not None:  # one value a batch
        check_choice("cacr", "reduction", options.reduction, "mean")
    for argument, wrong, found, fix in (
        ("tau_plus", tau_plus > 0 and kernel == "rbf", "is given with 'rbf'", "pass 'euclid'"),
        ("queue", queue is not None and parity is not None, "is given with parity", "leave it out"),
        ("views", len(stack) < 2, "has a single view", "pass at least two views"),
        ("views", stack.shape[1] < 2 and queue is None, "has a single sample", "pass two samples"),
    ):
        if wrong:
            raise ContrastInputError("cacr", argument, found, fix)


def _repulsion(
    options: Options,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    t_neg: float,
    kernel: str,
    freeze: bool,
) -> Tensor:
    """Minus the weighted cost of every row, or with ``rbf`` the log of its weighted mean."""

    def block(x: Tensor, sample: Tensor, y: Tensor, other: Tensor) -> Tensor:
        d2 = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * products(x, y.t())
        logits = (-t_neg * d2).masked_fill(sample[:, None] == other, -math.inf)
        weights = logits.log_softmax(1)
        weights = weights.detach() if freeze else weights
        if kernel == "rbf":
            return (weights - _RBF_SHARPNESS * d2).logsumexp(1)
        return -(weights.exp() * d2).sum(1)

    return by_rows(block, rows, columns, len(columns[0]), options)


def _constant_weights(options: Options, z: Tensor, samples: Tensor, t_neg: float) -> Tensor:
    """The same by symmetric sweeps: a log-sum has the slope of t_neg times the repulsion."""
    lengths = z.square().sum(1)
    keys = PairMask(row_id=samples, col_id=samples, expr="~same_id")
    with torch.no_grad():
        one, minus = torch.ones_like(z[:, :1]), -lengths[:, None]
        # The product of these rows and columns is minus the squared distance.
        rows, columns = torch.cat([2.0 * z, minus, one], 1), torch.cat([z, one, minus], 1)
        _, value = pair_expect(rows, columns, 1.0, t_neg, mask=keys, tile=options.tile)
    biases = -t_neg * lengths, None
    scale = z.new_tensor(2.0 * t_neg)
    masks = (keys.expr,)
    lse, _ = log_sums(z, None, scale, masks, keys=keys, biases=biases, engine=options.engine)
    return value + (lse[0] - lse[0].detach()) / t_neg


def _log_mean(logs: Tensor) -> Tensor:
    return logs.logsumexp(0) - math.log(len(logs))


def stored_keys(options: Options, queue: KeyQueue | Tensor, like: Tensor) -> Tensor:
    """Keys of a queue, detached, in the dtype of the rows and as long as they."""
    stored = queue if isinstance(queue, Tensor) else queue.stored()
    check_shape(options.function, "queue", stored, (-1, like.shape[-1]))
    check_device(options.function, "queue", stored, "embeddings", like)
    stored = stored.detach().to(like.dtype)
    return unit_rows(stored) if options.normalize else stored


def feature_transform(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    queue: KeyQueue | Float[Tensor, "m d"],
    *,
    alpha_pos: float = 2.0,
    alpha_neg: float = 1.6,
    per_dimension: bool = True,
    renormalize: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Harder positives by extrapolation, more diverse negatives by mixing (Zhu et al., 2021).

    ``q' = a q + (1 - a) k``, ``k' = a k + (1 - a) q`` with ``a ~ 1 + Beta(alpha_pos, alpha_pos)``,
    so that for unit rows and one a for a row the score s becomes ``s - 2 a (a - 1)(1 - s)``; the
    queue is mixed with its own permutation, weights ``Beta(alpha_neg, alpha_neg)``. Hand all
    three to `info_nce`, and enqueue k itself: this function changes no queue.

    Args:
        k: Unit keys, shape (n, d), taken without gradient.
        queue: Unit keys of earlier batches, `KeyQueue` or shape (m, d).
        alpha_pos: Concentration of the extrapolation, > 0.
        alpha_neg: Concentration of the mixing, > 0.
        per_dimension: One weight a dimension instead of one a row.
        renormalize: Bring the results back to length 1.
        generator: Source of the weights and of the permutation, on the device of ``q``.

    Example:
        >>> q, g = torch.eye(4), torch.Generator().manual_seed(0)
        >>> [x.shape[0] for x in feature_transform(q, q, torch.ones(6, 4), generator=g)]
        [4, 4, 6]
    """
    options = read_options("feature_transform", {"normalize": False})
    check_positive(options.function, alpha_pos=alpha_pos, alpha_neg=alpha_neg)
    generator = check_generator(options.function, generator)
    first, second = options.embeddings(q=q, k=k.detach()).unbind(0)
    stored = stored_keys(options, queue, first)

    def draw(like: Tensor, concentration: float) -> Tensor:
        shape = like.shape if per_dimension else (len(like), 1)
        shapes = like.new_full((2, *shape), concentration)
        gamma = torch._standard_gamma(shapes, generator=generator)
        return gamma[0] / gamma.sum(0).clamp_min(torch.finfo(like.dtype).tiny)

    a, b = 1.0 + draw(first, alpha_pos), draw(stored, alpha_neg)
    order = torch.randperm(len(stored), generator=generator, device=stored.device)
    results = (
        a * first + (1.0 - a) * second,
        (a * second + (1.0 - a) * first).detach(),
        b * stored + (1.0 - b) * stored[order],
    )
    x, y, negatives = (unit_rows(part) for part in results) if renormalize else results
    return x, y, negatives
