"""Margins and matching: triplets, ranking of two modalities, boosting, label guidance."""

from diptych_contrast.matching.boost import birank as birank
from diptych_contrast.matching.boost import boost_abs as boost_abs
from diptych_contrast.matching.boost import boost_kl as boost_kl
from diptych_contrast.matching.boost import boost_pro as boost_pro
from diptych_contrast.matching.boost import boost_rel as boost_rel
from diptych_contrast.matching.labels import label_guided as label_guided
from diptych_contrast.matching.labels import triplet as triplet
