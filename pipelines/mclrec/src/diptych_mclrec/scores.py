"""Scores of all items for steps to predict -> ranks under both policies for seen items.

Scores are computed for a number of steps at a time that bounds the memory, and nothing but ranks
and the head of each list is kept. A target and its competitors come from one product, so that
equal vectors tie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from diptych.randomness import Draw
from diptych_mclrec.config import RankingSection
from diptych_mclrec.fitting import Fitted, Policy
from diptych_mclrec.metrics import Counts, Ties, count_ranks, tiled_counts
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.queries import MISS, Queries
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.windows import encode_histories

CELLS = 1 << 24  # scores that are held at a time
MOST_ROWS = 4096
HEAD = 10  # items of the lists whose coverage and novelty are reported
Scores = Tensor | NDArray[np.float64]
Scorer = Callable[[Queries], Scores]  # scores of all items, column 0 for none


class _Counting(Protocol):
    def scores(self, histories: Sequences) -> NDArray[np.float64]: ...


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a method made of steps to predict.

    Args:
        kept: Rank of each target among all items, NaN where there is none, (Q, G).
        masked: The same without the items of the history; NaN for targets that are among them.
        repeated: Which targets are in the history, (Q, G).
        head: The best ids under the policy, best first, 0 where there are fewer, (Q, 10).
        confidence: Probability of the first of them by softmax of the scores, (Q,).
        tied: Steps in which another item has a target's score.
        sampled: Rank among ``evaluate.sampled_negatives`` random items; None without.
    """

    kept: Float[np.ndarray, "Q G"]
    masked: Float[np.ndarray, "Q G"]
    repeated: Bool[np.ndarray, "Q G"]
    head: Int[np.ndarray, "Q head"]
    confidence: Float[np.ndarray, " Q"]
    tied: int
    sampled: Float[np.ndarray, "Q G"] | None = None

    def under(self, policy: Policy) -> Float[np.ndarray, "Q G"]:
        """The ranks of a policy."""
        return self.masked if policy == "mask" else self.kept


def network_scorer(encoder: SequenceEncoder, fitted: Fitted) -> Scorer:
    """Scores by an encoder; by popularity where nothing of the history is known.

    Args:
        encoder: In evaluation mode.
        fitted: Of its fit.
    """

    @torch.no_grad()
    def scores(queries: Queries) -> Tensor:
        counts = torch.as_tensor(fitted.counts, dtype=torch.float32)
        found = counts.repeat(len(queries), 1)
        has = np.flatnonzero(queries.ends > 0)
        if len(has):
            h = encode_histories(encoder, queries.table, queries.subject[has], queries.ends[has])
            found[torch.as_tensor(has)] = encoder.scores(h).float().cpu()
        return found

    return scores


def baseline_scorer(baseline: _Counting) -> Scorer:
    """Scores by a fitted baseline."""
    return lambda queries: baseline.scores(queries.histories())


@torch.no_grad()
def rank_all(
    scorer: Scorer,
    queries: Queries,
    settings: RankingSection,
    policy: Policy,
    n_items: int,
    draw: Draw | None = None,
) -> Ranked:
    """Ranks of all targets.

    Args:
        scorer: A method.
        queries: Steps to predict, at least one.
        settings: Ties and sampled metrics.
        policy: Whose lists are looked at.
        n_items: Items I.
        draw: Of the random items of sampled metrics; None: there are none.

    Raises:
        TrainingError: A score is not a number.
    """
    rows = max(1, min(MOST_ROWS, CELLS // (n_items + 1)))
    parts = []
    for start in range(0, len(queries), rows):
        part = queries.select(np.arange(start, min(start + rows, len(queries))))
        ids = np.arange(start, start + len(part))
        parts.append(_rank_part(scorer, part, settings, policy, draw, ids))

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    return Ranked(
        joined("kept"),
        joined("masked"),
        joined("repeated"),
        joined("head"),
        joined("confidence"),
        sum(part.tied for part in parts),
        None if parts[0].sampled is None else joined("sampled"),
    )


def _rank_part(
    scorer: Scorer,
    part: Queries,
    settings: RankingSection,
    policy: Policy,
    draw: Draw | None,
    ids: NDArray[np.int64],
) -> Ranked:
    scores = torch.as_tensor(scorer(part))
    histories = part.histories()
    repeated = part.repeated(histories)
    known = np.maximum(part.targets, 0)
    counts = count_ranks(scores, known)
    own = [histories[row] for row in range(len(part))]
    new = count_ranks(scores, np.where(repeated, 0, known), exclude=own)
    sampled = None
    if draw is not None and settings.sampled_negatives:
        sampled = _sampled(scores, known, settings, draw, ids)
        sampled = np.where(part.targets == MISS, settings.sampled_negatives + 1, sampled)
    scores = scores.clone()
    scores[:, 0] = -torch.inf
    if policy == "mask":
        scores[
            torch.as_tensor(histories.rows), torch.as_tensor(histories.items).long()
        ] = -torch.inf
    values, head = scores.topk(min(HEAD, scores.shape[1] - 1), dim=1)
    probability = (values[:, 0] - scores.logsumexp(1)).exp()
    size = scores.shape[1] - 1
    return Ranked(
        _with_misses(counts, part, settings.ties, size),
        _with_misses(new, part, settings.ties, size),
        repeated,
        head.masked_fill(values == -torch.inf, 0).numpy(),
        probability.double().numpy(),
        int((counts.equal > 0).any(1).sum()),
        sampled,
    )


def _with_misses(counts: Counts, part: Queries, ties: Ties, size: int) -> NDArray[np.float64]:
    """Ranks; a target outside the catalogue comes after everything in it."""
    return np.where(part.targets == MISS, size + 1.0, counts.ranks(ties))


def _sampled(
    scores: Tensor,
    targets: NDArray[np.int64],
    settings: RankingSection,
    draw: Draw,
    ids: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Ranks among random items, as some papers report them."""
    count, size = settings.sampled_negatives, scores.shape[1] - 1
    chosen = torch.as_tensor(draw.of("sampled").integers(ids, count, size) + 1)
    others = scores.gather(1, chosen)
    ranks = np.full(targets.shape, np.nan)
    share = {"pessimistic": 1.0, "optimistic": 0.0, "average": 0.5}[settings.ties]
    for column in range(targets.shape[1]):
        wanted = torch.as_tensor(targets[:, column])
        own = scores.gather(1, wanted[:, None])
        other = chosen != wanted[:, None]
        greater = ((others > own) & other).sum(1)
        equal = ((others == own) & other).sum(1)
        found = (1 + greater + share * equal).double().numpy()
        ranks[:, column] = np.where(targets[:, column] > 0, found, np.nan)
    return ranks


@torch.no_grad()
def validation_ranks(
    encoder: SequenceEncoder,
    queries: Queries,
    fitted: Fitted,
    settings: RankingSection,
) -> tuple[Float[np.ndarray, "V G"], Int[np.ndarray, " V"]]:
    """Ranks of the targets of validation, by tiles of items, under the fit's policy.

    Steps whose history the encoder cannot read, or whose targets the policy leaves out, are left
    out.

    Args:
        encoder: In evaluation mode.
        queries: Steps of the validation part.
        fitted: Of the fit.
        settings: Policy, ties and tile.

    Returns:
        Ranks of the steps that are left, with NaN for no target; and their subjects.
    """
    part = queries.select(queries.ends > 0)
    histories = part.histories()
    targets, seen = np.maximum(part.targets, 0), None
    if fitted.policy(settings.seen) == "mask":
        targets = np.where(part.repeated(histories), 0, targets)
        seen = [histories[row] for row in range(len(part))]
    h = encode_histories(encoder, part.table, part.subject, part.ends)
    counts = tiled_counts(h, encoder.item_weight(), targets, seen=seen, tile=settings.tile)
    ranks = _with_misses(counts, part, settings.ties, fitted.catalogue.size)
    left = ~np.isnan(ranks).all(1)
    return ranks[left], part.subject[left]
