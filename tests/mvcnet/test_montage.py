from __future__ import annotations

import pytest

from diptych_mvcnet.montage import clean_name, clean_names, is_electrode


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Fc5.", "FC5"),
        ("EEG C3-REF", "C3"),
        ("EEG Fp1-LE", "Fp1"),
        ("eeg cz-a1a2", "Cz"),
        ("T3", "T7"),
        ("EEG T6-REF", "P8"),
        ("FP2", "Fp2"),
        ("CCP3", "CCP3"),
        ("C5h", "C5h"),
    ],
)
def test_amplifier_names_become_10_05_names(written: str, name: str) -> None:
    assert clean_name(written) == name
    assert is_electrode(name)


@pytest.mark.parametrize(
    "written", ["EOG 1", "STATUS", "EMG-left", "targetPosX", "Channel 1", "ECG", "ACC"]
)
def test_other_channels_keep_their_names_and_are_no_electrodes(written: str) -> None:
    assert clean_name(written) == written
    assert not is_electrode(clean_name(written))


def test_the_users_names_win_over_the_rule() -> None:
    got = clean_names(["Channel 1", "Fc5.", "Cz"], {"Channel 1": "C3", "FC5": "FC6"})
    assert got == ["C3", "FC6", "Cz"]
