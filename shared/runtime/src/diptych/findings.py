"""Findings: what a check saw, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
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
    """All findings of a check, in the order they were made.

    Args:
        items: The findings.
        names: The user's own names of files and subjects -> what stands for them in a run folder.
            Lives in memory only: terminals show own names, run folders show the others.
    """

    items: tuple[Finding, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __add__(self, other: Iterable[Finding]) -> Findings:
        names = other.names if isinstance(other, Findings) else {}
        return Findings((*self.items, *other), {**self.names, **names})

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop."""
        return tuple(finding for finding in self.items if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that go to the report as warnings."""
        return tuple(finding for finding in self.items if finding.severity == "warning")

    def summary(self, most: int = 10) -> list[str]:
        """The warnings in a few lines, those of one code together.

        Args:
            most: Lines at most; one more says how many codes are left out.
        """
        by_code: dict[str, list[Finding]] = {}
        for finding in self.warnings:
            by_code.setdefault(finding.code, []).append(finding)
        lines = [
            group[0].line().replace(": ", f" ({len(group)}, such as): ", 1)
            if len(group) > 1
            else group[0].line()
            for group in by_code.values()
        ]
        rest = len(lines) - most
        return lines[:most] + ([f"and {rest} more: see the report"] if rest > 0 else [])

    def to_json(self) -> dict[str, Any]:
        """The binding form of ``--json`` and of ``findings.json``."""
        return {
            "findings": [asdict(finding) for finding in self.items],
            "errors": len(self.errors),
            "warnings": len(self.warnings),
        }

    def redacted(self) -> Findings:
        """The same findings without the user's own names, for everything that is kept."""
        if not self.names:
            return self
        known = sorted(self.names, key=len, reverse=True)
        pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, known)) + r")(?!\w)")

        def hide(text: str) -> str:
            return pattern.sub(lambda match: self.names[match.group()], text)

        return Findings(
            tuple(
                replace(item, where=hide(item.where), found=hide(item.found), fix=hide(item.fix))
                for item in self.items
            )
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Findings:
        """Findings read back from their JSON form."""
        return cls(tuple(Finding(**finding) for finding in stored["findings"]))
