"""Losses that weigh their pairs: by distance, learned temperature, mixing, gates of classes."""

from diptych_contrast.reweight.cacr import cacr as cacr
from diptych_contrast.reweight.cacr import feature_transform as feature_transform
from diptych_contrast.reweight.learned import PairGate as PairGate
from diptych_contrast.reweight.learned import PairTemperature as PairTemperature
from diptych_contrast.reweight.learned import amcl as amcl
from diptych_contrast.reweight.learned import arbitrary_pairs as arbitrary_pairs
from diptych_contrast.reweight.learned import sample_partners as sample_partners
