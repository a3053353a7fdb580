"""Statistics over subjects and the evaluation folder."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from diptych import statistics
from diptych.contract import Evaluation, Metric
from diptych.errors import DataError, UsageError
from diptych.evaluate import Setting, combine, subject_values, summarise, write
from diptych.findings import Finding, Findings
from diptych.results import read_results, validate, verdict
from diptych.statistics import (
    holm,
    mean_intervals,
    paired_differences,
    pooled_difference,
    pooled_interval,
    sign_flip_tests,
)

ACCURACY = Metric("Accuracy", "%", "higher", headline=True)
ERROR = Metric("Calibration error", "", "lower")
METRICS = {"accuracy": ACCURACY, "ece": ERROR}
SETTING = Setting(METRICS, "net", "loso", "participant", [1, 2])


def rows(
    values: dict[str, dict[str, list[float | None]]], *, table: str = "", condition: str = ""
) -> pl.DataFrame:
    """Method -> metric -> one value a subject."""
    return pl.DataFrame(
        [
            {
                "table": table,
                "condition": condition,
                "subject": f"S-{subject:08x}",
                "unit": f"u{subject}",
                "method": method,
                "metric": metric,
                "value": value,
                "fit": "seed-1",
            }
            for method, metrics in values.items()
            for metric, column in metrics.items()
            for subject, value in enumerate(column)
        ]
    )


def bca_of_mean(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Efron's formulas, independent of scipy's code."""
    rng = np.random.default_rng(seed)
    n = len(values)
    means = values[rng.integers(0, n, (resamples, n))].mean(1)
    bias = ndtri((means < values.mean()).mean() + 0.5 * (means == values.mean()).mean())
    jackknife = (values.sum() - values) / (n - 1)
    spread = jackknife.mean() - jackknife
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    ends = []
    for z in (ndtri(0.025), ndtri(0.975)):
        level = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append(float(np.quantile(means, level)))
    return ends[0], ends[1]


def test_interval_is_the_bca_interval_of_the_mean() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=15)
    found = mean_intervals(values[:, None])[0]
    low, high = bca_of_mean(values, 200_000, seed=9)
    scale = values.std()
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(low, abs=0.03 * scale)
    assert found.high == pytest.approx(high, abs=0.03 * scale)


def test_equal_scores_give_an_interval_without_width() -> None:
    found = mean_intervals(np.full((6, 1), 0.25))[0]
    assert (found.value, found.low, found.high, found.reason) == (0.25, 0.25, 0.25, None)


def test_one_subject_has_a_value_but_neither_interval_nor_test() -> None:
    found = paired_differences(np.array([0.8]), np.array([[0.5]]))[0]
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.reason


def test_a_missing_score_leaves_its_subject_out_of_that_column_alone() -> None:
    values = np.array([[1.0, 1.0], [3.0, np.nan], [5.0, 5.0], [3.0, 6.0]])
    first, second = mean_intervals(values)
    assert (first.value, first.n) == (3.0, 4)
    assert (second.value, second.n) == (4.0, 3)


def test_many_subjects_share_their_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 100_000)
    values = np.random.default_rng(0).normal(2.0, 3.0, (2500, 2))
    values[::2, 1] = np.nan
    both = mean_intervals(values)
    for column, found in enumerate(both):
        present = values[np.isfinite(values[:, column]), column]
        error = present.std() / math.sqrt(present.size)
        assert found.low == pytest.approx(present.mean() - 1.96 * error, abs=0.15 * error)
        assert found.high == pytest.approx(present.mean() + 1.96 * error, abs=0.15 * error)
    shifted = mean_intervals(np.stack([values[:, 0], values[:, 0] + 1.0], 1))
    assert shifted[1].low - shifted[0].low == pytest.approx(1.0)


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8))
@settings(max_examples=40, deadline=None)
def test_sign_flip_test_counts_every_sign_up_to_twelve_subjects(values: list[int]) -> None:
    observed = abs(sum(values))
    reached = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= observed
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    found = sign_flip_tests(np.array(values, float)[:, None] / 45)[0]
    assert found == pytest.approx(sum(reached) / len(reached))


def test_drawn_signs_agree_with_all_signs() -> None:
    values = np.round(np.random.default_rng(5).normal(0.25, 1.0, 15), 1)
    signs = np.array(list(itertools.product((1, -1), repeat=15)))
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-9)
    found = sign_flip_tests(np.stack([values, np.r_[values[:4], np.full(11, np.nan)]], 1))
    assert found[0] == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert found[1] == sign_flip_tests(values[:4, None])[0]


def test_holm_multiplies_by_the_hypotheses_that_are_left() -> None:
    assert holm([0.01, None, 0.03, 0.02]) == pytest.approx([0.03, None, 0.04, 0.04], abs=1e-12)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def weighted_mean(payload: dict[str, np.ndarray], weights: dict[str, float]) -> float:
    """A pooled metric whose right answers are known: the mean over subjects."""
    each = np.array([weights[str(subject)] for subject in payload["subject"]])
    return float((each * payload["score"]).sum() / each.sum()) if each.sum() else math.nan


def test_a_pooled_metric_that_is_a_mean_gets_the_statistics_of_the_mean() -> None:
    rng = np.random.default_rng(2)
    first, other = rng.normal(0.7, 0.1, 9), rng.normal(0.6, 0.1, 9)
    names = np.array([f"S-{k}" for k in range(9)])
    metric = Metric("Mean", "", "higher", headline=True, pooled=weighted_mean)
    a, b = ({"subject": names, "score": scores} for scores in (first, other))
    pooled, mean = pooled_interval(metric, a), mean_intervals(first[:, None])[0]
    assert pooled.value == pytest.approx(mean.value)
    assert pooled.low == pytest.approx(mean.low, abs=0.01)
    assert pooled.high == pytest.approx(mean.high, abs=0.01)
    found, wanted = pooled_difference(metric, a, b), paired_differences(first, other[:, None])[0]
    assert found.value == pytest.approx(wanted.value)
    assert found.p == pytest.approx(wanted.p)


def test_a_pooled_metric_is_averaged_over_fits_and_says_when_it_is_undefined() -> None:
    metric = Metric("Mean", "", "higher", pooled=weighted_mean)
    payload = {
        "subject": np.array(["a", "b", "a", "b"]),
        "score": np.array([1.0, 2.0, 3.0, 4.0]),
        "fit": np.array(["seed-1", "seed-1", "seed-2", "seed-2"]),
    }
    assert pooled_interval(metric, payload).value == pytest.approx(2.5)

    def mostly_undefined(payload: dict[str, np.ndarray], weights: dict[str, float]) -> float:
        return 1.0 if min(weights.values()) > 0 else math.nan

    found = pooled_interval(Metric("M", "", "higher", pooled=mostly_undefined), payload)
    assert (found.value, found.low, found.high) == (1.0, None, None)
    assert "undefined" in str(found.reason)


def test_units_are_averaged_before_fits() -> None:
    frame = rows({"": {"accuracy": [0.0]}}).clear()
    for fit, values in {"seed-1": [0.0, 0.0, 0.6], "seed-2": [1.0]}.items():
        for unit, value in enumerate(values):
            frame = frame.vstack(
                rows({"": {"accuracy": [value]}}).with_columns(
                    unit=pl.lit(str(unit)), fit=pl.lit(fit)
                )
            )
    assert subject_values(frame).values[0, 0] == pytest.approx((0.2 + 1.0) / 2)


def test_results_have_their_binding_form_and_say_why_a_number_is_missing() -> None:
    scores = np.random.default_rng(1).uniform(0.5, 0.9, (3, 10))
    frame = pl.concat(
        [
            rows({"": {"accuracy": [*scores[0]], "ece": [None, *scores[1, 1:]]}}),
            rows({"lda": {"accuracy": [*scores[1]]}, "mdm": {"accuracy": [*scores[2]]}}),
            rows({"": {"accuracy": [0.5, math.nan]}, "lda": {"accuracy": [0.5]}}, condition="gap"),
            rows({"": {"ece": [math.inf]}}, table="odd"),
        ]
    )
    results = summarise(Evaluation(rows=frame, notes=("alignment=online",)), SETTING)
    assert list(results) == [
        *("schema", "pipeline", "protocol", "subject", "n_subjects", "methods", "differences"),
        *("tables", "seeds", "notes"),
    ]
    assert list(results["methods"]) == ["net", "lda", "mdm"]
    assert results["methods"]["net"]["ece"]["n"] == 9
    assert [(d["a"], d["b"], d["metric"]) for d in results["differences"]] == [
        ("net", "lda", "accuracy"),
        ("net", "mdm", "accuracy"),
    ]
    raw = sign_flip_tests((scores[0] - scores[1:]).T)
    assert [d["p"] for d in results["differences"]] == pytest.approx(holm(raw))
    gap, odd = results["tables"]
    assert (gap["name"], gap["condition"], gap["n_subjects"]) == ("", "gap", 2)
    assert gap["differences"][0]["p"] is None
    assert odd["methods"]["net"]["ece"]["value"] is None
    assert odd["methods"]["net"]["ece"]["reason"]
    assert results["notes"][0] == "alignment=online"
    assert any("2 unit values were not finite" in note for note in results["notes"])
    json.loads(json.dumps(results, allow_nan=False))
    assert results == summarise(Evaluation(rows=frame, notes=("alignment=online",)), SETTING)


def test_whole_set_values_have_no_interval() -> None:
    frame = rows({"": {"accuracy": [0.5]}, "lda": {"accuracy": [0.4]}})
    results = summarise(Evaluation(rows=frame.with_columns(subject=pl.lit(""))), SETTING)
    assert results["methods"]["net"]["accuracy"] == {
        **{"value": 0.5, "low": None, "high": None, "n": 0},
        "reason": "one value of the whole set",
    }
    assert results["differences"][0]["value"] == pytest.approx(0.1)


def test_few_subjects_are_said() -> None:
    results = summarise(Evaluation(rows=rows({"": {"accuracy": [0.5, 0.6, 0.9]}})), SETTING)
    assert any("mean little" in note for note in results["notes"])
    results = summarise(Evaluation(rows=rows({"": {"accuracy": [0.5]}})), SETTING)
    assert any("With one participant" in note for note in results["notes"])


def test_damaged_results_are_refused_with_the_place() -> None:
    good = summarise(Evaluation(rows=rows({"": {"accuracy": [0.5, 0.6]}})), SETTING)
    for change, word in (
        ({"schema": 2}, "schema"),
        ({"extra": 1}, "extra"),
        (
            {"methods": {"net": {"accuracy": {"value": None, "low": 0.0, "high": 0.0, "n": 1}}}},
            "null",
        ),
        (
            {
                "methods": {
                    "net": {"accuracy": {"value": math.nan, "low": 0.0, "high": 0.0, "n": 1}}
                }
            },
            "value",
        ),
    ):
        with pytest.raises(DataError, match=word):
            validate({**good, **change})


@pytest.mark.parametrize(
    ("model", "baseline", "words"),
    [
        ([0.9, 0.91, 0.92, 0.93, 0.95, 0.9, 0.97], [0.5] * 7, "better"),
        ([0.4, 0.41, 0.42, 0.43, 0.45, 0.4, 0.47], [0.5] * 7, "worse"),
        ([0.4, 0.6, 0.4, 0.6, 0.45, 0.55, 0.5], [0.5] * 7, "no evidence of a gain"),
        (
            [0.4, 0.41, 0.44],  # no test of three subjects reaches p < 0.05
            [0.5] * 3,
            "no evidence of a gain, the whole interval is a loss",
        ),
        ([0.6, 0.59, 0.56], [0.5] * 3, "no evidence of a gain"),
        ([0.9], [0.5], "not tested (one subject: nothing to resample)"),
    ],
)
def test_verdict_says_what_the_difference_is_worth(
    model: list[float], baseline: list[float], words: str
) -> None:
    frame = rows({"": {"accuracy": model}, "lda": {"accuracy": baseline}})
    sentence = verdict(summarise(Evaluation(rows=frame), SETTING), METRICS)
    assert sentence.startswith(f"Accuracy: net {100 * np.mean(model):.1f} %")
    assert "best baseline lda 50.0 %" in sentence
    assert sentence.endswith(f": {words}")


def test_verdict_without_a_baseline_is_unanchored() -> None:
    results = summarise(Evaluation(rows=rows({"": {"accuracy": [0.5, 0.7]}})), SETTING)
    assert "unanchored" in verdict(results, METRICS)


def test_a_lower_metric_is_better_when_it_falls() -> None:
    metrics = {"ece": Metric("Calibration error", "", "lower", headline=True)}
    frame = rows({"": {"ece": [0.1] * 7}, "bad": {"ece": [0.3] * 7}, "good": {"ece": [0.2] * 7}})
    sentence = verdict(
        summarise(Evaluation(rows=frame), replace(SETTING, metrics=metrics)), metrics
    )
    assert "best baseline good 0.200" in sentence
    assert sentence.endswith("difference -0.100 [-0.100, -0.100]: better")


def test_a_rise_of_a_lower_metric_is_a_loss_beyond_its_margin_alone() -> None:
    frame = rows({"": {"ece": [0.3, 0.31, 0.34]}, "lda": {"ece": [0.2] * 3}})
    for margin, ending in ((0.05, "the whole interval is a loss"), (0.2, "no evidence of a gain")):
        metrics = {"ece": Metric("Calibration error", "", "lower", headline=True, margin=margin)}
        assert verdict(
            summarise(Evaluation(rows=frame), replace(SETTING, metrics=metrics)), metrics
        ).endswith(ending)


def evaluation(value: float = 0.5) -> Evaluation:
    return Evaluation(
        rows=rows({"": {"accuracy": [value, 0.7, 0.8]}}),
        artifacts={"lda": {"seed-1/fold-1": {"weights": np.arange(3.0)}}},
        files={"chance": pl.DataFrame({"bound": [0.6]}), "extra.csv": pl.DataFrame({"a": [1]})},
        notes=("alignment=online",),
        findings=Findings((Finding("warning", "a.b", "file x", "odd", "look"),)),
    )


def test_evaluation_folder_holds_results_units_findings_files_and_baselines(tmp_path: Path) -> None:
    target = tmp_path / "run" / "evaluation"
    results = write(evaluation(), target, SETTING)
    assert read_results(target) == results
    units = pl.read_parquet(target / "units.parquet")
    assert units["method"].unique().to_list() == ["net"]
    assert pl.read_parquet(target / "chance.parquet")["bound"].to_list() == [0.6]
    assert (target / "extra.csv").read_text() == "a\n1\n"
    assert json.loads((target / "findings.json").read_text())["warnings"] == 1
    assert (target / "baselines" / "lda" / "seed-1" / "fold-1" / "weights.npy").is_file()


def test_a_failed_evaluation_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "evaluation"
    before = write(evaluation(), target, SETTING)
    broken = Evaluation(rows=evaluation(0.1).rows, files={"../escape": {"a": 1}})
    with pytest.raises(ValueError, match="inside the evaluation folder"):
        write(broken, target, SETTING)
    assert read_results(target) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation"]
    after = write(evaluation(0.2), target, SETTING)
    assert read_results(target) == after != before


def test_a_folder_that_is_no_evaluation_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="no evaluation"):
        write(evaluation(), tmp_path, SETTING)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_missing_columns_are_named() -> None:
    with pytest.raises(ValueError, match="'fit'"):
        summarise(Evaluation(rows=evaluation().rows.drop("fit")), SETTING)


def test_baselines_are_combined_with_the_model_and_clashes_are_refused() -> None:
    baseline = Evaluation(rows=rows({"lda": {"accuracy": [0.5] * 3}}), notes=("alignment=online",))
    both = combine([evaluation(), baseline])
    assert both.rows["method"].unique(maintain_order=True).to_list() == ["", "lda"]
    assert both.notes == ("alignment=online",)
    with pytest.raises(ValueError, match="chance"):
        combine([evaluation(), evaluation()])
