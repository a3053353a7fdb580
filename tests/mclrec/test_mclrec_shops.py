"""Fits and evaluation on the real tables: policies, published weights, the official schedule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from tests.mclrec.tables import real_data

from diptych import loop
from diptych.config import load, merge
from diptych.contract import Fit
from diptych.randomness import seed_globals
from diptych.split import Split
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.evaluate import evaluate
from diptych_mclrec.fitting import divide
from diptych_mclrec.parity import weights
from diptych_mclrec.prepare import prepare
from diptych_mclrec.store import load as load_events
from diptych_mclrec.task import MCLRecTask, modules

torch.set_num_threads(1)
pytestmark = pytest.mark.data
BEAUTY = "amazon_beauty_sequences.parquet"


@pytest.mark.parametrize(
    ("name", "policy"),
    [(BEAUTY, "mask"), ("amazon_toys_sequences.parquet", "mask"), ("meds", "keep")],
)
def test_seen_items_are_masked_where_no_target_repeats(tmp_path: Path, name, policy):
    config = MCLRecConfig()
    prepared = prepare(config, real_data() / name, tmp_path / "prepared")
    found = divide(load_events(prepared), config).fitted
    assert found.seen == policy
    if name == BEAUTY:
        assert found.catalogue.size == 12_101
        assert found.counts.sum() == 198_502 - 2 * 22_363


@pytest.mark.slow
def test_published_weights_are_evaluated_as_published(tmp_path: Path):
    config = load(MCLRecConfig, recipe="paper-beauty")
    prepared = prepare(config, real_data() / BEAUTY, tmp_path / "prepared")
    found = weights(config, real_data() / "mclrec_beauty_published.safetensors")
    own = merge(config, found.overrides)
    fit = Fit("final", Split((), (), tuple(range(prepared.index.height))), 0)
    built = modules(own, found.facts, fit)
    built["encoder"].load_state_dict(found.tensors["encoder"])
    built["encoder"].eval().requires_grad_(False)
    trained = SimpleNamespace(
        fits=(fit,), final="final", modules=lambda name: built, artifacts=lambda name: {}
    )
    scored = evaluate(own, prepared, trained)
    assert "seen=kept" in scored.notes
    head = scored.rows.filter((pl.col("table") == "") & (pl.col("subject") != ""))
    for k, hits in {5: 1299, 10: 1947, 20: 2780, 50: 4144}.items():
        kept = head.filter(pl.col("metric") == f"hr@{k}")
        assert kept.height == 22_363
        assert kept["value"].sum() == pytest.approx(hits, abs=2)
    masked = head.filter(pl.col("metric") == "hr@10_masked")
    assert masked["value"].sum() == pytest.approx(2126, abs=2)
    gain = head.filter(pl.col("metric") == "ndcg@10_masked")["value"].mean()
    assert gain == pytest.approx(0.0576, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["official", "two_stage"])
def test_the_loss_falls_over_three_epochs_of_two_thousand_customers(tmp_path: Path, schedule):
    config = load(
        MCLRecConfig,
        recipe="paper-beauty",
        sets=[f"objective.schedule={schedule}", "train.epochs=3", "objective.lambda_=0.1"],
    )
    table = pl.read_parquet(real_data() / BEAUTY).head(2000)
    table.write_parquet(tmp_path / "cut.parquet")
    prepared = prepare(config, tmp_path / "cut.parquet", tmp_path / "prepared")
    parts = divide(load_events(prepared), config)
    seed_globals(2020, "train", 0, 0)
    task = MCLRecTask(config, parts.fitted, train=parts.split.train)
    train = config.train.model_copy(update={"metric": None, "patience": None})
    loop.fit(task, loop.Settings(train, config.run, 2020), tmp_path / "fit")
    curves = pl.read_csv(tmp_path / "fit" / "metrics.csv")
    terms = [name for name in curves.columns if name.startswith("train/")]
    assert {"train/rec", "train/cl1", "train/cl2", "train/reg"} <= set(terms)
    assert all(curves[name].cast(pl.Float64).is_finite().all() for name in terms)
    rec = curves["train/rec"].cast(pl.Float64).drop_nulls().to_list()
    assert rec == sorted(rec, reverse=True)
