"""The graph that leaves a run, and the item vectors beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from diptych.contract import Exportable, Trained
from diptych.errors import UsageError
from diptych.files import write_json
from diptych.findings import Findings
from diptych.folders import write_folder
from diptych.prepared import Prepared
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.serve import Recommender, open_recommender, stored_histories
from diptych_mclrec.verbs import ItemsOptions
from diptych_mclrec.windows import StepTable

if TYPE_CHECKING:
    from diptych_mclrec.model import SequenceEncoder

EXAMPLES = 256  # histories on which the graph has to agree with the network
NEAR_TIE = 1e-3  # scores this close may change places in the last bits
ITEMS, TABLE, ABOUT = "items.npy", "items.parquet", "items.json"


class RankingGraph(nn.Module):
    """Histories of any length to what is asked for; the last steps are cut out inside.

    Args:
        encoder: The sequence encoder.
        size: Items of the catalogue.
        what: "vector", "scores" or "topk".
        k: Items of a list.
        mask: Whether items of the history are left out of a list.
    """

    def __init__(
        self, encoder: SequenceEncoder, size: int, what: str, k: int = 10, mask: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.size, self.what = encoder, size, what
        self.k, self.mask = min(k, size), mask

    def forward(
        self, items: Int[Tensor, "B L ..."], lengths: Int[Tensor, " B"]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rank.

        Args:
            items: Catalogue ids 1..I from the left, oldest first, 0 behind them; for a model of
                baskets (B, L, M).
            lengths: Steps of each history, at least 1.

        Returns:
            "vector": (B, H). "scores": (B, I), column j is the item of id j + 1. "topk": ids and
            scores, (B, k) each.
        """
        h = self.encoder(*self._window(items, lengths), hidden=False)
        if self.what == "vector":
            vector: Tensor = h
            return vector
        scores: Tensor = h @ self.encoder.item_weight()[1 : self.size + 1].t()
        if self.what == "scores":
            return scores
        if self.mask:
            inside = torch.arange(items.shape[1], device=items.device) < lengths[:, None]
            inside = inside.reshape(*inside.shape, *(1,) * (items.dim() - 2))
            seen = torch.where(inside, items, 0).flatten(1)
            nothing = scores.new_zeros(scores.shape[0], 1)
            whole = torch.cat([nothing, scores], 1).scatter(1, seen, float("-inf"))
            scores = whole[:, 1:]
        best, columns = scores.topk(self.k, dim=1)
        return columns + 1, best

    def _window(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The last steps, always as many columns as the encoder has positions."""
        most = self.encoder.max_len
        columns = torch.arange(most, device=items.device)
        kept = lengths.clamp(max=most)
        source = columns + (lengths - kept)[:, None]
        inside = columns < kept[:, None]
        rows = torch.arange(items.shape[0], device=items.device)[:, None]
        taken = items[rows, source.clamp(max=items.shape[1] - 1)]
        inside = inside.reshape(*inside.shape, *(1,) * (items.dim() - 2))
        return torch.where(inside, taken, 0), kept


def export(
    config: MCLRecConfig, trained: Trained, prepared: Prepared | None
) -> Mapping[str, Exportable]:
    """The graph of ``export.what`` for another program.

    Args:
        config: The run's configuration.
        trained: The run's fits.
        prepared: The run's data, up to 256 histories of which check the export; without them
            random histories do.

    Returns:
        One part by the name of ``export.what``; any number of histories of any length.
    """
    recommender = open_recommender(config, trained)
    what = config.export.what
    size = recommender.fitted.catalogue.size
    mask = recommender.fitted.seen == "mask"
    graph = RankingGraph(recommender.encoder, size, what, config.export.k, mask).eval().cpu()
    items, lengths = _examples(recommender, prepared)
    if what == "topk":
        clear = _clearly_ranked(graph, items, lengths)
        items, lengths = items[clear], lengths[clear]
    axes = {0: "batch", 1: "steps"} | ({2: "members"} if items.ndim == 3 else {})
    return {
        what: Exportable(
            module=graph,
            examples={"items": items, "lengths": lengths},
            outputs=("ids", "scores") if what == "topk" else (what,),
            dynamic_axes={"items": axes, "lengths": {0: "batch"}},
        )
    }


def export_items(config: MCLRecConfig, trained: Trained, options: ItemsOptions) -> Findings:
    """Write the item vectors for an index of nearest neighbours.

    Args:
        config: The run's configuration.
        trained: The run's fits.
        options: The folder, which must not exist.

    Raises:
        UsageError: It exists.
    """
    if options.out.exists():
        raise UsageError(f"{options.out}: exists: choose another --out")
    write_items(open_recommender(config, trained), options.out)
    return Findings()


def write_items(recommender: Recommender, folder: Path) -> None:
    """Write ``items.npy`` (I, H), ``items.parquet`` with one row for each of its rows, and facts.

    The product of a row with a history's vector (``export.what=vector``) is the item's score.

    Args:
        recommender: The model.
        folder: Replaced whole.
    """
    catalogue = recommender.fitted.catalogue
    matrix = recommender.weight()[1:].cpu().numpy()
    table = catalogue.to_table().with_row_index("id", offset=1)

    def write(target: Path) -> None:
        np.save(target / ITEMS, matrix, allow_pickle=False)
        table.write_parquet(target / TABLE)
        write_json(target / ABOUT, {"catalogue": catalogue.hash, "items": catalogue.size})

    write_folder(folder, write)


def _examples(
    recommender: Recommender, prepared: Prepared | None
) -> tuple[Int[Tensor, "S L ..."], Int[Tensor, " S"]]:
    """Histories for the check: of the run's data, else drawn; all lengths, beyond the window."""
    rng = np.random.default_rng(0)
    size, most = recommender.fitted.catalogue.size, recommender.encoder.max_len
    sequences = None if prepared is None else stored_histories(recommender.fitted, prepared)
    if sequences is None or not len(sequences.items):
        lengths = rng.integers(1, most + 8, EXAMPLES)
        lists = [rng.integers(1, size + 1, length).tolist() for length in lengths]
        sequences = Sequences.from_lists(lists)
        if recommender.fitted.baskets:
            pairs = (sequences.steps // 2).astype(np.int32)
            sequences = Sequences(
                sequences.subjects, sequences.offsets, sequences.items, None, pairs
            )
    counts = sequences.step_counts
    rows: NDArray[np.int64] = np.flatnonzero(counts)
    if len(rows) > EXAMPLES:
        rows = np.sort(rng.choice(rows, EXAMPLES, replace=False))
    table = StepTable.of(sequences)
    items = table.matrix(table.steps[rows], table.steps[rows + 1])
    return torch.from_numpy(items), torch.from_numpy(counts[rows])


@torch.no_grad()
def _clearly_ranked(graph: RankingGraph, items: Tensor, lengths: Tensor) -> Tensor:
    """Rows whose list could not change by the last bits of a score; all where none is so."""
    _, scores = RankingGraph(graph.encoder, graph.size, "topk", graph.k + 1, graph.mask)(
        items, lengths
    )
    gaps: Float[Tensor, "S k"] = scores[:, :-1] - scores[:, 1:]
    clear = (gaps > NEAR_TIE).all(1) & scores.isfinite().all(1)
    return clear if bool(clear.any()) else torch.ones_like(clear)
