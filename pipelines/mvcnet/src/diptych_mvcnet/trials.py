"""Trials that were cut before: ``.npz`` files and MNE or EEGLAB epochs."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from diptych.findings import Finding
from diptych_mvcnet.config import EEGDataSection
from diptych_mvcnet.headers import duplicate_channels, not_eeg
from diptych_mvcnet.montage import clean_names
from diptych_mvcnet.recordings import IN_MICROVOLT, Recording, Trials, refusal, refuse

SIZE_LIMIT = 16 << 30
LAYOUT = "X (trials, channels, samples), y, ch_names, sfreq, optional subject, session, run"


def read_npz(path: Path, section: EEGDataSection, name: str) -> Recording:
    """Trials from an ``.npz`` file; nothing in it is unpickled.

    Args:
        path: The file, with the arrays of :data:`LAYOUT`; X in microvolt unless ``data.unit``
            says otherwise.
        section: Section ``data``.
        name: What findings call the file.

    Returns:
        The recording.

    Raises:
        DataError: The file, a shape or a type is wrong.
    """
    arrays = _arrays(path, name)
    x = arrays["X"]
    if x.dtype.kind not in "fiu":
        raise refuse(
            "npz.dtype",
            f"{name}, X",
            f"type {x.dtype}",
            "store X as real numbers, float32 in microvolt for example",
        )
    channels = [str(channel) for channel in np.atleast_1d(arrays["ch_names"]).tolist()]
    trials = x.shape[0] if x.ndim == 3 else 0
    wrong = [] if x.ndim == 3 else [f"X has {x.ndim} dimensions instead of 3"]
    if x.ndim == 3 and len(channels) != x.shape[1]:
        wrong.append(f"X has {x.shape[1]} channels, ch_names {len(channels)}")
    for key in ("y", "subject", "session", "run"):
        if key in arrays and arrays[key].ndim and len(arrays[key]) != trials and x.ndim == 3:
            wrong.append(f"X has {trials} trials, {key} {len(arrays[key])}")
    if np.size(arrays["sfreq"]) != 1:
        wrong.append("sfreq is no single number")
    if wrong:
        raise refusal(
            tuple(Finding("error", "npz.shape", name, found, f"store {LAYOUT}") for found in wrong)
        )
    if x.size == 0:
        raise refuse("file.empty", name, "0 samples", "store the trials again")

    def texts(key: str) -> tuple[str, ...]:
        if key not in arrays:
            return ()
        return tuple(str(value) for value in np.broadcast_to(arrays[key], (trials,)).tolist())

    unit = "uV" if section.unit == "auto" else section.unit
    cut = Trials(
        x=np.asarray(x, dtype=np.float64) * IN_MICROVOLT[unit],
        label=texts("y"),
        subject=texts("subject"),
        session=texts("session"),
        run=texts("run"),
    )
    return _recording(cut, channels, float(arrays["sfreq"]), unit, section, name)


def from_mne(epochs: Any, section: EEGDataSection, name: str) -> Recording:
    """Trials from ``mne.Epochs``: their event names are the labels.

    Args:
        epochs: Any MNE epochs.
        section: Section ``data``.
        name: What findings call the file.

    Returns:
        The recording.
    """
    names = {code: text for text, code in epochs.event_id.items()}
    sfreq = float(epochs.info["sfreq"])
    # MNE takes what the file holds for volt.
    unit = "V" if section.unit == "auto" else section.unit
    cut = Trials(
        x=epochs.get_data(copy=False) * IN_MICROVOLT[unit],
        label=tuple(names[code] for code in epochs.events[:, 2]),
        onset_s=tuple((epochs.events[:, 0] / sfreq).tolist()),
    )
    return _recording(cut, list(epochs.ch_names), sfreq, unit, section, name)


def _recording(
    cut: Trials, channels: list[str], sfreq: float, unit: str, section: EEGDataSection, name: str
) -> Recording:
    repeated = duplicate_channels(tuple(channels), name, section.rename)
    if repeated:
        raise refusal(tuple(repeated))
    note = Finding(
        "note",
        "trials.given",
        name,
        "the trials were cut before",
        "data.window and data.filter do not apply to them: filter and cut them as the model needs",
    )
    names = tuple(clean_names(channels, section.rename))
    return Recording(name, None, cut, names, sfreq, unit=unit, findings=(note,))


def _arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > SIZE_LIMIT:
            raise refuse(
                "file.too_large",
                name,
                f"{size >> 30} GiB unpacked",
                f"store at most {SIZE_LIMIT >> 30} GiB a file, one file a subject",
            )
        with np.load(path, allow_pickle=False) as stored:
            missing = [key for key in ("X", "ch_names", "sfreq") if key not in stored.files]
            arrays = {} if missing else {key: stored[key] for key in stored.files}
    except zipfile.BadZipFile as error:
        raise refusal((not_eeg(path, ".npz", name),)) from error
    except ValueError as error:
        raise refuse(
            "npz.dtype",
            name,
            "an array of Python objects",
            "store plain numbers and text: np.savez never needs allow_pickle for them",
        ) from error
    if missing:
        raise refuse("npz.shape", name, f"no array {', '.join(missing)}", f"store {LAYOUT}")
    return arrays
