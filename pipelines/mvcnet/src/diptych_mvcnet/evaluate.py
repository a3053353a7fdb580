"""Predictions of every fit on its test trials, pooled over folds and scored subject by subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from diptych.contract import Evaluation, Facts, Fit, Trained
from diptych.findings import Finding, Findings
from diptych_mvcnet import baselines
from diptych_mvcnet.align import References
from diptych_mvcnet.artefacts import artefact_table, suspicion
from diptych_mvcnet.config import MVCNetConfig, align_test_mode
from diptych_mvcnet.metrics import chance_bound, trial_metrics
from diptych_mvcnet.parts import about, labels, scored_fits, testing_part, training_part, trials
from diptych_mvcnet.patterns import describe_network
from diptych_mvcnet.plan import INNER_STAGE
from diptych_mvcnet.scores import Predictions, score
from diptych_mvcnet.task import MODEL, decode

if TYPE_CHECKING:
    from torch import nn

    from diptych.prepared import Prepared

__all__ = ["chance_bound", "evaluate", "evaluate_baseline", "trial_metrics"]

BAYES_BAND = (0.75, 0.96)
ALIGNMENT = "alignment"  # name of the artifact with a fit's training references


def evaluate(config: MVCNetConfig, prepared: Prepared, trained: Trained) -> Evaluation:
    """Scores of MVCNet and of the trained baselines on the test parts of their fits.

    Args:
        config: The run's configuration.
        prepared: The data that the fits' splits index.
        trained: Finished fits.

    Returns:
        Rows and payload by method, what the network looks at, the check for artefacts, notes on
        alignment and protocol, and for the generated sample a finding where the accuracy is not
        credible.
    """
    predictions: dict[str, list[Predictions]] = {}
    scored = scored_fits(trained.fits, prepared.index)
    for fit in scored:
        references = trained.artifacts(fit.name)[ALIGNMENT]
        x = trials(prepared, fit.split.test)
        aligned = testing_part(config, prepared.index, fit, x, references)
        proba = probabilities(trained.modules(fit.name)[MODEL], aligned)
        predictions.setdefault(fit.method, []).append(Predictions(fit.split.test, proba, fit.seed))
    evaluations = [score(method, found, prepared) for method, found in predictions.items()]
    own = [fit for fit in scored if fit.method == "" and fit.seed == scored[0].seed]
    regions = artefact_table(config, prepared, [fit for fit in own if fit.split.train])
    files: dict[str, Any] = {"artefacts": regions}
    final = next((fit for fit in trained.fits if fit.name == trained.final), None)
    if final is not None and final.split.train:
        network = trained.modules(final.name)[MODEL]
        files["network"] = describe_network(config, prepared, final, network)
    for part in evaluations:
        files.update(part.files)
    rows = pl.concat([part.rows for part in evaluations])
    notes, bayes = _bayes(prepared.facts, rows)
    return Evaluation(
        rows=rows,
        payload={key: value for part in evaluations for key, value in part.payload.items()},
        files=files,
        notes=(*_notes(config, prepared, own), *notes),
        findings=Findings((*suspicion(regions), *bayes)),
    )


def evaluate_baseline(
    name: str, config: MVCNetConfig, prepared: Prepared, trained: Trained
) -> Evaluation:
    """Scores of a closed-form baseline on the splits of the network.

    Args:
        name: As in :func:`diptych_mvcnet.baselines.make_baseline`.
        config: The run's configuration.
        prepared: The data.
        trained: Finished fits of the network, whose splits are used.

    Returns:
        Rows and payload, in ``loso`` once more without alignment, and the fitted arrays of the
        fits that predict.
    """
    own = [fit for fit in trained.fits if fit.method == ""]
    seed = own[0].seed  # other seeds have the same splits
    scored = [fit for fit in scored_fits(own, prepared.index) if fit.seed == seed]
    found = [
        Predictions(fit.split.test, _tested(name, config, prepared, trained, fit), seed)
        for fit in scored
    ]
    parts = [score(name, found, prepared)]
    if config.split.kind == "loso" and config.align.train and all(f.split.train for f in scored):
        plain = config.align.model_copy(update={"train": False, "test": "none"})
        unaligned = config.model_copy(update={"align": plain})
        found = [
            Predictions(fit.split.test, _tested(name, unaligned, prepared, trained, fit), seed)
            for fit in scored
        ]
        parts.append(score(name, found, prepared, condition="no alignment"))
    finals = [fit for fit in own if fit.name.startswith("final") and fit.stage != INNER_STAGE]
    state = {
        fit.name: {"state": baselines.state_of(_fitted(name, config, prepared, fit)[0])}
        for fit in finals
        if fit.split.train
    }
    return Evaluation(
        rows=pl.concat([part.rows for part in parts]),
        payload={key: value for part in parts for key, value in part.payload.items()},
        artifacts={name: state} if state else {},
        files={key: value for part in parts for key, value in part.files.items()},
    )


def probabilities(network: nn.Module, x: Float[np.ndarray, "n c t"]) -> Float[np.ndarray, "n k"]:
    """Class probabilities of a network.

    Args:
        network: With ``decode``.
        x: Aligned trials.

    Returns:
        Softmax of the logits, in float64.
    """
    device = next(network.parameters()).device
    logits = decode(network, torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), device)
    proba: np.ndarray = logits.double().softmax(dim=-1).numpy()
    return proba


def _fitted(
    name: str, config: MVCNetConfig, prepared: Prepared, fit: Fit
) -> tuple[Any, References]:
    x = trials(prepared, fit.split.train)
    aligned, references = training_part(config, prepared.index, fit, x)
    y = labels(prepared, fit.split.train)
    settings = about(prepared.facts)
    return baselines.fit_baseline(name, aligned, y, **settings, seed=fit.seed), references


def _tested(
    name: str, config: MVCNetConfig, prepared: Prepared, trained: Trained, fit: Fit
) -> np.ndarray:
    """Probabilities of a baseline on a fit's test part; a final model's come from its artifacts."""
    if fit.split.train:
        estimator, references = _fitted(name, config, prepared, fit)
    else:
        references = trained.artifacts(fit.name)[ALIGNMENT]
        state = trained.artifacts(f"{name}/{fit.name}")["state"]
        estimator = baselines.restore(name, state, **about(trained.facts(fit.name)))
    x = trials(prepared, fit.split.test)
    aligned = testing_part(config, prepared.index, fit, x, references)
    return baselines.probabilities(estimator, aligned, len(prepared.facts["classes"]))


def _notes(config: MVCNetConfig, prepared: Prepared, fits: Sequence[Fit]) -> list[str]:
    mode = "double" if config.align.parity_double else align_test_mode(config)
    transductive = mode in {"block", "double"}
    notes = [
        f"alignment={mode}",
        f"transductive={str(transductive).lower()}",
        f"protocol={config.split.kind}",
    ]
    if transductive:
        notes.append(
            "Transductive: the alignment of a test session saw all of its trials (no labels)."
        )
    if config.align.train and mode == "none":
        notes.append(
            "Training trials were aligned and test trials were not: with align.test=none set "
            "align.train=false too."
        )
    if not config.evaluate.baselines:
        notes.append("Unanchored: no baseline was scored on the same splits.")
    rows = [row for fit in fits for row in fit.split.test]
    per_subject = prepared.index[rows].group_by("subject").len()["len"].to_numpy()
    if len(per_subject):
        error = float(np.sqrt(np.mean(0.25 / per_subject) / len(per_subject)))
        notes.append(
            f"The number of trials alone ({len(per_subject)} subjects, "
            f"{int(np.median(per_subject))} test trials each) gives the mean accuracy a standard "
            f"error of up to {error:.3f}: differences of that size mean nothing."
        )
    if "rejected" in prepared.index.columns and prepared.index["rejected"].any():
        count = int(prepared.index["rejected"].sum())
        notes.append(f"{count} rejected trials were neither trained on nor scored.")
    return notes


def _bayes(facts: Facts, rows: pl.DataFrame) -> tuple[list[str], list[Finding]]:
    """The known best accuracy of the generated sample beside the measured one."""
    best = facts.get("bayes_accuracy")
    own = rows.filter(
        (pl.col("table") == "")
        & (pl.col("condition") == "")
        & (pl.col("method") == "")
        & (pl.col("metric") == "accuracy")
    )
    if best is None or own.is_empty():
        return [], []
    accuracy = float(own.group_by("subject").agg(pl.col("value").mean())["value"].mean())  # type: ignore[arg-type]
    notes = [
        f"bayes_accuracy={best:.4f}",
        f"Generated sample: the best decision that knows the truth is right in {best:.1%}, "
        f"MVCNet in {accuracy:.1%}.",
    ]
    low, high = BAYES_BAND
    if low <= accuracy <= high:
        return notes, []
    finding = Finding(
        "error",
        "sample.accuracy",
        "generated sample",
        f"accuracy {accuracy:.3f} is outside {low:g}-{high:g}, the best possible is {best:.3f}",
        "the installation is suspect: compare the versions that 'diptych doctor' lists",
    )
    return notes, [finding]
