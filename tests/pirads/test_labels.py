"""What the values of label files allow."""

import numpy as np
import pytest

from diptych_pirads.labels import (
    AFS,
    ANY,
    BG,
    CONTOUR,
    DPU,
    PZ,
    SCHEMES,
    TZ,
    UNSEEN,
    guess_scheme,
    join_contours,
    join_masks,
    scheme_of_segments,
)


def bits(*classes: int) -> int:
    return sum(2**c for c in classes)


@pytest.mark.parametrize(
    ("scheme", "sets"),
    [
        ("zones4", [bits(BG), bits(PZ), bits(TZ), bits(DPU), bits(AFS)]),
        ("pz_tz", [bits(BG), bits(PZ, DPU), bits(TZ, AFS, DPU)]),
        ("msd05", [bits(BG), bits(PZ, DPU), bits(TZ, AFS, DPU)]),
        ("prostate158", [bits(BG), bits(TZ, AFS, DPU), bits(PZ, DPU)]),
        ("gland", [bits(BG), bits(PZ, TZ, DPU, AFS)]),
    ],
)
def test_file_values_become_the_sets_of_their_scheme(scheme: str, sets: list[int]) -> None:
    made = SCHEMES[scheme].to_sets(np.arange(len(sets)).reshape(1, -1))
    assert made.tolist() == [sets]
    assert made.dtype == np.uint8


def test_unseen_voxels_allow_everything() -> None:
    assert SCHEMES["pz_tz"].to_sets(np.array([UNSEEN])).tolist() == [ANY]


def test_an_unknown_value_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[3\].*pz_tz"):
        SCHEMES["pz_tz"].to_sets(np.array([0, 3]))


@pytest.mark.parametrize(
    ("scheme", "peripheral", "inner"),
    [
        ("zones4", (1,), (2, 3, 4)),
        ("pz_tz", (1,), (2,)),
        ("prostate158", (2,), (1,)),
        ("gland", (), ()),
        ("prostatex_masks", (1,), (2,)),
    ],
)
def test_every_scheme_knows_its_peripheral_zone(
    scheme: str, peripheral: tuple[int, ...], inner: tuple[int, ...]
) -> None:
    assert SCHEMES[scheme].peripheral == peripheral
    assert SCHEMES[scheme].inner == inner


def test_segment_names_say_the_zones() -> None:
    names = {1: "Peripheral zone", 2: "Central zone", 3: "AFMS (stroma)", 4: "Urethra"}
    scheme = scheme_of_segments(names)
    assert scheme.allowed[2] == {TZ}
    assert scheme.allowed[3] == {AFS}
    assert scheme.allowed[4] == {DPU, TZ, PZ}
    assert scheme.peripheral == (1,)
    with pytest.raises(ValueError, match="bladder"):
        scheme_of_segments({1: "bladder"})
    with pytest.raises(ValueError, match="300"):
        scheme_of_segments({300: "Peripheral zone"})


def test_values_suggest_a_scheme() -> None:
    assert guess_scheme(np.array([0, 1])) == "gland"
    assert guess_scheme(np.array([0, 1, 2, 255])) == "pz_tz"
    assert guess_scheme(np.array([0, 1, 4])) == "zones4"


def test_a_contour_goes_to_the_zones_that_it_separates() -> None:
    label = np.zeros((1, 9, 11), np.uint8)
    label[0, 1:8, 1:10] = CONTOUR
    label[0, 2:7, 2:5] = 1
    label[0, 2:7, 6:9] = 2
    joined = join_contours(label)[0]
    assert set(np.unique(joined)) == {0, 1, 2}
    assert (joined[1:8, 1:4] == 1).all()
    assert (joined[1:8, 7:10] == 2).all()
    assert (joined[0] == 0).all()


def test_slices_of_nothing_but_contour_become_background() -> None:
    assert not join_contours(np.full((1, 4, 4), CONTOUR, np.uint8)).any()


def test_three_masks_become_one_label_and_say_their_overlap() -> None:
    gland = np.array([[[1, 1, 1, 1, 0]]], bool)
    pz = np.array([[[1, 1, 0, 0, 0]]], bool)
    tz = np.array([[[0, 1, 1, 0, 0]]], bool)
    label, overlap = join_masks(gland, pz, tz)
    assert label.tolist() == [[[1, 3, 2, 3, 0]]]
    assert overlap == 1
