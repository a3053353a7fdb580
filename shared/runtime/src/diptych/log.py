"""Messages of the package on the terminal and in a run's log, and failures in words."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import DiptychError, InterruptedRun, TrainingError, UsageError
from diptych.folders import BESIDE
from diptych.progress import is_silent

FILE = "log.txt"
TERMINAL_ONLY = {"terminal_only": True}  # ``extra=`` of a message with the user's own names
_FORBIDDEN = ("permission denied", "make its folder writable, or choose another --out")
_FULL = ("no space left", "free some space, or choose another --out")
_OTHER = ("{}", "choose another path")
# What the system refuses and a user can change, no bug of ours: what it is, and the remedy.
REFUSALS = {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: ("on a read-only disk", "choose another --out"),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOTDIR: _OTHER,
    errno.EISDIR: _OTHER,
    errno.EEXIST: _OTHER,
    errno.ENAMETOOLONG: _OTHER,
}
# Writers in other languages tell the number in words, numpy tells how much it could not write.
_NUMBER_IN_WORDS = re.compile(r"\(os error (\d+)\)")
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")


@dataclass(frozen=True)
class Failure:
    """How a command ended: the exit code and words for the user."""

    exit_code: int
    message: str


@contextmanager
def messages(run: Callable[[], Path | None]) -> Iterator[None]:
    """Send what the package says by ``logging`` to standard error and to the run's log.

    Args:
        run: Gives the run folder, or None; the log is written once the folder is a run.
    """
    logger = logging.getLogger("diptych")
    level = logger.level
    handler = _Messages(run)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Messages(logging.Handler):
    def __init__(self, run: Callable[[], Path | None]) -> None:
        super().__init__()
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        if is_silent():
            return
        text = record.getMessage()
        print(text, file=sys.stderr, flush=True)
        if not hasattr(record, "terminal_only"):
            append(self._run(), f"{record.levelname.lower()}: {text}")


def append(run: Path | None, text: str) -> Path | None:
    """Add a paragraph to a run's log.

    Returns:
        The log, or None where there is no run.
    """
    if run is None or not (run / "run.json").is_file():
        return None
    log = run / FILE
    with log.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text.rstrip() + "\n")
    return log


def failure(error: BaseException, run: Path | None, out: Path | None = None) -> Failure:
    """An exception as an exit code and a message that says what to do next.

    A bug is logged: in the run without the exception's own words, which can hold names from
    the data, or whole in a temporary file.

    Args:
        error: What was raised.
        run: The run folder of the command, where there is one.
        out: Where the command writes, as the user gave it.
    """
    if isinstance(error, DiptychError):
        return Failure(error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
        resumable = run is not None and (run / "run.json").is_file()
        hint = "--resume goes on with the run" if resumable else "run the same command again"
        return Failure(InterruptedRun.exit_code, f"interrupted; {hint}")
    number = _system_error(error)
    if number in REFUSALS:
        return Failure(UsageError.exit_code, _refused(error, number, out))
    if _is_out_of_memory(error):
        return Failure(
            TrainingError.exit_code,
            f"out of memory ({_first_line(error)}); lower train.batch or take a larger device",
        )
    log = append(run, _frames(error)) or _temporary_log(error)
    return Failure(1, f"{_first_line(error)}; this is a bug, the log is {log}; --debug shows it")


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error behind an exception, where there is one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    words = _NUMBER_IN_WORDS.search(str(error))
    if words:
        return int(words.group(1))
    return errno.ENOSPC if _CUT_SHORT.search(str(error)) else None


def _refused(error: BaseException, number: int, out: Path | None) -> str:
    """What the system refused, under the path that the user gave."""
    what, remedy = REFUSALS[number]
    what = what.format(os.strerror(number))
    name = getattr(error, "filename", None)
    if name is None:
        place = f"{out} or the temporary folder {tempfile.gettempdir()}" if out else "the disk"
        return f"{place}: {what}: {remedy}"
    path = Path(os.fsdecode(name))
    if out is not None and _is_part_of(path.absolute(), out.absolute()):
        path = out
    elif beside := BESIDE.fullmatch(path.name):
        path = path.with_name(beside.group(1))
    elif remedy == _FORBIDDEN[1]:
        remedy = "make it readable, or give another path"
    return f"{path}: {what}: {remedy}"


def _is_part_of(path: Path, out: Path) -> bool:
    """Whether a path is the output, a folder above it, within it, or beside it by its name."""
    if out.is_relative_to(path):
        return True
    if not path.is_relative_to(out.parent):
        return False
    first = path.relative_to(out.parent).parts[0]
    return first == out.name or first.startswith(f".{out.name}.")


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _frames(error: BaseException) -> str:
    lines = [f"bug: {type(error).__name__}"]
    for frame in traceback.extract_tb(error.__traceback__):
        lines.append(f"  {Path(frame.filename).name}, line {frame.lineno}, in {frame.name}")
    return "\n".join(lines)


def _temporary_log(error: BaseException) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="diptych-", suffix=".log", delete=False, encoding="utf-8"
    ) as stream:
        stream.writelines(traceback.format_exception(error))
    return Path(stream.name)
