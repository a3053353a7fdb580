"""The errors that a user can mend, one class for each exit code of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from diptych.findings import Findings


class DiptychError(Exception):
    """A failure with a message for the user: what was found, where, and what to do next."""

    exit_code: ClassVar[int] = 1


class UsageError(DiptychError):
    """A wrong option, a wrong config value, or a folder that must not be overwritten."""

    exit_code = 2


class DataError(DiptychError):
    """Data that cannot be used, or that do not fit the model.

    Args:
        message: What is wrong, in one sentence.
        findings: Every finding behind it, for the terminal and for ``--json``.
    """

    exit_code = 3

    def __init__(self, message: str, findings: Findings | None = None) -> None:
        super().__init__(message)
        self.findings = findings


class TrainingError(DiptychError):
    """Training or export that did not give a usable result."""

    exit_code = 4


class InterruptedRun(DiptychError):
    """A run that was stopped after its state had been saved: ``--resume`` goes on."""

    exit_code = 5
