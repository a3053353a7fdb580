"""What MCLRec minimises, term by term.

With h the vectors of the plain prefixes, h1, h2 those of two views and z1, z2 what the augmenters
make of h1, h2:

    encoder    L_rec + lambda NCE(h1, h2) + beta (L_cl2 + gamma R)
    augmenters L_cl2 + gamma1 R,  L_cl2 = NCE(h1, z2) + NCE(h2, z1) + NCE(z1, z2)

Qin et al., "Meta-optimized contrastive learning for sequential recommendation", SIGIR 2023,
equations 5 to 13. NCE is the mean over both directions; the paper writes their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

import diptych_contrast
from diptych_contrast import PairMask, gather_no_grad, gather_with_grad, pair_max
from diptych_contrast.errors import warn

Form = Literal["paper", "official"]
Similarity = Literal["dot", "cos"]
Group = torch_dist.ProcessGroup | None


def info_nce(
    x1: Float[Tensor, "B H"],
    x2: Float[Tensor, "B H"],
    *,
    tau: float = 1.0,
    sim: Similarity = "dot",
    groups: Int[Tensor, " B"] | None = None,
    group: Group = None,
) -> Float[Tensor, ""]:
    """InfoNCE of two views: every row against its partner and all other rows of both.

    ``-s_rp / tau + log sum_{c != r} exp(s_rc / tau)``, mean over the 2B rows, s the dot product.

    Args:
        x1: First view.
        x2: Second view of the same prefixes.
        tau: Temperature, above 0.
        sim: "cos" divides the rows by their lengths first.
        groups: Subject of each prefix; prefixes of one subject are no negatives of each other.
        group: Processes that share the batch.

    Returns:
        The loss; 0, with a warning, where a single prefix leaves no negatives.

    Example:
        >>> round(info_nce(torch.ones(4, 8), torch.ones(4, 8)).exp().item())
        7
    """
    if _is_alone("info_nce", x1, group):
        return _zero(x1, x2)
    loss: Tensor = diptych_contrast.nt_xent(
        x1, x2, tau, ids=groups, normalize=sim == "cos", empty="zero", group=group
    )
    return loss


def contrastive_regulariser(
    x1: Float[Tensor, "B H"],
    x2: Float[Tensor, "B H"],
    *,
    form: Form = "paper",
    groups: Int[Tensor, " B"] | None = None,
    group: Group = None,
) -> Float[Tensor, ""]:
    """How far positives lie above the hardest negative, and negatives below it.

    With positives p and negatives n of the dot products of a pair of views,
    ``mean relu(p - min(min p, max n)) + mean relu(max(min p, max n) - n)``; minima and maxima carry
    gradient. Minimising it keeps InfoNCE from saturating (Qin et al. 2023, equations 10 to 12).

    Args:
        x1: First view.
        x2: Second view of the same prefixes.
        form: "paper": minimum and maximum over the whole batch; "official": within each row.
        groups: As in :func:`info_nce`.
        group: Processes that share the batch.

    Returns:
        The term; 0, with a warning, where there are no negatives.
    """
    if _is_alone("contrastive_regulariser", x1, group):
        return _zero(x1, x2)
    if group is not None:
        groups = None if groups is None else gather_no_grad(groups, group)
        x1, x2 = gather_with_grad(x1, group), gather_with_grad(x2, group)
    if groups is None:
        groups = torch.arange(len(x1), device=x1.device)
    z, ids = torch.cat([x1, x2]), groups.repeat(2)
    if z.dtype != torch.float64:
        z = z.float()
    with torch.autocast(z.device.type, enabled=False):
        positive = (z[: len(x1)] * z[len(x1) :]).sum(1).repeat(2)
        hardest, column = pair_max(z, z, PairMask(row_id=ids, col_id=ids, expr="~same_id"))
        # the sum over a row's negatives is one product with the sum of all rows of other groups
        _, number = torch.unique(ids, return_inverse=True)
        members = z.new_zeros(int(number.max()) + 1, z.shape[1]).index_add(0, number, z)
        negative = (z * (z.sum(0) - members[number])).sum(1)
        counts = len(z) - torch.bincount(number)[number].to(z.dtype)
        valid = column >= 0
        if not bool(valid.any()):
            if bool(z.isfinite().all()):  # of what is not, nothing is the largest
                _warn_no_negatives("contrastive_regulariser")
            return _zero(x1, x2)
        return _spread(form, positive[valid], hardest[valid], negative[valid], counts[valid])


def meta_contrast(
    h1: Float[Tensor, "B H"],
    h2: Float[Tensor, "B H"],
    z1: Float[Tensor, "B H"],
    z2: Float[Tensor, "B H"],
    *,
    gamma: float,
    form: Form = "paper",
    groups: Int[Tensor, " B"] | None = None,
    group: Group = None,
) -> dict[str, Float[Tensor, ""]]:
    """The contrast of data views with model views, L_cl2, and its regulariser.

    Temperature 1 and dot products throughout, as in the official code.

    Args:
        h1: Vectors of the first views.
        h2: Vectors of the second views.
        z1: The first augmenter's views of ``h1``.
        z2: The second augmenter's views of ``h2``.
        gamma: Weight of the regulariser; 0 leaves it out.
        form: As in :func:`contrastive_regulariser`; "paper" regularises (z1, z2) alone,
            "official" sums over all three pairs.
        groups: As in :func:`info_nce`.
        group: Processes that share the batch.

    Returns:
        "cl2", "reg" and "total" = cl2 + gamma reg.
    """
    pairs = [(h1, z2), (h2, z1), (z1, z2)]
    cl2 = torch.stack([info_nce(a, b, groups=groups, group=group) for a, b in pairs]).sum()
    reg = torch.zeros_like(cl2)
    if gamma:
        terms = [
            contrastive_regulariser(a, b, form=form, groups=groups, group=group)
            for a, b in (pairs if form == "official" else pairs[-1:])
        ]
        reg = torch.stack(terms).sum()
    return {"cl2": cl2, "reg": reg, "total": cl2 + gamma * reg}


def next_item_loss(
    h: Float[Tensor, "N H"],
    weight: Float[Tensor, "items H"],
    targets: Int[Tensor, " N"] | Int[Tensor, "N M"],
    *,
    pad_in_softmax: bool = False,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next item, or mean over the items of the next basket.

    Args:
        h: Vectors of histories.
        weight: Item vectors, I + 1 rows.
        targets: Ids 1..I, or baskets of them; 0 is no target.
        pad_in_softmax: Let row 0 stand in the softmax, as the official code does.

    Returns:
        Mean over the rows that have a target; 0 without any.

    Example:
        >>> h, weight = torch.ones(2, 3), torch.ones(5, 3)
        >>> round(next_item_loss(h, weight, torch.tensor([1, 4])).exp().item())
        4
    """
    known = targets.reshape(len(targets), -1).ne(0)
    rows = known.any(1)
    if not bool(rows.all()):
        h, targets, known = h[rows], targets[rows], known[rows]
    if not len(h):
        return _zero(h, weight)
    first = 0 if pad_in_softmax else 1
    logits = h @ weight[first:].t()
    if targets.dim() == 1:
        return F.cross_entropy(_at_least_float(logits), targets - first)
    logits = _at_least_float(logits)
    members = logits.gather(1, (targets - first).clamp_min(0))
    mean = members.masked_fill(~known, 0.0).sum(1) / known.sum(1)
    return (logits.logsumexp(1) - mean).mean()


def sampled_softmax_loss(
    h: Float[Tensor, "N H"],
    weight: Float[Tensor, "items H"],
    targets: Int[Tensor, " N"],
    negatives: Int[Tensor, " m"] | Int[Tensor, "N m"],
    log_q: Float[Tensor, " items"] | None = None,
    *,
    correct_target: bool = False,
) -> Float[Tensor, ""]:
    """Softmax over the target and sampled items, corrected for how often they are sampled.

    Negatives that are the target by accident are left out. Bengio & Senécal 2008; the correction
    makes the expected gradient approach that of the full softmax.

    Args:
        h: Vectors of histories.
        weight: Item vectors, I + 1 rows.
        targets: Ids 1..I.
        negatives: Ids, shared by all rows or one set a row; for in-batch sampling the targets.
        log_q: Log of each item's expected number among a row's negatives, log(m q), I + 1 values;
            None corrects nothing.
        correct_target: Correct the target's logit likewise, for in-batch sampling.

    Returns:
        Mean over the rows.
    """
    positive = (h * weight[targets]).sum(1, keepdim=True)
    shared = negatives.dim() == 1
    vectors = weight[negatives]
    sampled = h @ vectors.t() if shared else torch.einsum("nh,nmh->nm", h, vectors)
    if log_q is not None:
        sampled = sampled - log_q[negatives]
        if correct_target:
            positive = positive - log_q[targets][:, None]
    sampled = sampled.masked_fill(targets[:, None] == negatives, -torch.inf)
    logits = _at_least_float(torch.cat([positive, sampled], 1))
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def gbce_loss(
    h: Float[Tensor, "N H"],
    weight: Float[Tensor, "items H"],
    targets: Int[Tensor, " N"],
    negatives: Int[Tensor, " k"] | Int[Tensor, "N k"],
    *,
    t: float = 0.75,
) -> Float[Tensor, ""]:
    """Generalised binary cross-entropy with k sampled negatives a row.

    ``-(b log sigmoid(s+) + sum log(1 - sigmoid(s-))) / (k + 1)``,
    ``b = a (t (1 - 1/a) + 1/a)``, ``a = k / (I - 1)``. Petrov & Macdonald, "gSASRec: reducing
    overconfidence in sequential recommendation trained with negative sampling", RecSys 2023.

    Args:
        h: Vectors of histories.
        weight: Item vectors, I + 1 rows.
        targets: Ids 1..I.
        negatives: Ids, k a row or k that all rows share; where one is the target by accident it is
            left out.
        t: Calibration in [0, 1]; 0 is binary cross-entropy, 1 undoes the overconfidence wholly.

    Returns:
        Mean over the rows.
    """
    count = negatives.shape[-1]
    share = count / max(len(weight) - 2, 1)
    power = share * (t * (1 - 1 / share) + 1 / share)
    positive = _at_least_float((h * weight[targets]).sum(1))
    vectors = weight[negatives]
    shared = negatives.dim() == 1
    sampled = h @ vectors.t() if shared else torch.einsum("nh,nmh->nm", h, vectors)
    sampled = _at_least_float(sampled.masked_fill(targets[:, None] == negatives, -torch.inf))
    losses = power * F.softplus(-positive) + F.softplus(sampled).sum(1)
    return losses.mean() / (count + 1)


def _spread(
    form: Form, positive: Tensor, hardest: Tensor, negative: Tensor, counts: Tensor
) -> Tensor:
    """The regulariser from each row's positive, largest negative, and sum of negatives."""
    if form == "paper":
        positive_floor, hardest = positive.min(), hardest.max()
    elif form == "official":
        positive_floor = positive
    else:
        raise ValueError(f"objective.regulariser is {form!r}: choose 'paper' or 'official'")
    low = torch.minimum(positive_floor, hardest)
    high = torch.maximum(positive_floor, hardest)
    # no negative lies above `high`, so that the mean needs no list of negatives
    below = (high * counts - negative).sum() / counts.sum()
    return F.relu(positive - low).mean() + below


def _is_alone(function: str, x: Tensor, group: Group) -> bool:
    if len(x) > 1 or group is not None:
        return False
    _warn_no_negatives(function)
    return True


def _warn_no_negatives(function: str) -> None:
    warn(function, "x1", "leaves no negatives", "the term is 0: use batches of several subjects")


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _zero(*tensors: Tensor) -> Tensor:
    """A zero that gradients pass."""
    return 0.0 * torch.stack([one.sum() for one in tensors]).sum()
