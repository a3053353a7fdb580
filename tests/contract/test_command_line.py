"""What every pipeline promises on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import RECIPE, Subject

HEAVY = (
    *("torch", "lightning_fabric", "scipy", "matplotlib", "mne", "sklearn", "pandas"),
    *("monai", "nibabel", "pydicom", "SimpleITK", "skimage"),
)


def test_the_demo_stays_within_90_seconds_of_two_cores_and_2_gigabytes(subject: Subject) -> None:
    seen = json.loads((subject.demo / "call.json").read_text())
    # where other tests share the cores, the work has to fit, not the time on the wall
    assert seen["seconds"] < 90 or seen["cpu_seconds"] < 2 * 90
    assert seen["peak"] < 2e9


@pytest.mark.parametrize("words", [["list"], ["NAME", "--help"], ["NAME", "train", "--help"]])
def test_list_and_help_import_nothing_heavy(subject: Subject, words: list[str]) -> None:
    words = [subject.name if word == "NAME" else word for word in words]
    code = (
        "import sys; from diptych.cli import run; run(sys.argv[1:]); "
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, env=subject.environment, check=False,
    )  # fmt: skip
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_an_unknown_key_exits_2_with_the_nearest_name(subject: Subject, tmp_path: Path) -> None:
    call = subject.call("train", subject.data, "--out", tmp_path / "run", "--set", "train.epoch=3")
    assert call.code == 2
    assert "train.epochs" in call.err
    assert not (tmp_path / "run").exists()


def test_a_wrong_value_in_a_file_names_file_and_line(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train:\n  epochs: many\n  batch: 0\n")
    call = subject.call(
        "train", subject.data, "--out", tmp_path / "run", "--config", tmp_path / "my.yaml"
    )
    assert call.code == 2
    assert "my.yaml, line 2, train.epochs" in call.err
    assert "my.yaml, line 3, train.batch" in call.err


@pytest.mark.parametrize("kind", ["missing", "empty folder", "empty file", "a web page"])
def test_data_that_are_none_exit_3_and_leave_nothing(
    subject: Subject, tmp_path: Path, kind: str
) -> None:
    data = tmp_path / "Übung mit Leerzeichen"
    if kind == "empty folder":
        data.mkdir()
    if kind == "empty file":
        data.write_bytes(b"")
    if kind == "a web page":
        data.write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    for verb, *rest in (("check",), ("prepare", "--out", "P"), ("train", "--out", "R")):
        out = [tmp_path / word if len(word) == 1 else word for word in rest]
        call = subject.call(verb, data, *out)
        assert call.code == 3, call.err
        assert "Traceback" not in call.err + call.out
        assert len((call.err + call.out).strip()) > 20
    assert {entry.name for entry in tmp_path.iterdir()} <= {data.name}


def test_check_speaks_json_alone(subject: Subject) -> None:
    call = subject.call("check", subject.data, "--json")
    assert call.code == 0
    found = json.loads(call.out)
    assert set(found) == {"findings", "errors", "warnings"}
    assert found["errors"] == 0


def test_an_existing_run_is_never_overwritten(subject: Subject) -> None:
    before = {path: path.stat().st_mtime_ns for path in subject.run.rglob("*")}
    call = subject.train(subject.run)
    assert call.code == 2
    assert "--resume" in call.err
    assert before == {path: path.stat().st_mtime_ns for path in subject.run.rglob("*")}


def test_nothing_is_written_into_the_data_folder(subject: Subject, tmp_path: Path) -> None:
    before = sorted(subject.data.rglob("*"))
    for verb in ("train", "prepare"):
        call = subject.call(verb, subject.data, "--out", subject.data / "new", *RECIPE)
        assert call.code == 2
        assert "inside the data folder" in call.err
    assert sorted(subject.data.rglob("*")) == before


def test_every_recipe_can_be_printed_saved_and_used(subject: Subject, tmp_path: Path) -> None:
    printed = subject.call("recipe", "demo")
    assert printed.code == 0
    (tmp_path / "mine.yaml").write_text(printed.out)
    call = subject.call("check", subject.data, "--config", tmp_path / "mine.yaml")
    assert call.code == 0, call.err


def test_predict_reads_the_sample_and_refuses_to_overwrite(
    subject: Subject, tmp_path: Path
) -> None:
    out = tmp_path / "prediction.csv"
    first = subject.call("predict", subject.run, subject.one_input, "--out", out)
    assert first.code == 0, first.err
    written = [path for path in (out, *out.rglob("*")) if path.is_file()]
    assert min(path.stat().st_size for path in written) > 20
    assert subject.call("predict", subject.run, subject.one_input, "--out", out).code == 2


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_the_exported_graph_passes_its_parity_check(
    subject: Subject, tmp_path: Path, form: str
) -> None:
    out = tmp_path / f"model.{form}"
    call = subject.call("export", subject.run, "--format", form, "--out", out)
    assert call.code == 0, call.err
    assert out.stat().st_size > 0
    assert [entry.name for entry in tmp_path.iterdir()] == [out.name]
