"""What MVCNet minimises: CE + lambda_cvc * CVC + lambda_cmc * CMC.

With NTX the loss ``objective.contrast`` (by default ``nt_xent``), over a batch of B trials in V
views, raw first:

    CE   sum over the views of the cross-entropy of the logits
    CVC  mean over the kept views of NTX(raw features, features of the view)
    CMC  NTX(features of the CNN, features of the Transformer), over all views

In the official code a pair may be positive in one contrast and negative in the other, and views
whose label changed are positives; the words "all" bring that back (section ``objective``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

import diptych_contrast
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.model import MVCNetOutput

Features = Sequence[Float[Tensor, "B D"]]
Labels = Sequence[Int[Tensor, " B"]]
ClassNegatives = Literal["all", "other_class", "supcon"]
OF_VIEWS = ("mv_info_nce", "mv_dhel", "cacr")  # losses that take a tuple of views


def cross_view_loss(
    z_cnn: Features,
    z_tr: Features,
    keep: Sequence[bool],
    *,
    contrast: str = "nt_xent",
    temperature: float = 0.2,
    negatives: Literal["same_branch", "all"] = "same_branch",
    class_negatives: ClassNegatives = "all",
    labels: Int[Tensor, " B"] | None = None,
    group: torch_dist.ProcessGroup | None = None,
) -> Tensor:
    """Contrast of the raw trial with its views (CVC).

    Args:
        z_cnn: Features of the convolutional branch, one tensor a view, raw first.
        z_tr: Features of the Transformer branch, likewise.
        keep: For each view but the raw one, whether it is paired.
        contrast: Name of a two-view loss of ``diptych_contrast``.
        temperature: Above 0.
        negatives: "same_branch": a pool of 2B rows a branch, averaged; "all": both branches in
            one pool of 4B rows.
        class_negatives: Trials of the same class are negatives ("all"), left out ("other_class")
            or positives ("supcon").
        labels: Class of each raw trial; needed unless ``class_negatives`` is "all".
        group: Processes that share the batch.

    Returns:
        Mean over the kept views; 0 without any.
    """
    terms = []
    for view, kept in enumerate(keep, start=1):
        if not kept:
            continue
        if negatives == "all":
            pools = [(torch.cat([z_cnn[0], z_tr[0]]), torch.cat([z_cnn[view], z_tr[view]]))]
        else:
            pools = [(z_cnn[0], z_cnn[view]), (z_tr[0], z_tr[view])]
        for first, second in pools:
            same = None if labels is None else labels.repeat(len(first) // len(labels))
            terms.append(
                _contrast(first, second, contrast, temperature, class_negatives, same, group=group)
            )
    return torch.stack(terms).mean() if terms else _zero(z_cnn[0], z_tr[0])


def cross_model_loss(
    z_cnn: Features,
    z_tr: Features,
    *,
    contrast: str = "nt_xent",
    temperature: float = 0.2,
    negatives: Literal["exclude_same_trial", "all"] = "exclude_same_trial",
    class_negatives: ClassNegatives = "all",
    labels: Labels | None = None,
    ids: Int[Tensor, " B"] | None = None,
    group: torch_dist.ProcessGroup | None = None,
) -> Tensor:
    """Contrast of the two branches on the same trial in the same view (CMC).

    Args:
        z_cnn: Features of the convolutional branch, one tensor a view.
        z_tr: Features of the Transformer branch, likewise.
        contrast: As in :func:`cross_view_loss`.
        temperature: Above 0.
        negatives: "exclude_same_trial": other views of a trial are no negatives; "all": they are.
        class_negatives: As in :func:`cross_view_loss`.
        labels: Classes of each view; needed unless ``class_negatives`` is "all".
        ids: Number of each trial; needed where processes share the batch.
        group: Processes that share the batch.

    Returns:
        The loss; 0 where no trial has a negative.
    """
    first, second = torch.cat(list(z_cnn)), torch.cat(list(z_tr))
    trials = torch.arange(len(z_cnn[0]), device=first.device) if ids is None else ids
    excluded = trials.repeat(len(z_cnn)) if negatives == "exclude_same_trial" else None
    if excluded is not None and len(trials) == 1 and group is None:
        return _zero(first, second)
    same = None if labels is None else torch.cat(list(labels))
    return _contrast(
        first,
        second,
        contrast,
        temperature,
        class_negatives,
        same,
        ids=excluded,
        group=group,
    )


def mvcnet_loss(
    outputs: Sequence[MVCNetOutput],
    labels: Labels,
    config: MVCNetConfig,
    *,
    keep: Sequence[bool] | None = None,
    ids: Int[Tensor, " B"] | None = None,
    group: torch_dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The whole objective.

    Args:
        outputs: One output a view, raw first.
        labels: Classes of each view.
        config: The configuration; its section ``objective`` is used.
        keep: For each view but the raw one, whether its labels are those of the raw trials;
            None compares the labels of this batch.
        ids: Number of each trial; needed where processes share the batch.
        group: Processes that share the batch.

    Returns:
        "total", "ce", "cvc" and "cmc"; a term of weight 0 is not computed and 0.
    """
    settings = config.objective
    z_cnn, z_tr = [one.z_cnn for one in outputs], [one.z_tr for one in outputs]
    if settings.cvc_pairs == "all":
        keep = [True] * (len(outputs) - 1)
    elif keep is None:
        keep = [bool((label == labels[0]).all()) for label in labels[1:]]
    aware = settings.negatives != "all"
    ce = torch.stack(
        [F.cross_entropy(one.logits, label) for one, label in zip(outputs, labels, strict=True)]
    ).sum()
    cvc = cmc = _zero(z_cnn[0], z_tr[0])
    if settings.lambda_cvc:
        cvc = cross_view_loss(
            z_cnn,
            z_tr,
            keep,
            contrast=settings.contrast,
            temperature=settings.temperature,
            negatives=settings.cvc_negatives,
            class_negatives=settings.negatives,
            labels=labels[0] if aware else None,
            group=group,
        )
    if settings.lambda_cmc:
        cmc = cross_model_loss(
            z_cnn,
            z_tr,
            contrast=settings.contrast,
            temperature=settings.temperature,
            negatives=settings.cmc_negatives,
            class_negatives=settings.negatives,
            labels=labels if aware else None,
            ids=ids,
            group=group,
        )
    total = ce + settings.lambda_cvc * cvc + settings.lambda_cmc * cmc
    return {"total": total, "ce": ce, "cvc": cvc, "cmc": cmc}


def _contrast(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    contrast: str,
    temperature: float,
    class_negatives: ClassNegatives,
    labels: Int[Tensor, " n"] | None,
    *,
    ids: Int[Tensor, " n"] | None = None,
    group: torch_dist.ProcessGroup | None = None,
) -> Tensor:
    """The chosen loss, or SupCon, over the pool of both; a row without negatives counts as 0."""
    if class_negatives != "all" and labels is None:
        raise ValueError(f"class_negatives='{class_negatives}' needs labels: pass them")
    if len(first) == 1 and group is None:
        return _zero(first, second)
    options: dict[str, Any] = {"group": group, "empty": "zero"}
    loss: Tensor
    if class_negatives == "supcon":
        assert labels is not None
        pool = torch.cat([first, second])
        loss = diptych_contrast.sup_con(pool, labels.repeat(2), temperature, **options)
        return loss
    if contrast != "cacr":  # which weighs by distance, without a temperature
        options["temperature"] = temperature
    if ids is not None:
        options["ids"] = ids
    if class_negatives == "other_class":
        options["labels"] = labels
    function = getattr(diptych_contrast, contrast)
    views = ((first, second),) if contrast in OF_VIEWS else (first, second)
    loss = function(*views, **options)
    return loss


def _zero(*features: Tensor) -> Tensor:
    """A zero that gradients pass."""
    return 0.0 * torch.stack([z.float().sum() for z in features]).sum()
