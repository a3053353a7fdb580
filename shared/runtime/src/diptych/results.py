"""The form of ``evaluation/results.json``, and how its numbers are said in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diptych.contract import Metric
from diptych.errors import DataError

SIGNIFICANT = 0.05
FEW_SUBJECTS = 6

Number = Annotated[float, Field(allow_inf_nan=False)] | None


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Reasoned(_Form):
    reason: str | None = None

    @model_validator(mode="after")
    def _missing_numbers_have_a_reason(self) -> Self:
        missing = [name for name, value in self if value is None and name != "reason"]
        if missing and not self.reason:
            raise ValueError(f"{', '.join(missing)} is null without a reason")
        return self


class Score(_Reasoned):
    """A metric of a method: value, 95 % interval and the subjects that entered."""

    value: Number
    low: Number
    high: Number
    n: int = Field(ge=0)


class Difference(_Reasoned):
    """Model ``a`` minus method ``b``; ``p`` is Holm-adjusted over the table."""

    a: str
    b: str
    metric: str
    value: Number
    low: Number
    high: Number
    p: Annotated[float, Field(ge=0, le=1)] | None


class Table(_Form):
    """The same methods scored on another table or under another condition."""

    name: str
    condition: str
    protocol: str
    n_subjects: int = Field(ge=0)
    methods: dict[str, dict[str, Score]]
    differences: list[Difference]


class Results(_Form):
    """``evaluation/results.json``; the top level is the headline table."""

    schema_: Literal[1] = Field(alias="schema")
    pipeline: str
    protocol: str
    subject: str
    n_subjects: int = Field(ge=0)
    methods: dict[str, dict[str, Score]]
    differences: list[Difference]
    tables: list[Table]
    seeds: list[int]
    notes: list[str]


def validate(results: Mapping[str, Any]) -> Results:
    """Check results against their binding form.

    Args:
        results: The content of ``results.json``.

    Returns:
        The same as a typed object.

    Raises:
        DataError: If a key is missing or unknown, a number is not finite, or a null lacks its
            reason; the message names each place.
    """
    try:
        return Results.model_validate(dict(results))
    except ValidationError as error:
        places = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'top level'}: {problem['msg']}"
            for problem in error.errors()[:8]
        )
        raise DataError(
            f"results.json does not have its form ({places}): evaluate the run again"
        ) from None


def read_results(evaluation: Path) -> dict[str, Any]:
    """Read and check the results of an evaluation folder.

    Args:
        evaluation: The folder that holds ``results.json``.

    Returns:
        The results as plain values.

    Raises:
        DataError: If there are none, or they are damaged.
    """
    file = evaluation / "results.json"
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{file} is missing: the run has not been evaluated; run `evaluate` first"
        ) from None
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): evaluate the run again") from None
    validate(results)
    return results


def metric_of(metrics: Mapping[str, Metric], name: str) -> Metric:
    """The metric's description; an undeclared one is shown under its own name."""
    return metrics.get(name) or Metric(title=name, unit="", better="higher")


def headline_metric(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str | None:
    """The first metric declared as headline that a method of the headline table has."""
    measured = {name for scores in results["methods"].values() for name in scores}
    return next((n for n, m in metrics.items() if m.headline and n in measured), None)


def scale(metric: Metric) -> float:
    """Factor from stored to shown values: "%" metrics are stored as fractions."""
    return 100.0 if metric.unit == "%" else 1.0


def decimals(metric: Metric, values: Iterable[float | None]) -> int:
    """Decimals that show the values of one metric with about three significant digits.

    Args:
        metric: What the values measure.
        values: All values that stand in one column.

    Returns:
        1 to 4; a column shares them so that its numbers align.
    """
    if metric.unit == "%":
        return 1
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest == 0.0:
        return 2
    return min(4, max(1, 2 - math.floor(math.log10(largest))))


def metric_decimals(results: Mapping[str, Any], name: str, metric: Metric) -> int:
    """The decimals of a metric in every table of the results."""
    tables = [results, *results["tables"]]
    scores = [
        table["methods"][method][name]["value"]
        for table in tables
        for method in table["methods"]
        if name in table["methods"][method]
    ]
    return decimals(metric, scores)


def number(value: float | None, metric: Metric, digits: int, *, signed: bool = False) -> str:
    """A stored value as it is shown, without its unit; a dash where it is missing.

    Example:
        >>> number(0.7123, Metric("Accuracy", "%", "higher"), 1)
        '71.2'
    """
    if value is None:
        return "-"
    shown = f"{value * scale(metric):{'+' if signed else ''}.{digits}f}"
    # a rounded zero has no sign
    return shown if float(shown) != 0 else f"{0:.{digits}f}"


def interval(score: Mapping[str, Any], metric: Metric, digits: int, *, signed: bool = False) -> str:
    """The interval in square brackets; empty where there is none."""
    if score["low"] is None or score["high"] is None:
        return ""
    ends = [number(score[end], metric, digits, signed=signed) for end in ("low", "high")]
    return f"[{ends[0]}, {ends[1]}]"


def with_unit(text: str, metric: Metric) -> str:
    """A shown value followed by its unit."""
    return f"{text} {metric.unit}" if metric.unit else text


def probability(p: float | None) -> str:
    """A p-value in words of a table."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


Evidence = Literal[
    "better",
    "worse",
    "no evidence of a gain",
    "no evidence of a gain, the whole interval is a loss",
    "not tested",
]


def evidence(difference: Mapping[str, Any], metric: Metric) -> Evidence:
    """What a tested difference says about the first method.

    Args:
        difference: value (first minus second), its interval and Holm-adjusted ``p``.
        metric: Which direction is better, and the margin up to which methods count as equal.

    Returns:
        "better" or "worse" with p < 0.05, else "no evidence of a gain"; with few subjects no
        test can reach p < 0.05, so an interval that is a loss from end to end is named too.
        "not tested" without p.
    """
    if difference["p"] is None or difference["value"] is None:
        return "not tested"
    sign = 1 if metric.better == "higher" else -1
    gain, *ends = (
        sign * value if (value := difference[key]) is not None else 0.0
        for key in ("value", "low", "high")
    )
    if difference["p"] < SIGNIFICANT:
        return "better" if gain > 0 else "worse"
    if max(ends) < 0 and gain < -metric.margin:
        return "no evidence of a gain, the whole interval is a loss"
    return "no evidence of a gain"


def tone(word: str) -> Literal["good", "bad", "open"]:
    """The colour in which a word of :func:`evidence` stands."""
    if word.endswith("loss") or word == "worse":
        return "bad"
    return "good" if word == "better" else "open"


def best_baseline(results: Mapping[str, Any], name: str, metric: Metric) -> str | None:
    """The other method with the best value of a metric in the headline table."""
    values: dict[str, float] = {
        method: scores[name]["value"]
        for method, scores in results["methods"].items()
        if method != results["pipeline"] and name in scores and scores[name]["value"] is not None
    }
    if not values:
        return None
    ranked = sorted(values, key=lambda method: values[method])
    return ranked[-1] if metric.better == "higher" else ranked[0]


def verdict(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    """The result in one sentence: model, best baseline, difference, and what that is worth.

    Args:
        results: The content of ``results.json``.
        metrics: The pipeline's metrics; the first measured headline metric is spoken of.

    Returns:
        For example "Accuracy: mvcnet 71.2 % [66.0, 76.1]; best baseline tangent_lr 70.3 %;
        difference +0.9 [-1.6, 3.3]: no evidence of a gain".
    """
    model = results["pipeline"]
    name = headline_metric(results, metrics)
    if name is None:
        return f"{model}: no headline metric was measured"
    metric = metric_of(metrics, name)
    digits = metric_decimals(results, name, metric)
    score = results["methods"].get(model, {}).get(name)
    if score is None or score["value"] is None:
        reason = f" ({score['reason']})" if score else ""
        return f"{metric.title}: {model} has no value{reason}"
    sentence = f"{metric.title}: {model} {_said(score, metric, digits)}"
    baseline = best_baseline(results, name, metric)
    if baseline is None:
        return f"{sentence}; unanchored: no baseline was evaluated beside it"
    value = number(results["methods"][baseline][name]["value"], metric, digits)
    sentence += f"; best baseline {baseline} {with_unit(value, metric)}"
    difference = next(
        (d for d in results["differences"] if d["b"] == baseline and d["metric"] == name), None
    )
    if difference is None or difference["value"] is None:
        reason = f" ({difference['reason']})" if difference else ""
        return f"{sentence}; they share no {results['subject']} to compare{reason}"
    shown = number(difference["value"], metric, digits, signed=True)
    ends = interval(difference, metric, digits)
    sentence += f"; difference {shown} {ends}".rstrip()
    word = evidence(difference, metric)
    if word == "not tested":
        word_and_reason = f"not tested ({difference['reason']})"
        return f"{sentence}: {word_and_reason}"
    return f"{sentence}: {word}"


def _said(score: Mapping[str, Any], metric: Metric, digits: int) -> str:
    value = with_unit(number(score["value"], metric, digits), metric)
    return f"{value} {interval(score, metric, digits)}".rstrip()
