from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.mclrec.tables import real_data, write_csv

from diptych_mclrec.check import check, check_events
from diptych_mclrec.config import MCLRecConfig

BAD = {
    "empty.csv": ("error", "events.empty", "zero bytes"),
    "header_only.csv": ("error", "events.empty", "no data rows"),
    "wrong_header.csv": ("error", "events.columns", "subject, item, time among uid, product, ts"),
    "bad_time.csv": ("error", "events.bad_time", "2021-13-45T08:00:00"),
    "null_ids.csv": ("error", "events.null_id", "(data rows 3, 8)"),
    "duplicate_rows.csv": ("warning", "events.duplicates", "30 of 60 rows"),
    "all_times_tied.csv": ("warning", "events.ties", "100%"),
    "future_time.csv": ("warning", "events.future_time", "2206"),
    "latin1.csv": ("error", "events.encoding", "byte 808"),
    "ragged.inter": ("error", "events.ragged", "line 3 has 2 of 3 fields"),
    "untyped_header.inter": ("error", "recbole.header", "user_id, item_id"),
    "zero_item_sequences.txt": ("error", "events.reserved", "id 0 on line 2; token 'x' on line 3"),
    "float_items.parquet": ("error", "events.item_type", "nan, 2.5"),
    "truncated.parquet": ("error", "parquet.broken", "out of specification"),
    "leaky_split.csv": ("error", "split.leak", "p1 in train and test"),
}


def lines(path: Path, config: MCLRecConfig | None = None) -> dict[str, tuple[str, str]]:
    return {one.code: (one.severity, one.line()) for one in check(config or MCLRecConfig(), path)}


@pytest.mark.data
@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_gives_its_finding_and_no_other_error(name: str) -> None:
    severity, code, words = BAD[name]
    found = lines(real_data() / "bad" / name)
    assert found[code][0] == severity
    assert words in found[code][1]
    assert name in found[code][1]
    errors = [one for one, (level, _) in found.items() if level == "error"]
    assert errors == ([code] if severity == "error" else [])


@pytest.mark.data
def test_broken_clinical_tables_give_all_their_findings() -> None:
    meds = lines(real_data() / "bad" / "meds_not_contiguous.parquet")
    assert {code for code, (level, _) in meds.items() if level == "error"} == {
        "meds.contiguous",
        "meds.sorted",
    }
    assert "row 2" in meds["meds.sorted"][1]
    omop = lines(real_data() / "bad" / "omop_orphan")
    assert omop["omop.orphan"][0] == "error"
    assert "99" in omop["omop.orphan"][1]
    assert "1 of 3 rows" in omop["omop.unmapped"][1]
    assert "omop.before_birth" not in omop


@pytest.mark.data
def test_a_split_file_is_judged_beside_the_events() -> None:
    bad = real_data() / "bad"
    config = MCLRecConfig.model_validate({"split": {"file": bad / "leaky_split.csv"}})
    assert lines(bad / "duplicate_rows.csv", config)["split.leak"][0] == "error"


@pytest.mark.data
def test_seen_items_are_masked_where_no_target_ever_repeats() -> None:
    folder = real_data()
    repeat = lines(folder / "amazon_toys_sequences.parquet")["target.repeat"]
    assert repeat[0] == "note"
    assert "0.0% of 148185" in repeat[1]
    assert "stay candidates" in lines(folder / "meds")["target.repeat"][1]


def test_a_file_date_or_a_given_day_is_the_present(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", "x", "2020-01-01"), ("a", "y", "2020-03-01")])
    assert "events.future_time" not in lines(path)
    os.utime(path, (1_580_000_000, 1_580_000_000))  # 2020-01-26
    assert "row 3 of the file" in lines(path)["events.future_time"][1]
    config = MCLRecConfig.model_validate({"data": {"now": "2020-04-01"}})
    assert "events.future_time" not in lines(path, config)


def test_times_in_milliseconds_are_read_and_said(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", "x", 1_577_836_800_000)])
    assert "look like ms" in lines(path)["events.time_unit"][1]
    config = MCLRecConfig.model_validate({"data": {"time_unit": "ms"}})
    assert "events.time_unit" not in lines(path, config)


def test_tied_clinical_events_that_stay_apart_are_warned_of(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", "x", "2020-01-01"), ("a", "y", "2020-01-01")])

    def ties(**data: str) -> tuple[str, str]:
        config = MCLRecConfig.model_validate({"data": {"kind": "clinical", **data}})
        return lines(path, config)["events.ties"]

    assert ties()[0] == "note"
    assert "predicted from its own basket" in ties(basket="flat")[1]


def test_a_missing_path_and_an_unknown_ending_are_findings(tmp_path: Path) -> None:
    assert [one.code for one in check_events(tmp_path / "none.csv")] == ["file.none"]
    other = tmp_path / "a.xlsx"
    other.write_bytes(b"PK")
    assert [one.code for one in check_events(other)] == ["data.format"]
    assert [one.code for one in check_events(other, format="parquet")] == ["parquet.broken"]


def test_findings_hide_file_names_in_what_is_kept(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "ward7.csv", [("a", "x", "2020-01-01")] * 2)
    findings = check(MCLRecConfig(), path)
    assert any("ward7.csv" in one.line() for one in findings)
    assert not any("ward7.csv" in one.line() for one in findings.redacted())
