"""Pseudonyms: the same data give the same names, and no name can be read back."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from diptych.errors import UsageError

SHORT, LONG = 8, 16


def pseudonyms(
    digests_of_subject: Mapping[str, Sequence[str]], key_file: Path | None = None
) -> dict[str, str]:
    """A pseudonym for each subject.

    ``S-`` and 8 hex digits of an HMAC over the subject's own name. The key is a BLAKE2b hash over
    the hashes of the files the subject occurs in and is not stored, so that only someone who has
    these files can recompute it. If two subjects collide, all names get 16 digits.

    Args:
        digests_of_subject: Subject's own name -> SHA-256 (hex) of the files it occurs in.
        key_file: A file whose bytes are the key instead: names stay while data grow.

    Returns:
        Subject's own name -> pseudonym.

    Raises:
        UsageError: The key cannot be read.
    """
    try:
        fixed = hashlib.blake2b(key_file.read_bytes()).digest() if key_file is not None else None
    except OSError as error:
        raise UsageError(
            f"run.pseudonym_key {key_file}: cannot be read ({error.strerror}): give the file with "
            "--set run.pseudonym_key=FILE, or null for names that follow from the data"
        ) from None
    names = {
        subject: _code(subject, fixed or _key(digests))
        for subject, digests in digests_of_subject.items()
    }
    short = {subject: code[:SHORT] for subject, code in names.items()}
    length = SHORT if len(set(short.values())) == len(short) else LONG
    return {subject: f"S-{code[:length]}" for subject, code in names.items()}


def _key(digests: Sequence[str]) -> bytes:
    return hashlib.blake2b("\n".join(sorted(digests)).encode()).digest()


def _code(subject: str, key: bytes) -> str:
    return hmac.new(key, subject.encode(), hashlib.sha256).hexdigest()
