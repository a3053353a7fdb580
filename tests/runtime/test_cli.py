"""The command line: verbs, exit codes, words for the user, and what it may import."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest

from diptych import api, cli, installed, verbs
from diptych.errors import DataError, InterruptedRun, TrainingError, UsageError
from diptych.findings import Finding, Findings

PACKAGE = {
    "config.py": """
        from pydantic import Field

        from diptych.config import DataSection, PredictSection, RunSection, Section, TrainSection

        class Predict(PredictSection):
            box: tuple[int, ...] = Field(
                (), description="Corners.",
                json_schema_extra={"option": "--box", "verbs": ["predict"]},
            )

        class Config(Section):
            data: DataSection = Field(DataSection(), description="Data.")
            train: TrainSection = Field(TrainSection(), description="Loop.")
            predict: Predict = Field(Predict(), description="Prediction.")
            run: RunSection = Field(RunSection(), description="Run.")

        class Listen(Section):
            port: int = Field(description="Port to listen at.")
            loud: bool = Field(False, description="Say more.")
            only_these: tuple[str, ...] = Field((), description="Names.")
        """,
    "pipeline.py": """
        from diptych.contract import Metric, Pipeline, Verb, lazy

        from toy_wheel.config import Config, Listen

        here = "toy_wheel.work:"
        PIPELINE = Pipeline(
            name="toy", title="A toy", subject="person", config=Config,
            metrics={"accuracy": Metric("Accuracy", "%", "higher", headline=True)},
            check=lazy(here + "check"), prepare=lazy(here + "prepare"), plan=lazy(here + "plan"),
            modules=lazy(here + "modules"), build=lazy(here + "build"),
            evaluate=lazy(here + "evaluate"), sample=lazy(here + "sample"),
            predict=lazy(here + "predict"),
            verbs={
                "listen": Verb("Listen.", "run", lazy(here + "listen"), Listen),
                "tidy": Verb("Tidy up.", "nothing", lazy(here + "tidy"), Listen),
            },
        )
        """,
    "recipes/demo.yaml": "# demo: quick words.\ntrain: {epochs: 1}\n",
    "recipes/fast.yaml": "# In minutes.\n# Second line.\ntrain: {epochs: 5}\n",
    "__init__.py": "",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("wheel")
    for name, text in PACKAGE.items():
        path = folder / "toy_wheel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    information = folder / "diptych_toy-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: diptych-toy\nVersion: 0.1.0"
    )
    points = "[diptych.pipelines]\ntoy = toy_wheel.pipeline:PIPELINE\n"
    (information / "entry_points.txt").write_text(points)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_wheel"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def elsewhere(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MagicMock:
    """The verbs, replaced by recorders with the same signatures."""
    recorder = MagicMock()
    names = ("check", "prepare", "train", "evaluate", "predict", "compare", "report", "sample")
    for name in (*names, "demo", "run_verb", "open_model"):
        fake = create_autospec(getattr(verbs, name))
        recorder.attach_mock(fake, name)
        monkeypatch.setattr(verbs, name, fake)
    for name in ("check", "prepare", "predict", "run_verb"):
        getattr(recorder, name).return_value = Findings()
    recorder.train.return_value = recorder.evaluate.return_value = tmp_path / "run"
    recorder.compare.return_value = "table"
    return recorder


def diptych(words: str) -> int:
    return cli.run(words.split())


ERROR = Finding("error", "file.cut", "für a.edf", "ends early", "copy it again")
NOTE = Finding("note", "file.old", "b.edf", "is old", "nothing to do")


def test_list_names_each_pipeline_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list"]) == 0
    assert "toy          A toy\n" in capsys.readouterr().out


def test_a_broken_pipeline_is_listed_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = metadata.EntryPoint("broken", "no_such_module:PIPELINE", installed.GROUP)
    whole = installed.points()
    monkeypatch.setattr(installed, "points", lambda: {"broken": broken, **whole})
    assert cli.run(["list"]) == cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert "broken       cannot be loaded: No module named 'no_such_module'" in out
    assert "A toy" in out


def test_a_verb_without_callable_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["toy", "--help"]) == 0
    shown = capsys.readouterr().out
    verbs_shown = [line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line]
    assert verbs_shown == [
        "demo", "sample", "recipe", "check", "prepare", "train", "evaluate", "predict", "compare",
        "report", "listen", "tidy",
    ]  # fmt: skip
    assert cli.run(["toy", "export", "RUN", "--format", "onnx", "--out", "a"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["toyy"], "no pipeline 'toyy' is installed: did you mean 'toy'?"),
        (["lst"], "no command 'lst': did you mean 'list'?"),
        (["toy", "trian"], "Did you mean 'train'?"),
        (["toy", "train", "data"], "Missing option '--out'"),
        (["toy", "compare", "data"], "compare: needs two runs or more"),
        (["toy", "report", "gone"], "gone: no such run folder or file of weights"),
        (["toy", "check", "data", "--config", "gone.yaml"], "gone.yaml: cannot be read"),
        (["toy", "check", "data", "--recipe", "fats"], "nearest valid name: fast"),
        (
            ["toy", "train", "data", "--out", "run", "--init-partial"],
            "--init-partial: needs --init",
        ),
        (
            ["toy", "check", "data", "--set", "train.epoch=3"],
            "--set train.epoch=3, train.epoch: unknown key; nearest valid name: train.epochs",
        ),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], called: MagicMock
) -> None:
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
    assert "Traceback" not in err
    assert called.mock_calls == []


@pytest.mark.parametrize("verb", ["check", "prepare", "train"])
def test_missing_data_exits_3_before_anything_is_done(
    verb: str, capsys: pytest.CaptureFixture[str], called: MagicMock, tmp_path: Path
) -> None:
    words = [] if verb == "check" else ["--out", "new"]
    assert cli.run(["toy", verb, "no such/Prüfung", *words]) == 3
    err = capsys.readouterr().err
    assert "error data.missing: no such/Prüfung" in err.replace("\\", "/")
    assert f"relative paths start at {tmp_path}" in err
    assert called.mock_calls == []
    assert not Path("new").exists()


def test_check_prints_json_alone(capsys: pytest.CaptureFixture[str], called: MagicMock) -> None:
    called.check.return_value = Findings((ERROR, NOTE))
    assert cli.run(["toy", "check", "data", "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == Findings((ERROR, NOTE)).to_json()
    assert err == ""


def test_missing_data_are_a_finding_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["toy", "check", "gone", "--json"]) == 3
    stored = json.loads(capsys.readouterr().out)
    assert (stored["errors"], stored["findings"][0]["code"]) == (1, "data.missing")


def test_check_prints_findings_and_counts_for_people(
    capsys: pytest.CaptureFixture[str], called: MagicMock
) -> None:
    called.check.return_value = Findings((ERROR, NOTE))
    assert cli.run(["toy", "check", "data"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("error file.cut: für a.edf\n    ends early\n    copy it again\n")
    assert out.endswith("1 error, 1 note\n")
    called.check.return_value = Findings((NOTE,))
    assert cli.run(["toy", "check", "data"]) == 0


def test_names_are_shown_on_request_alone(
    capsys: pytest.CaptureFixture[str], called: MagicMock
) -> None:
    called.check.return_value = Findings((NOTE,), {"subject Ann": "subject S-1", "b.edf": "12ab"})
    assert diptych("toy check data") == 0
    assert "Ann" not in capsys.readouterr().out
    assert diptych("toy check data --names") == 0
    assert capsys.readouterr().out.endswith(
        "1 note\nsubject S-1  subject Ann\n12ab         b.edf\n"
    )
    assert diptych("toy check data --names --json") == 2


def test_equal_findings_share_a_paragraph_and_errors_come_first(
    capsys: pytest.CaptureFixture[str], called: MagicMock
) -> None:
    cut = [Finding("error", "file.cut", f"{number}.edf", "cut", "copy") for number in range(7)]
    called.check.return_value = Findings((NOTE, *cut))
    assert diptych("toy check data") == 3
    assert capsys.readouterr().out == (
        "error file.cut: 0.edf, 1.edf, 2.edf, 3.edf, 4.edf and 2 more\n    cut\n    copy\n"
        "note file.old: b.edf\n    is old\n    nothing to do\n7 errors, 1 note\n"
    )


def test_train_hands_everything_over(called: MagicMock, tmp_path: Path) -> None:
    Path("my.yaml").write_text("train: {batch: 2}\n")
    words = "toy train data --out run --config my.yaml --set train.clip=1 --init RUN:a "
    words += "--init-partial --fit fold-1 --no-evaluate"
    assert cli.run([*words.split(), "--set", f"run.pseudonym_key={tmp_path / 'a b'}"]) == 0
    (pipeline, data, out, config), keywords = called.train.call_args
    assert (pipeline.name, data, out) == ("toy", Path("data"), Path("run"))
    assert (config.train.epochs, config.train.batch, config.train.clip) == (5, 2, 1.0)
    assert config.run.pseudonym_key == tmp_path / "a b"
    command = keywords.pop("command")
    assert keywords == {
        "init": "RUN:a", "init_partial": True, "fit": "fold-1", "resume": False, "evaluate": False,
    }  # fmt: skip
    assert command == (
        "diptych toy train DATA --out RUN --config CONFIG --set train.clip=1 "
        "--set run.pseudonym_key=PATH --init INIT --init-partial"
    )


def test_resume_takes_the_runs_own_config_and_options_on_top(called: MagicMock) -> None:
    assert diptych("toy train data --out run --resume") == 0
    assert called.train.call_args.args[3] is None
    Path("run").mkdir()
    Path("run/config.yaml").write_text("train: {epochs: 77}\n")
    assert diptych("toy train data --out run --resume --set run.threads=1") == 0
    config: Any = called.train.call_args.args[3]
    assert (config.train.epochs, config.run.threads) == (77, 1)


def test_train_prints_the_run_the_report_and_the_verdict(
    called: MagicMock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = called.train.return_value / "evaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "results.json").write_text("{}")
    monkeypatch.setattr("diptych.results.read_results", lambda folder: {"read": folder})
    monkeypatch.setattr("diptych.results.verdict", lambda results, _: f"Verdict of {results}")
    assert diptych("toy train data --out run") == 0
    run = called.train.return_value
    assert capsys.readouterr().out.splitlines() == [
        f"run: {run}",
        f"report: {run / 'report.html'}",
        f"Verdict of { ({'read': evaluation}) }",
    ]


def test_demo_uses_its_recipe_and_one_seed(called: MagicMock) -> None:
    called.demo.return_value = Path("d/run")
    assert diptych("toy demo --out d --seed 4") == 0
    _, folder, config, seed, command = called.demo.call_args.args
    assert (folder, seed, config.train.epochs, config.run.seeds) == (Path("d"), 4, 1, (4,))
    assert command == "diptych toy demo --out DIR --seed 4"


def test_an_alias_is_the_config_key_it_stands_for(called: MagicMock) -> None:
    assert diptych("toy predict data data --out new --box 1,2 --set run.threads=1") == 0
    assert called.predict.call_args.args[4] == ["run.threads=1", "predict.box=[1,2]"]


def test_predictions_with_refused_inputs_exit_3(called: MagicMock) -> None:
    called.predict.return_value = Findings((ERROR,))
    assert diptych("toy predict data data --out new") == 3


def test_fields_of_a_domain_verb_are_flags(called: MagicMock) -> None:
    assert diptych("toy listen data --port 7 --loud --only-these a --only-these b") == 0
    _, name, target, options, sets = called.run_verb.call_args.args
    assert (name, target, sets) == ("listen", Path("data"), ())
    assert (options.port, options.loud, options.only_these) == (7, True, ("a", "b"))
    assert diptych("toy tidy --port 7") == 0
    assert called.run_verb.call_args.args[2] is None
    assert called.run_verb.call_args.args[3].loud is False


def test_a_wrong_flag_of_a_domain_verb_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert diptych("toy tidy --port x") == 2
    assert "error: --port: given 'x', allowed: a whole number\n" in capsys.readouterr().err
    assert cli.run(["toy", "tidy"]) == 2


def test_recipes_are_listed_and_printed_ready_to_use(
    capsys: pytest.CaptureFixture[str], called: MagicMock
) -> None:
    assert cli.run(["toy", "recipe"]) == 0
    assert capsys.readouterr().out == "demo         quick words.\nfast         In minutes.\n"
    assert cli.run(["toy", "recipe", "fast"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# In minutes.\n# Second line.\n# Save and edit it, then: diptych toy")
    Path("my.yaml").write_text(text)
    assert diptych("toy check data --config my.yaml --recipe demo") == 0
    assert called.check.call_args.args[2].train.epochs == 5


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("choose another"), 2, "error: choose another\n"),
        (DataError("no use", Findings((ERROR,))), 3, "file.cut"),
        (TrainingError("diverged: lower optim.lr"), 4, "error: diverged"),
        (InterruptedRun("stopped: --resume goes on"), 5, "error: stopped"),
        (KeyboardInterrupt(), 5, "error: interrupted; run the same command again\n"),
        (PermissionError(13, "Permission denied", "run"), 2, "error: run: permission denied: "),
        (MemoryError(), 4, "lower train.batch"),
    ],
)
def test_each_failure_has_its_code_and_no_traceback(
    error: BaseException,
    code: int,
    said: str,
    called: MagicMock,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    called.train.side_effect = error
    assert diptych("toy train data --out run") == code
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.glob("*.log")) == []


def test_a_refusal_that_is_one_finding_is_said_once(
    called: MagicMock, capsys: pytest.CaptureFixture[str]
) -> None:
    called.predict.side_effect = DataError(ERROR.line(), Findings((ERROR,)))
    assert diptych("toy predict data data --out new") == 3
    shown = "error file.cut: für a.edf\n    ends early\n    copy it again\n"
    assert capsys.readouterr().err == shown


def test_an_interrupted_run_is_told_to_resume(
    called: MagicMock, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    called.train.side_effect = KeyboardInterrupt()
    assert diptych("toy train data --out run") == 5
    assert "--resume goes on" in capsys.readouterr().err


def test_a_bug_names_a_log_that_holds_it(
    called: MagicMock, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    called.train.side_effect = KeyError("Ann")
    assert diptych("toy train data --out run") == 1
    err = capsys.readouterr().err
    [log] = tmp_path.glob("*.log")
    assert str(log) in err
    assert "Traceback" not in err
    assert "KeyError: 'Ann'" in log.read_text()


def test_the_log_of_a_run_holds_no_names_from_the_data(
    called: MagicMock, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    called.train.side_effect = KeyError("Ann")
    assert diptych("toy train data --out run") == 1
    assert f"the log is {Path('run') / 'log.txt'}" in capsys.readouterr().err
    text = Path("run/log.txt").read_text()
    assert text.startswith("bug: KeyError\n")
    assert "commands.py, line " in text
    assert "Ann" not in text
    assert str(tmp_path) not in text


def test_debug_shows_where_an_error_comes_from(
    called: MagicMock, capsys: pytest.CaptureFixture[str]
) -> None:
    called.train.side_effect = UsageError("choose another")
    assert diptych("toy train data --out run --debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: choose another\n")


def test_every_verb_takes_debug(wheel: Path) -> None:
    group = cli.root.get_command(cli.root.make_context("diptych", ["list"]), "toy")
    assert group is not None
    commands: dict[str, Any] = {**group.commands, **cli.root.commands}  # type: ignore[attr-defined]
    for command in commands.values():
        assert any("--debug" in parameter.opts for parameter in command.params), command.name


def test_other_processes_of_a_launch_are_silent(
    called: MagicMock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert diptych("toy train data --out run") == 0
    called.train.side_effect = TrainingError("diverged")
    assert diptych("toy train data --out run") == 0, "the launcher would end the first process"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert diptych("toy train data --out run") == 4
    assert capsys.readouterr() == ("", "")


def test_python_walks_the_same_way(called: MagicMock) -> None:
    run = api.train("toy", "data", "run", recipe="demo", overrides={"train.batch": 3})
    (pipeline, data, out, config), _ = called.train.call_args
    assert (data, out, run.path) == (Path("data"), Path("run"), Path("run"))
    assert (config.train.epochs, config.train.batch) == (1, 3)
    run.predict("a", "b", {"predict.box": [1], "predict.subject": "007"})
    called.predict.assert_called_with(
        pipeline, Path("run"), Path("a"), Path("b"),
        ["predict.box=[1]", 'predict.subject="007"'],
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"train\.epochs"):
        api.train("toy", "data", "run", overrides={"train.epoch": 3})


def test_a_run_opens_with_the_pipeline_that_it_names() -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text('{"format": 1, "pipeline": "toy", "version": "0.1.0"}')
    assert api.open_run("run").pipeline.name == "toy"
    with pytest.raises(UsageError, match="not a run folder"):
        api.open_run("data")


HEAVY = ("torch", "polars", "numpy", "rich", "matplotlib", "ruamel.yaml", "lightning")


@pytest.mark.parametrize(
    "words", ["list", "--help", "toy --help", "toy train --help", "toy listen --help", "toy recipe"]
)
def test_help_answers_at_once_without_heavy_imports(words: str, wheel: Path) -> None:
    code = f"""
import sys, time, diptych.cli
assert diptych.cli.run({words.split()}) == 0
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
assert time.process_time() < 0.5  # of the processor: the machine may be busy with other things
"""
    sources = [str(wheel), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diptych", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"diptych {metadata.version('diptych')}\n"
