"""Findings about all trials together: classes, duplicates, electrodes, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from diptych.errors import DataError
from diptych.findings import Finding, Severity
from diptych.split_file import SplitFile, join_split_file
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.split import SPLIT_FILE, make_splits

FEW, TOO_FEW = 20, 5
MINORITY = 0.6  # of an equal share: 30 % of the trials of two classes


def check_set(
    rows: Sequence[pl.DataFrame],
    channels: Sequence[str],
    config: MVCNetConfig,
    split: SplitFile | None,
    *,
    complete: bool,
) -> list[Finding]:
    """Look at the trials of all usable files together.

    Args:
        rows: Trials of each file with own names of subjects, in time; digests of the samples.
        channels: Names of the channel axis.
        config: The configuration.
        split: The user's own split.
        complete: Whether every file could be used; if not, nothing is said about splits.

    Returns:
        The findings.
    """
    columns = ("subject", "session", "run", "trial", "label", "rejected", "digest")
    table = pl.concat([part.select(columns) for part in rows]).sort("subject", maintain_order=True)
    findings = _classes(table, config) + _unpaired(channels, config)
    findings += _duplicate_subjects(table)
    if split is not None:
        table = join_split_file(table, split)
        findings += _unmatched_split(table, split)
    splits = []
    if complete and not any(finding.severity == "error" for finding in findings):
        try:
            splits = make_splits(
                table,
                config.split.kind,
                folds=config.split.folds,
                train_fraction=config.split.fractions[0],
                gap_trials=config.split.gap_trials,
            )
        except DataError as error:
            findings += [
                replace(one, where=split.name) if split and one.where == SPLIT_FILE else one
                for one in error.findings or ()
            ]
    parts = [(set(one.train) | set(one.validation), set(one.test)) for one in splits]
    return findings + _duplicate_trials(table, parts)


def _classes(table: pl.DataFrame, config: MVCNetConfig) -> list[Finding]:
    findings = []
    good = table.filter(~pl.col("rejected"))
    for subject in table["subject"].unique(maintain_order=True):
        labels = good.filter(pl.col("subject") == subject)["label"]
        counts = {name: int((labels == name).sum()) for name in config.data.classes}
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        where = f"subject {subject}"
        present = [count for count in counts.values() if count]
        if len(present) < 2:
            fix = "add the other class to data.events, or leave the subject out with data.exclude"
            findings.append(Finding("error", "events.one_class", where, said, fix))
            continue
        least = min(counts.values())
        if least < FEW:
            severe = min(present) < TOO_FEW
            fix = f"{TOO_FEW} trials a class are the least, {FEW} or more are sound: record more"
            severity: Severity = "error" if severe else "warning"
            findings.append(Finding(severity, "events.few", where, said, fix))
        if least / len(labels) < MINORITY / len(counts):
            fix = "look at balanced accuracy first: it gives every class the same weight"
            findings.append(Finding("warning", "events.imbalance", where, said, fix))
    return findings


def _unpaired(channels: Sequence[str], config: MVCNetConfig) -> list[Finding]:
    reflect = config.views.reflect
    if "reflect" not in config.views.use or reflect.allow_partial or reflect.pairs is not None:
        return []
    from diptych_mvcnet.views import unpaired_channels

    alone = unpaired_channels(channels)
    if not alone:
        return []
    return [
        Finding(
            "warning",
            "montage.unpaired",
            "channels",
            f"{', '.join(alone)} have no partner on the other side: the view reflect is not used",
            "leave them out of data.channels, or --set views.reflect.allow_partial=true",
        )
    ]


def _duplicate_subjects(table: pl.DataFrame) -> list[Finding]:
    whole = table.group_by("subject", maintain_order=True).agg(pl.col("digest").sort())
    same: dict[tuple[str, ...], list[str]] = {}
    for subject, digests in whole.rows():
        same.setdefault(tuple(digests), []).append(subject)
    return [
        Finding(
            "error",
            "subject.duplicate",
            ", ".join(f"subject {name}" for name in names),
            "identical signals under different names",
            "leave all but one out with data.exclude, or correct the names",
        )
        for names in same.values()
        if len(names) > 1
    ]


def _duplicate_trials(
    table: pl.DataFrame, parts: Sequence[tuple[set[int], set[int]]]
) -> list[Finding]:
    findings = []
    numbered = table.with_row_index("row")
    repeated = numbered.filter(pl.col("digest").is_duplicated())
    for group in repeated.partition_by("digest", maintain_order=True):
        rows = set(group["row"].to_list())
        leaks = any(rows & train and rows & test for train, test in parts)
        names = [
            f"subject {subject} session {session} run {run} trial {trial}"
            for subject, session, run, trial in group.select(
                "subject", "session", "run", "trial"
            ).rows()
        ]
        findings.append(
            Finding(
                "error" if leaks else "warning",
                "trial.duplicate",
                "; ".join(names[:4]) + ("; ..." if len(names) > 4 else ""),
                f"{len(rows)} trials hold the same samples"
                + (", in training and in test" if leaks else ""),
                "keep one of them: a repeated trial counts twice, or leaks into the test",
            )
        )
    return findings


def _unmatched_split(table: pl.DataFrame, split: SplitFile) -> list[Finding]:
    matched = int(table[split.column].is_not_null().sum())
    if matched == table.height:
        return []
    severity: Severity = "warning" if matched else "error"
    return [
        Finding(
            severity,
            "split.unmatched",
            split.name,
            f"{table.height - matched} of {table.height} trials are in no line of it",
            "they are in no part; subjects, sessions and runs are named as in the files, "
            "trials count from 0",
        )
    ]
