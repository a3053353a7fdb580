"""Rankings in three lines of Python: fit on histories or a table, recommend, score, embed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast

import numpy as np
import polars as pl
from jaxtyping import Float

from diptych import loop
from diptych.config import load, merge, resolve
from diptych.contract import Task
from diptych.prepared import Prepared, is_prepared
from diptych.randomness import isolated_globals, seed_globals
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import from_artifacts
from diptych_mclrec.histories import Given, list_table
from diptych_mclrec.metrics import ranking_metrics, tiled_ranks
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.plan import plan
from diptych_mclrec.prepare import prepare
from diptych_mclrec.sequences import EventTable, Sequences
from diptych_mclrec.serve import BATCH, Recommender, Seen, Session, stored_histories
from diptych_mclrec.task import build, modules
from diptych_mclrec.windows import StepTable

FINAL = "final"


class MCLRecRecommender:
    """MCLRec, or SASRec by ``objective={"kind": "sasrec"}``, without a run folder.

    It measures nothing beside :meth:`score`: `diptych mclrec train` gives the same model with
    baselines, statistics and a report.

    Args:
        recipe: Name of a recipe.
        seed: Seed of initialisation, order and views.
        **config: Sections over the recipe's, as in a configuration file.

    Example:
        ``MCLRecRecommender(train={"epochs": 5}).fit("ratings.csv").recommend([["tea"]], k=3)``
    """

    def __init__(self, recipe: str = "fast", seed: int = 0, **config: Any) -> None:
        self.recipe, self.seed, self.config = recipe, seed, config
        self._fitted: Recommender | None = None

    @classmethod
    def from_run(cls, path: Path | str) -> Self:
        """The model of a run, ready to recommend.

        Args:
            path: The run folder. Where it holds its prepared data, their subjects can be asked
                for by their pseudonyms.

        Raises:
            UsageError: It is no run folder, or has no final model yet.
        """
        from diptych.verbs import open_model
        from diptych_mclrec.pipeline import PIPELINE
        from diptych_mclrec.serve import open_recommender

        trained = open_model(PIPELINE, Path(path), (), section="predict")
        opened = open_recommender(trained.config, trained)
        own = Path(path) / "prepared"
        made = cls(seed=trained.config.run.seeds[0])
        known = stored_histories(opened.fitted, Prepared.open(own)) if is_prepared(own) else None
        made._fitted = Recommender(opened.encoder, opened.fitted, opened.config, known)
        return made

    def fit(self, X: Given, y: None = None) -> Self:
        """Train on histories.

        Args:
            X: A file or folder of events, a frame or an `EventTable` with one event a row, or
                lists of item names (or of baskets of names), one a subject.
            y: Not used.

        Returns:
            The fitted recommender. The split holds out what a run would hold out, for the choice
            of the best epoch; subjects are known by their place in lists, else by pseudonym.

        Raises:
            DataError: The findings of data that cannot be used.
        """
        config = self._config()
        if isinstance(X, EventTable):
            config = merge(config, {"data.kind": X.kind})
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            source, own = self._source(X, Path(folder))
            prepared = prepare(config, source, Path(folder) / "prepared")
            self._fitted = self._train(config, prepared, own)
        return self

    def recommend(
        self,
        X: Given,
        k: int = 10,
        seen: Seen = "auto",
        exclude: Iterable[str] | None = None,
        batch_size: int = BATCH,
    ) -> pl.DataFrame:
        """As :meth:`diptych_mclrec.serve.Recommender.recommend`."""
        return self.ready.recommend(X, k, seen, exclude, batch_size)

    def embed(self, X: Given) -> Float[np.ndarray, "S H"]:
        """As :meth:`diptych_mclrec.serve.Recommender.embed`."""
        return self.ready.embed(X)

    def explain(self, history: Any, item: str) -> pl.DataFrame:
        """As :meth:`diptych_mclrec.serve.Recommender.explain`."""
        return self.ready.explain(history, item)

    def open(self, history: Any = ()) -> Session:
        """As :meth:`diptych_mclrec.serve.Recommender.open`."""
        return self.ready.open(history)

    def score(self, X: Given, y: None = None) -> float:
        """NDCG@10 of each history's last step, from the steps before it.

        Args:
            X: As :meth:`recommend` takes it. Histories of fewer than two known steps are left
                out, and, where seen items are left out of rankings, repeated targets.
            y: Not used.

        Raises:
            ValueError: No history is long enough.
        """
        recommender = self.ready
        sequences = recommender.read(X).sequences
        scored = sequences.select(np.flatnonzero(sequences.step_counts > 1))
        history = scored.keep(scored.steps < (scored.step_counts - 1)[scored.rows])
        table = StepTable.of(scored)
        targets = table.sets(table.steps[1:] - 1)
        seen = None
        if recommender.fitted.seen == "mask":
            repeated = [
                bool(np.isin(targets[row], history[row]).any()) for row in range(len(scored))
            ]
            new = np.flatnonzero(~np.array(repeated, bool))
            history, targets = history.select(new), targets[new]
            seen = [history[row] for row in range(len(history))]
        if not len(history):
            raise ValueError("no history has two known steps: nothing can be scored")
        queries = recommender.vectors(history)
        ranks = tiled_ranks(queries, recommender.weight(), targets, seen=seen)
        return ranking_metrics(ranks, ks=(10,))["ndcg@10"]

    @property
    def ready(self) -> Recommender:
        """The fitted model.

        Raises:
            ValueError: It is not fitted.
        """
        if self._fitted is None:
            raise ValueError("this recommender is not fitted: call fit, or open a run by from_run")
        return self._fitted

    def _config(self) -> MCLRecConfig:
        loaded = load(MCLRecConfig, recipe=self.recipe)
        return merge(loaded, {**self.config, "run.seeds": [self.seed]})

    def _source(self, X: Given, folder: Path) -> tuple[Path, list[str] | None]:
        """What `prepare` reads, and the subjects' names where they are plain."""
        if isinstance(X, Path | str):
            return Path(X), None
        if isinstance(X, EventTable):
            columns = [one.name for one in X.frame if one.null_count() < len(one)]
            X = X.frame.select(columns).drop("row", "source")
        table = X if isinstance(X, pl.DataFrame) else list_table(X)
        path = folder / "events.parquet"
        table.write_parquet(path)
        return path, None if isinstance(X, pl.DataFrame) else table["subject"].unique(
            maintain_order=True
        ).to_list()

    def _train(
        self, config: MCLRecConfig, prepared: Prepared, own: list[str] | None
    ) -> Recommender:
        fit = next(one for one in plan(config, prepared) if one.name == FINAL)
        resolved = resolve(config, fit)
        with isolated_globals():
            seed_globals(fit.seed, fit.stage, 0, 0)
            built = modules(resolved, prepared.facts, fit)
        train = resolved.train
        if not fit.split.validation:
            train = train.model_copy(update={"metric": None, "patience": None})
        settings = loop.Settings(
            train,
            resolved.run,
            fit.seed,
            stage=fit.stage,
            facts=dict(prepared.facts),
            better="higher" if train.metric else None,
        )
        task = cast("Task", build(resolved, prepared, fit, built, {}))
        fitted = from_artifacts(loop.fit(task, settings).artifacts)
        encoder = built["encoder"].eval().requires_grad_(False)
        assert isinstance(encoder, SequenceEncoder)
        known = stored_histories(fitted, prepared)
        if own is not None:
            known = Sequences(
                np.asarray(own, dtype=np.str_), known.offsets, known.items, known.times,
                known.baskets,
            )  # fmt: skip
        return Recommender(encoder, fitted, config, known)
