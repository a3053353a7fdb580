"""Margins and matching: triplets, ranking of two modalities, boosting, label guidance."""

from diptych_contrast.matching.boost import birank, boost_abs, boost_kl, boost_pro, boost_rel
from diptych_contrast.matching.label_guided import label_guided
from diptych_contrast.matching.triplet import triplet

__all__ = [
    "birank",
    "boost_abs",
    "boost_kl",
    "boost_pro",
    "boost_rel",
    "label_guided",
    "triplet",
]
