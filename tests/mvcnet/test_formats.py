from pathlib import Path

import mne
import numpy as np
import polars as pl
import pytest
from tests.mvcnet.files import write

import diptych
from diptych_mvcnet.pipeline import PIPELINE
from diptych_mvcnet.sample import write_sample


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.edf", 5e-3), ("a.vhdr", 1e-5), ("a.set", 1e-5)]
)
def test_a_recording_is_decoded_alike_in_every_format(
    causal_run: Path, tmp_path: Path, name: str, tolerance: float
) -> None:
    write_sample(tmp_path / "new", 9, n_subjects=1)
    origin = tmp_path / "new" / "sub-01_ses-1_raw.fif"
    raw = mne.io.read_raw_fif(origin, preload=True, verbose=False)
    run = diptych.open_run(causal_run, PIPELINE)
    tables = []
    for source in (origin, write(raw, tmp_path / "other" / name)):
        out = tmp_path / f"{source.name}.csv"
        assert not run.predict(source, out).errors
        tables.append(pl.read_csv(out))
    expected, got = tables
    assert got["onset_s"].to_list() == pytest.approx(expected["onset_s"].to_list())
    np.testing.assert_allclose(got["p_left_hand"], expected["p_left_hand"], atol=tolerance)
