from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from tests.mclrec.tables import histories, real_data, write_csv

from diptych.errors import DataError
from diptych_mclrec.config import EventDataSection
from diptych_mclrec.events import Ordered, order_events
from diptych_mclrec.read import find_format, read_events, read_source
from diptych_mclrec.times import parse_times

ROWS = [(name, item) for name, items in histories().items() for item in items]


def csv(folder: Path) -> Path:
    return write_csv(folder / "a.csv", ROWS, "user_id,item_id")


def packed_csv(folder: Path) -> Path:
    path = folder / "a.csv.gz"
    path.write_bytes(gzip.compress(csv(folder).read_bytes()))
    return path


def semicolons(folder: Path) -> Path:
    path = folder / "a.csv"
    path.write_text("item;extra;person_id\n" + "".join(f"{i};x;{s}\n" for s, i in ROWS))
    return path


def recbole(folder: Path) -> Path:
    path = folder / "a.inter"
    lines = ["user_id:token\titem_id:token", *("\t".join(row) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n")
    return path


def sequences(folder: Path) -> Path:
    path = folder / "a.txt"
    path.write_text("".join(f"{s} {' '.join(i)}\n" for s, i in histories().items()))
    return path


def pairs(folder: Path) -> Path:
    path = folder / "a.txt"
    path.write_text("".join(f"{s} {i}\n" for s, i in ROWS))
    return path


def parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    pl.DataFrame(ROWS, schema=["subject_id", "code"], orient="row").write_parquet(path)
    return path


def lists(folder: Path) -> Path:
    path = folder / "a.parquet"
    columns = {
        "user_id": list(histories()),
        "item_ids": [[*map(int, i)] for i in histories().values()],
    }
    pl.DataFrame(columns).write_parquet(path)
    return path


def same(one: Ordered, other: Ordered) -> bool:
    return one.sequences.equals(other.sequences) and one.catalogue.names == other.catalogue.names


@pytest.mark.parametrize(
    "write", [packed_csv, semicolons, recbole, sequences, pairs, parquet, lists]
)
def test_every_form_of_equal_data_reads_equal(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    expected = order_events(read_events(csv(tmp_path)))
    assert same(order_events(read_events(write(tmp_path))), expected)
    assert expected.sequences.subjects.tolist() == list(histories())
    assert expected.catalogue.decode(expected.sequences.items) == [item for _, item in ROWS]


def test_dated_events_read_equal_whatever_way_times_are_written(tmp_path: Path) -> None:
    seconds = [1_577_836_800 + 3600 * row for row in range(9)]
    texts = [datetime.fromtimestamp(one).astimezone().isoformat() for one in seconds]
    rows = list(zip(*zip(*ROWS, strict=True), texts, strict=True))
    by_text = order_events(read_events(write_csv(tmp_path / "t.csv", rows)))
    for factor in (1, 1000, 1_000_000):
        rows = [(*row, factor * second) for row, second in zip(ROWS, seconds, strict=True)]
        by_number = order_events(read_events(write_csv(tmp_path / "n.csv", rows)))
        assert same(by_text, by_number)
    assert by_text.sequences.times is not None
    assert by_text.sequences.times[0] == seconds[0] * 10**6


@pytest.mark.parametrize(
    ("texts", "bad"),
    [
        (["2020-01-01T08:00:00", "2020-01-01", "2020-01-01 08:00", "2020-13-01"], 1),
        (["2020-01-01T08:00:00Z", "2020-01-01T08:00:00+02:00"], 0),
        (["12.5", "13", "14", "nan", "x"], 2),
        (["1e400", "3", "1e300"], 2),
    ],
)
def test_only_cells_that_are_no_time_are_bad(texts: list[str], bad: int) -> None:
    parsed = parse_times(pl.Series(texts))
    assert int(parsed.is_bad.sum()) == bad
    assert parsed.times.null_count() == bad


def test_zones_become_utc_and_a_mixture_is_refused(tmp_path: Path) -> None:
    zoned = parse_times(pl.Series(["2020-01-01T08:00:00+02:00"]))
    assert zoned.times.to_list() == [datetime(2020, 1, 1, 6)]
    rows = [("a", "x", "2020-01-01T08:00:00Z"), ("a", "y", "2020-01-02T08:00:00")]
    with pytest.raises(DataError, match="some times have a zone and some have none"):
        read_events(write_csv(tmp_path / "m.csv", rows))


def test_a_form_of_time_can_be_said(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", [("a", "x", "31/12/2020")])
    with pytest.raises(DataError, match=r"row 2 of the file \(data row 1\).*31/12/2020"):
        read_events(path)
    table = read_events(path, time_format="%d/%m/%Y")
    assert table.frame["time"].to_list() == [datetime(2020, 12, 31)]


def test_a_short_row_is_named_and_not_filled_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('subject_id,item_id,time\na,"x,1",2020-01-01\n\na,y\nb,z,2020-01-02,9\n')
    with pytest.raises(DataError, match="line 4 has 2 of 3 fields; line 5 has 4 of 3 fields"):
        read_events(path)


def test_blank_lines_are_no_events(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text("subject_id,item_id,time\na,x,2020-01-01\n\na,y,2020-01-02\n")
    assert read_events(path).frame["row"].to_list() == [2, 4]


def test_another_encoding_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_bytes("subject_id,item_id,time\na,médicament,2020-01-01\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"row 2 of the file: byte 27 \(0xe9\) is not UTF-8"):
        read_events(path)
    assert read_events(path, encoding="latin-1").frame["item"].to_list() == ["médicament"]


def test_wide_encodings_and_broken_packs_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_bytes("subject_id,item_id,time\na,茶,2020-01-01\n".encode("utf-16"))
    assert read_events(path, encoding="utf-16").frame["item"].to_list() == ["茶"]
    packed = tmp_path / "p.csv.gz"
    packed.write_bytes(b"\xff no gzip")
    with pytest.raises(DataError, match=r"events\.unreadable: p\.csv\.gz"):
        read_events(packed, encoding="latin-1")


def test_an_undecodable_byte_behind_a_ragged_row_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "u.csv"
    path.write_bytes(b"subject_id,item_id\na,b,c\na,\xff\n")
    with pytest.raises(DataError, match=r"events\.encoding"):
        read_events(path)


def test_a_column_that_looks_like_time_is_not_passed_over(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "w.csv", [("a", "x", "2020-01-01")], "user_id,item_id,when")
    with pytest.raises(DataError, match="'when' looks like one"):
        read_events(path)
    assert read_events(path, columns={"time": "when"}).frame["time"].null_count() == 0


def test_a_table_without_times_is_read_with_a_warning(tmp_path: Path) -> None:
    reading = read_source(csv(tmp_path), EventDataSection())
    warned = [one for one in reading.findings if one.severity == "warning"]
    assert [one.code for one in warned] == ["events.columns"]
    assert "the order of the file is taken" in warned[0].found


def test_a_folder_of_tables_is_read_together_and_a_bad_one_can_be_left_out(
    tmp_path: Path,
) -> None:
    write_csv(tmp_path / "a.csv", [("ann", "x", "2020-01-01")])
    write_csv(tmp_path / "b.csv", [("ann", "y", "2020-13-01")])
    reading = read_source(tmp_path, EventDataSection())
    assert reading.table is None
    kept = read_source(tmp_path, EventDataSection(on_error="skip"))
    assert kept.table is not None
    assert kept.table.frame["item"].to_list() == ["x"]
    assert any("the file is left out" in one.fix for one in kept.findings)
    (tmp_path / "c.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    form, findings = find_format(tmp_path, EventDataSection())
    assert form is None
    assert findings[0].code == "data.format"


def omop(folder: Path, **tables: pl.DataFrame) -> Path:
    person = pl.DataFrame({"PERSON_ID": [1, 2], "YEAR_OF_BIRTH": [1980, 1990]})
    for name, table in {"person": person, **tables}.items():
        table.write_csv(folder / f"{name.upper()}.csv")
    return folder


def drugs(concepts: list[int]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "person_id": [1, 1, 2],
            "drug_concept_id": concepts,
            "drug_exposure_start_date": ["2020-01-01", "2020-01-01", "1970-05-05"],
            "drug_source_value": ["a", "b", "c"],
            "visit_occurrence_id": [None, None, 7],
        }
    )


def test_omop_in_upper_case_csv_reads_with_days_as_baskets(tmp_path: Path) -> None:
    reading = read_source(omop(tmp_path, drug_exposure=drugs([5, 0, 6])), EventDataSection())
    assert reading.table is not None
    assert reading.table.frame["item"].to_list() == ["drug/5", "drug/6"]
    assert reading.table.frame["basket"].to_list()[1] == 7
    codes = {one.code: one.severity for one in reading.findings}
    assert codes == {
        "omop.unmapped": "warning",
        "omop.before_birth": "warning",
        "data.kind": "note",
    }


def test_unmapped_codes_can_be_kept_and_too_many_stop(tmp_path: Path) -> None:
    folder = omop(tmp_path, drug_exposure=drugs([0, 0, 6]))
    stopped = read_source(folder, EventDataSection())
    first = stopped.findings[0]
    assert (first.severity, first.code) == ("error", "omop.unmapped")
    kept = read_events(folder, omop={"unmapped": "source_value"})
    assert kept.frame["item"].to_list() == ["drug/src:a", "drug/src:b", "drug/6"]
    assert kept.frame["basket"][0] == kept.frame["basket"][1] != kept.frame["basket"][2]


def test_missing_tables_and_columns_of_omop_are_named(tmp_path: Path) -> None:
    found = read_source(omop(tmp_path), EventDataSection()).findings
    assert [one.code for one in found] == ["omop.missing_table"]
    found = read_source(
        omop(tmp_path, drug_exposure=drugs([1, 2, 3]).drop("drug_concept_id")), EventDataSection()
    ).findings
    assert [one.code for one in found] == ["omop.columns"]


@pytest.mark.data
def test_the_real_omop_folder_has_its_published_counts() -> None:
    table = read_events(real_data() / "omop_synthea27")
    rows = {source.path.stem: source.rows for source in table.sources}
    counts = table.frame.group_by(table=pl.col("item").str.split("/").list.first()).agg(
        pl.len(), pl.col("subject").n_unique()
    )
    assert dict(counts.select("table", "len").rows()) == {
        "drug": 883,
        "condition": 470,
        "procedure": 1649,
    }
    assert rows["drug_exposure"] == 883
    assert dict(counts.select("table", "subject").rows())["drug"] == 26
    assert table.kind == "clinical"


@pytest.mark.data
def test_the_real_meds_folder_has_its_published_counts_and_splits() -> None:
    table = read_events(real_data() / "meds")
    rows = {source.path.parent.name: source.rows for source in table.sources}
    assert (rows["train"], rows["tuning"], rows["held_out"]) == (29_381, 3_232, 4_586)
    parts = list(table.splits.values())
    assert [parts.count(part) for part in ("train", "validation", "test")] == [434, 49, 60]
    assert table.frame.height == 36_044
    only = read_events(real_data() / "meds", meds={"codes": ["RxNorm/*"]})
    assert set(only.frame["item"].str.split("/").list.first()) == {"RxNorm"}


@pytest.mark.data
def test_meds_and_synthea_hold_the_same_codes() -> None:
    meds, synthea = (read_events(real_data() / name) for name in ("meds", "synthea"))
    assert (
        meds.frame["item"]
        .value_counts(sort=True)
        .sort("item")
        .equals(synthea.frame["item"].value_counts(sort=True).sort("item"))
    )


@pytest.mark.data
def test_the_first_beauty_users_read_equal_from_all_forms(tmp_path: Path) -> None:
    frame = pl.read_parquet(real_data() / "amazon_beauty_sequences.parquet").head(400)
    frame.write_parquet(tmp_path / "s.parquet")
    flat = frame.explode("item_ids").rename({"item_ids": "item_id"})
    flat.write_csv(tmp_path / "c.csv")
    flat.write_parquet(tmp_path / "p.parquet")
    text = "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in frame.rows())
    (tmp_path / "t.txt").write_text(text)
    pairs_text = "".join(f"{user} {item}\n" for user, item in flat.rows())
    (tmp_path / "pairs.txt").write_text(pairs_text)
    expected = order_events(read_events(real_data() / "amazon_beauty_first400.inter.gz"))
    for name in ("s.parquet", "c.csv", "p.parquet", "t.txt", "pairs.txt"):
        assert same(order_events(read_events(tmp_path / name)), expected), name
    ids = [int(name) for name in expected.catalogue.names]
    assert ids == list(range(1, len(ids) + 1))  # their own numbers are already by appearance
