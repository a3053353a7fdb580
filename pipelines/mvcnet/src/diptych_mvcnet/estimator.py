"""MVCNet as a scikit-learn classifier over arrays of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import numpy as np
import polars as pl
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import unique_labels
from sklearn.utils.validation import check_is_fitted

from diptych import loop
from diptych.config import load, merge
from diptych.contract import Fit, Task
from diptych.prepared import Prepared
from diptych.randomness import isolated_globals, seed_globals
from diptych.split import Split
from diptych_mvcnet.align import align_test
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.evaluate import probabilities
from diptych_mvcnet.task import MODEL, build, modules

SESSION = "1"


class MVCNetClassifier(ClassifierMixin, BaseEstimator):
    """MVCNet for band-passed trials, in ``cross_val_score`` and in pipelines.

    ``fit`` aligns the trials of each group by themselves. Prediction knows no groups: after a fit
    without groups it uses the reference of the training trials; after one with groups, which are
    people, the trials of a call count as one new person's, in their order, and are aligned online
    (``align.test`` "online"; or "block", by their own mean covariance).

    Args:
        sfreq: Sampling rate of the trials in hertz.
        ch_names: Electrode names; None numbers the channels, and the view ``reflect`` is left out.
        recipe: Name of a recipe.
        overrides: Values over the recipe's, by dotted key.
        seed: Seed of initialisation, order and dropout.

    Example:
        >>> MVCNetClassifier(100.0, ["C3", "Cz", "C4"], overrides={"train.epochs": 5})
        MVCNetClassifier(...)
    """

    def __init__(
        self,
        sfreq: float,
        ch_names: Sequence[str] | None = None,
        *,
        recipe: str = "fast",
        overrides: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.sfreq = sfreq
        self.ch_names = ch_names
        self.recipe = recipe
        self.overrides = overrides
        self.seed = seed

    def fit(
        self,
        X: Float[np.ndarray, "n c t"],
        y: np.ndarray,
        groups: np.ndarray | None = None,
    ) -> Self:
        """Train on trials.

        Args:
            X: Trials in microvolt, band-passed.
            y: Labels of any kind, at least two classes.
            groups: Subject (or session) of each trial, for the alignment; None is one group.

        Returns:
            The fitted classifier.

        Raises:
            ValueError: Shapes disagree, a value is not finite, or there is one class only.
        """
        x = self._checked(X)
        labels = np.asarray(y)
        self.classes_ = unique_labels(labels)
        if len(labels) != len(x) or len(self.classes_) < 2:
            raise ValueError(
                f"{len(x)} trials, {len(labels)} labels of {len(self.classes_)} class(es): give "
                "one label a trial and at least two classes"
            )
        self.n_features_in_ = x.shape[1]
        self.config_ = self._config(strangers=groups is not None)
        prepared = self._prepared(x, np.searchsorted(self.classes_, labels), groups)
        fit = Fit("final", Split(tuple(range(len(x)))), self.seed)
        with isolated_globals():
            seed_globals(self.seed, fit.stage, 0, 0)
            self.modules_ = modules(self.config_, prepared.facts, fit)
        task = build(self.config_, prepared, fit, self.modules_, {})
        # There is no validation part: the weights after the last epoch are kept.
        section = self.config_.train.model_copy(update={"metric": None, "patience": None})
        settings = loop.Settings(section, self.config_.run, self.seed)
        loop.fit(cast("Task", task), settings)
        self.references_ = task.artifacts()["alignment"]
        return self

    def predict_proba(self, X: Float[np.ndarray, "n c t"]) -> Float[np.ndarray, "n k"]:
        """Class probabilities.

        Args:
            X: Trials as in ``fit``.

        Returns:
            One row a trial, in the order of ``classes_``.
        """
        check_is_fitted(self)
        x = self._checked(X)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(f"{x.shape[1]} channels, trained on {self.n_features_in_}")
        subject = "1" if self.config_.align.test == "train" else None
        aligned = align_test(x, subject, SESSION, self.references_, self.config_)
        return probabilities(self.modules_[MODEL], aligned)

    def predict(self, X: Float[np.ndarray, "n c t"]) -> np.ndarray:
        """The most probable class of each trial."""
        best = self.predict_proba(X).argmax(axis=1)
        chosen: np.ndarray = self.classes_[best]
        return chosen

    def _config(self, *, strangers: bool) -> MVCNetConfig:
        config = merge(load(MVCNetConfig, recipe=self.recipe), self.overrides or {})
        mirrored = {*config.data.class_mirror, *config.data.class_mirror.values()}
        decided: dict[str, Any] = {"split.kind": "loso" if strangers else "co"}
        if config.align.test == "auto":
            decided["align.test"] = "online" if strangers else "train"
        if self.ch_names is None or not mirrored & set(map(str, self.classes_)):
            decided["views.use"] = [name for name in config.views.use if name != "reflect"]
        return merge(config, decided)

    def _prepared(self, x: np.ndarray, y: np.ndarray, groups: np.ndarray | None) -> Prepared:
        subject = ["1"] * len(x) if groups is None else [str(group) for group in groups]
        classes = [str(label) for label in self.classes_]
        mirror = {
            name: other
            for name, other in self.config_.data.class_mirror.items()
            if {name, other} <= set(classes)
        }
        facts = {
            "ch_names": self._names(x.shape[1]),
            "sfreq": float(self.sfreq),
            "n_times": x.shape[2],
            "classes": classes,
            "class_mirror": {**mirror, **{other: name for name, other in mirror.items()}},
        }
        index = pl.DataFrame({"subject": subject, "session": [SESSION] * len(x), "y": y})
        return Prepared.from_arrays(index, facts, {"epochs": x})

    def _names(self, n_channels: int) -> list[str]:
        if self.ch_names is None:
            return [f"channel {number}" for number in range(n_channels)]
        return list(self.ch_names)

    def _checked(self, X: Any) -> Float[np.ndarray, "n c t"]:
        x = np.asarray(X, dtype=np.float32)
        if x.ndim != 3 or not len(x):
            raise ValueError(f"X has shape {x.shape}: give (trials, channels, samples)")
        if self.ch_names is not None and len(self.ch_names) != x.shape[1]:
            raise ValueError(f"X has {x.shape[1]} channels, ch_names {len(self.ch_names)}")
        if not np.isfinite(x).all():
            raise ValueError("X holds NaN or infinity: leave these trials out")
        return x
