"""Runs side by side, paired by subject."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.compare import compare, compare_runs, table
from diptych.contract import Metric
from diptych.errors import DataError, UsageError
from diptych.statistics import sign_flip_tests


def subject_means(run: Path, metric: str) -> np.ndarray:
    units = pl.read_parquet(run / "evaluation" / "units.parquet")
    chosen = units.filter(
        (pl.col("condition") == "") & (pl.col("method") == "mvcnet") & (pl.col("metric") == metric)
    )
    return (
        chosen.group_by("subject").agg(pl.col("value").mean()).sort("subject")["value"].to_numpy()
    )


def test_a_better_run_is_a_gain_paired_by_subject(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    runs = [make_run("plain"), make_run("views", 1, shift=0.08)]
    found = compare(runs, pipeline.metrics)
    pair = next(p for p in found.pairs if (p.table, p.metric) == ("", "accuracy"))
    first, second = (subject_means(run, "accuracy") for run in runs)
    assert pair.difference.value == pytest.approx((second - first).mean())
    assert pair.difference.low < pair.difference.value < pair.difference.high
    raw = sign_flip_tests((second - first)[:, None])[0]
    assert raw is not None
    assert raw <= pair.difference.p <= 2 * raw  # Holm over two headline metrics
    assert pair.word == "gain"
    loss = next(p for p in found.pairs if (p.table, p.metric) == ("", "nll"))
    assert loss.difference.value < 0
    assert loss.word == "gain"


def test_the_order_of_the_runs_turns_the_sign(make_run: Callable[..., Path], pipeline: Any) -> None:
    runs = [make_run("plain"), make_run("views", 1, shift=0.08)]
    there = compare(runs, pipeline.metrics).pairs[0]
    back = compare(runs[::-1], pipeline.metrics).pairs[0]
    assert back.difference.value == pytest.approx(-there.difference.value)
    assert (back.difference.low, back.difference.high) == pytest.approx(
        (-there.difference.high, -there.difference.low), abs=0.005
    )
    assert back.word == "worse"


def test_differences_up_to_the_margin_are_no_gain(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    runs = [make_run("plain"), make_run("views", 1, shift=0.08)]
    wide = {"accuracy": Metric("Accuracy", "%", "higher", headline=True, margin=0.2)}
    words = {p.metric: p.word for p in compare(runs, wide).pairs}
    assert words["accuracy"] == "within margin"


def test_equal_runs_show_no_evidence_and_the_differing_settings_are_listed(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    config = "objective: {lambda_cvc: 0.0}\nrun: {seeds: [1, 2]}\n"
    first = make_run("a", config=config)
    second = make_run("b", config=config.replace("0.0", "0.1"))
    found = compare([first, second], pipeline.metrics)
    assert dict(found.settings) == {"objective.lambda_cvc": (0.0, 0.1)}
    assert {p.word for p in found.pairs} == {"within margin"}
    text = table(found)
    assert "objective.lambda_cvc" in text
    assert "noise 20 uV" in text


def test_runs_over_other_splits_or_files_are_refused(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    first, second, third = make_run("a"), make_run("b"), make_run("c")
    split = json.loads((second / "split.json").read_text())
    split["splits"]["f" * 16] = split["splits"].pop("0" * 16)
    for fit in split["fits"]:
        fit["split"] = fit["split"].replace("0" * 16, "f" * 16)
    (second / "split.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match="b was scored over other splits than a"):
        compare([first, second], pipeline.metrics)
    manifest = json.loads((third / "manifest.json").read_text())
    manifest["sources"].pop()
    (third / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="c was trained on other files than a"):
        compare([first, third], pipeline.metrics)


def test_one_run_or_a_run_without_evaluation_is_refused(
    make_run: Callable[..., Path], pipeline: Any, tmp_path: Path
) -> None:
    run = make_run("a")
    with pytest.raises(UsageError, match="at least two"):
        compare([run], pipeline.metrics)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="evaluate"):
        compare([run, tmp_path / "empty"], pipeline.metrics)


def test_the_table_aligns_its_columns(make_run: Callable[..., Path], pipeline: Any) -> None:
    text = compare_runs([make_run("a"), make_run("b", 1)], pipeline.metrics)
    head, *lines = next(
        block for block in text.split("\n\n") if block.startswith("metric")
    ).splitlines()
    assert len(lines) == len(pipeline.metrics)
    for column in ("value ", "difference ", " p "):
        end = f"{head} ".index(column) + len(column) - 1
        assert all(line[end - 1].isdigit() and line[end] == " " for line in lines)
