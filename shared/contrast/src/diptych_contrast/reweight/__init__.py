"""Losses that weigh their pairs: by distance, learned temperature, mixing, gates of classes."""

from diptych_contrast.reweight.amcl import PairTemperature as PairTemperature
from diptych_contrast.reweight.amcl import amcl as amcl
from diptych_contrast.reweight.arbitrary_pairs import PairGate as PairGate
from diptych_contrast.reweight.arbitrary_pairs import arbitrary_pairs as arbitrary_pairs
from diptych_contrast.reweight.arbitrary_pairs import sample_partners as sample_partners
from diptych_contrast.reweight.cacr import cacr as cacr
from diptych_contrast.reweight.cacr import feature_transform as feature_transform
