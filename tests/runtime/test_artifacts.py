"""Artifacts come back as they were saved."""

import datetime

import numpy as np
import polars as pl
import pytest

from diptych import artifacts
from diptych.errors import DataError


def test_every_kind_of_artifact_survives(tmp_path):
    table = pl.DataFrame({"name": ["a", None], "value": [1.5, float("nan")]})
    arrays = {"file": np.arange(6).reshape(2, 3), "words": np.array(["ä", "bc"]), "x": np.ones(())}
    saved = {
        "table": table,
        "array": np.arange(4, dtype=np.float16),
        "flags.v2": np.array([True, False]),
        "arrays": arrays,
        "json": {"a": [1, 2.5, None, "ü"], "b": {"c": True}},
        "empty": {},
        "number": 3,
    }
    artifacts.save(saved, tmp_path / "deep" / "artifacts")
    loaded = artifacts.load(tmp_path / "deep" / "artifacts")
    assert set(loaded) == set(saved)
    assert loaded["table"].equals(table)
    for name in ("array", "flags.v2"):
        assert loaded[name].dtype == saved[name].dtype
        assert (loaded[name] == saved[name]).all()
    for key, array in arrays.items():
        assert loaded["arrays"][key].dtype == array.dtype
        assert (loaded["arrays"][key] == array).all()
    assert {name: loaded[name] for name in ("json", "empty", "number")} == {
        "json": saved["json"],
        "empty": {},
        "number": 3,
    }


def test_json_numbers_that_are_not_finite_become_null_and_numpy_scalars_become_plain(tmp_path):
    artifacts.save(
        {"a": {"x": [float("inf"), np.float32(0.5), np.int64(3)], "t": (1, 2)}}, tmp_path
    )
    assert artifacts.load(tmp_path) == {"a": {"x": [None, 0.5, 3], "t": [1, 2]}}


def test_saving_again_replaces_the_whole_folder_and_gives_equal_bytes(tmp_path):
    folder = tmp_path / "artifacts"
    artifacts.save({"old": 1, "arrays": {"a": np.ones(3)}}, folder)
    before = (folder / "arrays.npz").read_bytes()
    artifacts.save({"arrays": {"a": np.ones(3)}}, folder)
    assert [file.name for file in folder.iterdir()] == ["arrays.npz"]
    assert (folder / "arrays.npz").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifacts"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array([object()]), "python objects"),
        ({"a": np.array([None])}, "python objects"),
        ({"when": datetime.date(2000, 1, 1)}, "a.when: is a date"),
        ({1: "a"}, "key 1 is no string"),
    ],
)
def test_what_would_need_pickle_is_refused_and_nothing_is_left(tmp_path, value, says):
    artifacts.save({"a": 1}, tmp_path / "artifacts")
    with pytest.raises(TypeError, match=says):
        artifacts.save({"a": value}, tmp_path / "artifacts")
    assert artifacts.load(tmp_path / "artifacts") == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifacts"]


@pytest.mark.parametrize("name", ["../a", "", ".hidden", "a/b", "a\\b"])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="in its name"):
        artifacts.save({name: 1}, tmp_path / "artifacts")


@pytest.mark.parametrize("name", ["a.parquet", "a.npy", "a.npz", "a.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK damaged")
    with pytest.raises(DataError, match=name):
        artifacts.load(tmp_path)


def test_a_pickled_array_is_never_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy"):
        artifacts.load(tmp_path)


def test_no_folder_means_no_artifacts(tmp_path):
    assert artifacts.load(tmp_path / "absent") == {}
