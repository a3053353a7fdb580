"""In which order the encoder and the augmenters learn from one batch.

::

    two_stage  encoder with frozen augmenters, then augmenters with the encoder as it now is
               (Qin et al. 2023, algorithm 1)
    official   the same, then the encoder once more on the same batch, as the official code does
    joint      both at once
    bilevel    augmenters by what one step of the encoder on their contrast does to it, then the
               encoder

But for the last, no gradient passes from a stage through the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych_contrast import gather_no_grad, gather_with_grad
from diptych_mclrec.model import ModelAugmenter, SequenceEncoder, encode_in_groups
from diptych_mclrec.objective import (
    gbce_loss,
    info_nce,
    meta_contrast,
    next_item_loss,
    sampled_softmax_loss,
)

if TYPE_CHECKING:
    from diptych.loop import StepContext
    from diptych_mclrec.config import MCLRecObjectiveSection

Terms = dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Views:
    """Two views of the histories of a batch.

    Args:
        first: Ids of the first view, (B, L), or baskets, (B, L, M).
        first_lengths: Its steps, (B,).
        second: Ids of the second view, likewise.
        second_lengths: Its steps.
        subjects: Subject of each history, (B,).
    """

    first: Int[Tensor, "B L ..."]
    first_lengths: Int[Tensor, " B"]
    second: Int[Tensor, "B L ..."]
    second_lengths: Int[Tensor, " B"]
    subjects: Int[Tensor, " B"]


@dataclass(frozen=True)
class Batch:
    """Histories and what followed.

    Args:
        items: Ids, (B, L), or baskets, (B, L, M).
        lengths: Steps of each history, (B,).
        targets: What followed each history, (B,) or, as baskets, (B, G); with ``every_step`` what
            followed each of its steps, (B, L) or (B, L, G). 0 is nothing.
        every_step: Whether the loss is taken at every step.
        views: For the contrast; None where there is none.
        negatives: Sampled ids, (m,) or (rows, m), for the losses that sample.
        log_q: Log of each item's expected number among a row's negatives, (I + 1,).
    """

    items: Int[Tensor, "B L ..."]
    lengths: Int[Tensor, " B"]
    targets: Int[Tensor, "B ..."]
    every_step: bool = False
    views: Views | None = None
    negatives: Int[Tensor, ...] | None = None
    log_q: Float[Tensor, " items"] | None = None


@dataclass(frozen=True)
class Networks:
    """What learns, and how.

    Args:
        encoder: The sequence encoder.
        augmenters: Both; None without contrast.
        objective: The section of the configuration.
        length_groups: Most passes a batch is encoded in.
        inner_lr: Size of the encoder's trial step in ``bilevel``, above 0.
    """

    encoder: SequenceEncoder
    augmenters: tuple[ModelAugmenter, ModelAugmenter] | None
    objective: MCLRecObjectiveSection
    length_groups: int = 1
    inner_lr: float = 1e-3


def encoder_terms(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """The encoder's loss "total" and its terms "rec", "cl1", "cl2" and "reg".

    Args:
        networks: What learns.
        batch: Its views may be None, then "rec" is all.
        ctx: Of the step.
    """
    objective, views = networks.objective, batch.views
    histories = [] if batch.every_step else [(batch.items, batch.lengths)]
    vectors = _encode(networks, [*histories, *_of(views)])
    if batch.every_step:
        h, targets = _every_step(networks, batch)
    else:
        h, targets = vectors.pop(0), batch.targets
    rec, rows = _next_item(networks, batch, h, targets), len(h)
    terms = {"rec": rec, "total": rec * _weight(rows, ctx)}
    if views is None:
        return terms
    h1, h2 = vectors
    subjects = views.subjects if objective.mask_same_subject else None
    if objective.lambda_:
        terms["cl1"] = info_nce(
            h1, h2, tau=objective.tau, sim=objective.sim, groups=subjects, group=ctx.group
        )
        terms["total"] = terms["total"] + objective.lambda_ * terms["cl1"]
    if objective.beta and networks.augmenters is not None:
        found = _meta(networks, views, h1, h2, objective.gamma, ctx)
        terms |= {"cl2": found["cl2"], "reg": found["reg"]}
        terms["total"] = terms["total"] + objective.beta * found["total"]
    return terms


def augmenter_terms(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """The augmenters' loss "total" and its terms "cl2" and "reg"; the encoder is a constant.

    Args:
        networks: What learns.
        batch: With views.
        ctx: Of the step.
    """
    objective, views = networks.objective, batch.views
    assert views is not None
    with torch.no_grad():
        h1, h2 = _encode(networks, _of(views))
    return _meta(networks, views, h1, h2, _augmenter_gamma(objective), ctx)


def recommend_only(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """One step of the encoder: without views this is SASRec.

    Args:
        networks: What learns; ``ctx`` knows its optimiser as "encoder".
        batch: What it learns from.
        ctx: Of the step.

    Returns:
        Terms to log.
    """
    with _constant(*(networks.augmenters or ())):
        terms = encoder_terms(networks, batch, ctx)
    ctx.zero("encoder")
    ctx.backward(terms["total"], weighted=True)
    ctx.step("encoder")
    return terms


def two_stage(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """The encoder, then the augmenters; optimisers "encoder" and "augmenters"."""
    terms = recommend_only(networks, batch, ctx)
    found = augmenter_terms(networks, batch, ctx)
    ctx.zero("augmenters")
    ctx.backward(found["total"], weighted=True)
    ctx.step("augmenters")
    return terms | {f"augmenters/{name}": value for name, value in found.items()}


def official(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """The encoder, the augmenters, the encoder again; optimisers as in :func:`two_stage`."""
    terms = two_stage(networks, batch, ctx)
    return terms | recommend_only(networks, batch, ctx)


def joint(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """Encoder and augmenters on the encoder's loss; one optimiser, "joint"."""
    terms = encoder_terms(networks, batch, ctx)
    ctx.zero("joint")
    ctx.backward(terms["total"], weighted=True)
    ctx.step("joint")
    return terms


def bilevel(networks: Networks, batch: Batch, ctx: StepContext) -> Terms:
    """The augmenters through a trial step of the encoder, then the encoder.

    ``theta' = theta - inner_lr grad_theta L0(theta, phi)`` is a plain step that keeps its graph;
    the augmenters learn from ``L1(theta', phi) + L_rec(theta')``. Optimisers as in
    :func:`two_stage`.
    """
    objective = networks.objective
    update = {"lambda_": 0.0, "beta": 1.0, "gamma": _augmenter_gamma(objective)}
    outer = replace(networks, objective=objective.model_copy(update=update))
    parameters = dict(networks.encoder.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kinds have no second derivative
        inner = encoder_terms(networks, batch, ctx)["total"]
        slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        moved = {
            f"encoder.{name}": parameter.detach() - networks.inner_lr * _averaged(slope, ctx)
            for (name, parameter), slope in zip(parameters.items(), slopes, strict=True)
        }
        found: Terms = functional_call(_EncoderTerms(outer), moved, (batch, ctx))
    ctx.zero("augmenters")
    ctx.backward(found["total"], weighted=True)
    ctx.step("augmenters")
    terms = recommend_only(networks, batch, ctx)
    return terms | {f"augmenters/{name}": value for name, value in found.items()}


SCHEDULES: Mapping[str, Callable[[Networks, Batch, StepContext], Terms]] = {
    "two_stage": two_stage,
    "official": official,
    "joint": joint,
    "bilevel": bilevel,
}


class _EncoderTerms(nn.Module):
    """The encoder's loss as a module, so that it can be had for other parameters."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.encoder, self.networks = networks.encoder, networks

    def forward(self, batch: Batch, ctx: StepContext) -> Terms:
        return encoder_terms(self.networks, batch, ctx)


def _augmenter_gamma(objective: MCLRecObjectiveSection) -> float:
    given = objective.augmenter_gamma
    return objective.gamma * objective.beta if given is None else given


def _averaged(slope: Tensor, ctx: StepContext) -> Tensor:
    """The mean of a gradient over the processes, with gradient."""
    return slope if ctx.group is None else gather_with_grad(slope[None], ctx.group).mean(0)


def _of(views: Views | None) -> list[tuple[Tensor, Tensor]]:
    if views is None:
        return []
    return [(views.first, views.first_lengths), (views.second, views.second_lengths)]


def _encode(
    networks: Networks, histories: list[tuple[Tensor, Tensor]]
) -> list[Float[Tensor, "B H"]]:
    """Last vectors of several matrices of histories, stacked so that like lengths meet."""
    if not histories:
        return []
    width = max(items.shape[1] for items, _ in histories)
    stacked = torch.cat([_widened(items, width) for items, _ in histories])
    lengths = torch.cat([own for _, own in histories])
    encoded = encode_in_groups(networks.encoder, stacked, lengths, networks.length_groups)
    return list(torch.split(encoded, [len(own) for _, own in histories]))


def _widened(items: Tensor, width: int) -> Tensor:
    baskets = (0, 0) * (items.dim() - 2)
    return nn.functional.pad(items, (*baskets, 0, width - items.shape[1]))


def _weight(rows: int, ctx: StepContext) -> float:
    """Turns a mean over this process's rows into its share of the mean over all rows."""
    if ctx.group is None:
        return 1.0
    everywhere = gather_no_grad(torch.tensor([rows], device=ctx.device), ctx.group)
    return rows * len(everywhere) / max(int(everywhere.sum()), 1)


def _every_step(
    networks: Networks, batch: Batch
) -> tuple[Float[Tensor, "N H"], Int[Tensor, "N ..."]]:
    """Vectors and targets of all steps that have one; histories of like length meet."""
    order = torch.argsort(batch.lengths)
    parts = order.chunk(networks.length_groups)
    longest = batch.lengths[torch.stack([part[-1] for part in parts])].tolist()
    vectors, targets = [], []
    for part, steps in zip(parts, longest, strict=True):
        h = networks.encoder(batch.items[part, :steps], batch.lengths[part], positions="all")
        wanted = batch.targets[part, :steps]
        known = wanted.flatten(2).any(2) if wanted.dim() > 2 else wanted.ne(0)
        vectors.append(h[known])
        targets.append(wanted[known])
    return torch.cat(vectors), torch.cat(targets)


def _next_item(
    networks: Networks, batch: Batch, h: Float[Tensor, "N H"], targets: Int[Tensor, "N ..."]
) -> Float[Tensor, ""]:
    """The loss of the objective, a mean over rows."""
    objective, weight = networks.objective, networks.encoder.item_weight()
    if batch.negatives is None:
        return next_item_loss(h, weight, targets, pad_in_softmax=objective.pad_in_softmax)
    if objective.loss == "gbce":
        return gbce_loss(h, weight, targets, batch.negatives, t=objective.gbce_t)
    corrected = objective.sampler != "uniform"
    return sampled_softmax_loss(
        h, weight, targets, batch.negatives, batch.log_q, correct_target=corrected
    )


def _meta(
    networks: Networks, views: Views, h1: Tensor, h2: Tensor, gamma: float, ctx: StepContext
) -> Terms:
    assert networks.augmenters is not None
    first, second = networks.augmenters
    return meta_contrast(
        h1,
        h2,
        first(h1),
        second(h2),
        gamma=gamma,
        form=networks.objective.regulariser,
        groups=views.subjects if networks.objective.mask_same_subject else None,
        group=ctx.group,
    )


@contextmanager
def _constant(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass through modules, not into them."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
