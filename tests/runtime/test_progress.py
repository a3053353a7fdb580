"""Progress: silence for short work, plain lines without a terminal, bars on one."""

from __future__ import annotations

import io
import itertools
import sys
import time

import pytest

from diptych import progress as module
from diptych.progress import is_silent, progress, quiet


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOW_AFTER", 0.05)
    monkeypatch.setattr(module._Lines, "every", 0.0)
    monkeypatch.setattr(module._Terminal, "every", 0.0)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def work(steps: int, seconds: float = 0.04) -> None:
    with progress(steps, "Reading") as bar:
        for step in range(steps):
            time.sleep(seconds)
            bar.advance(loss=step / 8, fold="a")


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(3), "Reading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_longer_work_gives_plain_lines_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    work(5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[-1] == "Reading: 5/5, 0:00 elapsed, loss 0.5 fold a"
    assert all(line.startswith("Reading: ") and line.isascii() for line in lines)
    assert "left" in lines[1]


def test_an_iterable_is_passed_on_whole_and_in_order() -> None:
    assert list(progress("abc", "Reading")) == ["a", "b", "c"]
    assert list(progress(iter([1, 2]), "Reading")) == [1, 2]


def test_work_of_unknown_length_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for step in progress(itertools.count(), "Waiting"):
        time.sleep(0.04)
        if step == 4:
            break
    err = capsys.readouterr().err
    assert "Waiting: " in err
    assert "/" not in err


def test_resumed_work_is_timed_by_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1000, "Reading", done=998) as bar:
        time.sleep(0.1)
        bar.advance()
    assert capsys.readouterr().err.splitlines()[-1] == "Reading: 999/1000, 0:00 elapsed, 0:00 left"


def test_quiet_shows_nothing_and_ends_with_its_context(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        work(4)
    assert capsys.readouterr().err == ""
    assert not is_silent()
    work(4)
    assert capsys.readouterr().err != ""


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_only_the_first_process_of_a_launch_speaks(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    work(4)
    assert capsys.readouterr().err == ""


def test_counting_bars_cannot_be_iterated() -> None:
    with pytest.raises(TypeError, match="advance"):
        iter(progress(3, "Reading")).__next__()


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(monkeypatch: pytest.MonkeyPatch) -> _Screen:
    """A terminal in the place of standard error; made in the test, as pytest sets its own."""
    monkeypatch.setenv("TERM", "xterm")
    fake = _Screen()
    monkeypatch.setattr(sys, "stderr", fake)
    return fake


def test_nested_bars_share_one_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen(monkeypatch)
    for _ in progress(range(2), "Folds"):
        work(4)
    assert "Folds" in shown.getvalue()
    assert "Reading" in shown.getvalue()
    assert "2/2" in shown.getvalue()
    assert module._terminal.get() is None


def fail_inside() -> None:
    with progress(3, "Folds"):
        time.sleep(0.1)
        raise ValueError("broken")


def test_an_error_inside_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen(monkeypatch)
    with pytest.raises(ValueError, match="broken"):
        fail_inside()
    assert shown.getvalue().endswith("\x1b[?25h")  # the cursor is visible again
    assert module._terminal.get() is None
