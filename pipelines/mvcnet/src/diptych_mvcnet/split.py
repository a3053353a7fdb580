"""Protocols of motor-imagery studies as splits over the rows of the index.

A trial is a (subject, session, run, source, trial) of the index: windows cut from one trial always
share a part. Rows marked ``rejected`` are in no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from diptych.errors import DataError, UsageError
from diptych.findings import Finding, Findings
from diptych.split import Level, Split, as_rows, level_keys

PROTOCOLS: Mapping[str, str] = {
    "within_cv": "per subject, contiguous blocks in time per class",
    "within_cv_plain": "per subject, contiguous blocks in time",
    "co": "per subject, first part in time trains, the rest tests",
    "co_per_class": "per subject, first part of each class trains, the rest tests",
    "cross_run": "per subject, each run is tested once",
    "cross_session": "per subject, each session is tested with the sessions before it",
    "loso": "each subject is tested with all others",
    "fixed": "the user's own CSV",
}
SPLIT_FILE = "split.file"
PER_SUBJECT = frozenset(PROTOCOLS) - {"loso", "fixed"}

_LEVELS: Mapping[str, Level] = {
    "within_cv": "item",
    "within_cv_plain": "item",
    "co": "item",
    "co_per_class": "item",
    "cross_run": "recording",
    "cross_session": "session",
    "loso": "subject",
}


@dataclass(frozen=True)
class ProtocolSplit(Split):
    """A split with its place in the protocol.

    Args:
        subject: The tested subject; "" where the test part holds several.
        fold: Number of the fold among those of this subject, from 1.
    """

    subject: str = ""
    fold: int = 1


@dataclass(frozen=True)
class _Trials:
    """The trials of one subject in time: their rows, class and session and run."""

    subject: str
    rows: tuple[tuple[int, ...], ...]
    label: np.ndarray
    session: np.ndarray
    run: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def make_splits(
    index: pl.DataFrame,
    protocol: str,
    *,
    folds: int = 5,
    train_fraction: float = 0.8,
    gap_trials: int = 0,
    parity_class_sorted: bool = False,
) -> list[ProtocolSplit]:
    """The splits of a protocol, subject after subject.

    Args:
        index: One row per epoch in chronological order within a subject; columns subject, label,
            and where present session, run, trial, rejected (missing ones count as one session,
            one run, every row its own trial, nothing rejected). ``fixed`` reads ``fold`` or
            ``split``.
        protocol: A key of :data:`PROTOCOLS`.
        folds: Folds of the cross-validations, at least 2.
        train_fraction: Part of the trials that trains in ``co`` and ``co_per_class``, in (0, 1).
        gap_trials: Training trials dropped on each side of a test block, in time.
        parity_class_sorted: Order the test rows class by class, as the official code does.

    Returns:
        Splits with disjoint ``train`` and ``test`` row numbers, ``subject`` and ``fold``.

    Raises:
        UsageError: Unknown protocol, or a fold number or fraction outside its range.
        DataError: The data do not hold what the protocol needs (sessions, runs, trials).

    Example:
        >>> index = pl.DataFrame({"subject": ["a"] * 10, "label": ["left", "right"] * 5})
        >>> [len(split.test) for split in make_splits(index, "within_cv")]
        [2, 2, 2, 2, 2]
    """
    _refuse_settings(protocol, folds, train_fraction, gap_trials)
    subjects = _trials_by_subject(index)
    if protocol == "fixed":
        splits = _fixed(index)
    elif protocol == "loso":
        splits = _leave_one_subject_out(subjects)
    else:
        assign: Mapping[str, Callable[[_Trials], list[np.ndarray]]] = {
            "within_cv": lambda trials: _blocks_per_class(trials, folds),
            "within_cv_plain": lambda trials: _plain_blocks(trials, folds),
            "co": lambda trials: _chronological(trials, train_fraction),
            "co_per_class": lambda trials: _chronological_per_class(trials, train_fraction),
            "cross_run": _one_run_out,
            "cross_session": _later_sessions,
        }
        splits = [
            _within_subject(trials, roles, number, gap_trials, _LEVELS[protocol])
            for trials in subjects
            for number, roles in enumerate(assign[protocol](trials), start=1)
        ]
    if parity_class_sorted:
        labels = index["label"].to_list()
        splits = [
            replace(split, test=tuple(sorted(split.test, key=lambda row: str(labels[row]))))
            for split in splits
        ]
    return splits


def inner_validation(index: pl.DataFrame, train: Sequence[int], fraction: float = 0.2) -> Split:
    """The last part in time of each subject and class of a training part, for choosing an epoch.

    Args:
        index: As in :func:`make_splits`.
        train: Rows of the training part.
        fraction: Part of each class that validates, in (0, 1).

    Returns:
        A split of ``train`` into train and validation, without test rows, disjoint by item.
    """
    chosen = set(train)
    validation: list[int] = []
    for trials in _trials_by_subject(index):
        inside = [n for n, rows in enumerate(trials.rows) if rows[0] in chosen]
        for label in np.unique(trials.label[inside]):
            of_class = [n for n in inside if trials.label[n] == label]
            last = of_class[len(of_class) - round(fraction * len(of_class)) :]
            validation += [row for n in last for row in trials.rows[n]]
    held = set(validation)
    return Split(
        train=tuple(row for row in train if row not in held),
        validation=as_rows(sorted(held)),
        disjoint_by="item",
    )


def _refuse_settings(protocol: str, folds: int, train_fraction: float, gap_trials: int) -> None:
    if protocol not in PROTOCOLS:
        raise UsageError(f"split.kind: {protocol!r} is no protocol; one of {', '.join(PROTOCOLS)}")
    if folds < 2:
        raise UsageError(f"split.folds: {folds} folds leave nothing to test; at least 2")
    if not 0 < train_fraction < 1:
        raise UsageError(f"split.fractions: {train_fraction} is outside (0, 1)")
    if gap_trials < 0:
        raise UsageError(f"split.gap_trials: {gap_trials} is negative; 0 or more")


def _trials_by_subject(index: pl.DataFrame) -> list[_Trials]:
    frame = index.with_row_index("_row")
    for column in ("session", "run"):
        if column not in frame.columns:
            frame = frame.with_columns(pl.lit("1").alias(column))
    if "trial" not in frame.columns:
        frame = frame.with_columns(pl.col("_row").alias("trial"))
    if "rejected" in frame.columns:
        frame = frame.filter(~pl.col("rejected"))
    trial = [
        column
        for column in ("subject", "session", "run", "source", "trial")
        if column in frame.columns
    ]
    grouped = (
        frame.group_by(trial, maintain_order=True)
        .agg(pl.col("_row"), pl.col("label").first())
        .sort("subject", maintain_order=True)
    )
    return [
        _Trials(
            subject=str(part["subject"][0]),
            rows=tuple(tuple(rows) for rows in part["_row"].to_list()),
            label=part["label"].cast(pl.String).to_numpy(),
            session=part["session"].cast(pl.String).to_numpy(),
            run=part["run"].cast(pl.String).to_numpy(),
        )
        for part in grouped.partition_by("subject", maintain_order=True)
    ]


def _within_subject(
    trials: _Trials, roles: np.ndarray, fold: int, gap: int, level: Level
) -> ProtocolSplit:
    test = np.flatnonzero(roles == "test")
    train = np.flatnonzero(roles == "train")
    if gap and test.size:
        near = np.abs(train[:, None] - test[None, :]).min(axis=1) <= gap
        train = train[~near]
    if not train.size or not test.size:
        raise _refused(
            f"subject {trials.subject}",
            f"fold {fold} has {train.size} training and {test.size} test trials",
            "record more trials, or lower split.folds or split.gap_trials",
        )
    return ProtocolSplit(
        train=tuple(row for n in train for row in trials.rows[n]),
        test=tuple(row for n in test for row in trials.rows[n]),
        disjoint_by=level,
        subject=trials.subject,
        fold=fold,
    )


def _roles(in_test: np.ndarray) -> np.ndarray:
    return np.where(in_test, "test", "train")


def _blocks_per_class(trials: _Trials, folds: int) -> list[np.ndarray]:
    fold_of = np.empty(len(trials), dtype=int)
    for label in np.unique(trials.label):
        members = np.flatnonzero(trials.label == label)
        if members.size < folds:
            raise _refused(
                f"subject {trials.subject}",
                f"{members.size} trials of class {label} for {folds} folds",
                "lower split.folds or leave the subject out with data.exclude",
            )
        fold_of[members] = np.arange(members.size) * folds // members.size
    return [_roles(fold_of == fold) for fold in range(folds)]


def _plain_blocks(trials: _Trials, folds: int) -> list[np.ndarray]:
    if len(trials) < folds:
        raise _refused(
            f"subject {trials.subject}",
            f"{len(trials)} trials for {folds} folds",
            "lower split.folds or leave the subject out with data.exclude",
        )
    blocks = np.array_split(np.arange(len(trials)), folds)
    return [_roles(np.isin(np.arange(len(trials)), block)) for block in blocks]


def _chronological(trials: _Trials, fraction: float) -> list[np.ndarray]:
    return [_roles(np.arange(len(trials)) >= _ceil(fraction * len(trials)))]


def _chronological_per_class(trials: _Trials, fraction: float) -> list[np.ndarray]:
    classes = np.unique(trials.label)
    first = _ceil(fraction * len(trials) / classes.size)
    in_test = np.zeros(len(trials), dtype=bool)
    for label in classes:
        in_test[np.flatnonzero(trials.label == label)[first:]] = True
    return [_roles(in_test)]


def _ceil(value: float) -> int:
    # 0.8 * 45 is 36.00000000000001 in floating point where the protocol means 36.
    return math.ceil(value - 1e-9)


def _one_run_out(trials: _Trials) -> list[np.ndarray]:
    runs = np.char.add(np.char.add(trials.session.astype(str), "/"), trials.run.astype(str))
    names = list(dict.fromkeys(runs.tolist()))
    if len(names) < 2:
        raise _refused(
            f"subject {trials.subject}",
            "one run only",
            "split.kind=within_cv or co needs a single run",
        )
    return [_roles(runs == name) for name in names]


def _later_sessions(trials: _Trials) -> list[np.ndarray]:
    names = list(dict.fromkeys(trials.session.tolist()))
    if len(names) < 2:
        raise _refused(
            f"subject {trials.subject}",
            "one session only",
            "split.kind=within_cv, co or cross_run needs one",
        )
    position = np.array([names.index(name) for name in trials.session.tolist()])
    return [
        np.where(position < later, "train", np.where(position == later, "test", "none"))
        for later in range(1, len(names))
    ]


def _leave_one_subject_out(subjects: list[_Trials]) -> list[ProtocolSplit]:
    if len(subjects) < 2:
        raise _refused(
            f"subject {subjects[0].subject}" if subjects else "the data",
            "the only subject",
            "split.kind=loso needs two or more; within_cv or co needs one",
        )
    rows = {trials.subject: tuple(r for group in trials.rows for r in group) for trials in subjects}
    return [
        ProtocolSplit(
            train=tuple(row for other in rows if other != tested for row in rows[other]),
            test=rows[tested],
            disjoint_by="subject",
            subject=tested,
        )
        for tested in rows
    ]


def _fixed(index: pl.DataFrame) -> list[ProtocolSplit]:
    usable = index.with_row_index("_row")
    if "rejected" in usable.columns:
        usable = usable.filter(~pl.col("rejected"))
    if "split" in usable.columns and usable["split"].is_not_null().any():
        train, validation, test = (
            as_rows(usable.filter(pl.col("split") == part)["_row"])
            for part in ("train", "validation", "test")
        )
        level = _level_of(index, (train, validation, test))
        splits = [ProtocolSplit(train, validation, test, level)]
    elif "fold" in usable.columns and usable["fold"].is_not_null().any():
        usable = usable.filter(pl.col("fold").is_not_null())
        splits = []
        for number, fold in enumerate(sorted(usable["fold"].unique().to_list()), start=1):
            train = as_rows(usable.filter(pl.col("fold") != fold)["_row"])
            test = as_rows(usable.filter(pl.col("fold") == fold)["_row"])
            level = _level_of(index, (train, test))
            splits.append(ProtocolSplit(train, (), test, level, fold=number))
    else:
        raise UsageError(
            "split.kind=fixed: the prepared data hold no fold or split of the user's; "
            "name the CSV with --set split.file=FILE and prepare again"
        )
    for split in splits:
        if not split.train or not split.test:
            raise _refused(
                SPLIT_FILE,
                f"{len(split.train)} training and {len(split.test)} test trials matched the data",
                "name both parts, with subjects, sessions and runs as the files have them",
            )
    return splits


def _level_of(index: pl.DataFrame, parts: Sequence[Sequence[int]]) -> Level:
    """The highest level at which the parts share nothing."""
    levels: tuple[Level, ...] = ("subject", "session", "recording")
    for level in levels:
        keys = level_keys(index, level)
        values = [{keys[row] for row in rows} for rows in parts]
        if sum(map(len, values)) == len(set().union(*values)):
            return level
    return "item"


def _refused(where: str, found: str, fix: str) -> DataError:
    finding = Finding("error", "split.impossible", where, found, fix)
    return DataError(finding.line(), Findings((finding,)))
