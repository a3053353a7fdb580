import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import hilbert

from diptych.randomness import Draw
from diptych_mvcnet.config import ViewsSection
from diptych_mvcnet.parity import OFFICIAL_PAIRS, official_mirror
from diptych_mvcnet.views import (
    build_views,
    class_mirror_index,
    flip,
    frequency_shift,
    mirror_index,
    reflect,
    unpaired_channels,
    usable_views,
)

BNCI2014001 = [
    *("Fz", "FC3", "FC1", "FCz", "FC2", "FC4", "C5", "C3", "C1", "Cz", "C2"),
    *("C4", "C6", "CP3", "CP1", "CPz", "CP2", "CP4", "P1", "Pz", "P2", "POz"),
]
FOUR = ["left_hand", "right_hand", "feet", "tongue"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hilbert_shift(x, delta, dt):
    n = 1 << int(np.ceil(np.log2(x.shape[-1])))
    analytic = hilbert(x.numpy().astype(np.float64), N=n, axis=-1)[..., : x.shape[-1]]
    return np.real(analytic * np.exp(2j * np.pi * delta * np.arange(x.shape[-1]) * dt))


@pytest.mark.parametrize("n_times", [1001, 750, 512, 3])
def test_frequency_shift_is_the_analytic_signal_turned(n_times):
    x = noise(4, 3, n_times)
    for delta in (0.1, -1.3):
        shifted = frequency_shift(x, delta, 1 / 250)
        np.testing.assert_allclose(shifted, hilbert_shift(x, delta, 1 / 250), atol=1e-5)


def test_a_shift_of_zero_changes_nothing():
    x = noise(2, 3, 300)
    assert frequency_shift(x, 0.0, 0.01).equal(x)


def test_a_sine_of_ten_hertz_moves_to_twelve():
    time = torch.arange(300) / 100
    spectrum = torch.fft.rfft(
        frequency_shift(torch.sin(2 * torch.pi * 10 * time).expand(1, 1, -1), 2.0, 0.01)
    ).abs()
    assert int(spectrum.argmax()) / 3 == 12.0


def test_every_trial_may_have_its_own_shift():
    x = noise(3, 2, 100)
    delta = torch.tensor([0.5, -1.0, 0.0])
    together = frequency_shift(x, delta[:, None, None], 0.01)
    for row in range(3):
        alone = frequency_shift(x[row], float(delta[row]), 0.01)
        assert together[row].allclose(alone, atol=1e-6)


def test_half_precision_is_shifted_in_single_precision():
    x = noise(2, 2, 64)
    shifted = frequency_shift(x.bfloat16(), 0.5, 0.01)
    assert shifted.dtype == torch.bfloat16
    assert shifted.equal(frequency_shift(x.bfloat16().float(), 0.5, 0.01).bfloat16())


def test_names_give_the_official_pairs():
    assert mirror_index(BNCI2014001).equal(official_mirror("BNCI2014001", 22))
    left, right = OFFICIAL_PAIRS["BNCI2014001"]
    assert mirror_index(BNCI2014001)[list(left)].tolist() == list(right)


@settings(max_examples=30, deadline=None)
@given(names=st.permutations(BNCI2014001))
def test_reflecting_twice_is_the_identity(names):
    x, mirror = noise(2, 22, 8), mirror_index(names)
    assert reflect(reflect(x, mirror), mirror).equal(x)
    assert not reflect(x, mirror).equal(x)


@pytest.mark.parametrize(
    ("names", "mirror"),
    [
        (["T3", "t8", "CFC1", "CFC2", "Oz"], [1, 0, 3, 2, 4]),
        (["FFC1h", "CCP3h", "FFC2h", "CCP4h"], [2, 3, 0, 1]),
        (["C9", "C10"], [1, 0]),
        (["T5", "P8"], [1, 0]),
    ],
)
def test_partners_follow_from_electrode_names(names, mirror):
    assert mirror_index(names).tolist() == mirror


def test_an_electrode_without_partner_is_named():
    names = ["C3", "Cz", "C4", "P7"]
    assert unpaired_channels(names) == ["P7"]
    with pytest.raises(ValueError, match=r"\['P7'\].*allow_partial"):
        mirror_index(names)
    assert mirror_index(names, allow_partial=True).tolist() == [2, 1, 0, 3]


def test_explicit_pairs_replace_the_rule():
    assert mirror_index(["E1", "E2", "E3"], pairs=[("E1", "E3")]).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="E9"):
        mirror_index(["E1", "E2"], pairs=[("E1", "E9")])


def test_classes_without_a_side_keep_their_label():
    assert class_mirror_index(FOUR, {"left_hand": "right_hand"}).tolist() == [1, 0, 2, 3]
    assert class_mirror_index(["left_hand", "feet"], {"left_hand": "right_hand"}).tolist() == [0, 1]


def test_views_come_raw_first_with_their_labels():
    x, y = noise(4, 22, 50), torch.tensor([0, 1, 2, 3])
    mirror = mirror_index(BNCI2014001)
    views, labels = build_views(
        x,
        y,
        ["flip", "freq_shift", "reflect", "scale"],
        sfreq=100.0,
        mirror=mirror,
        class_mirror=class_mirror_index(FOUR, {"left_hand": "right_hand"}),
    )
    expected = [x, flip(x), frequency_shift(x, 0.1, 0.01), x[:, mirror], 0.8 * x]
    assert all(view.equal(one) for view, one in zip(views, expected, strict=True))
    assert [label.tolist() for label in labels] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 0, 2, 3],
        [0, 1, 2, 3],
    ]


def test_official_switches_act():
    x, y = noise(3, 22, 64), torch.tensor([0, 1, 2])
    quirks = ViewsSection.model_validate(
        {"freq_shift": {"parity_dt": 0.004}, "reflect": {"parity_binary_swap": True}}
    )
    views, labels = build_views(
        x, y, ["freq_shift", "reflect"], sfreq=512.0, mirror=mirror_index(BNCI2014001),
        settings=quirks,
    )  # fmt: skip
    assert views[1].equal(frequency_shift(x, 0.1, 0.004))
    assert labels[2].tolist() == [1, 0, 2]


RANDOM = ViewsSection.model_validate(
    {"use": ["freq_shift", "noise", "surrogate"], "freq_shift": {"random": True}}
)


def random_views(rows, epoch=0):
    x = noise(9, 4, 60)
    return build_views(
        x[rows], torch.zeros(len(rows), dtype=torch.long), RANDOM.use, sfreq=100.0,
        settings=RANDOM, draw=Draw(3).at(epoch), ids=rows,
    )[0][1:]  # fmt: skip


def test_random_views_depend_on_the_trial_and_the_epoch_alone():
    together, alone = random_views([1, 5, 8]), random_views([5])
    for view, one in zip(together, alone, strict=True):
        assert view[1].allclose(one[0], atol=1e-6)
    for view, later in zip(alone, random_views([5], epoch=1), strict=True):
        assert not view.allclose(later, atol=1e-3)


def test_noise_stays_within_its_amplitude():
    x, view = noise(9, 4, 60)[[2]], random_views([2])[1]
    assert float((view - x).abs().max()) <= 0.5 * float(x.std(correction=0))


def test_a_surrogate_keeps_spectra_and_covariance():
    x, view = noise(9, 4, 60)[[2]], random_views([2])[2]
    assert torch.fft.rfft(view).abs().allclose(torch.fft.rfft(x).abs(), atol=1e-4)
    assert torch.cov(view[0]).allclose(torch.cov(x[0]), atol=1e-5)
    assert not view.allclose(x, atol=0.1)


@pytest.mark.parametrize("name", ["freq_shift", "noise", "surrogate"])
def test_a_random_view_without_draws_is_refused(name):
    with pytest.raises(ValueError, match=name):
        build_views(
            noise(1, 2, 8), torch.zeros(1, dtype=torch.long), [name], sfreq=100.0, settings=RANDOM
        )


@pytest.mark.parametrize(
    ("names", "lesion", "reason"),
    [
        (["C3", "Cz", "C4", "P7"], False, "P7"),
        (["Fz", "Cz"], False, "opposite sides"),
        (["C3", "Cz", "C4"], True, "lesion"),
    ],
)
def test_an_impossible_reflection_is_left_out_with_its_reason(names, lesion, reason):
    used, left_out = usable_views(ViewsSection(), names, lesion=lesion)
    assert used == ("flip", "freq_shift")
    assert reason in left_out["reflect"]
    without = ViewsSection(use=("flip",))
    assert usable_views(without, names, lesion=lesion) == (("flip",), {})


def test_a_lesion_may_be_reflected_on_request():
    keep = ViewsSection.model_validate({"reflect": {"keep_with_lesion": True}})
    assert usable_views(keep, ["C3", "C4"], lesion=True) == (keep.use, {})
