"""Dense references of `diptych_contrast.discover`."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych_contrast.reference import pairwise


def soft_con(
    features: Tensor,
    probs: Tensor,
    temperature: float = 0.07,
    *,
    labels: Tensor | None = None,
    labelled: str = "one_hot",
    parity: str | None = None,
) -> Tensor:
    """`diptych_contrast.soft_con`, dense."""
    if labels is not None and labelled == "one_hot" and parity is None:
        probs = probs.clone()
        probs[labels >= 0] = torch.eye(probs.shape[1]).to(probs)[labels[labels >= 0]]
    loss = pairwise.soft_sup_con(features, probs, temperature)
    return loss if parity is None else loss * temperature / 0.07


def self_distillation(
    student: Tensor,
    epoch: int,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.07, 0.04),
    warmup: int = 30,
) -> Tensor:
    """`diptych_contrast.self_distillation`, dense."""
    t = torch.linspace(*teacher_temperature, warmup, dtype=torch.float64)[min(epoch, warmup - 1)]
    logits = student.double()
    pairs = [(a, b) for a in range(len(logits)) for b in range(len(logits)) if a != b]
    terms = [
        (logits[a].detach() / t).softmax(1) * (logits[b] / student_temperature).log_softmax(1)
        for a, b in pairs
    ]
    return -torch.stack(terms).sum(2).mean()
