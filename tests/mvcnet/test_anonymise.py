from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.mvcnet.files import CHANNELS, real_data, simulated, write

from diptych_mvcnet.check import check
from diptych_mvcnet.config import EEGDataSection, MVCNetConfig
from diptych_mvcnet.prepare import prepare
from diptych_mvcnet.read import read_recording

WORDS = (b"Doe", b"Jane", b"1961", b"Nurse", b"MRN-0042", b"2019")
CONFIG = MVCNetConfig.model_validate({"data": {"anonymise": True, "resample_hz": 64.0}})


@pytest.mark.parametrize("name", ["a.edf", "a.vhdr", "a.set", "a_raw.fif"])
def test_the_copy_holds_the_same_signal_and_nobody(tmp_path: Path, name: str) -> None:
    raw = simulated(10)
    raw.info["subject_info"] = {"last_name": "Doe", "first_name": "Jane", "his_id": "MRN-0042"}
    path = write(raw, tmp_path / "data" / name)
    prepare(CONFIG, path, tmp_path / "p")
    copies = sorted((tmp_path / "p" / "anonymised").iterdir())
    content = b"".join(copy.read_bytes() for copy in copies)
    assert not any(word in content for word in WORDS)
    (copy,) = (one for one in copies if one.suffix == path.suffix)
    assert copy.name.startswith("S-")
    got = read_recording(copy)
    np.testing.assert_allclose(
        got.signal(CHANNELS), read_recording(path).signal(CHANNELS), atol=0.1
    )
    assert [text[-2:] for text in got.raw.annotations.description] == ["T1", "T2"] * 5


def test_the_warning_becomes_a_note_when_copies_are_written(tmp_path: Path) -> None:
    raw = simulated(10)
    raw.info["subject_info"] = {"last_name": "Doe"}
    path = write(raw, tmp_path / "a_raw.fif")
    for anonymise, severity in ((False, "warning"), (True, "note")):
        section = EEGDataSection(anonymise=anonymise, resample_hz=64.0)
        findings = check(MVCNetConfig(data=section), path)
        assert [one.severity for one in findings if one.code == "header.phi"] == [severity]


@pytest.mark.data
def test_the_file_with_a_filled_header_leaves_no_trace_of_it(tmp_path: Path) -> None:
    source = tmp_path / "data"
    for n, subject in enumerate("ab"):
        content = bytearray(write(simulated(12, seed=n), source / subject / "1.edf").read_bytes())
        filled = (real_data() / "bad" / "phi.edf").read_bytes()
        content[8:168] = filled[8:168]
        (source / subject / "1.edf").write_bytes(content)
    assert [one.code for one in check(CONFIG, source) if one.code == "header.phi"]
    prepare(CONFIG, source, tmp_path / "p")
    everything = b"".join(p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file())
    assert not any(word in everything for word in WORDS)
