"""Findings: what a check saw, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One observation about the user's data.

    Args:
        severity: "error" stops, "warning" goes to the report, "note" is for the record.
        code: Dotted code of the domain spec, such as ``file.truncated``.
        where: File, channel, trial, row: as exact as known.
        found: What is there.
        fix: What to do about it.
    """

    severity: Severity
    code: str
    where: str
    found: str
    fix: str

    def line(self) -> str:
        """The finding as one line for a terminal."""
        return f"{self.severity} {self.code}: {self.where}: {self.found}; {self.fix}"


@dataclass(frozen=True)
class Findings:
    """All findings of a check, in the order they were made."""

    items: tuple[Finding, ...] = ()

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __add__(self, other: Iterable[Finding]) -> Findings:
        return Findings((*self.items, *other))

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop."""
        return tuple(finding for finding in self.items if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that go to the report as warnings."""
        return tuple(finding for finding in self.items if finding.severity == "warning")

    def to_json(self) -> dict[str, Any]:
        """The binding form of ``--json`` and of ``findings.json``."""
        return {
            "findings": [asdict(finding) for finding in self.items],
            "errors": len(self.errors),
            "warnings": len(self.warnings),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Findings:
        """Findings read back from their JSON form."""
        return cls(tuple(Finding(**finding) for finding in stored["findings"]))
