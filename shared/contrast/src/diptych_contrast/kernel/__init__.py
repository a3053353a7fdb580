"""The pair kernel: exact sums over all pairs, tile by tile, in memory O((n + m) d).

Read in this order: `masks` (which pairs count), `tiles` (the forward sweep), `backward` (first and
second derivatives), `autograd` (the sweep as a differentiable function), `ring` (columns on several
processes), `sums` (functions of the scores), `api` and `extremes` (what is called).
"""

from diptych_contrast.errors import ContrastInputError, ContrastWarning
from diptych_contrast.kernel.api import Backend, Engine, check_engine, log_sums, pair_lse
from diptych_contrast.kernel.extremes import pair_expect, pair_max
from diptych_contrast.kernel.masks import PairMask
from diptych_contrast.kernel.normalize import unit_rows
from diptych_contrast.kernel.sums import pair_sum
from diptych_contrast.kernel.tiles import default_tile
from diptych_contrast.statistics import PairInfo

__all__ = [
    "Backend",
    "ContrastInputError",
    "ContrastWarning",
    "Engine",
    "PairInfo",
    "PairMask",
    "check_engine",
    "default_tile",
    "log_sums",
    "pair_expect",
    "pair_lse",
    "pair_max",
    "pair_sum",
    "unit_rows",
]
