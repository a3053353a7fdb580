"""How far two views of a history are apart, and how evenly vectors fill their sphere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from diptych.randomness import Draw
from diptych_contrast import alignment, uniformity
from diptych_mclrec.config import SequenceViewsSection
from diptych_mclrec.model import SequenceEncoder, encode_in_groups
from diptych_mclrec.queries import Queries
from diptych_mclrec.views import two_views

MEASURED = 1024  # histories whose views are looked at
GROUPS = 8
_SCHEMA = pl.Schema({"views": pl.String(), "alignment": pl.Float64(), "uniformity": pl.Float64()})


@torch.no_grad()
def view_geometry(
    modules: Mapping[str, nn.Module], queries: Queries, views: SequenceViewsSection
) -> pl.DataFrame:
    """Alignment and uniformity of two views of test histories (Wang and Isola, 2020).

    Args:
        modules: Of the fit; "augmenter_1" and "augmenter_2" where it has them.
        queries: The steps that were predicted.
        views: Ratios of the random views.

    Returns:
        views ("h" by crop, mask and reorder; "z" by the augmenters), alignment (0 is best),
        uniformity (lower is more even); none with fewer than two histories of two steps.
    """
    encoder = modules["encoder"]
    assert isinstance(encoder, SequenceEncoder)
    ends: NDArray[np.int64] = np.minimum(queries.ends, encoder.max_len)
    chosen = np.flatnonzero(ends > 1)[:MEASURED]
    if len(chosen) < 2:
        return pl.DataFrame(schema=_SCHEMA)
    last = queries.table.steps[queries.subject[chosen]] + queries.ends[chosen]
    items = queries.table.matrix(last - ends[chosen], last)
    ratios = {"crop": views.crop, "mask": views.mask, "reorder": views.reorder}
    found = two_views(items, ends[chosen], Draw(0, "evaluate"), ratios, ids=chosen)
    first, n1, second, n2 = (torch.from_numpy(one) for one in found)
    device = encoder.item_embedding.weight.device
    h1, h2 = (
        encode_in_groups(encoder, one.to(device), steps.to(device), GROUPS)
        for one, steps in ((first, n1), (second, n2))
    )
    pairs = {"h": (h1, h2)}
    if "augmenter_1" in modules:
        pairs["z"] = (modules["augmenter_1"](h1), modules["augmenter_2"](h2))
    rows = [
        {
            "views": name,
            "alignment": float(alignment(one, other)),
            "uniformity": (float(uniformity(one)) + float(uniformity(other))) / 2,
        }
        for name, (one, other) in pairs.items()
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)
