"""Findings: the binding JSON form, and what is kept without the user's own names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import (
    DataError,
    DiptychError,
    InterruptedRun,
    TrainingError,
    UsageError,
)
from diptych.findings import Finding, Findings

findings = st.lists(
    st.builds(
        Finding,
        severity=st.sampled_from(["error", "warning", "note"]),
        code=st.text(),
        where=st.text(),
        found=st.text(),
        fix=st.text(),
    )
).map(lambda items: Findings(tuple(items)))

ONE = Finding("error", "file.cut", "Ann/a.edf", "Ann's file ends early", "copy Ann again")


def test_the_json_form_is_the_binding_one() -> None:
    both = Findings((ONE, Finding("warning", "a", "b", "c", "d")))
    assert both.to_json() == {
        "findings": [
            {
                "severity": "error",
                "code": "file.cut",
                "where": "Ann/a.edf",
                "found": "Ann's file ends early",
                "fix": "copy Ann again",
            },
            {"severity": "warning", "code": "a", "where": "b", "found": "c", "fix": "d"},
        ],
        "errors": 1,
        "warnings": 1,
    }


@given(findings)
@settings(max_examples=40, deadline=None)
def test_findings_survive_their_json_form(found: Findings) -> None:
    assert Findings.from_json(json.loads(json.dumps(found.to_json()))).items == found.items


@given(findings, findings)
@settings(max_examples=40, deadline=None)
def test_counts_add_up(first: Findings, second: Findings) -> None:
    both = first + second
    assert list(both) == [*first, *second]
    assert len(both.errors) == len(first.errors) + len(second.errors)
    assert len(both.warnings) == len(first.warnings) + len(second.warnings)


def test_what_is_kept_holds_pseudonyms_and_whole_words_only() -> None:
    named = Findings((Finding("note", "a", "Ann/Annex.edf", "Ann", "-"),), names={"Ann": "S-1"})
    assert named.redacted().items == (Finding("note", "a", "S-1/Annex.edf", "S-1", "-"),)
    assert named.items[0].where == "Ann/Annex.edf"


def test_a_line_says_what_where_and_how_to_mend_it() -> None:
    assert ONE.line() == "error file.cut: Ann/a.edf: Ann's file ends early; copy Ann again"


@pytest.mark.parametrize(
    ("kind", "code"),
    [(DiptychError, 1), (UsageError, 2), (DataError, 3), (TrainingError, 4), (InterruptedRun, 5)],
)
def test_each_kind_of_error_has_its_exit_code(kind: type[DiptychError], code: int) -> None:
    assert kind.exit_code == code
    assert str(kind("what to do")) == "what to do"


def test_warnings_are_summed_up_by_code_in_a_few_lines() -> None:
    twelve = [warning(f"code.{number}", "a.edf") for number in range(12)]
    lines = Findings((warning("code.0", "b.edf"), *twelve)).summary()
    assert lines[0] == "warning code.0 (2, such as): b.edf: odd; look"
    assert lines[1] == "warning code.1: a.edf: odd; look"
    assert len(lines) == 11
    assert lines[-1] == "and 2 more: see the report"
    assert Findings((Finding("note", "a", "b", "c", "d"),)).summary() == []


def warning(code: str, where: str) -> Finding:
    return Finding("warning", code, where, "odd", "look")
