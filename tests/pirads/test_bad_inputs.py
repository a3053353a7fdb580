"""From the command line every broken real input gives its code, its file and its exit code."""

from __future__ import annotations

import json
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import SimpleITK
from tests.pirads.test_check_real import FOLDERS, IMAGES, LABELS
from tests.pirads.volumes import real_data, write_manifest

from diptych import installed
from diptych.cli import run

pytestmark = [pytest.mark.data, pytest.mark.slow]
MANIFEST = "b16_manifest_duplicate.csv"
CODES = {**IMAGES, **LABELS, **FOLDERS, MANIFEST: "E117"}


@pytest.fixture(autouse=True)
def _pirads_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("pirads", "diptych_pirads.pipeline:PIPELINE", installed.GROUP)
    monkeypatch.setattr(installed, "points", lambda: {"pirads": point})


def source(folder: Path, name: str) -> Path:
    """What a user would point at: a manifest of one study, or the shipped one."""
    bad = real_data() / "bad"
    if name == MANIFEST:
        return bad / name
    row = {"subject_id": "P", "study_id": "S", "label": "", "scheme": ""}
    if name in LABELS:
        good = real_data() / "prostatex_t2" / "ProstateX-0227_t2_tra.nrrd"
        image = SimpleITK.ReadImage(str(good))[112:208, 112:208, 6:14]
        SimpleITK.WriteImage(image, str(folder / "t2.nrrd"))
        row |= {"t2": "t2.nrrd", "label": str(bad / name), "scheme": "pz_tz"}
    elif name in FOLDERS:
        with zipfile.ZipFile(bad / f"{name}.zip") as archive:
            archive.extractall(folder / name)
        row |= {"t2": name}
    else:
        row |= {"t2": str(bad / name)}
    return write_manifest(folder / "studies.csv", row)


@pytest.mark.parametrize("name", CODES)
def test_a_broken_input_gives_its_code_its_file_and_its_exit_code(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data = CODES[name], source(tmp_path, name)
    expected = 3 if code.startswith("E") else 0
    assert run(["pirads", "check", str(data), "--json"]) == expected
    printed = capsys.readouterr()
    found = [(one["code"], one["where"]) for one in json.loads(printed.out)["findings"]]
    assert (code, name) in found
    assert "Traceback" not in printed.err
    if code == "W108":
        strict = ["pirads", "check", str(data), "--set", "data.strict=true"]
        assert run(strict) == 3
    if expected:
        for verb in ("prepare", "train"):
            assert run(["pirads", verb, str(data), "--out", str(tmp_path / verb)]) == 3
            assert not (tmp_path / verb).exists()
        printed = capsys.readouterr()
        assert code in printed.err
        assert name in printed.err
        assert "Traceback" not in printed.err
