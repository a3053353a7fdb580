"""Copies of recordings without the header fields that identify people."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

from diptych.errors import UsageError
from diptych_mvcnet.check import Survey, Surveyed
from diptych_mvcnet.config import EEGDataSection
from diptych_mvcnet.read import format_of
from diptych_mvcnet.sources import read_located

# MNE writes these; BDF, GDF and CNT become EDF.
_WRITTEN_AS = {".vhdr": ".vhdr", ".set": ".set", ".fif": ".fif"}


def write_anonymised(seen: Survey, folder: Path, section: EEGDataSection) -> list[Path]:
    """Write every continuous recording anew, without names, dates and comments.

    Args:
        seen: The surveyed files.
        folder: Gets one file (BrainVision: three) a recording, named by pseudonym, session, run
            and the first digits of the source's hash.
        section: Section ``data``.

    Returns:
        The written files; those that were there already are not written again.

    Raises:
        UsageError: The package that writes the format is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for one in seen.files:
        suffix = _WRITTEN_AS.get(format_of(one.located.path) or "", ".edf")
        path = folder / f"{_stem(one, seen)}{suffix}"
        written.append(path)
        if path.exists():
            continue
        recording = read_located(one.located, section)
        if recording.raw is None:
            written.pop()
            continue
        _export(recording.raw.anonymize(verbose="error"), path)
    return written


def _stem(one: Surveyed, seen: Survey) -> str:
    located = one.located
    subject = seen.names.get(located.subject, "S")
    return f"{subject}_{one.source.name}"


def _export(raw: Any, path: Path) -> None:
    """Write into a folder beside and rename: a file is whole or absent."""
    import mne

    beside = path.parent / f".{secrets.token_hex(4)}"
    beside.mkdir()
    try:
        if path.suffix == ".fif":
            raw.save(beside / "recording_raw.fif", fmt="double", verbose="error")
            (beside / "recording_raw.fif").replace(path)
            return
        mne.export.export_raw(beside / path.name, raw, verbose="error")
        # The header of a BrainVision recording comes last: it names the other two.
        for file in sorted(beside.iterdir(), key=lambda one: one.suffix == path.suffix):
            file.replace(path.with_name(file.name))
    except ImportError as error:
        raise UsageError(
            f"data.anonymise needs a package that writes {path.suffix}: "
            "pip install 'diptych-mvcnet[write]'"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
