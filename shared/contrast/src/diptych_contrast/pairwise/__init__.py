"""Losses over pairs of embeddings."""

from diptych_contrast.pairwise.clip_loss import clip_loss
from diptych_contrast.pairwise.decoupled import dcl, dclw
from diptych_contrast.pairwise.hard_negatives import debiased, hcl
from diptych_contrast.pairwise.info_nce import info_nce
from diptych_contrast.pairwise.metric_learning import (
    circle,
    contrastive_margin,
    multi_similarity,
    n_pairs,
)
from diptych_contrast.pairwise.nt_xent import nt_xent
from diptych_contrast.pairwise.siglip import siglip
from diptych_contrast.pairwise.soft_sup_con import soft_sup_con
from diptych_contrast.pairwise.sup_con import sup_con

__all__ = [
    "circle",
    "clip_loss",
    "contrastive_margin",
    "dcl",
    "dclw",
    "debiased",
    "hcl",
    "info_nce",
    "multi_similarity",
    "n_pairs",
    "nt_xent",
    "siglip",
    "soft_sup_con",
    "sup_con",
]
