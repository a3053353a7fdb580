"""The doctor: finds what is missing or broken, and never fails itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from diptych import doctor as module
from diptych import installed
from diptych.doctor import Check, doctor


def requirements(*texts: str) -> list[Check]:
    return list(module._requirements("diptych-toy", [Requirement(text) for text in texts]))


def test_it_looks_at_python_torch_memory_disk_and_wheels() -> None:
    checks = {check.name: check for check in doctor()}
    assert checks["torch"].status == "ok"
    assert checks["torch"].found == metadata.version("torch")
    assert {"python", "threads", "memory", "disk", "diptych"} <= set(checks)


def test_a_missing_requirement_is_a_problem_with_the_command_that_mends_it() -> None:
    [check] = requirements("no-such-package-here>=2")
    assert (check.status, check.fix) == ("problem", "pip install 'no-such-package-here>=2'")


def test_a_version_out_of_range_is_a_problem() -> None:
    [check] = requirements("numpy<1")
    assert check.status == "problem"
    assert check.found == f"numpy {metadata.version('numpy')}, needs numpy<1"


def test_a_missing_extra_is_a_note_that_names_it() -> None:
    [check] = requirements("no-such-package-here; extra == 'stream'", "numpy; extra == 'stream'")
    assert check.status == "note"
    assert check.found == "extra stream: no no-such-package-here"
    assert check.fix == "pip install 'diptych-toy[stream]'"


def test_requirements_of_other_systems_are_left_out() -> None:
    assert requirements("no-such-package-here; sys_platform == 'plan9'") == []


def test_a_broken_look_is_a_problem_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        raise OSError("libcuda is damaged")

    monkeypatch.setattr(module, "_torch", broken)
    checks = {check.name: check for check in doctor()}
    assert checks["torch"].found == "OSError: libcuda is damaged"
    assert "disk" in checks


def test_a_pipeline_that_cannot_be_loaded_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("toy", "no_such_module:PIPELINE", installed.GROUP)
    monkeypatch.setattr(installed, "points", lambda: {"toy": point})
    [check] = module._pipelines()
    assert check.status == "problem"
    assert "no_such_module" in check.found
