"""Rankings in three lines of Python."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from tests.mclrec.tables import write_csv

from diptych import verbs
from diptych.config import merge
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.estimator import MCLRecRecommender
from diptych_mclrec.pipeline import PIPELINE
from diptych_mclrec.read import read_events

torch.set_num_threads(1)
SMALL = {
    "model": {"dim": 8, "inner": 8, "layers": 1, "heads": 1, "dropout": 0.0, "attn_dropout": 0.0},
    "train": {"epochs": 6, "batch": 32},
    "optim": {"lr": 0.02},
    "objective": {"loss": "full"},
    "data": {"min_subject_events": 3, "min_item_events": 2},
}


def ring(subjects: int = 60, items: int = 9, length: int = 8) -> list[list[str]]:
    """Every item is followed by the next one of a ring."""
    return [[f"i{(row + step) % items}" for step in range(length)] for row in range(subjects)]


@pytest.fixture(scope="module")
def fitted() -> MCLRecRecommender:
    longer = SMALL | {"train": {"epochs": 15, "batch": 16}}
    return MCLRecRecommender(seed=1, **longer).fit(ring())


def test_what_follows_is_learnt_and_scored(fitted):
    assert fitted.score(ring()) > 0.8
    found = fitted.recommend([["i3", "i4"], ["i7"]], k=1)
    assert found["item"].to_list() == ["i5", "i8"]
    assert fitted.recommend(["2"], k=1)["item"].to_list() == ["i1"]  # by its place in the lists
    assert fitted.embed([["i3"]]).shape == (1, 8)
    assert fitted.open(["i3"]).push("i4").top(1)["item"].to_list() == ["i5"]


def test_one_seed_gives_the_same_model_and_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [MCLRecRecommender(seed=1, **SMALL).fit(ring(20)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    one, other = (model.embed([["i1", "i2"]]) for model in models)
    assert np.array_equal(one, other)


def test_a_frame_and_a_file_train_the_same_model(tmp_path):
    rows = [
        (f"u{row}", item, f"2024-01-{step + 1:02d}")
        for row, history in enumerate(ring(20))
        for step, item in enumerate(history)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "time"], orient="row")
    by_file = MCLRecRecommender(**SMALL).fit(write_csv(tmp_path / "events.csv", rows))
    by_frame = MCLRecRecommender(**SMALL).fit(frame)
    by_events = MCLRecRecommender(**SMALL).fit(read_events(tmp_path / "events.csv"))
    assert np.array_equal(by_events.embed([["i1"]]), by_frame.embed([["i1"]]))
    assert np.array_equal(by_file.embed([["i1"]]), by_frame.embed([["i1"]]))
    assert by_file.ready.known is not None
    assert all(name.startswith("S-") for name in by_file.ready.known.subjects)


def test_a_score_is_the_ndcg_of_the_last_step(fitted):
    lists = [["i0", "i1", "i5"], ["i3", "i4", "i5", "i6"], ["i2"]]
    ranked = fitted.recommend([one[:-1] for one in lists[:2]], k=9)
    expected = []
    for row, one in enumerate(lists[:2]):
        part = ranked.filter(subject=str(row))["item"].to_list()
        expected.append(1 / np.log2(part.index(one[-1]) + 2))
    assert fitted.score(lists) == pytest.approx(np.mean(expected))
    with pytest.raises(ValueError, match="no history has two known steps"):
        fitted.score([["i2"]])


@pytest.mark.slow
def test_a_run_recommends_and_its_report_names_nobody(tmp_path):
    rows = [
        (f"Ann-{row}", item, f"2024-01-{step + 1:02d}")
        for row, history in enumerate(ring(40))
        for step, item in enumerate(history)
    ]
    source = write_csv(tmp_path / "events.csv", rows)
    merged = merge(MCLRecConfig(), SMALL | {"evaluate": {"baselines": ["markov1"]}})
    run = verbs.train(PIPELINE, source, tmp_path / "run", merged)
    model = MCLRecRecommender.from_run(run)
    assert model.ready.known is not None
    name = str(model.ready.known.subjects[0])
    assert name.startswith("S-")
    assert model.recommend([name], k=2)["subject"].to_list() == [name, name]
    report = (run / "report.html").read_text()
    assert "Single histories" in report
    assert "Ann-" not in report
    assert str(tmp_path) not in report


def test_an_unfitted_recommender_says_what_to_do():
    with pytest.raises(ValueError, match="call fit"):
        MCLRecRecommender().recommend([["i1"]])


def test_configurations_are_validated():
    with pytest.raises(Exception, match=r"train\.epochz"):
        MCLRecRecommender(train={"epochz": 3}).fit(ring())
