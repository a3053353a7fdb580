import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from diptych.config import resolve
from diptych.contract import Fit
from diptych.prepared import Prepared
from diptych.split import Split
from diptych_mvcnet.align import training_references
from diptych_mvcnet.artefacts import artefact_table, region_of, suspicion
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.evaluate import chance_bound, evaluate_baseline, trial_metrics
from diptych_mvcnet.metrics import above_chance, calibration_error
from diptych_mvcnet.pipeline import PIPELINE
from diptych_mvcnet.plan import plan
from diptych_mvcnet.scores import Predictions, score

TWO = ["left_hand", "right_hand"]


def two(p: list[float]) -> np.ndarray:
    return np.stack([1 - np.array(p), np.array(p)], axis=1)


def test_the_metrics_of_four_trials_are_those_computed_by_hand() -> None:
    found = trial_metrics([0, 0, 1, 1], two([0.2, 0.6, 0.9, 0.5]), TWO, trial_s=4.0)
    assert found["accuracy"] == 0.5  # the tie of the last trial goes to class 0
    assert found["balanced_accuracy"] == 0.5
    assert found["kappa"] == 0.0
    assert found["auc"] == 0.75  # pairs won: 0.9 > 0.2, 0.9 > 0.6, 0.5 > 0.2
    expected = -(np.log(0.8) + np.log(0.4) + np.log(0.9) + np.log(0.5)) / 4
    assert found["nll"] == pytest.approx(expected, abs=1e-12)
    assert found["itr"] == 0.0


def test_ties_count_one_half_in_the_area() -> None:
    assert trial_metrics([0, 1], two([0.4, 0.4]), TWO)["auc"] == 0.5
    assert trial_metrics([0, 0, 1], two([0.4, 0.1, 0.4]), TWO)["auc"] == 0.75


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 4), n=st.integers(12, 40))
@settings(max_examples=40, deadline=None)
def test_kappa_and_area_agree_with_scikit_learn(seed: int, classes: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), draw.integers(0, classes, n)])
    proba = np.round(draw.dirichlet(np.ones(classes), len(y)), 2)
    proba /= proba.sum(axis=1, keepdims=True)
    found = trial_metrics(y, proba, [str(k) for k in range(classes)])
    kappa = cohen_kappa_score(y, proba.argmax(axis=1))
    assert found["kappa"] == pytest.approx(0.0 if np.isnan(kappa) else kappa, abs=1e-12)
    area = roc_auc_score(y, proba[:, 1] if classes == 2 else proba, multi_class="ovr")
    assert found["auc"] == pytest.approx(area, abs=1e-12)


def test_one_class_gives_no_area_and_its_absence_is_named() -> None:
    found = trial_metrics([1, 1, 1], two([0.9, 0.2, 0.8]), TWO)
    assert found["auc"] is None
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)
    assert "left_hand" in found["notes"][0]
    agreed = trial_metrics([1, 1], two([0.9, 0.8]), TWO)
    assert agreed["kappa"] == 0.0
    assert any("kappa" in note for note in agreed["notes"])


def test_the_transfer_rate_is_wolpaws() -> None:
    def rate(accuracy: float, k: int = 2) -> float:
        n = 100
        y = np.zeros(n, dtype=int)
        right = round(accuracy * n)
        proba = np.zeros((n, k))
        proba[:right, 0] = proba[right:, 1] = 1
        return float(trial_metrics(y, proba, [str(c) for c in range(k)], trial_s=4.0)["itr"])

    assert rate(1.0) == pytest.approx(15.0)
    assert rate(0.5) == 0.0
    assert rate(0.3) == 0.0
    expected = (2 + 0.8 * np.log2(0.8) + 0.2 * np.log2(0.2 / 3)) * 15
    assert rate(0.8, 4) == pytest.approx(expected)


def test_the_chance_bound_is_the_binomial_quantile() -> None:
    assert chance_bound(15, 2) == pytest.approx(binom.ppf(0.975, 15, 0.5) / 15)
    assert round(chance_bound(15, 2), 3) == 0.733
    assert round(chance_bound(45, 2), 3) == 0.644


def test_being_above_chance_is_adjusted_for_the_number_of_subjects() -> None:
    raw = binom.sf(np.array([44, 29, 24]), 45, 0.5)
    expected = np.maximum.accumulate(raw * [3, 2, 1])
    np.testing.assert_allclose(above_chance([45, 30, 25], [45] * 3, 2), np.minimum(expected, 1))


def test_perfect_confidence_has_no_calibration_error_and_doubt_has() -> None:
    assert calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0.0
    half = calibration_error(np.full(4, 0.9), np.array([True, True, False, False]))
    assert half == pytest.approx(0.4)


def noise(subjects: int = 2, n: int = 20, channels: tuple[str, ...] = ("C3", "Cz", "C4")):
    draw = np.random.default_rng(0)
    rows = subjects * n
    index = pl.DataFrame(
        {
            "subject": np.repeat([f"S-{k}" for k in range(subjects)], n),
            "session": ["1"] * rows,
            "run": ["1"] * rows,
            "trial": list(range(n)) * subjects,
            "label": [TWO[k % 2] for k in range(rows)],
            "y": [k % 2 for k in range(rows)],
            "rejected": [False] * rows,
        }
    )
    facts = {
        "ch_names": list(channels),
        "sfreq": 100.0,
        "n_times": 200,
        "classes": TWO,
        "class_mirror": {"left_hand": "right_hand", "right_hand": "left_hand"},
        "window": [0.5, 2.5],
        "filter": {"band": [1.0, 49.0], "phase": "zero", "notch": None},
    }
    x = draw.standard_normal((rows, len(channels), 200)).astype(np.float32)
    return Prepared.from_arrays(index, facts, {"epochs": x})


@dataclass(frozen=True)
class Fits:
    fits: list[Fit]
    final: str = "final"
    stored: dict = field(default_factory=dict)

    def artifacts(self, name: str) -> dict:
        return self.stored.get(name, {})

    def facts(self, name: str) -> dict:
        return noise().facts


def test_folds_of_a_seed_are_pooled_before_the_metric() -> None:
    prepared = noise(1, 4)
    parts = [
        Predictions((0, 1), two([0.1, 0.4]), 1),
        Predictions((2, 3), two([0.6, 0.9]), 1),
    ]
    rows = score("", parts, prepared).rows
    auc = rows.filter(pl.col("metric") == "auc")["value"].to_list()
    pooled = roc_auc_score([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9])
    assert auc == [pytest.approx(pooled)]
    assert pooled != 1.0  # which every fold alone would give


def test_a_known_lesion_side_gets_a_table_of_its_own() -> None:
    prepared = noise(2, 4)
    sides = prepared.index["subject"].replace_strict({"S-0": "left", "S-1": ""})
    lesioned = Prepared(None, prepared.index.with_columns(lesion_side=sides), prepared.facts)
    part = Predictions(tuple(range(8)), two([0.2, 0.8] * 4), 1)
    rows = score("", [part], lesioned).rows.filter(pl.col("table") == "lesion side")
    assert set(rows["subject"]) == {"S-0"}
    assert set(rows["condition"]) == {"left"}


def test_a_baseline_of_a_final_model_predicts_from_its_artifacts() -> None:
    prepared = noise()
    prepared.array("epochs")[prepared.index["y"].to_numpy() == 1, 0] *= 3
    config = MVCNetConfig.model_validate({"split": {"kind": "loso"}})
    fits = plan(config, prepared)
    trained = evaluate_baseline("csp_lda", config, prepared, Fits(fits))
    state = trained.artifacts["csp_lda"]["final"]
    everyone = Fit("final", Split((), (), tuple(range(40))), 1)
    who = prepared.index["subject"].to_list(), prepared.index["session"].to_list()
    references = training_references(prepared.array("epochs"), *who)
    stored = {"csp_lda/final": state, "final": {"alignment": references}}
    again = evaluate_baseline("csp_lda", config, prepared, Fits([everyone], stored=stored))
    own = again.rows.filter(pl.col("metric") == "accuracy")["value"].mean()
    assert own > 0.9
    assert not again.artifacts


def test_loso_scores_baselines_without_alignment_too() -> None:
    prepared = noise()
    config = MVCNetConfig.model_validate({"split": {"kind": "loso"}})
    found = evaluate_baseline("logvar_lda", config, prepared, Fits(plan(config, prepared)))
    assert set(found.rows["condition"]) == {"", "no alignment"}


def test_regions_follow_the_names_of_electrodes() -> None:
    names = {"C3": "central", "FCz": "central", "CP4": "central", "Fp1": "frontal", "F7": "frontal"}
    names |= {"T7": "temporal", "FT10": "temporal", "Oz": "other", "AFz": "frontal"}
    assert {name: region_of(name) for name in names} == names


def test_a_muscle_at_the_temple_is_suspected_and_noise_is_not() -> None:
    prepared = noise(2, 60, ("C3", "Cz", "C4", "T7", "Fp1"))
    x = prepared.array("epochs").copy()
    x[prepared.index["y"].to_numpy() == 1, 3] *= 3
    loud = Prepared(None, prepared.index, prepared.facts, {"epochs": x})
    config = MVCNetConfig.model_validate({"split": {"kind": "within_cv"}})
    fits = [fit for fit in plan(config, loud) if fit.split.test and not fit.method]
    table = artefact_table(config, loud, fits)
    codes = {(finding.code, finding.where) for finding in suspicion(table)}
    assert ("artefact.suspected", "temporal channels alone") in codes
    assert ("artefact.suspected", "frontal channels alone") not in codes
    assert not any("central" in where for _, where in codes)


def test_a_run_names_every_fit_and_within_subject_adds_final_models() -> None:
    prepared = noise()
    config = MVCNetConfig.model_validate({"run": {"seeds": [3, 4]}, "split": {"folds": 2}})
    names = [fit.name for fit in plan(config, prepared)]
    assert len(names) == len(set(names))
    assert {"seed-3/S-0/fold-1", "seed-4/S-1/fold-2", "seed-3/S-0/fold-1/ifnet"} <= set(names)
    assert {"final", "final-S-0", "final-S-1"} <= set(names)
    finals = [fit for fit in plan(config, prepared) if fit.name.startswith("final")]
    assert all(not fit.split.test and fit.seed == 3 for fit in finals)
    epochs = {fit.name: resolve(config, fit).train.epochs for fit in finals}
    assert epochs == {"final": 12, "final-S-0": 60, "final-S-1": 60}


def test_inner_validation_adds_fits_before_those_that_use_them() -> None:
    config = MVCNetConfig.model_validate(
        {"train": {"inner_validation": True}, "split": {"kind": "loso"}}
    )
    fits = {fit.name: fit for fit in plan(config, noise())}
    inner, outer = fits["seed-1/S-0/inner"], fits["seed-1/S-0"]
    assert {*inner.split.train, *inner.split.validation} == set(outer.split.train)
    assert not inner.split.test
    assert list(fits).index("seed-1/S-0/inner") < list(fits).index("seed-1/S-0")


def test_a_users_hold_out_split_is_the_final_model() -> None:
    prepared = noise()
    held = prepared.index.with_columns(
        split=pl.when(pl.col("subject") == "S-0").then(pl.lit("train")).otherwise(pl.lit("test"))
    )
    config = MVCNetConfig.model_validate(
        {"split": {"kind": "fixed"}, "run": {"seeds": [1, 2]}, "evaluate": {"baselines": []}}
    )
    fits = plan(config, Prepared(None, held, prepared.facts))
    assert [fit.name for fit in fits] == ["final", "seed-2/hold-out"]


def test_a_run_states_alignment_protocol_and_the_best_possible_accuracy(causal_run: Path) -> None:
    results = json.loads((causal_run / "evaluation" / "results.json").read_text())
    assert {"alignment=online", "transductive=false", "protocol=loso"} <= set(results["notes"])
    assert any(note.startswith("bayes_accuracy=0.9") for note in results["notes"])
    assert set(results["methods"]) == {"mvcnet", "csp_lda", "majority", "ifnet"}
    assert results["methods"]["majority"]["accuracy"]["value"] == 0.5
    conditions = {table["condition"]: set(table["methods"]) for table in results["tables"]}
    assert conditions == {"no alignment": {"csp_lda", "majority"}}
    assert set(PIPELINE.metrics) == set(results["methods"]["mvcnet"])


def test_the_order_of_subjects_changes_no_result_of_a_subject() -> None:
    prepared = noise(3)
    config = MVCNetConfig.model_validate({"split": {"kind": "within_cv"}})
    turned = prepared.index.with_row_index("_row").sort("subject", descending=True)
    rows = turned["_row"].to_numpy()
    other = Prepared(
        None, turned.drop("_row"), prepared.facts, {"epochs": prepared.array("epochs")[rows]}
    )
    first, second = (
        evaluate_baseline("csp_lda", config, data, Fits(plan(config, data))).rows
        for data in (prepared, other)
    )
    keys = ["subject", "metric", "fit"]
    assert first.sort(keys)["value"].to_list() == pytest.approx(
        second.sort(keys)["value"].to_list(), nan_ok=True
    )
