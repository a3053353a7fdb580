"""Small models in memory, for the rooms that use one."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import Fitted
from diptych_mclrec.model import SequenceEncoder, build_augmenters
from diptych_mclrec.sequences import Catalogue, Sequences
from diptych_mclrec.serve import Recommender

NAMES = tuple(f"code-{number}" for number in range(1, 31))


def fitted(
    names: Sequence[str] = NAMES, *, seen: str = "keep", kind: str = "interactions", baskets=False
) -> Fitted:
    counts = np.r_[0, np.arange(len(names), 0, -1)]
    words = {names[0]: "the first"}
    catalogue = Catalogue(tuple(names), tuple(counts[1:].tolist()), words)
    return Fitted(catalogue, counts, counts, seen=seen, kind=kind, baskets=baskets)


def recommender(
    names: Sequence[str] = NAMES,
    *,
    known: Sequences | None = None,
    max_len: int = 6,
    config: MCLRecConfig | None = None,
    **more: Any,
) -> Recommender:
    torch.manual_seed(3)
    net = SequenceEncoder(len(names), dim=16, inner=24, layers=1, max_len=max_len)
    torch.nn.init.normal_(net.item_embedding.weight, std=0.7)
    net.eval().requires_grad_(False)
    return Recommender(net, fitted(names, **more), config or MCLRecConfig(), known)


def trained(model: Recommender) -> Any:
    """The model as the runtime hands it to a pipeline."""
    first, second = build_augmenters(16)
    built = {"encoder": model.encoder, "augmenter_1": first, "augmenter_2": second}
    return SimpleNamespace(
        final="final",
        modules=lambda fit: built,
        artifacts=lambda fit: model.fitted.artifacts(),
        facts=lambda fit: {},
    )
