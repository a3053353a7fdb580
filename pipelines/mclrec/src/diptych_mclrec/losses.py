"""The names under which the terms of the objective are known to other programs."""

from diptych_mclrec.objective import (
    contrastive_regulariser,
    gbce_loss,
    info_nce,
    meta_contrast,
    next_item_loss,
    sampled_softmax_loss,
)

__all__ = [
    "contrastive_regulariser",
    "gbce_loss",
    "info_nce",
    "meta_contrast",
    "next_item_loss",
    "sampled_softmax_loss",
]
