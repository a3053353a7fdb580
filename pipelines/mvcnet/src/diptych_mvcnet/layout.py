"""Which file belongs to which subject, session and run."""

from __future__ import annotations

import csv
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diptych.errors import UsageError
from diptych.findings import Finding
from diptych_mvcnet.config import EEGDataSection
from diptych_mvcnet.read import COMPRESSED, format_of

ONE = "1"  # session and run of data that have a single one
PLACE = ("subject", "session", "run")
_FIELD = re.compile(r"\{(\w+)(?::0?(\d*)d)?\}")
_ENTITY = re.compile(r"(?:^|[_/])(sub|ses|run)-([A-Za-z0-9]+)")
_BIDS_SUFFIX = re.compile(r"_eeg\.\w+$")
_COMPANIONS = (".eeg", ".vmrk", ".fdt", ".json", ".tsv", ".csv", ".txt", ".md", ".html", ".yaml")


@dataclass(frozen=True)
class Located:
    """A recording and where it belongs.

    Args:
        path: The file.
        name: Its path below the data folder; what findings call it.
        subject: The user's own name; empty where the file itself tells it (``.npz``).
        session: "1" where there is one only.
        run: "1" where there is one only.
        lesion_side: "left", "right", or empty; from the manifest.
        bids: Whether it is read with its BIDS side files.
    """

    path: Path
    name: str
    subject: str
    session: str = ONE
    run: str = ONE
    lesion_side: str = ""
    bids: Path | None = None

    def fill(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows with subject, session and run where the file itself did not tell them."""
        return rows.with_columns(
            pl.lit(getattr(self, name)).alias(name) for name in PLACE if name not in rows.columns
        )


def find_recordings(data: Path, section: EEGDataSection) -> tuple[list[Located], list[Finding]]:
    """The recordings of a file or folder, subject by subject in time.

    A manifest wins, then a pattern, then BIDS names (``sub-01_ses-1_run-2``), then folders
    ``subject/[session/]file``. A single file is one subject under its own name.

    Args:
        data: A file or a folder.
        section: Section ``data``.

    Returns:
        Recordings sorted by subject, session and run (numbers as numbers), and findings about
        files that belong to nobody.

    Raises:
        UsageError: The path does not exist, or manifest or pattern are unusable.
    """
    if not data.exists():
        raise UsageError(f"{data}: no such file or folder: give a recording or a folder of them")
    if data.is_file():
        return _chosen(*_single(data, section), section)
    if section.manifest is not None:
        return _chosen(_from_manifest(section.manifest, data), [], section)
    found: list[Located] = []
    unmatched: list[Path] = []
    foreign: list[str] = []
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        name = path.relative_to(data).as_posix()
        if format_of(path) is None:
            known = path.suffix.lower() in _COMPANIONS
            foreign += (
                [] if known or any(part.startswith(".") for part in name.split("/")) else [name]
            )
        elif (placed := _placed(name, section.pattern)) is None:
            unmatched.append(path)
        else:
            found.append(_located(path, name, placed, _bids_root(data, name)))
    if not found and len(unmatched) == 1 and section.pattern is None:
        return _chosen(*_single(unmatched[0], section), section)
    names = [path.relative_to(data).as_posix() for path in unmatched]
    if section.pattern is not None and names and not found:
        return [], [_pattern_of_nothing(section.pattern, names)]
    findings = [_unmatched(name, section.pattern) for name in names]
    return _chosen(found, findings + [_foreign(name) for name in foreign], section)


def _single(path: Path, section: EEGDataSection) -> tuple[list[Located], list[Finding]]:
    if section.pattern is None:
        placed = _by_entities(path.name) or {"subject": path.name.partition(".")[0]}
    elif (by_pattern := _by_pattern(path.name, section.pattern)) is not None:
        placed = by_pattern
    else:
        return [], [_pattern_of_nothing(section.pattern, [path.name])]
    return [_located(path, path.name, placed)], []


def _placed(name: str, pattern: str | None) -> dict[str, str] | None:
    if pattern is not None:
        return _by_pattern(name, pattern)
    entities = _by_entities(name)
    if entities is not None:
        return entities
    folders = name.split("/")[:-1]
    if len(folders) == 1:
        return {"subject": folders[0], "run": _stem(name)}
    if len(folders) == 2:
        return {"subject": folders[0], "session": folders[1], "run": _stem(name)}
    return {"subject": ""} if not folders and format_of(Path(name)) == ".npz" else None


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _by_entities(name: str) -> dict[str, str] | None:
    entities: dict[str, str] = {}
    for key, value in _ENTITY.findall(name):
        entities[key] = value
    if "sub" not in entities:
        return None
    words = {"sub": "subject", "ses": "session", "run": "run"}
    return {words[key]: value for key, value in entities.items()}


def _by_pattern(name: str, pattern: str) -> dict[str, str] | None:
    """Fields of a name, numbers without leading zeros; a pattern with a slash sees the folders."""
    target = name if "/" in pattern else name.rpartition("/")[2]
    match = compile_pattern(pattern).fullmatch(target)
    if match is None and target.lower().endswith(COMPRESSED):
        match = compile_pattern(pattern).fullmatch(target.rpartition(".")[0])
    if match is None:
        return None
    return {
        key: value.lstrip("0") or "0" if value.isdigit() else value
        for key, value in match.groupdict().items()
    }


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of file names as a regular expression.

    Args:
        pattern: ``{subject:03d}`` stands for three or more digits, ``{subject:d}`` for digits,
            ``{subject}`` for any characters but ``/``, ``*`` for anything but ``/``. Fields other
            than subject, session and run are read and not used.

    Returns:
        The expression with one named group a field.

    Raises:
        UsageError: No subject field, or a field stands twice.

    Example:
        >>> compile_pattern("S{subject:03d}R{run:02d}.edf").fullmatch("S001R04.edf")["run"]
        '04'
    """
    expression, end = "", 0
    for field in _FIELD.finditer(pattern):
        expression += _literal(pattern[end : field.start()])
        name, width = field.group(1), field.group(2)
        numeric = ":" in field.group()
        digits = rf"\d{{{width},}}" if numeric and width else r"\d+"
        expression += f"(?P<{name}>{digits if numeric else '[^/]+?'})"
        end = field.end()
    try:
        compiled = re.compile(expression + _literal(pattern[end:]), re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"data.pattern {pattern!r}: each field may stand once") from error
    if "subject" not in compiled.groupindex:
        raise UsageError(
            f"data.pattern {pattern!r}: no {{subject}}: write for example "
            '"S{subject:03d}R{run:02d}.edf"'
        )
    return compiled


def _literal(text: str) -> str:
    return re.escape(text).replace(r"\*", "[^/]*")


def _located(path: Path, name: str, placed: Mapping[str, str], bids: Path | None = None) -> Located:
    return Located(
        path,
        name,
        placed["subject"],
        placed.get("session") or ONE,
        placed.get("run") or ONE,
        placed.get("lesion_side", ""),
        bids,
    )


def _bids_root(data: Path, name: str) -> Path | None:
    described = (data / "dataset_description.json").is_file()
    return data if described and _BIDS_SUFFIX.search(name) else None


def _from_manifest(manifest: Path, data: Path) -> list[Located]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"data.manifest {manifest}: cannot be read: {error}") from error
    if not rows or not {"path", "subject"} <= rows[0].keys():
        raise UsageError(
            f"data.manifest {manifest}: columns path and subject are needed, session, run and "
            "lesion_side may follow"
        )
    located = []
    for line, row in enumerate(rows, start=2):
        path = data / row["path"]
        if not path.is_file() or not row["subject"]:
            raise UsageError(
                f"data.manifest {manifest}, line {line}: "
                + (
                    f"{row['path']} is no file below the data folder"
                    if row["subject"]
                    else "no subject"
                )
            )
        located.append(_located(path, row["path"], row))
    return located


def _chosen(
    found: list[Located], findings: list[Finding], section: EEGDataSection
) -> tuple[list[Located], list[Finding]]:
    """Without excluded files and other runs, in the order of the data's time."""
    named = [one.name for one in found] + [one.where for one in findings]
    left_out = excluded(named, section.exclude)
    findings = [one for one in findings if one.where not in left_out]
    kept = [one for one in found if one.name not in left_out]
    if found and not kept:
        findings.append(_nothing_left("data.exclude", len(found), "exclude fewer files"))
    if kept and section.runs is not None:
        there = ", ".join(sorted({one.run for one in kept}, key=natural)[:20])
        runs = {run.lstrip("0") or "0" for run in section.runs}
        kept = [one for one in kept if (one.run.lstrip("0") or "0") in runs]
        if not kept:
            findings.append(_nothing_left("data.runs", len(found), f"there are {there}"))
    order = sorted(
        kept, key=lambda one: tuple(map(natural, (one.subject, one.session, one.run, one.name)))
    )
    return order, findings


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which run 10 comes after run 9."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part.lower())
        for part in re.findall(r"\d+|\D+", text)
    )


def excluded(names: Iterable[str], globs: Sequence[str]) -> set[str]:
    """The names that ``data.exclude`` leaves out.

    Args:
        names: Files by their path below the data folder, with ``/``.
        globs: Each fits a whole path or a file name.
    """
    return {
        name
        for name in names
        if any(
            fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(name.rpartition("/")[2], glob)
            for glob in globs
        )
    }


def _nothing_left(key: str, count: int, fix: str) -> Finding:
    what = "the only recording" if count == 1 else f"all of {count} recordings"
    return Finding("error", "file.none", key, f"it leaves out {what}", fix)


def _pattern_of_nothing(pattern: str, names: Sequence[str]) -> Finding:
    what = f"none of {len(names)} file names, such as" if len(names) > 1 else "not the file name"
    return Finding(
        "error",
        "file.none",
        "data.pattern",
        f"{pattern!r} fits {what} {names[0]}",
        f"--set 'data.pattern={suggest_pattern(names[0])}' would fit this one",
    )


def _unmatched(name: str, pattern: str | None) -> Finding:
    return Finding(
        "warning",
        "file.unmatched",
        name,
        "no subject follows from its name or folder; it is not used"
        if pattern is None
        else f"its name does not fit data.pattern {pattern!r}; it is not used",
        f"--set 'data.pattern={suggest_pattern(name)}' names the parts of file names, "
        "data.manifest lists files, data.exclude leaves them out",
    )


def _foreign(name: str) -> Finding:
    return Finding(
        "warning",
        "file.unmatched",
        name,
        "no recording in a supported format; it is not used",
        "export it to EDF, BDF, GDF, BrainVision, EEGLAB, FIF or NPZ, or name it in data.exclude",
    )


def suggest_pattern(name: str) -> str:
    """A pattern that fits a file name whose numbers are subject, then session, then run."""
    stem, dot, rest = name.rpartition("/")[2].partition(".")
    suffix = (
        rest.rpartition(".")[0] if rest.lower().endswith(("xz", "gz")) and "." in rest else rest
    )
    numbers = re.findall(r"\d+", stem)
    fields = {0: ["subject"], 1: ["subject"], 2: ["subject", "run"]}.get(
        len(numbers), ["subject", "session", "run"]
    )
    if not numbers:
        return "{subject}" + dot + suffix
    parts = re.split(r"\d+", stem)
    pattern = parts[0]
    for n, (number, after) in enumerate(zip(numbers, parts[1:], strict=True)):
        field = f"{{{fields[n]}:0{len(number)}d}}" if n < len(fields) else "*"
        pattern += field + after
    return pattern + dot + suffix
