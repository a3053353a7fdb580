"""Files to recordings: every format through one function, every problem as a finding."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diptych.errors import DataError
from diptych.findings import Finding
from diptych_mvcnet import headers
from diptych_mvcnet.config import EEGDataSection
from diptych_mvcnet.epochs import Cut, cut_epochs
from diptych_mvcnet.montage import clean_names
from diptych_mvcnet.recordings import IN_MICROVOLT, Recording, Trials, refusal, refuse
from diptych_mvcnet.trials import from_mne, read_npz

__all__ = [
    "SUPPORTED_SUFFIXES",
    "Cut",
    "Recording",
    "Trials",
    "cut_epochs",
    "format_of",
    "read_recording",
]

SUPPORTED_SUFFIXES: tuple[str, ...] = (
    *(".edf", ".rec", ".bdf", ".gdf", ".vhdr", ".set", ".fif", ".cnt", ".npz"),
)
COMPRESSED = (".xz", ".gz")
MANY_FILES = (".vhdr",)
UNPACKED_LIMIT = 16 << 30
_CHUNK = 1 << 20


def format_of(path: Path) -> str | None:
    """The suffix of a supported file without its compression, or None for other files.

    Args:
        path: A file.

    Returns:
        One of :data:`SUPPORTED_SUFFIXES` or None.

    Example:
        >>> format_of(Path("S001R04.edf.xz")), format_of(Path("notes.txt"))
        ('.edf', None)
    """
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = name.suffix.lower()
    if suffix not in SUPPORTED_SUFFIXES or (name != path and suffix in MANY_FILES):
        return None
    return suffix


def read_recording(
    path: Path,
    *,
    preload: bool = True,
    data: EEGDataSection | None = None,
    name: str | None = None,
) -> Recording:
    """Read one file of any supported format.

    Args:
        path: The file; ``.xz`` and ``.gz`` are unpacked to a temporary file first.
        preload: Hold the samples in memory; compressed and repaired files always do.
        data: Section ``data``: units, names, and what is repaired; None means its defaults.
        name: What findings call the file; None means its file name.

    Returns:
        The recording with the reader's findings.

    Raises:
        DataError: The file cannot be used as it is; its ``findings`` say why and what to do.

    Example:
        >>> read_recording(Path("S001R04.edf.xz")).ch_names  # doctest: +SKIP
    """
    section = data or EEGDataSection()
    called = name or path.name
    suffix = format_of(path)
    if suffix is None:
        raise refuse(
            "file.unsupported",
            called,
            f"no supported format: {', '.join(SUPPORTED_SUFFIXES)}, each also as .xz or .gz",
            "export the recording to one of them",
        )
    with tempfile.TemporaryDirectory(prefix="diptych-") as folder:
        plain = _plain_file(path, suffix, Path(folder), section, called)
        findings = _tolerated(headers.inspect(plain, suffix, called, section.rename), section)
        if any(finding.severity == "error" for finding in findings):
            raise refusal(tuple(findings))
        keep = preload or plain != path
        try:
            recording = _read(plain, suffix, section, called, keep)
        except DataError as error:
            raise refusal((*findings, *(error.findings or ()))) from error
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # MNE raises whatever a damaged file makes it stumble over
            broken = headers.not_eeg(plain, suffix, called)
            found = f"{broken.found}; the reader stopped with {type(error).__name__}"
            raise refusal((*findings, replace(broken, found=found))) from error
    return replace(recording, findings=(*findings, *recording.findings))


def _plain_file(path: Path, suffix: str, folder: Path, section: EEGDataSection, name: str) -> Path:
    """The file itself, or its unpacked or repaired copy in a temporary folder."""
    plain = path
    if path.suffix.lower() in COMPRESSED:
        plain = folder / path.with_suffix("").name
        opener: Callable[..., Any] = lzma.open if path.suffix.lower() == ".xz" else gzip.open
        try:
            with opener(path) as packed, plain.open("wb") as unpacked:
                _copy_limited(packed, unpacked)
        except (lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk refused, the file is not to blame
            raise refuse(
                "file.truncated",
                name,
                f"it does not unpack ({type(error).__name__}: {error})",
                "copy the file again",
            ) from error
    if section.repair_crlf and suffix in (".edf", ".rec", ".bdf"):
        found = {finding.code for finding in headers.inspect(plain, suffix, name, {})}
        if "file.text_mode" in found:
            repaired = folder / f"repaired{suffix}"
            repaired.write_bytes(repair_crlf(plain.read_bytes()))
            plain = repaired
    if suffix == ".rec":  # MNE knows the format by the suffix .edf alone
        return Path(shutil.copyfile(plain, folder / "recording.edf"))
    return plain


def repair_crlf(content: bytes) -> bytes:
    """The bytes of a file whose line feeds were turned into CR LF, as they were before."""
    return content.replace(b"\r\n", b"\n")


def _copy_limited(packed: BinaryIO, unpacked: BinaryIO) -> None:
    size = 0
    while chunk := packed.read(_CHUNK):
        size += len(chunk)
        if size > UNPACKED_LIMIT:
            raise OSError(f"more than {UNPACKED_LIMIT >> 30} GiB unpacked")
        unpacked.write(chunk)


def _tolerated(findings: list[Finding], section: EEGDataSection) -> list[Finding]:
    """A cut file is a warning where the user accepts its whole records."""
    return [
        replace(finding, severity="warning", fix="the whole records are used")
        if finding.code == "file.truncated" and section.allow_truncated
        else finding
        for finding in findings
    ]


def _read(path: Path, suffix: str, section: EEGDataSection, name: str, preload: bool) -> Recording:
    if suffix == ".npz":
        return read_npz(path, section, name)
    import mne

    if suffix == ".fif" and path.stem.endswith(("-epo", "_epo")):
        return from_mne(mne.read_epochs(path, verbose="error"), section, name)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if suffix == ".set" and _holds_epochs(path):
            epochs = mne.read_epochs_eeglab(path, verbose="error")
            return from_mne(epochs, section, name)
        opened = _open_raw(path, suffix, preload, name)
    findings = list(opened.findings)
    omitted = [re.search(r"[Oo]mitted (\d+) annotation", str(one.message)) for one in heard]
    count = sum(int(match.group(1)) for match in omitted if match) + opened.omitted
    if count:
        findings.append(
            Finding(
                "warning",
                "events.out_of_range",
                name,
                f"{count} annotations lie outside the data",
                "nothing to do if the recording was cut on purpose: they are left out",
            )
        )
    return _tidied(opened.raw, section, name, findings)


@dataclass(frozen=True)
class _Opened:
    raw: Any
    findings: tuple[Finding, ...] = ()
    omitted: int = 0


def _open_raw(path: Path, suffix: str, preload: bool, name: str) -> _Opened:
    import mne

    if suffix in (".edf", ".rec", ".bdf"):
        return _open_edf(path, suffix, preload, name)
    readers: Mapping[str, Callable[..., Any]] = {
        ".gdf": mne.io.read_raw_gdf,
        ".vhdr": mne.io.read_raw_brainvision,
        ".set": mne.io.read_raw_eeglab,
        ".fif": mne.io.read_raw_fif,
        ".cnt": mne.io.read_raw_cnt,
    }
    raw = readers[suffix](path, preload=preload, verbose="warning")
    info = raw.info["subject_info"] or {}
    named = ("first_name", "middle_name", "last_name", "birthday")
    kinds = [kind.replace("_", " ") for kind in named if info.get(kind)]
    if suffix == ".fif" and kinds:
        found = f"the header identifies people: {', '.join(kinds)} (not repeated here)"
        return _Opened(raw, (Finding("warning", "header.phi", name, found, headers.PHI_FIX),))
    return _Opened(raw)


def _open_edf(path: Path, suffix: str, preload: bool, name: str) -> _Opened:
    import mne

    reader = mne.io.read_raw_bdf if suffix == ".bdf" else mne.io.read_raw_edf
    findings: tuple[Finding, ...] = ()
    encoding = "utf8"
    try:
        raw = reader(path, preload=preload, encoding=encoding, verbose="warning")
    except Exception as error:
        if "encoding" not in str(error):
            raise
        encoding = "latin1"
        raw = reader(path, preload=preload, encoding=encoding, verbose="warning")
        fix = "nothing to do: they were read as latin-1"
        found = "annotations are not UTF-8"
        findings = (Finding("warning", "edf.annotation_encoding", name, found, fix),)
    with path.open("rb") as stream:
        header = headers.parse_edf(stream.read(256 * 2049))
    if not header.discontinuous:
        return _Opened(raw, findings)
    omitted = _close_gaps(raw, path, header, encoding)
    return _Opened(raw, findings, omitted)


def _close_gaps(raw: Any, path: Path, header: headers.Header, encoding: str) -> int:
    """Annotations of an EDF+D file from clock time to the time of its samples, gaps as boundaries.

    Returns the number of annotations that fall into gaps.
    """
    import mne

    starts, annotations = headers.clock(path, header, encoding)
    length = header.record_s
    gaps = np.flatnonzero(np.diff(starts) > length * 1.001) + 1
    placed: list[tuple[float, float, str]] = [(gap * length, 0.0, "BAD boundary") for gap in gaps]
    omitted = 0
    for onset, duration, text in annotations:
        record = int(np.searchsorted(starts, onset + 1e-9, side="right")) - 1
        if record < 0 or onset - starts[record] > length:
            omitted += 1
        else:
            placed.append((record * length + onset - starts[record], duration, text))
    placed.sort()
    marks = mne.Annotations(*([one[field] for one in placed] for field in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw.set_annotations(marks, verbose="error")
    return omitted


def _holds_epochs(path: Path) -> bool:
    """Whether an EEGLAB file holds trials: it then says ``trials`` > 1."""
    import mne

    try:
        mne.io.read_raw_eeglab(path, preload=False, verbose="error")
    except TypeError:
        return True
    return False


def _tidied(raw: Any, section: EEGDataSection, name: str, findings: list[Finding]) -> Recording:
    """The recording under cleaned channel names and in microvolt."""
    repeated = headers.duplicate_channels(tuple(raw.ch_names), name, section.rename)
    if repeated:
        raise refusal((*findings, *repeated))
    if raw.n_times == 0:
        raise refuse("file.empty", name, "0 samples", "copy the file again")
    original = dict(getattr(raw, "_orig_units", {}) or {})
    first = raw.ch_names[0]
    names = clean_names(raw.ch_names, section.rename)
    raw.rename_channels(dict(zip(raw.ch_names, names, strict=True)), verbose="error")
    stated = str(original.get(first, "V")).replace("µ", "u").replace("μ", "u")
    stated = stated if stated in IN_MICROVOLT else "V"
    unit = stated if section.unit == "auto" else section.unit
    scale = 1e6 * IN_MICROVOLT[unit] / IN_MICROVOLT[stated]
    types = raw.get_channel_types()
    eeg = tuple(name for name, kind in zip(names, types, strict=True) if kind == "eeg")
    sfreq = float(raw.info["sfreq"])
    return Recording(name, raw, None, eeg, sfreq, scale, unit, tuple(findings))
