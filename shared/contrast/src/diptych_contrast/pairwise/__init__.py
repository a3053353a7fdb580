"""Losses over pairs of embeddings, one in a file."""

from diptych_contrast.pairwise.clip_loss import clip_loss
from diptych_contrast.pairwise.info_nce import info_nce
from diptych_contrast.pairwise.nt_xent import nt_xent
from diptych_contrast.pairwise.siglip import siglip
from diptych_contrast.pairwise.soft_sup_con import soft_sup_con
from diptych_contrast.pairwise.sup_con import sup_con

__all__ = ["clip_loss", "info_nce", "nt_xent", "siglip", "soft_sup_con", "sup_con"]
