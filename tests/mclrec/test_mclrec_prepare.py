from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.mclrec.tables import real_data, write_csv

from diptych.config import load
from diptych.errors import DataError
from diptych.prepared import Prepared
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.events import fit_catalogue, order_events
from diptych_mclrec.prepare import prepare
from diptych_mclrec.read import read_events
from diptych_mclrec.sequences import Catalogue, Sequences
from diptych_mclrec.split import split_sequences
from diptych_mclrec.store import load as load_events

ROWS = [
    ("zoe", "x", "2020-01-02"),
    ("ann", "y", "2020-01-01"),
    ("zoe", "y", "2020-01-01"),
    ("zoe", "y", "2020-01-01"),
]


def load_sequences(prepared: Prepared) -> tuple[Sequences, Catalogue]:
    events = load_events(prepared)
    return events.sequences, events.codes


def settings(*sets: str) -> MCLRecConfig:
    return load(MCLRecConfig, sets=sets)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_prepared_folder_gives_the_events_back(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    prepared = prepare(settings(), source, tmp_path / "out")
    sequences, codes = load_sequences(prepared)
    ordered = order_events(read_events(source))
    assert codes == ordered.catalogue
    own = ordered.sequences
    assert sequences.equals(replace(own, subjects=sequences.subjects))
    assert prepared.facts["duplicates"] == 1
    assert prepared.facts["times"] == "absolute"


def test_no_name_of_a_person_and_no_file_name_is_kept(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "ward7.csv", ROWS)
    prepared = prepare(settings(), source, tmp_path / "out")
    assert prepared.index["subject"].str.starts_with("S-").all()
    for name, content in contents(tmp_path / "out").items():
        assert not any(word in content for word in (b"zoe", b"ann", b"ward7")), name


def test_equal_inputs_give_equal_bytes_and_the_second_time_does_nothing(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    prepare(settings(), source, tmp_path / "one")
    prepare(settings(), source, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = (tmp_path / "one" / "events.parquet").stat().st_mtime_ns
    prepare(settings("data.min_item_events=2"), source, tmp_path / "one")
    assert (tmp_path / "one" / "events.parquet").stat().st_mtime_ns == before


def test_other_settings_or_events_prepare_anew(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    first = prepare(settings(), source, tmp_path / "out")
    kept = prepare(settings("data.drop_duplicates=false"), source, tmp_path / "out")
    assert (first.facts["events"], kept.facts["events"]) == (3, 4)
    write_csv(source, ROWS[:2])
    assert prepare(settings(), source, tmp_path / "out").facts["events"] == 2


def test_bad_data_leave_nothing_behind(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [("a", "", "2020-01-01")])
    with pytest.raises(DataError, match=r"events.null_id.*row 2") as refused:
        prepare(settings(), source, tmp_path / "out")
    assert refused.value.findings is not None
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(DataError, match="no such file"):
        prepare(settings(), tmp_path / "none", tmp_path / "out")


def test_clinical_times_are_relative_unless_the_split_cuts_by_time(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    clinical = prepare(settings("data.kind=clinical"), source, tmp_path / "one")
    sequences, _ = load_sequences(clinical)
    assert clinical.facts["times"] == "relative"
    assert sequences.times is not None
    assert sequences.times.tolist() == [0, 86_400 * 10**6, 0]
    dated = prepare(
        settings("data.kind=clinical", "split.kind=global_time"), source, tmp_path / "two"
    )
    assert dated.facts["times"] == "absolute"


def test_a_split_file_becomes_a_column_of_the_index(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    split = write_csv(tmp_path / "s.csv", [("zoe", "train"), ("ann", "test")], "subject,split")
    prepared = prepare(settings(f"split.file={split}"), source, tmp_path / "out")
    assert prepared.index["split"].to_list() == ["train", "test"]


@pytest.mark.data
def test_the_real_meds_folder_keeps_its_splits_and_baskets(tmp_path: Path) -> None:
    prepare(settings(), real_data() / "meds", tmp_path / "out")
    prepared = Prepared.open(tmp_path / "out")
    sequences, codes = load_sequences(prepared)
    assert codes.size == 339
    assert prepared.facts["events"] == len(sequences.items) == 36_044 - 524
    assert sequences.baskets is not None
    counts = dict(prepared.index["split"].value_counts().rows())
    assert sum(counts.values()) == 528
    split = split_sequences(sequences, "subject", parts=prepared.index["split"].to_list())
    assert (len(split.test), len(split.train)) == (59, 420)
    trained = (prepared.index["split"].to_numpy() == "train")[sequences.rows]
    catalogue, encoded = fit_catalogue(sequences, codes, fitted=trained)
    assert catalogue.size == 334
    assert sum(catalogue.counts) == int(trained.sum())
    assert len(encoded.items) == len(sequences.items)


@pytest.mark.data
def test_beauty_prepares_in_the_ids_of_the_published_weights(tmp_path: Path) -> None:
    source = real_data() / "amazon_beauty_sequences.parquet"
    sequences, codes = load_sequences(prepare(settings(), source, tmp_path / "out"))
    assert (len(sequences), codes.size, len(sequences.items)) == (22_363, 12_101, 198_502)
    assert list(codes.names) == [str(number) for number in range(1, 12_102)]
