from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import mne
import numpy as np
import polars as pl
import pytest
from tests.mvcnet.files import CHANNELS, real_data, simulated, write

from diptych.errors import DataError, UsageError
from diptych_mvcnet.check import check
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.prepare import prepare


def config(**data: object) -> MVCNetConfig:
    return MVCNetConfig.model_validate({"data": {"resample_hz": 64.0, **data}})


def cohort(folder: Path) -> Path:
    """Two subjects; the first with two sessions, one of two runs."""
    for n, name in enumerate(("anna/1/1", "anna/1/2", "anna/2/1", "bert/1/1")):
        write(simulated(12, seed=n), folder / f"{name}_raw.fif")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_prepared_trials_are_those_of_a_plain_mne_pipeline(tmp_path: Path) -> None:
    raw = simulated(12)
    prepared = prepare(config(), write(raw, tmp_path / "a_raw.fif"), tmp_path / "p")
    plain = raw.copy().filter(8, 30, verbose="error").resample(64.0, verbose="error")
    events, ids = mne.events_from_annotations(plain, verbose="error")
    epochs = mne.Epochs(
        plain, events, ids, 0.5, 3.5 - 1 / 64, baseline=None, preload=True, verbose="error"
    )
    array = prepared.array("epochs")
    assert array.dtype == np.float32
    assert array.shape == (12, len(CHANNELS), 192)
    np.testing.assert_allclose(array, epochs.get_data() * 1e6, atol=2e-3)
    assert prepared.index["label"].to_list() == ["left_hand", "right_hand"] * 6
    assert prepared.index["y"].to_list() == [0, 1] * 6
    np.testing.assert_allclose(prepared.index["onset_s"], 3.0 + 5 * np.arange(12))


def test_both_ends_are_kept_where_the_window_is_closed(tmp_path: Path) -> None:
    path = write(simulated(10), tmp_path / "a_raw.fif")
    assert prepare(config(), path, tmp_path / "p").facts["n_times"] == 192
    closed = prepare(config(window_closed=True), path, tmp_path / "q")
    assert closed.facts["n_times"] == 193 == closed.array("epochs").shape[2]


def test_rows_are_in_time_within_subject_session_and_run(tmp_path: Path) -> None:
    index = prepare(config(), cohort(tmp_path / "data"), tmp_path / "p").index
    assert index["item"].to_list() == list(range(48))
    order = ["session", "run", "trial"]
    for (_,), rows in index.group_by(["subject"], maintain_order=True):
        assert rows.select(order).equals(rows.sort(order).select(order))
    runs = index.select("subject", "session", "run").unique(maintain_order=True)
    assert runs["session"].to_list() == ["1", "1", "2", "1"]
    assert runs["run"].to_list() == ["1_raw", "2_raw", "1_raw", "1_raw"]
    assert index["trial"].to_list() == list(range(12)) * 4


def test_nothing_that_is_written_holds_a_name_a_path_or_a_date(tmp_path: Path) -> None:
    source = cohort(tmp_path / "hospital")
    prepare(config(), source, tmp_path / "p")
    everything = b"".join(contents(tmp_path / "p").values())
    for word in (b"anna", b"bert", b"hospital", b"_raw.fif", str(tmp_path).encode()):
        assert word not in everything
    subjects = pl.read_parquet(tmp_path / "p" / "index.parquet")["subject"].unique().to_list()
    assert all(name.startswith("S-") and len(name) == 10 for name in subjects)


def test_preparing_twice_changes_nothing(tmp_path: Path) -> None:
    source = cohort(tmp_path / "data")
    prepare(config(), source, tmp_path / "p")
    before = contents(tmp_path / "p")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    prepare(config(), source, tmp_path / "p")
    assert contents(tmp_path / "p") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()} == times


def test_the_users_folder_stays_as_it_was(tmp_path: Path) -> None:
    source = cohort(tmp_path / "data")
    before = contents(source)
    prepare(config(anonymise=True), source, tmp_path / "p")
    assert contents(source) == before


def test_one_new_file_leaves_the_other_trials_as_they_were(tmp_path: Path) -> None:
    source = cohort(tmp_path / "data")
    first = np.array(prepare(config(), source, tmp_path / "p").array("epochs"))
    write(simulated(12, seed=9), source / "bert/2/1_raw.fif")
    grown = prepare(config(), source, tmp_path / "p")
    fresh = prepare(config(), source, tmp_path / "fresh")
    np.testing.assert_array_equal(grown.array("epochs")[:48], first)
    np.testing.assert_array_equal(grown.array("epochs"), fresh.array("epochs"))
    columns = sorted(fresh.index.columns)
    assert grown.index.select(columns).equals(fresh.index.select(columns))


def test_a_file_that_moves_to_another_session_says_so(tmp_path: Path) -> None:
    source = cohort(tmp_path / "data")
    prepare(config(), source, tmp_path / "p")
    (source / "bert/1").rename(source / "bert/2")
    index = prepare(config(), source, tmp_path / "p").index
    assert index["session"].to_list()[-12:] == ["2"] * 12


def test_another_filter_prepares_anew(tmp_path: Path) -> None:
    path = write(simulated(10), tmp_path / "a_raw.fif")
    first = np.array(prepare(config(), path, tmp_path / "p").array("epochs"))
    second = prepare(config(filter={"band": [8.0, 20.0]}), path, tmp_path / "p").array("epochs")
    assert not np.allclose(first, second)


def test_data_with_errors_leave_no_folder(tmp_path: Path) -> None:
    source = cohort(tmp_path / "data")
    (source / "bert/1/2.edf").write_bytes(b"")
    with pytest.raises(DataError) as error:
        prepare(config(), source, tmp_path / "p")
    assert [one.code for one in error.value.findings or ()][:1] == ["file.empty"]
    assert not (tmp_path / "p").exists()
    assert prepare(config(on_error="skip"), source, tmp_path / "p").index.height == 48


def test_rejected_trials_stay_in_the_index_and_are_counted(tmp_path: Path) -> None:
    raw = simulated(12)
    raw.annotations.append(13.0, 1.5, "BAD_muscle")
    prepared = prepare(config(), write(raw, tmp_path / "a_raw.fif"), tmp_path / "p")
    assert prepared.index["rejected"].to_list() == [False, False, True] + [False] * 9
    assert prepared.facts["rejected"] == {"bad_span": 1}


def test_the_users_split_is_a_column_of_the_index(tmp_path: Path) -> None:
    source = cohort(tmp_path / "data")
    split = tmp_path / "split.csv"
    split.write_text("subject,session,split\nanna,1,train\nanna,2,validation\nbert,01,test\n")
    chosen = MVCNetConfig.model_validate(
        {"data": {"resample_hz": 64.0}, "split": {"kind": "fixed", "file": str(split)}}
    )
    prepared = prepare(chosen, source, tmp_path / "p")
    expected = ["train"] * 24 + ["validation"] * 12 + ["test"] * 12
    assert prepared.index["split"].to_list() == expected
    split.write_text(split.read_text().replace("bert,01,test", "bert,1,train"))
    with pytest.raises(DataError):
        prepare(chosen, source, tmp_path / "p")


def test_facts_describe_the_trials(tmp_path: Path) -> None:
    path = write(simulated(10, channels=("C3", "Cz", "C4", "CP3")), tmp_path / "a_raw.fif")
    facts = prepare(config(), path, tmp_path / "p").facts
    assert facts["ch_names"] == ["C3", "Cz", "C4", "CP3"]
    assert facts["unpaired"] == ["CP3"]
    assert facts["classes"] == ["left_hand", "right_hand"]
    assert facts["class_mirror"] == {"left_hand": "right_hand", "right_hand": "left_hand"}
    assert (facts["sfreq"], facts["recorded_hz"], facts["window"]) == (64.0, [128.0], [0.5, 3.5])
    assert facts["filter"] == {"band": [8.0, 30.0], "phase": "zero", "notch": None}
    assert json.loads(json.dumps(facts)) == facts


def test_several_subjects_in_one_npz_file_get_their_own_pseudonyms(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "x.npz",
        X=draw.normal(0, 20, (40, 3, 100)),
        y=np.arange(40) % 2,
        ch_names=["C3", "Cz", "C4"],
        sfreq=100.0,
        subject=["anna"] * 20 + ["bert"] * 20,
    )
    prepared = prepare(config(resample_hz=None), tmp_path / "x.npz", tmp_path / "p")
    assert prepared.index["subject"].n_unique() == 2
    assert prepared.index["trial"].to_list() == list(range(20)) * 2
    assert b"anna" not in b"".join(contents(tmp_path / "p").values())
    # Nothing is filtered: the trials are the file's own.
    draw = np.random.default_rng(0)
    expected = draw.normal(0, 20, (40, 3, 100)).astype(np.float32)
    np.testing.assert_array_equal(prepared.array("epochs"), expected)


def test_a_bids_data_set_is_read_with_its_events(tmp_path: Path) -> None:
    mne_bids = pytest.importorskip("mne_bids")
    for n, subject in enumerate(("01", "02")):
        raw = mne.io.read_raw_fif(
            write(simulated(12, seed=n), tmp_path / f"{subject}_raw.fif"), verbose="error"
        )
        raw.set_annotations(
            mne.Annotations(
                raw.annotations.onset,
                raw.annotations.duration,
                [{"T1": "left", "T2": "right"}[text] for text in raw.annotations.description],
            )
        )
        raw.info["line_freq"] = 50
        entry = mne_bids.BIDSPath(subject=subject, task="mi", root=tmp_path / "bids")
        mne_bids.write_raw_bids(
            raw, entry, format="BrainVision", allow_preload=False, verbose="error"
        )
    events = {"left_hand": ["left"], "right_hand": ["right"]}
    assert not check(config(events=events), tmp_path / "bids").errors
    prepared = prepare(config(events=events), tmp_path / "bids", tmp_path / "p")
    assert prepared.index["subject"].n_unique() == 2
    assert prepared.index["label"].to_list() == ["left_hand", "right_hand"] * 12


def test_a_missing_optional_package_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mne_bids", None)
    monkeypatch.setitem(sys.modules, "moabb", None)
    write(simulated(10), tmp_path / "sub-1" / "eeg" / "sub-1_task-mi_eeg.vhdr")
    (tmp_path / "dataset_description.json").write_text("{}")
    with pytest.raises(UsageError, match=r"diptych-mvcnet\[bids\]"):
        check(config(), tmp_path)
    with pytest.raises(UsageError, match=r"diptych-mvcnet\[moabb\]"):
        check(config(moabb="BNCI2014_001"), tmp_path)


def stand_in_for_moabb(monkeypatch: pytest.MonkeyPatch, *, complete: bool) -> None:
    """What is called of MOABB, over two simulated subjects."""
    import socket

    class Data:
        subject_list = (1, 2)

    class Paradigm:
        def __init__(self, **settings: object) -> None:
            self.settings = settings

        def get_data(
            self, _: object, subjects: list[int], return_epochs: bool
        ) -> tuple[object, ...]:
            if not complete:
                socket.getaddrinfo("data.example", 443)
            raw = simulated(20, seed=subjects[0])
            events, ids = mne.events_from_annotations(raw, verbose="error")
            window = (self.settings["tmin"], self.settings["tmax"])
            epochs = mne.Epochs(
                raw, events, ids, *window, baseline=None, preload=True, verbose="error"
            )
            labels = np.array(["left_hand", "right_hand"] * 10)
            column = types.SimpleNamespace(to_numpy=lambda dtype: np.full(20, "0", dtype=dtype))
            table = {"session": column, "run": column}
            return epochs, labels, table

    def module(name: str, **content: object) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    datasets = module("moabb.datasets", Simulated=Data)
    paradigms = module("moabb.paradigms", MotorImagery=Paradigm)
    module("moabb", datasets=datasets, paradigms=paradigms)


def test_moabb_gives_subjects_and_never_opens_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_moabb(monkeypatch, complete=True)
    chosen = config(moabb="Simulated", resample_hz=None)
    prepared = prepare(chosen, tmp_path, tmp_path / "p")
    assert prepared.index["subject"].n_unique() == 2
    assert prepared.facts["filter"]["band"] == [8.0, 30.0]
    assert prepared.array("epochs").shape == (40, len(CHANNELS), 385)
    stand_in_for_moabb(monkeypatch, complete=False)
    with pytest.raises(UsageError, match=r"allow_download"):
        check(chosen, tmp_path)
    with pytest.raises(UsageError, match="no MOABB data set"):
        check(config(moabb="Unknown"), tmp_path)


@pytest.mark.data
def test_the_real_recordings_give_forty_five_trials_of_each_subject(tmp_path: Path) -> None:
    chosen = config(pattern="S{subject:03d}R{run:02d}.edf", resample_hz=100.0)
    source = real_data() / "eegmmidb"
    assert not check(chosen, source).errors
    prepared = prepare(chosen, source, tmp_path / "p")
    assert prepared.array("epochs").shape == (450, 21, 300)
    counts = prepared.index.filter(~pl.col("rejected")).group_by("subject").len()
    assert counts["len"].to_list() == [45] * 10
    assert prepared.index["run"].unique(maintain_order=True).to_list() == ["4", "8", "12"]
    text = (tmp_path / "p" / "manifest.json").read_text() + json.dumps(dict(prepared.facts))
    assert "S001" not in text
