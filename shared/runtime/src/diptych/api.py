"""The command line's way in Python: the same steps, exceptions instead of exit codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych import installed, verbs
from diptych.config import default_recipe, load, merge
from diptych.contract import Pipeline
from diptych.findings import Findings
from diptych.log import messages
from diptych.run import open_folder, stored_config

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import nn


@dataclass(frozen=True)
class Run:
    """A trained run.

    Args:
        path: The run folder.
        pipeline: Whose run it is.
    """

    path: Path
    pipeline: Pipeline

    @property
    def config(self) -> BaseModel:
        """The configuration that reproduces the run."""
        config: BaseModel = stored_config(open_folder(self.path), self.pipeline)
        return config

    @property
    def results(self) -> dict[str, Any]:
        """The content of ``evaluation/results.json``."""
        from diptych.results import read_results

        return read_results(self.path / "evaluation")

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.path / "report.html"

    @property
    def model(self) -> Mapping[str, nn.Module]:
        """The modules that predict, by name, in evaluation mode."""
        trained = verbs.open_model(self.pipeline, self.path, (), section="predict")
        return trained.modules(trained.final)

    def predict(
        self, source: Path | str, out: Path | str, overrides: Mapping[str, Any] | None = None
    ) -> Findings:
        """Predict for a new file or folder.

        Args:
            source: The input.
            out: File or folder for the predictions; must not exist.
            overrides: Values by dotted key of ``predict``, ``run`` and other free fields.
        """
        return verbs.predict(self.pipeline, self.path, Path(source), Path(out), _sets(overrides))


def train(
    pipeline: Pipeline | str,
    data: Path | str,
    out: Path | str,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    init: str | None = None,
    resume: bool = False,
) -> Run:
    """Check, prepare, train, evaluate and report.

    Args:
        pipeline: A pipeline or the name of an installed one.
        data: Raw data or a prepared folder.
        out: The run folder; must not exist unless ``resume``.
        recipe: Name of a recipe; None for the pipeline's ``fast``.
        overrides: Values by dotted key, over the recipe's.
        init: RUN, RUN:FIT or a file of published weights to start from.
        resume: Go on with an interrupted run.

    Raises:
        DiptychError: What stops it, with words on what to do.

    Example:
        ``diptych.train("mvcnet", "recordings", "runs/a", overrides={"train.epochs": 10})``
    """
    chosen = installed.load(pipeline) if isinstance(pipeline, str) else pipeline
    path = Path(out)
    config = None
    if not (resume and recipe is None and not overrides):
        config = load(chosen.config, recipe=recipe or default_recipe(chosen.config))
        config = merge(config, overrides or {})
    with messages(lambda: path):
        verbs.train(
            chosen,
            Path(data),
            path,
            config,
            init=init,
            resume=resume,
            command=" ".join(["diptych", chosen.name, "train DATA --out RUN --config CONFIG"]),
        )
    return Run(path, chosen)


def open_run(path: Path | str, pipeline: Pipeline | None = None) -> Run:
    """Open a run folder, perhaps from another machine.

    Args:
        path: The run folder.
        pipeline: Whose run it is; None finds the installed pipeline by the run's own word.

    Raises:
        UsageError: It is no run folder, or its pipeline is not installed.
    """
    folder = open_folder(Path(path))
    if pipeline is None:
        name = json.loads((folder.path / "run.json").read_text(encoding="utf-8"))["pipeline"]
        pipeline = installed.load(name)
    return Run(folder.path, pipeline)


def _sets(overrides: Mapping[str, Any] | None) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
