"""What reaches the terminal and the log of a run, and failures in words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diptych.log import TERMINAL_ONLY, failure, messages


def test_messages_reach_the_terminal_and_the_runs_log_but_names_the_terminal_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("diptych.training")
    with messages(lambda: tmp_path):
        logger.info("before the run")
        (tmp_path / "run.json").write_text("{}")
        logger.warning("2 of 3 tensors match")
        logger.warning("%s is short", "ann.edf", extra=TERMINAL_ONLY)
    shown = "before the run\n2 of 3 tensors match\nann.edf is short\n"
    assert capsys.readouterr().err == shown
    assert (tmp_path / "log.txt").read_text() == "warning: 2 of 3 tensors match\n"
    assert logging.getLogger("diptych").handlers == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied", "out/.run.json.0a1b2c3d"),
            "out: permission denied: make its folder writable, or choose another --out",
        ),
        (
            PermissionError(13, "Permission denied", "data/a.edf"),
            "data/a.edf: permission denied: make it readable, or give another path",
        ),
        (
            PermissionError(13, "Permission denied", "run/.report.html.0a1b2c3d"),
            "run/report.html: permission denied: make its folder writable, or choose another",
        ),
        (
            PermissionError(13, "Permission denied", ".out.0a1b2c3d/parts/x"),
            "out: permission denied: make its folder writable, or choose another --out",
        ),
        (OSError(30, "Read-only file system", "out"), "out: on a read-only disk: choose another"),
        (OSError(28, "No space left on device"), "out or the temporary folder "),
        (OSError("4096 requested and 512 written"), "no space left: free some space, or choose"),
        (RuntimeError("I/O error: No space left (os error 28)"), "no space left: free some space"),
        (NotADirectoryError(20, "Not a directory", "out/b"), "out: Not a directory: choose"),
    ],
)
def test_what_the_system_refuses_is_said_under_the_users_path(error: Exception, said: str) -> None:
    failed = failure(error, None, Path("out"))
    assert failed.exit_code == 2
    assert said in failed.message.replace("\\", "/")
    assert "0a1b2c3d" not in failed.message
