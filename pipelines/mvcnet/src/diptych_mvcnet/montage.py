"""Electrode names: what amplifiers write, and what the 10-05 system calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

OLD_NAMES: Mapping[str, str] = {"t3": "T7", "t4": "T8", "t5": "P7", "t6": "P8"}
# Rows between F and C and between C and P of BCI Competition IV, data set 1.
EXTRA_NAMES = tuple(f"{row}{n}" for row in ("CFC", "CCP") for n in range(1, 9))
_PREFIX = re.compile(r"^EEG[\s:_-]+", re.IGNORECASE)
_REFERENCE = re.compile(r"[\s-]+(REF|LE|A1A2|A1|A2|M1|M2|AVG|AV|AR|CAR|CZ)$", re.IGNORECASE)


@cache
def electrodes() -> Mapping[str, str]:
    """Lower-case name -> name of every electrode that is known, the old names included."""
    known = {name.lower(): name for name in (*EXTRA_NAMES, *standard_montage("1005").ch_names)}
    return {**known, **OLD_NAMES}


def standard_montage(system: str) -> Any:
    """MNE's template montage under its new name, or the old one on an older MNE.

    Args:
        system: "1005" or "1020".

    Returns:
        The ``mne.channels.DigMontage``.
    """
    import mne

    name = f"colin27_{system}"
    if name not in mne.channels.get_builtin_montages():
        name = f"standard_{system}"
    return mne.channels.make_standard_montage(name)


def clean_name(name: str) -> str:
    """A channel name without dots, blanks, ``EEG`` and reference; the 10-05 name if it is one.

    Args:
        name: As the file has it.

    Returns:
        The electrode's name in its usual spelling, or the tidied name of another channel.

    Example:
        >>> clean_name("EEG Fc5.-REF"), clean_name("Fp1."), clean_name("T3"), clean_name("EOG 1")
        ('FC5', 'Fp1', 'T7', 'EOG 1')
    """
    tidy = name.strip().strip(".").strip()
    bare = _REFERENCE.sub("", _PREFIX.sub("", tidy)).strip(" .")
    found = electrodes().get(bare.replace(".", "").replace(" ", "").lower())
    return found if found is not None else tidy


def clean_names(names: Sequence[str], rename: Mapping[str, str] | None = None) -> list[str]:
    """Channel names of a file as the project uses them.

    Args:
        names: As the file has them.
        rename: Names in the file -> names to use; they win.

    Returns:
        One name a channel, in the same order; equal names are the caller's finding.
    """
    wanted = rename or {}
    return [wanted.get(name, wanted.get(clean_name(name), clean_name(name))) for name in names]


def is_electrode(name: str) -> bool:
    """Whether a cleaned name belongs to an electrode of the 10-05 system."""
    return name.lower() in electrodes()
