"""The configuration refuses what cannot work, and says what would."""

from pathlib import Path

import pytest

from diptych.config import load
from diptych.errors import UsageError
from diptych_pirads.config import PiradsConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.geometry.size=[24, 100, 112]", "no multiple of 8: take 96"),
        ("data.geometry.size=[23, 112, 112]", "no multiple of 2"),
        ("data.geometry.spacing=[0, 1, 1]", "a number > 0"),
        ("data.normalize.low=99", "is not below"),
        ("data.channels=[adc, t2]", "t2 comes first"),
        ("data.scheme=pz-tz", "pz_tz"),
        ("data.geometri.size=[24, 112, 112]", "geometry"),
    ],
)
def test_values_that_cannot_work_are_refused_with_a_way_out(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(PiradsConfig, sets=[setting])


def test_the_defaults_are_the_fast_grid() -> None:
    geometry = load(PiradsConfig).data.geometry
    assert geometry.spacing == (3.0, 0.75, 0.75)
    assert geometry.size == (24, 112, 112)


def test_configuration_and_volumes_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, diptych_pirads.prepare; sys.exit('torch' in sys.modules)"
    folder = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0
