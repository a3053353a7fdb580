"""The pair kernel: exact sums over all pairs, tile by tile, in memory O((n + m) d).

Read in this order: `masks` (which pairs count), `tiles` (the forward sweep), `backward` (first and
second derivatives), `autograd` (the sweep as a differentiable function), `ring` (columns on several
processes), `sums` (functions of the scores), `api` and `extremes` (what is called).
"""

from diptych_contrast.errors import ContrastInputError as ContrastInputError
from diptych_contrast.errors import ContrastWarning as ContrastWarning
from diptych_contrast.kernel.api import Backend as Backend
from diptych_contrast.kernel.api import Engine as Engine
from diptych_contrast.kernel.api import check_engine as check_engine
from diptych_contrast.kernel.api import log_sums as log_sums
from diptych_contrast.kernel.api import pair_lse as pair_lse
from diptych_contrast.kernel.call import products as products
from diptych_contrast.kernel.extremes import pair_expect as pair_expect
from diptych_contrast.kernel.extremes import pair_max as pair_max
from diptych_contrast.kernel.masks import PairMask as PairMask
from diptych_contrast.kernel.normalize import unit_rows as unit_rows
from diptych_contrast.kernel.sums import pair_sum as pair_sum
from diptych_contrast.kernel.tiles import default_tile as default_tile
from diptych_contrast.statistics import PairInfo as PairInfo
