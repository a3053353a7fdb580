"""What every run folder promises."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from diptych import verbs
from diptych.config import load, recipes_folder
from diptych.contract import Fit
from diptych.errors import DataError
from diptych.files import read_json
from diptych.installed import load as load_pipeline
from diptych.results import validate
from diptych.split import Split

from .conftest import FINAL_IS_TESTED, RECIPE, Subject


def weights(run: Path) -> dict[str, str]:
    """Hashes of the best weights of every fit."""
    return {
        path.relative_to(run / "fits").parts[:-3]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "fits").rglob("model.safetensors"))
    }  # type: ignore[return-value]


def test_a_run_holds_the_files_that_other_programs_read(subject: Subject) -> None:
    names = {entry.name for entry in subject.run.iterdir()}
    wanted = "run.json config.yaml environment.json manifest.json findings.json split.json fits"
    assert names >= {*wanted.split(), "evaluation", "report.html", "model_card.md", "log.txt"}
    assert read_json(subject.run / "run.json").keys() == {"format", "pipeline", "version"}
    assert (subject.run / "fits" / "final" / "fit.json").is_file()
    assert (subject.run / "fits" / "final" / "metrics.csv").is_file()


def test_the_results_have_the_binding_form(subject: Subject) -> None:
    results = read_json(subject.run / "evaluation" / "results.json")
    validate(results)
    assert subject.name in results["methods"]
    assert len(results["methods"]) > 1, "no baseline beside the model"


def test_the_report_needs_no_network_and_tells_no_names_or_paths(subject: Subject) -> None:
    page = (subject.run / "report.html").read_text()
    assert len(page) < 5_000_000
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    own = [path.name for path in subject.data.rglob("*") if path.is_file()]
    own += [str(subject.demo), f"{Path.home()}/", str(Path.cwd())]
    for path in subject.run.rglob("*"):
        if path.suffix in {".html", ".md", ".json", ".txt", ".yaml", ".csv"}:
            text = path.read_text(errors="replace")
            assert not [name for name in own if name in text], path


def test_one_seed_gives_the_same_weights_twice(subject: Subject, tmp_path: Path) -> None:
    for name in ("one", "two"):
        call = subject.train(tmp_path / name, "--no-evaluate")
        assert call.code == 0, call.err
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert len(weights(tmp_path / "one")) > 1


def test_a_moved_run_still_evaluates_reports_and_exports(subject: Subject, tmp_path: Path) -> None:
    moved = tmp_path / "somewhere else"
    shutil.copytree(subject.run, moved)
    for words in (("evaluate", moved), ("report", moved)):
        call = subject.call(*words)
        assert call.code == 0, call.err
    before = read_json(subject.run / "evaluation" / "results.json")
    after = read_json(moved / "evaluation" / "results.json")
    for name, scores in before["methods"].items():
        values = {metric: score["value"] for metric, score in scores.items()}
        again = {metric: after["methods"][name][metric]["value"] for metric in scores}
        assert again == pytest.approx(values, abs=1e-6), name


def test_compare_refuses_nothing_over_the_same_splits(subject: Subject, tmp_path: Path) -> None:
    shutil.copytree(subject.run, tmp_path / "twin")
    call = subject.call("compare", subject.run, tmp_path / "twin")
    assert call.code == 0, call.err
    headline = {"mclrec": "ndcg", "pirads": "masd"}.get(subject.name, "accuracy")
    assert headline in call.out.lower()


def test_data_of_the_training_subjects_are_refused_as_new_data(
    subject: Subject, tmp_path: Path
) -> None:
    some = tmp_path / "some"
    other = subject.copy_some(some)
    call = subject.call("evaluate", subject.run, "--data", some, "--out", tmp_path / "out")
    if not other:  # the run's own data, scored on its own splits
        assert call.code == 0, call.err
        return
    assert call.code == 3
    assert "split.overlap" in call.err


def test_leakage_is_refused_and_nothing_is_left(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "toy"))
    pipeline = load_pipeline(subject.name)
    rows = tuple(range(10))
    leak = Fit("final", Split(rows, (), rows), 1)
    leaking = replace(pipeline, plan=lambda config, prepared: [leak])
    config = load(
        pipeline.config, recipe="demo", recipes=recipes_folder(pipeline.config), file=None, sets=[]
    )
    with pytest.raises(DataError, match="overlap"):
        verbs.train(leaking, subject.data, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_single_fit_can_be_trained_as_a_job_and_gathered(
    subject: Subject, tmp_path: Path
) -> None:
    early = subject.train(tmp_path / "run", "--fit", "final")
    fits = [entry["name"] for entry in read_json(tmp_path / "run" / "split.json")["fits"]]
    assert early.code == 2
    assert fits[0] in early.err
    for name in fits[:2]:
        call = subject.train(tmp_path / "run", "--fit", name)
        assert call.code == 0, call.err
    call = subject.call("train", subject.data, "--out", tmp_path / "run", "--resume")
    assert call.code == 0, call.err
    whole = subject.train(tmp_path / "whole", "--no-evaluate")
    assert whole.code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_fits_side_by_side_give_the_same_weights(subject: Subject, tmp_path: Path) -> None:
    threads = ["--set", "run.threads=1", "--no-evaluate"]
    one = subject.train(tmp_path / "one", *threads)
    two = subject.train(tmp_path / "two", *threads, "--set", "run.parallel_fits=2")
    assert (one.code, two.code) == (0, 0), two.err
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_other_weights_can_be_the_start(subject: Subject, tmp_path: Path) -> None:
    call = subject.train(tmp_path / "seen", "--init", f"{subject.run}:final", "--no-evaluate")
    if subject.name in FINAL_IS_TESTED:
        assert call.code == 0, call.err
    else:
        assert call.code == 3, "the weights have seen every test subject"
    call = subject.train(
        tmp_path / "run", "--init", f"{subject.run}:final", "--set", "split.allow_leakage=true",
        "--no-evaluate",
    )  # fmt: skip
    assert call.code == 0, call.err
    assert RECIPE[1] == "demo"
