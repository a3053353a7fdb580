"""Contrastive losses, exact and tiled: memory grows with N x D, never with N x N.

``import diptych_contrast as dc``; every name below is found here and in its module. Said once for
all of them:

* Shapes are those of the annotations. Embeddings ``z``, ``z1``, ``q``, ``x``, ... are (n, d), row i
  of all the same sample; ``views`` are a tensor (v, n, d) or v times (n, d), two or more. Rows of
  several views are view-major: row ``a * n + i`` is view a of sample i.
* ``labels`` are the class of each sample, from 0; ``ids`` tell which rows are one sample.
* ``temperature`` is a number above 0, a 0-dim tensor or a `Temperature`, t in formulas, where s is
  the cosine similarity, or the product where ``normalize`` is False.
* ``**common`` are the arguments of `Common`, explained at `Options`. A loss that cannot honour one
  of them refuses it.
* ``parity="official"`` computes what the authors' code does.
* The formula of a docstring is the loss of one row; a loss returns its mean over the rows, in
  float32 or float64, also for half precision and under autocast.
* What cannot be used is refused with a `ContrastInputError`: argument, finding, what to do. Values
  are looked at only where that is free, on the CPU.
"""

from diptych_contrast.cluster import PrototypeQueue as PrototypeQueue
from diptych_contrast.cluster import Prototypes as Prototypes
from diptych_contrast.cluster import cluster_density as cluster_density
from diptych_contrast.cluster import proto_nce as proto_nce
from diptych_contrast.cluster import sinkhorn as sinkhorn
from diptych_contrast.cluster import spherical_kmeans as spherical_kmeans
from diptych_contrast.cluster import swav_loss as swav_loss
from diptych_contrast.diagnostics import alignment as alignment
from diptych_contrast.diagnostics import alpha_req as alpha_req
from diptych_contrast.diagnostics import collapse_report as collapse_report
from diptych_contrast.diagnostics import effective_rank as effective_rank
from diptych_contrast.diagnostics import gradient_balance as gradient_balance
from diptych_contrast.diagnostics import modality_gap as modality_gap
from diptych_contrast.diagnostics import nesum as nesum
from diptych_contrast.diagnostics import positive_negative_scores as positive_negative_scores
from diptych_contrast.diagnostics import rank_me as rank_me
from diptych_contrast.diagnostics import tolerance as tolerance
from diptych_contrast.diagnostics import uniformity as uniformity
from diptych_contrast.discover import balanced_regulariser as balanced_regulariser
from diptych_contrast.discover import cluster_accuracy as cluster_accuracy
from diptych_contrast.discover import estimate_class_distribution as estimate_class_distribution
from diptych_contrast.discover import logit_adjust as logit_adjust
from diptych_contrast.discover import sampling_rates as sampling_rates
from diptych_contrast.discover import self_balanced_sampling as self_balanced_sampling
from diptych_contrast.discover import self_distillation as self_distillation
from diptych_contrast.discover import soft_con as soft_con
from diptych_contrast.dist import gather_no_grad as gather_no_grad
from diptych_contrast.dist import gather_with_grad as gather_with_grad
from diptych_contrast.dist import world as world
from diptych_contrast.errors import ContrastInputError as ContrastInputError
from diptych_contrast.errors import ContrastWarning as ContrastWarning
from diptych_contrast.gradcache import grad_cache as grad_cache
from diptych_contrast.heads import MultiHead as MultiHead
from diptych_contrast.heads import ProjectionHead as ProjectionHead
from diptych_contrast.heads import head as head
from diptych_contrast.heads import multi_crop_forward as multi_crop_forward
from diptych_contrast.kernel import PairInfo as PairInfo
from diptych_contrast.kernel import PairMask as PairMask
from diptych_contrast.kernel import default_tile as default_tile
from diptych_contrast.kernel import pair_expect as pair_expect
from diptych_contrast.kernel import pair_lse as pair_lse
from diptych_contrast.kernel import pair_max as pair_max
from diptych_contrast.kernel import pair_sum as pair_sum
from diptych_contrast.matching import birank as birank
from diptych_contrast.matching import boost_abs as boost_abs
from diptych_contrast.matching import boost_kl as boost_kl
from diptych_contrast.matching import boost_pro as boost_pro
from diptych_contrast.matching import boost_rel as boost_rel
from diptych_contrast.matching import label_guided as label_guided
from diptych_contrast.matching import triplet as triplet
from diptych_contrast.multiview import average_views as average_views
from diptych_contrast.multiview import mv_dhel as mv_dhel
from diptych_contrast.multiview import mv_info_nce as mv_info_nce
from diptych_contrast.multiview import nt_xent_multi as nt_xent_multi
from diptych_contrast.multiview import pairwise_views as pairwise_views
from diptych_contrast.multiview import poly_view as poly_view
from diptych_contrast.pairwise import circle as circle
from diptych_contrast.pairwise import clip_loss as clip_loss
from diptych_contrast.pairwise import contrastive_margin as contrastive_margin
from diptych_contrast.pairwise import dcl as dcl
from diptych_contrast.pairwise import dclw as dclw
from diptych_contrast.pairwise import debiased as debiased
from diptych_contrast.pairwise import hcl as hcl
from diptych_contrast.pairwise import info_nce as info_nce
from diptych_contrast.pairwise import multi_similarity as multi_similarity
from diptych_contrast.pairwise import n_pairs as n_pairs
from diptych_contrast.pairwise import nt_xent as nt_xent
from diptych_contrast.pairwise import siglip as siglip
from diptych_contrast.pairwise import soft_sup_con as soft_sup_con
from diptych_contrast.pairwise import sup_con as sup_con
from diptych_contrast.probes import few_label_probe as few_label_probe
from diptych_contrast.probes import knn_probe as knn_probe
from diptych_contrast.probes import linear_probe as linear_probe
from diptych_contrast.probes import retrieval as retrieval
from diptych_contrast.probes import ridge_probe as ridge_probe
from diptych_contrast.registry import LossSpec as LossSpec
from diptych_contrast.registry import explain as explain
from diptych_contrast.registry import loss as loss
from diptych_contrast.registry import losses as losses
from diptych_contrast.reweight import PairGate as PairGate
from diptych_contrast.reweight import PairTemperature as PairTemperature
from diptych_contrast.reweight import amcl as amcl
from diptych_contrast.reweight import arbitrary_pairs as arbitrary_pairs
from diptych_contrast.reweight import cacr as cacr
from diptych_contrast.reweight import feature_transform as feature_transform
from diptych_contrast.reweight import sample_partners as sample_partners
from diptych_contrast.salient import SepWeights as SepWeights
from diptych_contrast.salient import joint_entropy as joint_entropy
from diptych_contrast.salient import sep_clr as sep_clr
from diptych_contrast.salient import sup_alignment as sup_alignment
from diptych_contrast.samplers import ClassBalancedSampler as ClassBalancedSampler
from diptych_contrast.samplers import SubjectSampler as SubjectSampler
from diptych_contrast.state import CrossBatchMemory as CrossBatchMemory
from diptych_contrast.state import KeyQueue as KeyQueue
from diptych_contrast.state import MomentumEncoder as MomentumEncoder
from diptych_contrast.state import Temperature as Temperature
from diptych_contrast.state import cosine_momentum as cosine_momentum
from diptych_contrast.testing import gaussian_pairs as gaussian_pairs
from diptych_contrast.testing import hypersphere as hypersphere
