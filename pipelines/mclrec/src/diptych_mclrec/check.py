"""Findings over a source of events, before anything expensive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from diptych.errors import DataError
from diptych.findings import Finding, Findings, Severity
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.events import Core, Ordered, k_core, order_events, repeat_share
from diptych_mclrec.read import FORMATS, Reading, read_source, whole
from diptych_mclrec.read_text import MOST, row_words
from diptych_mclrec.sequences import EventTable, Sequences
from diptych_mclrec.split import LEAST_STEPS, step_times, subject_parts, time_cuts
from diptych_mclrec.split_file import read_split_file
from diptych_mclrec.times import to_microseconds

MANY_TIES = 0.05
FEW_ITEMS, FEW_TEST = 20, 20


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Args:
        reading: Format and kind; its table keeps the sources without the events.
        findings: Everything that was found.
        ordered: The events in order; None where an error forbids it.
        parts: Subject -> part, where the source or ``split.file`` has a split.
        repeat_share: Share of events after a subject's first step whose item came before.
    """

    reading: Reading
    findings: Findings
    ordered: Ordered | None = None
    parts: Mapping[str, str] | None = None
    repeat_share: float = 0.0


def check(config: MCLRecConfig, path: Path) -> Findings:
    """Everything that is wrong or remarkable about the data; never stops at the first.

    Args:
        config: The configuration.
        path: A file or a folder.
    """
    return survey(config, path).findings


def check_events(
    path: Path | str, *, format: str = "auto", config: MCLRecConfig | None = None
) -> list[Finding]:
    """The findings of :func:`check` as a list.

    Args:
        path: A file or a folder.
        format: How it is read; "auto" finds it.
        config: The configuration; None for the defaults.

    Raises:
        ValueError: The format is unknown.

    Example:
        ``[one.code for one in check_events("ratings.csv") if one.severity == "error"]``
    """
    if format not in FORMATS:
        raise ValueError(f"format '{format}' is not one of {', '.join(FORMATS)}")
    chosen = config or MCLRecConfig()
    if format != "auto":
        data = chosen.data.model_copy(update={"format": format})
        chosen = chosen.model_copy(update={"data": data})
    return list(check(chosen, Path(path)))


def survey(config: MCLRecConfig, path: Path) -> Survey:
    """Read a source once and look at all of it.

    Args:
        config: The configuration.
        path: A file or a folder.
    """
    reading = read_source(path, config.data)
    findings = list(reading.findings)
    about = whole(path)
    parts: Mapping[str, str] | None = None
    if config.split.file is not None:
        parts, said = read_split_file(config.split.file)
        findings += said
    elif reading.table is not None and reading.table.splits:
        parts = reading.table.splits
    table = reading.table
    if table is None or _has_errors(findings):
        return Survey(replace(reading, table=None), Findings(tuple(findings)))
    findings += _future(table, config)
    kind = reading.kind
    baskets = config.joins_baskets(kind)
    try:
        ordered = order_events(
            table,
            ties="random" if config.data.ties == "random" else "source",
            baskets=baskets,
            drop_duplicates=config.data.drop_duplicates,
            seed=config.split.seed,
        )
    except DataError as error:
        fix = "give the files one at a time, or set data.columns.time"
        findings.append(Finding("error", "events.bad_time", path.name, str(error), fix))
        return Survey(replace(reading, table=None), Findings(tuple(findings)))
    names = {source.path.name: source.sha256[:12] for source in table.sources}
    findings += _duplicates(ordered, about, kept=not config.data.drop_duplicates)
    table = replace(table, frame=table.frame.clear())  # from here on numbers stand for names
    reading = replace(reading, table=table)
    findings += _ties(ordered, about, config, joined=baskets, kind=kind)
    share, targets = repeat_share(ordered.sequences)
    findings += _repeats(targets, about, share)
    findings += _sizes(ordered, about, config, kind, parts)
    return Survey(reading, Findings(tuple(findings), names), ordered, parts, share)


def _has_errors(findings: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def _future(table: EventTable, config: MCLRecConfig) -> list[Finding]:
    findings = []
    for number, source in enumerate(table.sources):
        if config.data.now is not None:
            limit = to_microseconds(config.data.now)
        else:
            written = datetime.fromtimestamp(source.path.stat().st_mtime, UTC)
            limit = to_microseconds((written + timedelta(days=1)).isoformat())
        late = table.frame.lazy().filter(
            (pl.col("source") == number) & (pl.col("time").cast(pl.Int64) > limit)
        )
        rows = late.select("row", "time").collect()
        if not rows.height:
            continue
        years = rows["time"].dt.year().unique().sort().head(MOST).to_list()
        found = f"{rows.height} events lie in the future, in {', '.join(map(str, years))}"
        header = 0 if ".parquet" in source.path.name else 1
        where = row_words(rows["row"].to_list(), source.path.name, header)
        fix = "check century and data.time_unit, or set data.now"
        findings.append(Finding("warning", "events.future_time", where, found, fix))
    return findings


def _duplicates(ordered: Ordered, path: Path, *, kept: bool) -> list[Finding]:
    count, events = ordered.duplicates, ordered.events
    if not count:
        return []
    done = "they are kept" if kept else "one of each is kept"
    other = "true leaves them out" if kept else "false keeps all"
    fix = f"{done}; data.drop_duplicates={other}"
    found = f"{count} of {events} rows ({count / events:.0%}) repeat subject, item and time"
    return [Finding("warning", "events.duplicates", path.name, found, fix)]


def _ties(
    ordered: Ordered, path: Path, config: MCLRecConfig, *, joined: bool, kind: str
) -> list[Finding]:
    share = ordered.tie_share
    if share <= MANY_TIES:
        return []
    found = f"{share:.0%} of the events share their time with another event of the subject"
    severity: Severity = "warning"
    if joined:
        severity, fix = "note", "they are joined into baskets, each a step (data.basket=flat: not)"
    elif kind == "clinical":
        fix = "an event may be predicted from its own basket: set data.basket=set"
    else:
        order = "a random order" if config.data.ties == "random" else "the order of the file"
        fix = f"they stand in {order}: choose data.ties (source, random, basket)"
    return [Finding(severity, "events.ties", path.name, found, fix)]


def _repeats(targets: int, path: Path, share: float) -> list[Finding]:
    if not targets:
        return []
    found = f"{share:.1%} of {targets} targets are already in the history"
    if share == 0:
        fix = "evaluate.seen=auto leaves seen items out of the candidates"
    elif share > 0.5:
        fix = "seen items stay candidates; compare with the baselines recency and frequency"
    else:
        fix = "evaluate.seen=auto keeps seen items among the candidates"
    return [Finding("note", "target.repeat", path.name, found, fix)]


def _sizes(
    ordered: Ordered,
    path: Path,
    config: MCLRecConfig,
    kind: str,
    parts: Mapping[str, str] | None,
) -> list[Finding]:
    findings = []
    sequences, catalogue = ordered.sequences, ordered.catalogue
    least_subject, least_item = config.least_events(kind)
    if catalogue.size < FEW_ITEMS or max(catalogue.counts) < least_item:
        severity: Severity = "error" if catalogue.size < 2 else "warning"
        found = f"{catalogue.size} items, the most frequent with {max(catalogue.counts)} events"
        fix = f"a ranking needs {FEW_ITEMS} items or more with data.min_item_events={least_item}"
        findings.append(Finding(severity, "catalogue.small", path.name, found, fix))
    try:
        core = k_core(sequences, catalogue.size, min_subject=least_subject, min_item=least_item)
    except DataError as error:
        findings.append(
            Finding("warning", "sequences.short", path.name, "training will refuse", str(error))
        )
        return findings
    gone = len(sequences) - len(core.subjects)
    short = int((core.steps < LEAST_STEPS).sum())
    if short or gone:
        found = f"filtering leaves {gone} of {len(sequences)} subjects out"
        found += f", and {short} have fewer than {LEAST_STEPS} steps"
        fix = "nothing to do if these are few; else lower data.min_subject_events"
        findings.append(Finding("warning", "sequences.short", path.name, found, fix))
    return findings + _test_part(config, kind, sequences, core, parts, path)


def _test_part(
    config: MCLRecConfig,
    kind: str,
    sequences: Sequences,
    core: Core,
    parts: Mapping[str, str] | None,
    path: Path,
) -> list[Finding]:
    findings = []
    names = sequences.subjects[core.subjects].tolist()
    given = None if parts is None else [parts.get(name) for name in names]
    if given is not None and None in given:
        found = f"{given.count(None)} of {len(names)} subjects have no part: they are left out"
        fix = "name every subject in the split, as in the events"
        findings.append(Finding("warning", "split.unmatched", path.name, found, fix))
    split = config.split
    protocol = config.split_kind(kind)
    if given is not None and (split.kind == "auto" or split.file is not None):
        protocol = "subject"
    if protocol == "leave_one_out":
        tested = int((core.steps >= LEAST_STEPS).sum())
    elif protocol == "subject":
        divided = given if given is not None else subject_parts(names, split.fractions, split.seed)
        scored = core.steps > config.evaluate.min_history
        tested = int((np.array([part == "test" for part in divided], bool) & scored).sum())
    else:
        try:
            _, cut = time_cuts(sequences, split.fractions, split.cuts)
        except DataError as error:
            refused = Finding(
                "warning", "split.tiny", path.name, "training will refuse", str(error)
            )
            return [*findings, refused]
        rows = sequences.rows[step_times(sequences) >= cut]
        tested = len(np.intersect1d(rows, core.subjects))
    if tested < FEW_TEST:
        found = f"{tested} test subjects"
        fix = "intervals will be wide: give more subjects, or a larger test part"
        findings.append(Finding("warning", "split.tiny", path.name, found, fix))
    return findings
