"""A table in, a ranked table out; bad input leaves nothing behind."""

import polars as pl
import pytest
import torch
from tests.mclrec.recommenders import NAMES, recommender, trained
from tests.mclrec.tables import write_csv

from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.predict import NOTICE, predict

torch.set_num_threads(1)
ROWS = [
    ("Ann", "code-9", "2024-05-02"),
    ("Bob", "code-1", "2024-05-01"),
    ("Ann", "code-3", "2024-05-01"),
    ("Cy", "new", "2024-05-01"),
]


def config(**predicted):
    return MCLRecConfig.model_validate({"predict": predicted})


@pytest.mark.parametrize("name", ["top.csv", "top.parquet"])
def test_every_subject_gets_its_list_under_its_own_name(tmp_path, name):
    model = recommender()
    source, out = write_csv(tmp_path / "new.csv", ROWS), tmp_path / name
    findings = predict(config(k=3), trained(model), source, out)
    found = pl.read_csv(out) if out.suffix == ".csv" else pl.read_parquet(out)
    assert found.columns == [
        "subject", "rank", "item", "description", "score", "probability", "fallback"
    ]  # fmt: skip
    assert found["subject"].to_list() == [n for n in ("Ann", "Bob", "Cy") for _ in range(3)]
    expected = model.recommend([["code-3", "code-9"], ["code-1"]], k=3)
    assert found["item"].to_list() == [*expected["item"], *NAMES[:3]]
    assert found["description"].to_list()[6] == "the first"
    assert found["fallback"].to_list() == [False] * 6 + [True] * 3
    codes = {one.code: one.found for one in findings}
    assert codes["predict.unknown"].startswith("1 events of 1 of 3")
    assert codes["predict.fallback"].startswith("1 of 3")
    assert not findings.errors


def test_clinical_rankings_carry_their_note_in_every_row(tmp_path):
    source, out = write_csv(tmp_path / "new.csv", ROWS), tmp_path / "top.csv"
    predict(config(k=2), trained(recommender(kind="clinical")), source, out)
    assert set(pl.read_csv(out)["note"]) == {NOTICE}


def test_events_of_one_day_are_one_basket_for_a_model_of_baskets(tmp_path):
    rows = [("Ann", "code-3", "2024-05-01"), ("Ann", "code-9", "2024-05-01")]
    rows.append(("Ann", "code-4", "2024-05-03"))
    model = recommender(baskets=True)
    source, out = write_csv(tmp_path / "new.csv", rows), tmp_path / "top.csv"
    predict(config(k=2), trained(model), source, out)
    expected = model.recommend([[["code-3", "code-9"], ["code-4"]]], k=2)
    assert pl.read_csv(out)["item"].to_list() == expected["item"].to_list()


@pytest.mark.parametrize(
    ("rows", "name", "code"),
    [
        (ROWS, "top.xlsx", "predict.format"),
        ([], "top.csv", "events.empty"),
        ([("Ann", "code-3", "soon")], "top.csv", "events.bad_time"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_is_written(tmp_path, rows, name, code):
    source = write_csv(tmp_path / "new.csv", rows)
    findings = predict(config(), trained(recommender()), source, tmp_path / name)
    assert code in {one.code for one in findings.errors}
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]
