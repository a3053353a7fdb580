"""The manifest: every source file of a prepared folder by size and hash, never by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.files import digest_of, read_json

FILE = "manifest.json"


@dataclass(frozen=True)
class Source:
    """A source file and what is known about it before it is read.

    Args:
        path: The file. Stays in memory; only ``digest`` and ``size`` are written.
        digest: SHA-256 of the content, 64 hex digits.
        size: Bytes.
        columns: Constant columns of its rows, such as subject (a pseudonym), session and run.
        files: SHA-256 of each file where the source is several, as the images and labels of a
            study are; ``digest`` then says what all of them give together.
    """

    path: Path
    digest: str
    size: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Twelve hex digits that stand for the file in ``index.parquet`` and in findings."""
        return self.digest[:12]


@dataclass(frozen=True)
class ManifestEntry:
    """What a prepared folder remembers of a source file."""

    size: int
    sha256: str
    rows: int
    columns: Mapping[str, Any]
    facts: Mapping[str, Any]
    files: Sequence[str] = ()

    @property
    def names(self) -> set[str]:
        """Twelve hex digits of the source and of each of its files."""
        return {digest[:12] for digest in (self.sha256, *self.files)}


@dataclass(frozen=True)
class Manifest:
    """Version, settings and sources of a preparation.

    Args:
        version: Version of the pipeline's preparation code.
        settings: Digest of the settings that the preparation depends on.
        sources: The source files in the order of their rows.
    """

    version: str
    settings: str
    sources: tuple[ManifestEntry, ...] = ()

    def digest(self) -> str:
        """Sixteen hex digits that name the prepared data."""
        return digest_of(
            {
                "version": self.version,
                "settings": self.settings,
                "sources": [[entry.sha256, dict(entry.columns)] for entry in self.sources],
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The form of ``manifest.json``."""
        return {
            "version": self.version,
            "settings": self.settings,
            "digest": self.digest(),
            "sources": [vars(entry) for entry in self.sources],
        }

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a prepared folder or a run."""
        stored = read_json(folder / FILE)
        entries = tuple(ManifestEntry(**entry) for entry in stored["sources"])
        return cls(stored["version"], stored["settings"], entries)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def scan(
    paths: Iterable[Path], columns: Mapping[Path, Mapping[str, Any]] | None = None
) -> list[Source]:
    """Size and hash of every file, in the given order.

    Args:
        paths: The files.
        columns: Constant columns by file.

    Returns:
        One source a file.
    """
    known = columns or {}
    return [
        Source(path, sha256_of(path), path.stat().st_size, dict(known.get(path, {})))
        for path in paths
    ]
