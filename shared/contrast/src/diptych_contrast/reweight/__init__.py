"""Losses that weigh their pairs: by distance, learned temperature, mixing, gates of classes."""

from diptych_contrast.reweight.amcl import PairTemperature, amcl
from diptych_contrast.reweight.arbitrary_pairs import PairGate, arbitrary_pairs, sample_partners
from diptych_contrast.reweight.cacr import cacr
from diptych_contrast.reweight.feature_transform import feature_transform

__all__ = [
    "PairGate",
    "PairTemperature",
    "amcl",
    "arbitrary_pairs",
    "cacr",
    "feature_transform",
    "sample_partners",
]
