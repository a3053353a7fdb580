"""What a file holds once it is read: a continuous recording, or trials that were cut before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from diptych.errors import DataError
from diptych.findings import Finding, Findings

IN_MICROVOLT: Mapping[str, float] = {"V": 1e6, "mV": 1e3, "uV": 1.0, "nV": 1e-3}


@dataclass(frozen=True)
class Trials:
    """Epoched input.

    Args:
        x: Microvolt (N, C, T).
        label: Label of each trial as the file has it, as text; empty where there are none.
        onset_s: Seconds of each trial's cue in its recording, NaN where it is not known.
        subject: Own name of each trial's subject, empty where the file does not say.
        session: Session of each trial, empty where the file does not say.
        run: Run of each trial, empty where the file does not say.
    """

    x: Float[np.ndarray, "n c t"]
    label: tuple[str, ...] = ()
    onset_s: tuple[float, ...] = ()
    subject: tuple[str, ...] = ()
    session: tuple[str, ...] = ()
    run: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """One file in memory.

    Args:
        name: What findings call it.
        raw: Continuous recording (``mne.io.BaseRaw``) with cleaned channel names, or None.
        epochs: Trials of a file that holds trials, or None.
        ch_names: Cleaned names of its EEG channels, in the file's order.
        sfreq: Hz.
        unit: What the samples of the file were taken for, as in ``data.unit``.
        scale: What turns the samples of ``raw`` (volt, as MNE reads them) into microvolt.
        findings: What the reader saw; no error among them.
    """

    name: str
    raw: Any
    epochs: Trials | None
    ch_names: tuple[str, ...]
    sfreq: float
    scale: float = 1e6
    unit: str = "V"
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    def signal(self, channels: tuple[str, ...]) -> Float[np.ndarray, "c t"]:
        """Samples of some channels of a continuous recording, in microvolt."""
        picks = [self.raw.ch_names.index(name) for name in channels]
        return np.asarray(self.raw.get_data(picks=picks)) * self.scale


def refuse(code: str, where: str, found: str, fix: str) -> DataError:
    """A data error that carries its one finding."""
    finding = Finding("error", code, where, found, fix)
    return DataError(finding.line(), Findings((finding,)))


def refusal(findings: tuple[Finding, ...]) -> DataError:
    """A data error that carries several findings, at least one of them an error."""
    errors = [finding for finding in findings if finding.severity == "error"]
    return DataError("\n".join(finding.line() for finding in errors), Findings(findings))
