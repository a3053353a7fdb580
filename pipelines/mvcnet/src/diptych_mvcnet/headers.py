"""Facts of a file that stand in its own header, before a reader interprets anything.

MNE reads a cut EDF file without a word and says nothing about the names in a header; sizes, record
counts, repeated labels and identifying fields are therefore taken from the bytes. No value of an
identifying field leaves this module.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diptych.findings import Finding
from diptych_mvcnet.montage import clean_names

TEXT_FIELD = 80
PHI_FIX = "--set data.anonymise=true writes copies without them; prepared data never hold them"
_GDF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 8, 8: 8, 16: 4, 17: 8, 279: 3, 535: 3}
_PERSON = re.compile(
    r"^\W*(patient|subject|operator|technician|birth\s*date|date\s+of\s+birth)\b[^:=\n]*[:=]\s*\S",
    re.IGNORECASE | re.MULTILINE,
)
_RECORD_START = re.compile(rb"([+-]\d+(?:\.\d*)?)\x14\x14")
_ANNOTATION = re.compile(
    rb"([+-]\d+(?:\.\d*)?)(?:\x15(\d+(?:\.\d*)?))?\x14(.*?)\x14\x00", re.DOTALL
)


@dataclass(frozen=True)
class Header:
    """The header of an EDF or BDF file.

    Args:
        header_bytes: Bytes before the first record.
        record_bytes: Bytes of a record.
        records: Number of records as stated; -1 where the recorder did not know.
        record_s: Seconds of a record.
        labels: Channel labels, the annotation channels included.
        samples: Samples of a record by channel.
        sample_bytes: 2 in EDF, 3 in BDF.
        discontinuous: Whether time passes between records (EDF+D).
        identifying: Which identifying fields are filled in, by their kind.
    """

    header_bytes: int
    record_bytes: int
    records: int
    record_s: float
    labels: tuple[str, ...]
    samples: tuple[int, ...]
    sample_bytes: int
    discontinuous: bool
    identifying: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes that the header promises."""
        return self.header_bytes + self.records * self.record_bytes


def parse_edf(start: bytes) -> Header:
    """The header of an EDF(+) or BDF(+) file.

    Args:
        start: The file from its first byte, the whole header at least.

    Returns:
        The parsed header.

    Raises:
        ValueError: The bytes are no such header.
    """

    def text(offset: int, length: int) -> str:
        return start[offset : offset + length].decode("latin-1").strip()

    def number(offset: int, length: int) -> int:
        return int(text(offset, length))

    is_bdf = start[:1] == b"\xff" and start[1:8] == b"BIOSEMI"
    if not is_bdf and text(0, 8) != "0":
        raise ValueError("no EDF or BDF version")
    channels = number(252, 4)
    header_bytes = number(184, 8)
    if channels < 1 or header_bytes != 256 * (channels + 1) or len(start) < header_bytes:
        raise ValueError("the header length does not fit the number of channels")
    labels = tuple(text(256 + 16 * n, 16) for n in range(channels))
    samples = tuple(number(256 + 216 * channels + 8 * n, 8) for n in range(channels))
    sample_bytes = 3 if is_bdf else 2
    return Header(
        header_bytes=header_bytes,
        record_bytes=sum(samples) * sample_bytes,
        records=number(236, 8),
        record_s=float(text(244, 8)),
        labels=labels,
        samples=samples,
        sample_bytes=sample_bytes,
        discontinuous=text(192, 44)[:5] in ("EDF+D", "BDF+D"),
        identifying=_edf_identifying(text(8, TEXT_FIELD), text(88, TEXT_FIELD)),
    )


def inspect(path: Path, suffix: str, name: str, rename: Mapping[str, str]) -> list[Finding]:
    """What the bytes of a file say before it is read.

    Args:
        path: The unpacked file.
        suffix: Its format, such as ".edf".
        name: What findings call it.
        rename: Channel names in the file -> names to use.

    Returns:
        Findings; an error among them means that the file cannot be read as it is.
    """
    if path.stat().st_size == 0:
        return [Finding("error", "file.empty", name, "0 bytes", "copy the file again")]
    inspector: Callable[[Path, str, str, Mapping[str, str]], list[Finding]] | None = {
        ".edf": _inspect_edf,
        ".rec": _inspect_edf,
        ".bdf": _inspect_edf,
        ".gdf": _inspect_gdf,
        ".vhdr": _inspect_brainvision,
    }.get(suffix)
    return inspector(path, suffix, name, rename) if inspector is not None else []


def not_eeg(path: Path, suffix: str, name: str) -> Finding:
    """The finding for a file that is not what its suffix says."""
    with path.open("rb") as stream:
        start = stream.read(512)
    web_page = re.match(rb"\s*(<!doctype html|<html|<\?xml)", start, re.IGNORECASE)
    what = "an HTML or XML page" if web_page else f"no {suffix[1:].upper()} file"
    return Finding(
        "error",
        "file.not_eeg",
        name,
        f"{what}; its first 16 bytes are {start[:16].hex(' ')}",
        "download it again from the data's own server",
    )


def clock(
    path: Path, header: Header, encoding: str
) -> tuple[np.ndarray, list[tuple[float, float, str]]]:
    """The clock of an EDF+ or BDF+ file: when each record and each annotation began.

    Args:
        path: The file.
        header: Its header.
        encoding: Of the annotations.

    Returns:
        Seconds from the first record, one a record (evenly spaced where the file does not say),
        and the annotations as (onset, duration, text).
    """
    payload = path.stat().st_size - header.header_bytes
    records = payload // header.record_bytes
    channels = [n for n, label in enumerate(header.labels) if label[4:] == "Annotations"]
    starts = np.full(records, np.nan)
    found: list[tuple[float, float, str]] = []
    with path.open("rb") as stream:
        for record in range(records):
            for channel in channels:
                offset = sum(header.samples[:channel]) * header.sample_bytes
                stream.seek(header.header_bytes + record * header.record_bytes + offset)
                content = stream.read(header.samples[channel] * header.sample_bytes)
                start = _RECORD_START.match(content)
                if start and channel == channels[0]:
                    starts[record] = float(start.group(1))
                for onset, duration, texts in _ANNOTATION.findall(content):
                    found += [
                        (float(onset), float(duration or 0), text.decode(encoding))
                        for text in texts.split(b"\x14")
                        if text
                    ]
    if records == 0 or not np.isfinite(starts).all():
        return np.arange(records) * header.record_s, found
    first = starts[0]
    return starts - first, [(onset - first, duration, text) for onset, duration, text in found]


def _inspect_edf(path: Path, suffix: str, name: str, rename: Mapping[str, str]) -> list[Finding]:
    with path.open("rb") as stream:
        start = stream.read(256 * 2049)
    try:
        header = parse_edf(start)
    except ValueError:
        return [not_eeg(path, suffix, name)]
    findings = _size_findings(path, header, name)
    if header.discontinuous:
        findings.append(
            Finding(
                "warning",
                "edf.discontinuous",
                name,
                "an interrupted recording (EDF+D)",
                "nothing to do: each gap is a boundary that no trial crosses",
            )
        )
    findings += duplicate_channels(header.labels, name, rename)
    findings += _phi(header.identifying, name)
    return findings


def duplicate_channels(
    labels: tuple[str, ...], name: str, rename: Mapping[str, str]
) -> list[Finding]:
    """An error for every channel name that a file holds twice.

    Args:
        labels: Names as the file has them.
        name: What findings call the file.
        rename: Names in the file -> names to use.

    Returns:
        One finding a repeated name.
    """
    signals = [label for label in labels if label[4:] != "Annotations"]
    counts = Counter(clean_names(signals, rename))
    return [
        Finding(
            "error",
            "channel.duplicate",
            f"{name}, channel {channel}",
            f"the name stands {count} times in the header",
            "correct the header, or give different names with data.rename if they differ in it",
        )
        for channel, count in counts.items()
        if count > 1
    ]


def _size_findings(path: Path, header: Header, name: str) -> list[Finding]:
    size = path.stat().st_size
    whole, rest = divmod(max(size - header.header_bytes, 0), max(header.record_bytes, 1))
    if header.records < 0:
        return [
            Finding(
                "warning",
                "file.records_unknown",
                name,
                "the header does not state the number of records (-1)",
                f"nothing to do: {whole} records follow from the size",
            )
        ]
    if header.records == 0 or header.record_bytes == 0 or (whole == 0 and rest == 0):
        return [Finding("error", "file.empty", name, "0 samples", "copy the file again")]
    if size < header.size:
        return [
            Finding(
                "error",
                "file.truncated",
                name,
                f"the header promises {header.records} records, {whole} whole ones are there"
                + (f" and {rest} bytes of another" if rest else ""),
                "copy the file again, or use the whole records with "
                "--set data.allow_truncated=true",
            )
        ]
    if size > header.size and size - path.read_bytes().count(b"\r\n") == header.size:
        return [
            Finding(
                "error",
                "file.text_mode",
                name,
                f"{size - header.size} bytes too long: every line feed became CR LF on the way",
                "fetch the file in binary mode, or --set data.repair_crlf=true",
            )
        ]
    return []


def _edf_identifying(patient: str, recording: str) -> tuple[str, ...]:
    """Kinds of filled identifying fields in the EDF+ form, or the free form of old files."""

    def filled(words: list[str], position: int) -> bool:
        return len(words) > position and words[position].strip("Xx.?-_") != ""

    kinds = []
    words = patient.split()
    if len(words) >= 4 or all(word.upper() == "X" for word in words):
        fields = ("patient code", 0), ("birth date", 2), ("patient name", 3)
        kinds += [kind for kind, position in fields if filled(words, position)]
    elif patient:
        kinds.append("patient field")
    words = recording.split()
    if words[:1] == ["Startdate"]:
        kinds += ["technician"] if filled(words, 3) else []
    elif any(filled([word], 0) for word in words):
        kinds.append("recording field")
    return tuple(kinds)


def _phi(kinds: tuple[str, ...], name: str) -> list[Finding]:
    if not kinds:
        return []
    return [
        Finding(
            "warning",
            "header.phi",
            name,
            f"the header identifies people: {', '.join(kinds)} (not repeated here)",
            PHI_FIX,
        )
    ]


def _inspect_gdf(path: Path, suffix: str, name: str, rename: Mapping[str, str]) -> list[Finding]:
    with path.open("rb") as stream:
        start = stream.read(256 * 1025)
    if start[:3] != b"GDF" or len(start) < 256:
        return [not_eeg(path, suffix, name)]
    version = float(start[4:8].decode("latin-1").strip() or 0)
    patient = start[8 : 8 + (66 if version >= 1.9 else TEXT_FIELD)]
    kinds = ["patient field"] if patient.strip(b" \x00Xx").split() else []
    if version >= 1.9 and any(start[176:184]):
        kinds.append("birth date")
    findings = _phi(tuple(kinds), name)
    records, channels = _gdf_counts(start, version)
    types = np.frombuffer(start, "<i4", channels, 256 + 220 * channels)
    samples = np.frombuffer(start, "<i4", channels, 256 + 216 * channels)
    labels = tuple(
        start[256 + 16 * n : 272 + 16 * n].split(b"\x00")[0].decode("latin-1").strip()
        for n in range(channels)
    )
    findings += duplicate_channels(labels, name, rename)
    record_bytes = sum(
        int(count) * _GDF_TYPE_BYTES.get(int(kind), 0)
        for count, kind in zip(samples, types, strict=True)
    )
    promised = 256 * (channels + 1) + max(records, 0) * record_bytes
    if records == 0:
        findings.append(Finding("error", "file.empty", name, "0 records", "copy the file again"))
    elif path.stat().st_size < promised:
        findings.append(
            Finding(
                "error",
                "file.truncated",
                name,
                f"the header promises {promised} bytes before the events, "
                f"{path.stat().st_size} are there",
                "copy the file again: events stand at the end of a GDF file and are lost",
            )
        )
    return findings


def _gdf_counts(start: bytes, version: float) -> tuple[int, int]:
    """Records and channels of a GDF header, both forms of which keep them in one place."""
    records: int = struct.unpack_from("<q", start, 236)[0]
    width = "<I" if version < 1.9 else "<H"
    channels: int = struct.unpack_from(width, start, 252)[0]
    return records, min(channels, (len(start) - 256) // 256)


def _inspect_brainvision(
    path: Path, suffix: str, name: str, rename: Mapping[str, str]
) -> list[Finding]:
    text = path.read_bytes()[: 1 << 20].decode("utf-8", "replace")
    if not re.match(r"\s*brain\s?vision", text, re.IGNORECASE):
        return [not_eeg(path, suffix, name)]
    comment = text.partition("[Comment]")[2]
    kinds = tuple(dict.fromkeys(match.group(1).lower() for match in _PERSON.finditer(comment)))
    findings = _phi(kinds, name)
    named = re.search(r"^DataFile=(.*)$", text, re.MULTILINE)
    data = path.with_name(named.group(1).strip()) if named else None
    if data is not None and "$b" not in data.name and not data.is_file():
        findings.append(
            Finding(
                "error",
                "file.incomplete",
                name,
                "its DataFile is not beside it",
                "put the .vhdr, .vmrk and .eeg of a recording into one folder under their names",
            )
        )
    return findings
