"""Zones, and what the values of a label file allow a voxel to be.

A public label set rarely names all four zones. Each scheme therefore gives every file value the
*set* of zones that it leaves possible; a set is one byte with bit c set where class c is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, Shaped, UInt8
from numpy import ndarray
from scipy import ndimage

ZONES = ("bg", "pz", "tz", "dpu", "afs")
BG, PZ, TZ, DPU, AFS = range(5)
GLAND = frozenset({PZ, TZ, DPU, AFS})
ANY = 0b11111
UNSEEN = 255  # stands for voxels that a mask's field of view does not reach
CONTOUR = 255  # the line around the zones in the `ucla_png` files

_WORDS = (
    (("distal",), frozenset({DPU})),
    (("peripheral", "pz"), frozenset({PZ})),
    (("transition", "tz"), frozenset({TZ})),
    (("central", "cz"), frozenset({TZ})),
    (("fibromuscular", "stroma", "afs"), frozenset({AFS})),
    # the whole urethra inside the prostate, of which DPU is only the distal part
    (("urethra",), frozenset({DPU, TZ, PZ})),
    (("background",), frozenset({BG})),
)


@dataclass(frozen=True)
class LabelScheme:
    """What the values of a label file mean.

    Args:
        name: As in the manifest's column `scheme`.
        allowed: File value -> the classes (positions in `ZONES`) that it allows.
    """

    name: str
    allowed: Mapping[int, frozenset[int]]

    def to_sets(self, arr: Integer[ndarray, "*n"]) -> UInt8[ndarray, "*n"]:
        """The allowed classes of every voxel as bits.

        Args:
            arr: File values; `UNSEEN` allows every class unless the scheme says otherwise.

        Returns:
            The same shape; bit c is set where class c is allowed.

        Raises:
            ValueError: A value that the scheme does not have.

        Example:
            ``SCHEMES["pz_tz"].to_sets(np.array([0, 1, 2]))`` gives 1, 10 and 28.
        """
        values = np.unique(arr)
        known = {UNSEEN: ANY} | {value: _bits(classes) for value, classes in self.allowed.items()}
        unknown = [int(value) for value in values if int(value) not in known]
        if unknown:
            raise ValueError(f"values {unknown} are not in the scheme {self.name}")
        bits = np.array([known[int(value)] for value in values], np.uint8)
        return bits[np.searchsorted(values, arr)]

    @property
    def foreground(self) -> tuple[int, ...]:
        """File values of the gland."""
        return tuple(v for v, classes in self.allowed.items() if classes <= GLAND)

    @property
    def peripheral(self) -> tuple[int, ...]:
        """File values of the peripheral zone; none where it is not told from the rest."""
        return tuple(v for v in self.foreground if self.allowed[v] & {PZ, TZ} == {PZ})

    @property
    def inner(self) -> tuple[int, ...]:
        """File values of the gland without the peripheral zone."""
        return tuple(v for v in self.foreground if PZ not in self.allowed[v])


_TWO_ZONES = {0: frozenset({BG}), 1: frozenset({PZ, DPU}), 2: frozenset({TZ, AFS, DPU})}
SCHEMES: dict[str, LabelScheme] = {
    scheme.name: scheme
    for scheme in (
        LabelScheme("zones4", {c: frozenset({c}) for c in range(5)}),
        LabelScheme("pz_tz", _TWO_ZONES),
        LabelScheme("msd05", _TWO_ZONES),
        LabelScheme("prostate158", {0: _TWO_ZONES[0], 1: _TWO_ZONES[2], 2: _TWO_ZONES[1]}),
        LabelScheme("gland", {0: frozenset({BG}), 1: GLAND}),
        LabelScheme("ucla_png", _TWO_ZONES),
        LabelScheme("prostatex_masks", {**_TWO_ZONES, 3: GLAND}),
    )
}
FROM_SEGMENTS = "prostatezones"  # its values stand in each file


def scheme_of_segments(names: Mapping[int, str]) -> LabelScheme:
    """The scheme `prostatezones`, from the segment names that a file carries.

    Args:
        names: File value -> segment name, such as "Peripheral zone".

    Returns:
        A scheme with the background 0 and these values.

    Raises:
        ValueError: A segment name that says no known zone, or a value that is not in 1 to 254.
    """
    allowed = {0: frozenset({BG})}
    for value, name in names.items():
        if not 0 < value < UNSEEN:
            raise ValueError(f"segment '{name}' has the value {value}; 1 to {UNSEEN - 1} are read")
        lower = name.lower()
        zones = next((zones for words, zones in _WORDS if any(w in lower for w in words)), None)
        if zones is None:
            raise ValueError(f"segment {value} is named '{name}', which is no known zone")
        allowed[value] = zones
    return LabelScheme(FROM_SEGMENTS, allowed)


def guess_scheme(values: Shaped[ndarray, " n"]) -> str:
    """The scheme that the values of a label file suggest where none is given.

    Values 0 to 2 may be `pz_tz` or its reverse `prostate158`; `pz_tz` is guessed, and `check`
    looks at the shapes.

    Args:
        values: The values that occur.

    Returns:
        "zones4", "pz_tz" or "gland".
    """
    present = {int(v) for v in values if 0 < v <= AFS}
    if present & {DPU, AFS}:
        return "zones4"
    return "pz_tz" if TZ in present else "gland"


def join_contours(label: Integer[ndarray, "z y x"]) -> Integer[ndarray, "z y x"]:
    """Give the contour line of `ucla_png` files to the zones that it separates.

    Each voxel of the line takes the most frequent other value among its 8 neighbours in the
    slice, gland before background; thick lines are taken up from their edges inwards.

    Args:
        label: Values 0, 1, 2 and `CONTOUR`.

    Returns:
        The label without contour values.
    """
    joined = label.copy()
    square = np.ones((1, 3, 3), np.float32)
    while (line := joined == CONTOUR).any():
        votes = np.stack(
            [
                ndimage.convolve((joined == value).astype(np.float32), square, mode="constant")
                for value in (PZ, TZ, BG)
            ]
        )
        taken = line & (votes.max(0) > 0)
        if not taken.any():  # a slice of nothing but contour
            joined[line] = BG
            break
        votes[2] = np.minimum(votes[2], 0.5)
        joined[taken] = np.array([PZ, TZ, BG], joined.dtype)[votes[:, taken].argmax(0)]
    return joined


def join_masks(
    prostate: Bool[ndarray, "z y x"], pz: Bool[ndarray, "z y x"], tz: Bool[ndarray, "z y x"]
) -> tuple[UInt8[ndarray, "z y x"], int]:
    """One label from the three masks of `prostatex_masks` (TZ holds CZ and AFS too).

    Args:
        prostate: The gland.
        pz: Peripheral zone.
        tz: The rest of the zones.

    Returns:
        Values 1 PZ, 2 TZ, 3 gland without a zone; and the number of voxels that both zones claim,
        which become 3 as well.
    """
    both = pz & tz
    label = np.where(pz, np.uint8(1), np.uint8(0))
    label[tz] = 2
    label[(prostate & ~pz & ~tz) | both] = 3
    return label, int(both.sum())


def _bits(classes: frozenset[int]) -> int:
    return sum(1 << c for c in classes)
