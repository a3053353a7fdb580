"""Recordings for the tests: small, simulated, with known events; and where the real ones are."""

from __future__ import annotations

import os
from pathlib import Path

import mne
import numpy as np
import pytest

CHANNELS = ("FC3", "FCz", "FC4", "C3", "C1", "Cz", "C2", "C4", "CPz", "Pz")
SFREQ = 128.0


def simulated(
    n_trials: int = 12, *, seed: int = 0, channels: tuple[str, ...] = CHANNELS, sfreq: float = SFREQ
) -> mne.io.RawArray:
    """Alternating T1 and T2 every 5 s from second 3 on, 20 uV of white noise rounded to 0.1 uV."""
    draw = np.random.default_rng(seed)
    length = round((3 + 5 * n_trials + 2) * sfreq)
    signal = np.round(draw.normal(0, 200, (len(channels), length))) * 1e-7
    raw = mne.io.RawArray(signal, mne.create_info(list(channels), sfreq, "eeg"), verbose="error")
    onset = 3 + 5 * np.arange(n_trials)
    raw.set_annotations(mne.Annotations(onset, 3.0, [("T1", "T2")[n % 2] for n in range(n_trials)]))
    return raw


def write(raw: mne.io.BaseRaw, path: Path) -> Path:
    """Write in the format of the suffix; FIF in double precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".fif":
        raw.save(path, fmt="double", overwrite=True, verbose="error")
    else:
        mne.export.export_raw(path, raw, overwrite=True, verbose="error")
    return path


def real_data() -> Path:
    """The folder of real recordings; skips the test where it is not there."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("DIPTYCH_TEST_DATA", default)) / "eeg"
    if not folder.is_dir():
        pytest.skip("no real recordings: set DIPTYCH_TEST_DATA to their folder")
    return folder
