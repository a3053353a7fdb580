"""What the samples of a recording say about its electrodes, its unit and its mains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.signal import welch

from diptych.findings import Finding, Severity
from diptych_mvcnet.config import EEGDataSection
from diptych_mvcnet.recordings import IN_MICROVOLT, Recording

BLOCK_S = 1.0
FLAT_UV = 0.1
FLAT_PART = 0.5
NOISY_Z = 5.0
NOISY_RATIO = 4.0  # where channels are all alike a small difference is no artefact
NOISY_CHANNELS = 8  # with fewer channels the spread between them says nothing
PLAUSIBLE_UV = (1.0, 500.0)
CLIPPED_PART = 1e-3
LINE_RATIO = 10.0
NULL_SPACE = 1e-7


@dataclass(frozen=True)
class _Signal:
    """A signal with its names: (channels, blocks, samples) where it is looked at in blocks."""

    x: Float[np.ndarray, "c t"]
    block_std: Float[np.ndarray, "c b"]
    channels: tuple[str, ...]
    sfreq: float
    name: str
    unit: str

    def finding(self, severity: Severity, code: str, channel: str, found: str, fix: str) -> Finding:
        where = f"{self.name}, channel {channel}" if channel else self.name
        return Finding(severity, code, where, found, fix)


def check_signal(
    recording: Recording, channels: Sequence[str], section: EEGDataSection
) -> list[Finding]:
    """Findings about the samples of the channels that will be used.

    Args:
        recording: With its samples in memory.
        channels: Names of channels that it has.
        section: Section ``data``.

    Returns:
        ``signal.nonfinite`` alone where samples are not finite; else the findings about unit,
        flat, noisy and clipped channels, mains and rank.
    """
    names = tuple(channels)
    if recording.epochs is None:
        x = recording.signal(names)
        wrong = _nonfinite(x, names, recording.name)
    else:
        given = recording.epochs.x[:, [recording.ch_names.index(name) for name in names]]
        wrong = _nonfinite_trials(given, names, recording.name)
        x = given.transpose(1, 0, 2).reshape(len(names), -1)
    if wrong:
        return wrong
    length = round(BLOCK_S * recording.sfreq)
    if recording.epochs is not None:
        length = min(length, recording.epochs.x.shape[2])
    whole = max(x.shape[1] // length, 1) * length
    blocks = x[:, :whole].reshape(len(names), -1, min(length, x.shape[1]))
    signal = _Signal(x, blocks.std(axis=2), names, recording.sfreq, recording.name, recording.unit)
    flat = (signal.block_std < FLAT_UV).mean(axis=1) > FLAT_PART
    findings = _implausible_unit(signal, flat)
    if findings:
        return findings
    findings = _flat(signal, flat) + _noisy(signal, flat) + _clipped(signal, flat)
    if recording.epochs is None:
        findings += _line(signal, section) + _rank(signal, flat)
    return findings


def _nonfinite(x: np.ndarray, names: tuple[str, ...], name: str) -> list[Finding]:
    counts = (~np.isfinite(x)).sum(axis=1)
    return [
        Finding(
            "error",
            "signal.nonfinite",
            f"{name}, channel {channel}",
            f"{count} samples are NaN or infinite, the first at sample "
            f"{int(np.flatnonzero(~np.isfinite(samples))[0])}",
            "mark the span as BAD and fill it, or leave the channel out of data.channels",
        )
        for channel, samples, count in zip(names, x, counts, strict=True)
        if count
    ]


def _nonfinite_trials(x: np.ndarray, names: tuple[str, ...], name: str) -> list[Finding]:
    counts = (~np.isfinite(x)).sum(axis=2)
    return [
        Finding(
            "error",
            "signal.nonfinite",
            f"{name}, trial {trial}, channel {names[channel]}",
            f"{counts[trial, channel]} samples are NaN or infinite",
            "drop the trial or fill the gap before it is stored",
        )
        for trial, channel in zip(*np.nonzero(counts), strict=True)
    ]


def _implausible_unit(signal: _Signal, flat: np.ndarray) -> list[Finding]:
    # Where every channel looks flat the unit may be the reason.
    alive = signal.block_std.any(axis=1) if flat.all() else ~flat
    if not alive.any():
        return []
    typical = float(np.median(np.median(signal.block_std[alive], axis=1)))
    low, high = PLAUSIBLE_UV
    if low <= typical <= high:
        return []
    found = (
        f"taken for {signal.unit}, the median channel varies by {typical:.2g} uV (standard "
        f"deviation over 1 s); {low:g} to {high:g} uV are plausible"
    )
    fix = "no unit makes them plausible: these samples are not calibrated, export them in microvolt"
    for unit, factor in IN_MICROVOLT.items():
        as_unit = typical * factor / IN_MICROVOLT[signal.unit]
        if low <= as_unit <= high:
            fix = f"--set data.unit={unit} makes it {as_unit:.2g} uV"
    return [signal.finding("error", "unit.implausible", "", found, fix)]


def _flat(signal: _Signal, flat: np.ndarray) -> list[Finding]:
    part = (signal.block_std < FLAT_UV).mean(axis=1)
    return [
        signal.finding(
            "warning",
            "channel.flat",
            channel,
            f"varies by less than {FLAT_UV:g} uV in {share:.0%} of the recording",
            "leave it out of data.channels, or rename it away and fill it in with "
            "data.interpolate=true",
        )
        for channel, is_flat, share in zip(signal.channels, flat, part, strict=True)
        if is_flat
    ]


def _noisy(signal: _Signal, flat: np.ndarray) -> list[Finding]:
    if (~flat).sum() < NOISY_CHANNELS:
        return []
    power = np.full(flat.size, np.nan)
    power[~flat] = 2 * np.log(np.median(signal.block_std[~flat], axis=1))
    centre = np.nanmedian(power)
    spread = 1.4826 * np.nanmedian(np.abs(power - centre))
    if spread == 0:
        return []
    z = (power - centre) / spread
    return [
        signal.finding(
            "warning",
            "channel.noisy",
            channel,
            f"its variance lies {value:.1f} robust standard deviations above the other channels",
            "look at the electrode; leave it out of data.channels if it is bad",
        )
        for channel, value, log_ratio in zip(signal.channels, z, power - centre, strict=True)
        if value > NOISY_Z and log_ratio > np.log(NOISY_RATIO)
    ]


def _clipped(signal: _Signal, flat: np.ndarray) -> list[Finding]:
    findings = []
    for channel, samples, is_flat in zip(signal.channels, signal.x, flat, strict=True):
        if is_flat:
            continue
        low, high = samples.min(), samples.max()
        step = 1e-9 * (high - low)
        at_limit = (samples <= low + step) | (samples >= high - step)
        # A limit holds samples in a row; a true extreme is one sample, or few of coarse steps.
        held = at_limit[1:] & at_limit[:-1]
        if at_limit.mean() > CLIPPED_PART and held.mean() > CLIPPED_PART / 2:
            findings.append(
                signal.finding(
                    "warning",
                    "signal.clipped",
                    channel,
                    f"{at_limit.mean():.2%} of the samples stand at its largest or smallest value",
                    "lower the gain of the amplifier; set data.reject.peak_uv to leave "
                    "clipped trials out",
                )
            )
    return findings


def _line(signal: _Signal, section: EEGDataSection) -> list[Finding]:
    low, high = section.filter.band or (0.0, signal.sfreq / 2)
    notch = section.filter.notch or 0.0
    mains = [
        one
        for one in (50.0, 60.0)
        if low < one < min(high, signal.sfreq / 2 - 1) and abs(notch - one) >= 1
    ]
    if not mains:
        return []
    window = min(round(4 * signal.sfreq), signal.x.shape[1])
    frequency, power = welch(signal.x, signal.sfreq, nperseg=window, axis=1)
    findings = []
    for one in mains:
        distance = np.abs(frequency - one)
        beside = (distance > 2) & (distance < 6)
        floor = np.maximum(np.median(power[:, beside], axis=1), np.finfo(float).tiny)
        ratio = power[:, distance <= 1].max(axis=1) / floor
        loud = [name for name, r in zip(signal.channels, ratio, strict=True) if r > LINE_RATIO]
        if loud:
            found = f"{one:g} Hz stands {ratio.max():.0f} times above its neighbours"
            where = loud[0] if len(loud) == 1 else f"{loud[0]} and {len(loud) - 1} more"
            fix = f"--set data.filter.notch={one:g}"
            findings.append(signal.finding("warning", "signal.line", where, found, fix))
    return findings


def _rank(signal: _Signal, flat: np.ndarray) -> list[Finding]:
    x = signal.x[~flat]
    if len(x) < 2:
        return []
    covariance = np.cov(x)
    if not np.isfinite(covariance).all():  # damaged samples so large that their squares overflow
        return []
    eigenvalues = np.linalg.eigvalsh(covariance)
    rank = int((eigenvalues > NULL_SPACE * eigenvalues[-1]).sum())
    if rank == len(x):
        return []
    return [
        signal.finding(
            "warning",
            "rank.deficient",
            "",
            f"{len(x)} channels of rank {rank}, as after an average reference",
            "nothing to do: alignment leaves the empty directions out",
        )
    ]
