"""Losses over pairs of embeddings."""

from diptych_contrast.pairwise.metric_learning import circle as circle
from diptych_contrast.pairwise.metric_learning import contrastive_margin as contrastive_margin
from diptych_contrast.pairwise.metric_learning import multi_similarity as multi_similarity
from diptych_contrast.pairwise.metric_learning import n_pairs as n_pairs
from diptych_contrast.pairwise.modalities import clip_loss as clip_loss
from diptych_contrast.pairwise.modalities import info_nce as info_nce
from diptych_contrast.pairwise.modalities import siglip as siglip
from diptych_contrast.pairwise.sup_con import soft_sup_con as soft_sup_con
from diptych_contrast.pairwise.sup_con import sup_con as sup_con
from diptych_contrast.pairwise.two_views import dcl as dcl
from diptych_contrast.pairwise.two_views import dclw as dclw
from diptych_contrast.pairwise.two_views import debiased as debiased
from diptych_contrast.pairwise.two_views import hcl as hcl
from diptych_contrast.pairwise.two_views import nt_xent as nt_xent
