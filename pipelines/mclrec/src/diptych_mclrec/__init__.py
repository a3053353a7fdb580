"""Sequential recommendation and clinical event sequences (MCLRec), from tables to rankings."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "read_events": "read",
    "check_events": "check",
    "EventTable": "sequences",
    "Sequences": "sequences",
    "Catalogue": "sequences",
    "split_sequences": "split",
    "Split": "split",
    "crop": "views",
    "mask": "views",
    "reorder": "views",
    "two_views": "views",
    "SequenceEncoder": "model",
    "ModelAugmenter": "model",
    "build_augmenters": "model",
    "encode_in_groups": "model",
    "load_published": "parity",
    "info_nce": "objective",
    "contrastive_regulariser": "objective",
    "meta_contrast": "objective",
    "next_item_loss": "objective",
    "sampled_softmax_loss": "objective",
    "gbce_loss": "objective",
    "MCLRecTask": "task",
    "SCHEDULES": "schedules",
    "rank_of_targets": "metrics",
    "tiled_ranks": "metrics",
    "ranking_metrics": "metrics",
    "Popularity": "baselines",
    "Recency": "baselines",
    "Frequency": "baselines",
    "Markov1": "baselines",
    "ItemKNN": "baselines",
    "Blend": "baselines",
    "Recommender": "serve",
    "Session": "serve",
    "tiled_top_items": "serve",
    "MCLRecRecommender": "estimator",
    "make_demo": "sample",
    "bayes_scores": "sample",
    "Demo": "sample",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """The public names, imported when first used, so that ``--help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diptych_mclrec' has no attribute '{name}'")
    return getattr(importlib.import_module(f"diptych_mclrec.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
