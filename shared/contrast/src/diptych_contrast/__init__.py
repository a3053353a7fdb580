"""Contrastive losses, exact and tiled: memory grows with N x D, never with N x N.

``import diptych_contrast as dc``; every name below is found here and in its module.
"""

from diptych_contrast.cluster import (
    PrototypeQueue,
    Prototypes,
    cluster_density,
    proto_nce,
    sinkhorn,
    spherical_kmeans,
    swav_loss,
)
from diptych_contrast.diagnostics import (
    alignment,
    alpha_req,
    collapse_report,
    effective_rank,
    gradient_balance,
    modality_gap,
    nesum,
    positive_negative_scores,
    rank_me,
    tolerance,
    uniformity,
)
from diptych_contrast.dist import gather_no_grad, gather_with_grad, world
from diptych_contrast.errors import ContrastInputError, ContrastWarning
from diptych_contrast.gradcache import grad_cache
from diptych_contrast.heads import MultiHead, ProjectionHead, head, multi_crop_forward
from diptych_contrast.kernel import (
    PairInfo,
    PairMask,
    default_tile,
    pair_expect,
    pair_lse,
    pair_max,
    pair_sum,
)
from diptych_contrast.multiview import (
    average_views,
    mv_dhel,
    mv_info_nce,
    nt_xent_multi,
    pairwise_views,
    poly_view,
)
from diptych_contrast.pairwise import (
    clip_loss,
    info_nce,
    nt_xent,
    siglip,
    soft_sup_con,
    sup_con,
)
from diptych_contrast.probes import (
    few_label_probe,
    knn_probe,
    linear_probe,
    retrieval,
    ridge_probe,
)
from diptych_contrast.registry import LossSpec, explain, loss, losses
from diptych_contrast.salient import SepWeights, joint_entropy, sep_clr, sup_alignment
from diptych_contrast.samplers import ClassBalancedSampler, SubjectSampler
from diptych_contrast.state import (
    CrossBatchMemory,
    KeyQueue,
    MomentumEncoder,
    Temperature,
    cosine_momentum,
)
from diptych_contrast.testing import gaussian_pairs, hypersphere

__all__ = [
    "ClassBalancedSampler",
    "ContrastInputError",
    "ContrastWarning",
    "CrossBatchMemory",
    "KeyQueue",
    "LossSpec",
    "MomentumEncoder",
    "MultiHead",
    "PairInfo",
    "PairMask",
    "ProjectionHead",
    "PrototypeQueue",
    "Prototypes",
    "SepWeights",
    "SubjectSampler",
    "Temperature",
    "alignment",
    "alpha_req",
    "average_views",
    "clip_loss",
    "cluster_density",
    "collapse_report",
    "cosine_momentum",
    "default_tile",
    "effective_rank",
    "explain",
    "few_label_probe",
    "gather_no_grad",
    "gather_with_grad",
    "gaussian_pairs",
    "grad_cache",
    "gradient_balance",
    "head",
    "hypersphere",
    "info_nce",
    "joint_entropy",
    "knn_probe",
    "linear_probe",
    "loss",
    "losses",
    "modality_gap",
    "multi_crop_forward",
    "mv_dhel",
    "mv_info_nce",
    "nesum",
    "nt_xent",
    "nt_xent_multi",
    "pair_expect",
    "pair_lse",
    "pair_max",
    "pair_sum",
    "pairwise_views",
    "poly_view",
    "positive_negative_scores",
    "proto_nce",
    "rank_me",
    "retrieval",
    "ridge_probe",
    "sep_clr",
    "siglip",
    "sinkhorn",
    "soft_sup_con",
    "spherical_kmeans",
    "sup_alignment",
    "sup_con",
    "swav_loss",
    "tolerance",
    "uniformity",
    "world",
]
