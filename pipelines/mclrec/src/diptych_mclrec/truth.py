"""The generated sample: the best possible scores are known, and those measured must fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import polars as pl
from jaxtyping import Float

from diptych.findings import Finding
from diptych_mclrec.baselines import Markov1
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import Fitted
from diptych_mclrec.queries import Queries
from diptych_mclrec.sample import Demo, bayes_scores, make_demo
from diptych_mclrec.scores import Ranked, baseline_scorer, rank_all
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.tables import Scored, rows

if TYPE_CHECKING:
    from diptych.prepared import Prepared

BEST = "best possible"  # name of the table
BAND = {"ndcg@10": (0.43, 0.52), "hr@10": (0.70, 0.80)}
NOT_CREDIBLE = 2.0  # standard errors above the best possible


class _Part(Protocol):
    @property
    def fitted(self) -> Fitted: ...

    @property
    def queries(self) -> Queries: ...

    @property
    def train(self) -> Sequences | None: ...


@dataclass(frozen=True)
class Judgement:
    """What the truth says about the scores; empty for data that were not generated."""

    rows: tuple[pl.DataFrame, ...] = ()
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def judged(
    config: MCLRecConfig, prepared: Prepared, tested: _Part, scored: Sequence[Scored]
) -> Judgement:
    """The best possible ranking beside the measured ones.

    Args:
        config: The run's configuration.
        prepared: Its fact "generated" holds the seed of the sample.
        tested: The test part.
        scored: Ranks of the model and of the trained baselines.

    Returns:
        A table with the model and the predictor that knows everything; the share of the gap
        between markov1 and it that the model closes; an error where the scores cannot be right.
    """
    seed = prepared.facts.get("generated")
    if seed is None or tested.train is None or not scored:
        return Judgement()
    demo = make_demo(int(seed))
    fitted, queries = tested.fitted, tested.queries

    def ranks_of(method: object) -> Ranked:
        return rank_all(
            baseline_scorer(method),  # type: ignore[arg-type]  # has scores(histories)
            queries,
            config.evaluate,
            "keep",
            fitted.catalogue.size,
        )

    best = ranks_of(_Bayes(demo, fitted))
    markov = ranks_of(Markov1().fit(tested.train, n_items=fitted.catalogue.size))
    model = next(one for one in scored if not one.method)
    sasrec = next((one for one in scored if one.method), None)
    perfect = Scored("bayes", model.seed, queries, best, fitted, "keep", model.ks)
    means = {
        "model": _means(model.ranked.kept),
        "bayes": _means(best.kept),
        "markov1": _means(markov.kept),
    }
    table = [
        rows(perfect),
        rows(Scored("", model.seed, queries, model.ranked, fitted, "keep", model.ks)),
    ]
    return Judgement(
        tuple(one.filter(pl.col("table") == "").with_columns(table=pl.lit(BEST)) for one in table),
        (*_notes(means), *_beside(means["model"], sasrec)),
        findings(means, len(queries)),
    )


@dataclass(frozen=True, eq=False)
class _Bayes:
    """The generator's own predictor in the ids of a catalogue."""

    demo: Demo
    fitted: Fitted

    def scores(self, histories: Sequences) -> Float[np.ndarray, "S items"]:
        own = np.r_[0, [int(name.split("-")[1]) + 1 for name in self.fitted.catalogue.names]]
        found = bayes_scores(histories.with_items(own[histories.items]), self.demo)
        return found[:, own]


def _means(ranks: Float[np.ndarray, "Q 1"]) -> dict[str, float]:
    first = ranks[:, 0]
    hit = first <= 10
    return {"hr@10": float(hit.mean()), "ndcg@10": float((hit / np.log2(first + 1)).mean())}


def _notes(means: dict[str, dict[str, float]]) -> list[str]:
    ndcg = {name: values["ndcg@10"] for name, values in means.items()}
    gap = (ndcg["model"] - ndcg["markov1"]) / (ndcg["bayes"] - ndcg["markov1"])
    return [
        f"bayes_ndcg@10={ndcg['bayes']:.4f}",
        f"gap_share={gap:.3f}",
        f"Generated sample: the best prediction that knows how it was made has NDCG@10 "
        f"{ndcg['bayes']:.3f} and HR@10 {means['bayes']['hr@10']:.3f}, counting neighbours "
        f"(markov1) {ndcg['markov1']:.3f} and {means['markov1']['hr@10']:.3f}; of the gap between "
        f"them the model closes {gap:.0%}.",
    ]


def _beside(model: dict[str, float], sasrec: Scored | None) -> list[str]:
    if sasrec is None:
        return []
    other = _means(sasrec.ranked.kept)["ndcg@10"]
    words = "not better" if model["ndcg@10"] <= other else "no more than a hair better"
    return [
        f"On this sample MCLRec is {words} than the same encoder without contrast (SASRec: NDCG@10 "
        f"{other:.3f}, MCLRec {model['ndcg@10']:.3f}): the demo shows that the way works, not that "
        "contrast pays."
    ]


def findings(means: Mapping[str, Mapping[str, float]], steps: int) -> tuple[Finding, ...]:
    """Errors where a score cannot be right.

    Args:
        means: "hr@10" and "ndcg@10" of "model", "bayes" and "markov1".
        steps: Steps that were scored.
    """
    model, bayes = means["model"], means["bayes"]
    fix = "the installation is suspect: compare the versions that 'diptych doctor' lists"
    problems = [
        f"{metric} of the model is {model[metric]:.3f}, outside {low:g}-{high:g}"
        for metric, (low, high) in BAND.items()
        if not low <= model[metric] <= high
    ]
    error = (bayes["hr@10"] * (1 - bayes["hr@10"]) / max(steps, 1)) ** 0.5
    if model["hr@10"] > bayes["hr@10"] + NOT_CREDIBLE * error:
        problems.append(
            f"HR@10 {model['hr@10']:.3f} is above the best possible {bayes['hr@10']:.3f}: tested "
            "events have leaked into training"
        )
    if model["ndcg@10"] <= means["markov1"]["ndcg@10"]:
        problems.append("the model ranks no better than counting neighbours: it learnt nothing")
    where = "generated sample"
    return tuple(Finding("error", "sample.ranking", where, text, fix) for text in problems)
