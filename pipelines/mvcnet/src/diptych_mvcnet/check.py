"""Findings over files, events, channels and samples, before anything expensive."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from diptych.errors import DataError
from diptych.findings import Finding, Findings
from diptych.manifest import Source, scan
from diptych.privacy import pseudonyms
from diptych.progress import progress
from diptych.split_file import SplitFile, read_split_file
from diptych_mvcnet.check_set import check_set
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.epochs import (
    electrodes_of,
    find_cues,
    missing_channels,
    place_given,
    place_trials,
    samples_of,
)
from diptych_mvcnet.layout import PLACE, Located
from diptych_mvcnet.montage import is_electrode
from diptych_mvcnet.recordings import Recording, refuse
from diptych_mvcnet.signals import check_signal
from diptych_mvcnet.sources import open_sources, read_located
from diptych_mvcnet.split import SPLIT_FILE

CYCLES = 3
SPLIT_KEYS = ("subject", "session", "run", "trial")  # trials are counted from 0 in a run
NO_RECORDING = (
    "give a folder per subject, BIDS names (sub-01_ses-1_run-1), data.pattern or data.manifest"
)


@dataclass(frozen=True)
class Surveyed:
    """What one file holds, without its samples.

    Args:
        located: Where it belongs.
        source: Its size and hash.
        findings: About this file alone.
        channels: The channels of it that can be used.
        sfreq: Hz.
        rows: Its trials: subject (own name), session, run, trial, label, rejected, and digest of
            the samples before any filter.
        inside: Which of subject, session and run the file itself says of each trial.
    """

    located: Located
    source: Source
    findings: tuple[Finding, ...]
    channels: tuple[str, ...] = ()
    sfreq: float = 0.0
    rows: pl.DataFrame | None = None
    inside: frozenset[str] = frozenset()

    @property
    def is_usable(self) -> bool:
        """Whether no finding about this file is an error."""
        return not _errors(self.findings)


@dataclass(frozen=True)
class Survey:
    """What all files hold together.

    Args:
        findings: Everything that was found.
        files: The usable files in time, subject by subject.
        channels: Names of the channel axis.
        sfreq: Rate of the prepared trials, Hz.
        names: Own name of each subject -> pseudonym.
        split: The user's own split, if there is one.
    """

    findings: Findings
    files: tuple[Surveyed, ...]
    channels: tuple[str, ...]
    sfreq: float
    names: dict[str, str]
    split: SplitFile | None


def check(config: MVCNetConfig, path: Path) -> Findings:
    """Everything that is wrong or remarkable about the data; never stops at the first.

    Args:
        config: The configuration.
        path: A file or a folder.

    Returns:
        The findings, file by file and then about all of them together.
    """
    with open_sources(config, path) as (located, findings):
        return survey(config, located, findings).findings


def survey(
    config: MVCNetConfig, located: Sequence[Located], findings: Sequence[Finding] = ()
) -> Survey:
    """Read every file once and look at all of them together.

    Args:
        config: The configuration.
        located: The files; one is in memory at a time.
        findings: What was found before.

    Returns:
        Findings and usable files. With ``data.on_error: skip`` the errors of files that are left
        out are warnings that say so.
    """
    sources = scan([one.path for one in located])
    surveyed = []
    with progress(len(sources), "check") as bar:
        for one, source in zip(located, sources, strict=True):
            surveyed.append(_survey_file(one, source, config))
            bar.advance()
    surveyed, channels, sfreq = _compare_files(surveyed, config)
    files = tuple(one for one in surveyed if one.is_usable)
    names = _pseudonyms(files, config)
    file = config.split.file
    split = read_split_file(file, SPLIT_KEYS) if file is not None else None
    together = list(split.findings) if split is not None else []
    if files:
        failed = len(files) < len(surveyed) and config.data.on_error == "stop"
        rows = [one.rows for one in files if one.rows is not None]
        together += check_set(rows, channels, config, split, complete=not failed)
    elif config.data.on_error == "skip" or not (surveyed or _errors(findings)):
        together.append(
            Finding("error", "file.none", "the data", "no recording can be used", NO_RECORDING)
        )
    own = [finding for one in surveyed for finding in _for_report(one, config)]
    hidden = {f"subject {own_name}": f"subject {name}" for own_name, name in names.items()}
    hidden |= {one.located.name: one.source.name for one in surveyed}
    if split is not None:
        hidden[split.name] = SPLIT_FILE
    everything = Findings((*findings, *own, *together), hidden)
    return Survey(everything, files, channels, sfreq, names, split)


def _errors(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "error"]


def _for_report(one: Surveyed, config: MVCNetConfig) -> list[Finding]:
    if one.is_usable or config.data.on_error == "stop":
        way_out = "; or leave the file out with data.exclude or data.on_error=skip"
        return [
            replace(finding, fix=finding.fix + way_out) if finding.severity == "error" else finding
            for finding in one.findings
        ]
    return [
        replace(
            finding, severity="warning", fix=f"the file is left out (on_error=skip); {finding.fix}"
        )
        if finding.severity == "error"
        else finding
        for finding in one.findings
    ]


def _survey_file(located: Located, source: Source, config: MVCNetConfig) -> Surveyed:
    try:
        recording = read_located(located, config.data)
    except DataError as error:
        return Surveyed(located, source, tuple(error.findings or ()))
    findings = _anonymised(recording.findings, config)
    findings += _untyped(recording, config)
    try:
        channels = _channels(recording, config)
        missing = missing_channels(recording, config.data.channels or (), config.data)
    except DataError as error:
        return Surveyed(located, source, (*findings, *(error.findings or ())))
    if missing:
        found, fix = f"{', '.join(missing)} not in this recording", "filled in by splines"
        findings.append(Finding("warning", "channel.missing", located.name, found, fix))
    findings += _marked_bad(recording, channels)
    findings += _filter_band(recording, config)
    findings += check_signal(recording, channels, config.data)
    rows, more = _trials(recording, channels, located, config)
    findings += more
    given = recording.epochs
    inside = frozenset(key for key in PLACE if given is not None and getattr(given, key))
    return Surveyed(located, source, tuple(findings), channels, recording.sfreq, rows, inside)


def _anonymised(findings: Sequence[Finding], config: MVCNetConfig) -> list[Finding]:
    if not config.data.anonymise:
        return list(findings)
    return [
        replace(finding, severity="note", fix="copies without them are written")
        if finding.code == "header.phi"
        else finding
        for finding in findings
    ]


def _channels(recording: Recording, config: MVCNetConfig) -> tuple[str, ...]:
    """The configured channels that the recording has, or its electrodes."""
    wanted = config.data.channels
    if wanted is None:
        return electrodes_of(recording)
    present = recording.ch_names if recording.raw is None else recording.raw.ch_names
    found = tuple(name for name in wanted if name in present)
    if not found:
        raise refuse(
            "channel.none",
            recording.name,
            "none of data.channels is in this recording",
            f"its channels are {', '.join(list(present)[:12])}",
        )
    return found


def _untyped(recording: Recording, config: MVCNetConfig) -> list[Finding]:
    listed = config.data.channels or ()
    return [
        Finding(
            "warning",
            "channel.untyped",
            f"{recording.name}, channel {name}",
            "no electrode of the 10-05 system; it is not used",
            "list it in data.channels to use it, or give its electrode in data.rename",
        )
        for name in recording.ch_names
        if not is_electrode(name) and name not in listed
    ]


def _marked_bad(recording: Recording, channels: tuple[str, ...]) -> list[Finding]:
    bads = [] if recording.raw is None else recording.raw.info["bads"]
    return [
        Finding(
            "warning",
            "channel.noisy",
            f"{recording.name}, channel {name}",
            "marked as bad by whoever recorded it",
            "look at the electrode; leave it out of data.channels if it is bad",
        )
        for name in bads
        if name in channels
    ]


def _filter_band(recording: Recording, config: MVCNetConfig) -> list[Finding]:
    section = config.data
    if recording.epochs is not None or section.filter.band is None:
        return []
    low, high = section.filter.band
    rate = min(section.resample_hz or recording.sfreq, recording.sfreq)
    findings = []
    if low < 0 or high >= rate / 2:
        findings.append(
            Finding(
                "error",
                "filter.band",
                recording.name,
                f"the band {low:g}-{high:g} Hz does not lie below half of {rate:g} Hz",
                "lower data.filter.band, or raise data.resample_hz where the recording allows it",
            )
        )
    cycles = (section.window[1] - section.window[0]) * low
    if low > 0 and cycles < CYCLES:
        findings.append(
            Finding(
                "error",
                "filter.band",
                recording.name,
                f"a trial holds {cycles:.1f} cycles of {low:g} Hz",
                f"{CYCLES} are needed: widen data.window or raise the lower edge of the band",
            )
        )
    return findings


def _trials(
    recording: Recording, channels: tuple[str, ...], located: Located, config: MVCNetConfig
) -> tuple[pl.DataFrame, list[Finding]]:
    section, name = config.data, recording.name
    findings: list[Finding] = []
    if recording.epochs is not None:
        rows, places = place_given(recording, section)
        seen: dict[str, int] = dict(Counter(recording.epochs.label))
        picks = [recording.ch_names.index(channel) for channel in channels]
        digests = [_digest(recording.epochs.x[place, picks]) for place in places]
    else:
        cues = find_cues(recording, {label: section.events[label] for label in section.classes})
        seen = dict(cues.seen)
        rows, starts = place_trials(recording, config, cues, recording.sfreq)
        signal = recording.signal(channels)
        length = samples_of(section, recording.sfreq)
        digests = [_digest(signal[:, start : start + length]) for start in starts]
        findings += _lost_trials(len(cues.sample) - rows.height, rows, name)
    if rows.is_empty() and not findings:
        labels = ", ".join(f"{text[:20]} ({count})" for text, count in sorted(seen.items())[:20])
        findings.append(
            Finding(
                "error",
                "events.none",
                name,
                f"no label of data.events; there are {labels or 'no labels at all'}",
                "add the labels of each class to data.events",
            )
        )
    rows = located.fill(rows)
    if (rows["subject"] == "").any():
        findings.append(
            Finding("error", "subject.unknown", name, "no array 'subject'", NO_RECORDING)
        )
    return rows.with_columns(pl.Series("digest", digests, dtype=pl.String)), findings


def _lost_trials(outside: int, rows: pl.DataFrame, name: str) -> list[Finding]:
    findings = []
    if outside:
        fix = "nothing to do if the recording was stopped early: they are left out"
        found = f"{outside} trials run over the ends of the recording"
        findings.append(Finding("warning", "events.out_of_range", name, found, fix))
    edge = int((rows["reason"] == "edge").sum())
    if edge:
        found = f"{edge} trials lie where the filter still feels an edge or a gap"
        fix = "they are left out: record some seconds before the first and after the last trial"
        findings.append(Finding("warning", "epoch.edge", name, found, fix))
    return findings


def _digest(samples: np.ndarray) -> str:
    return hashlib.blake2b(
        np.ascontiguousarray(samples, "<f4").tobytes(), digest_size=16
    ).hexdigest()


def _compare_files(
    surveyed: Sequence[Surveyed], config: MVCNetConfig
) -> tuple[list[Surveyed], tuple[str, ...], float]:
    """Channels and rate of the prepared data, and the findings of files that do not have them."""
    usable = [one for one in surveyed if one.is_usable]
    union = tuple(dict.fromkeys(name for one in usable for name in one.channels))
    channels = config.data.channels or union
    rates = [one.sfreq for one in usable]
    sfreq = config.data.resample_hz or min(rates, default=0.0)
    common = [name for name in union if all(name in one.channels for one in usable)]

    def compared(one: Surveyed) -> Surveyed:
        found = []
        missing = [name for name in channels if name not in one.channels]
        if config.data.channels is None and missing:
            allowed = config.data.interpolate and len(missing) <= 0.2 * len(channels)
            found.append(
                Finding(
                    "warning" if allowed else "error",
                    "channel.missing",
                    one.located.name,
                    f"{', '.join(missing)} not in this recording",
                    "filled in by splines"
                    if allowed
                    else f"--set 'data.channels=[{', '.join(common)}]' uses what all have; "
                    "data.interpolate=true fills in up to 20 %",
                )
            )
        if one.sfreq < sfreq:
            fix = f"--set data.resample_hz={min(rates):g}"
            said = f"{one.sfreq:g} Hz, {sfreq:g} Hz are wanted"
            found.append(Finding("error", "sfreq.differs", one.located.name, said, fix))
        elif one.sfreq != max(set(rates), key=rates.count):
            said = f"{one.sfreq:g} Hz, other recordings have another rate"
            fix = f"nothing to do: all are resampled to {sfreq:g} Hz"
            found.append(Finding("warning", "sfreq.differs", one.located.name, said, fix))
        return replace(one, findings=(*one.findings, *found))

    return [compared(one) if one.is_usable else one for one in surveyed], channels, sfreq


def _pseudonyms(files: Sequence[Surveyed], config: MVCNetConfig) -> dict[str, str]:
    digests: dict[str, list[str]] = {}
    for one in files:
        if one.rows is not None:
            for subject in one.rows["subject"].unique(maintain_order=True):
                digests.setdefault(subject, []).append(one.source.digest)
    return pseudonyms(digests, config.run.pseudonym_key)
