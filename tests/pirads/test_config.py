"""The configuration refuses what cannot work, and says what would."""

from pathlib import Path

import pytest

from diptych.config import dump_yaml, load, load_yaml
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
        ("model.paths.b=[afs]", "share no zone"),
        ("model.paths.b=[pz, tz]", "no path has afs"),
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


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load(PiradsConfig, sets=["model.paths.a=[pz, tz, dpu, afs]", "predict.tta=none"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_yaml(PiradsConfig, tmp_path / "config.yaml") == config


def test_configuration_and_volumes_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, diptych_pirads.prepare; sys.exit('torch' in sys.modules)"
    folder = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0
