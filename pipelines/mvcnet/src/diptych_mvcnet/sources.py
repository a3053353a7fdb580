"""Where recordings come from: files, a BIDS data set, or MOABB."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import DiptychError, UsageError
from diptych.findings import Finding
from diptych_mvcnet.config import EEGDataSection, MVCNetConfig
from diptych_mvcnet.layout import Located, find_recordings
from diptych_mvcnet.read import read_recording
from diptych_mvcnet.recordings import Recording


@contextmanager
def open_sources(config: MVCNetConfig, data: Path) -> Iterator[tuple[list[Located], list[Finding]]]:
    """The recordings of the user's data; those of MOABB exist until the block ends.

    Args:
        config: The configuration.
        data: A file, a folder, or the folder of MOABB's cache where ``data.moabb`` is set.

    Yields:
        Recordings in time, subject by subject, and findings about files that belong to nobody.
    """
    if config.data.moabb is None:
        yield find_recordings(data, config.data)
        return
    with tempfile.TemporaryDirectory(prefix="diptych-moabb-") as folder:
        yield _from_moabb(config, data, Path(folder)), []


def read_located(located: Located, section: EEGDataSection) -> Recording:
    """Read a recording with everything that its layout adds.

    Args:
        located: From :func:`open_sources`.
        section: Section ``data``.

    Returns:
        The recording; with the events, channel types and bad channels of its BIDS side files.

    Raises:
        DataError: The file cannot be used.
        UsageError: A BIDS data set without the extra ``bids``.
    """
    if located.bids is None:
        recording = read_recording(located.path, data=section, name=located.name)
        # MOABB cut and filtered as data.window and data.filter say.
        return recording if section.moabb is None else replace(recording, findings=())
    try:
        import mne
        import mne_bids
    except ImportError as error:
        raise UsageError(_missing("mne-bids", "bids", "a BIDS data set")) from error
    recording = read_recording(located.path, data=section, name=located.name)
    if recording.raw is None:
        return recording
    entry = mne_bids.get_bids_path_from_fname(located.path, verbose="error")
    described = mne_bids.read_raw_bids(entry, verbose="error")
    marks = described.annotations
    recording.raw.set_annotations(
        mne.Annotations(marks.onset - described.first_time, marks.duration, marks.description),
        verbose="error",
    )
    used = dict(zip(described.ch_names, recording.raw.ch_names, strict=True))
    types = dict(zip(described.ch_names, described.get_channel_types(), strict=True))
    recording.raw.info["bads"] = [used[name] for name in described.info["bads"]]
    eeg = tuple(used[name] for name, kind in types.items() if kind == "eeg")
    return replace(recording, ch_names=eeg)


def _from_moabb(config: MVCNetConfig, cache: Path, folder: Path) -> list[Located]:
    """One ``.npz`` a subject, cut by MOABB's motor imagery paradigm."""
    try:
        import moabb.datasets
        import moabb.paradigms
    except ImportError as error:
        raise UsageError(_missing("moabb", "moabb", "data.moabb")) from error
    section = config.data
    assert section.moabb is not None
    kind = getattr(moabb.datasets, section.moabb, None)
    if kind is None:
        raise UsageError(
            f"data.moabb: {section.moabb!r} is no MOABB data set: its names look like BNCI2014_001"
        )
    low, high = section.filter.band or (None, None)
    paradigm = moabb.paradigms.MotorImagery(
        n_classes=len(section.classes),
        events=list(section.classes),
        fmin=low,
        fmax=high,
        tmin=section.window[0],
        tmax=section.window[1],
        channels=list(section.channels) if section.channels else None,
        resample=section.resample_hz,
    )
    dataset = kind()
    located = []
    guard = nullcontext() if section.allow_download else _offline(section.moabb)
    with _cache_folder(cache), guard:
        for subject in dataset.subject_list:
            path = folder / f"{subject}.npz"
            _store_subject(path, paradigm, dataset, subject)
            located.append(Located(path, f"{section.moabb} subject {subject}", str(subject)))
    return located


def _store_subject(path: Path, paradigm: Any, dataset: Any, subject: int) -> None:
    epochs, labels, table = paradigm.get_data(dataset, subjects=[subject], return_epochs=True)
    np.savez(
        path,
        X=(epochs.get_data() * 1e6).astype(np.float32),
        y=np.asarray(labels, dtype=str),
        ch_names=np.array(epochs.ch_names),
        sfreq=epochs.info["sfreq"],
        session=table["session"].to_numpy(dtype=str),
        run=table["run"].to_numpy(dtype=str),
    )


@contextmanager
def _cache_folder(folder: Path) -> Iterator[None]:
    """MOABB looks here; its own setter would write into the user's settings."""
    before = os.environ.get("MNE_DATA")
    os.environ["MNE_DATA"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MNE_DATA"]
        else:
            os.environ["MNE_DATA"] = before


@contextmanager
def _offline(name: str) -> Iterator[None]:
    """Refuses every connection while MOABB looks into its cache."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("downloads are not allowed")

    original = socket.getaddrinfo
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    try:
        yield
    except DiptychError:
        raise
    except Exception as error:
        raise UsageError(
            f"data.moabb: {name} is not complete in this cache ({type(error).__name__}): "
            "--set data.allow_download=true fetches it"
        ) from error
    finally:
        socket.getaddrinfo = original


def _missing(package: str, extra: str, what: str) -> str:
    return f"{what} needs {package}: pip install 'diptych-mvcnet[{extra}]'"
