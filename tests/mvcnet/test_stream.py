from pathlib import Path

import mne
import numpy as np
import polars as pl
import pytest

from diptych.errors import DataError, UsageError
from diptych_mvcnet.pipeline import PIPELINE, StreamOptions
from diptych_mvcnet.stream import StreamDecoder

SFREQ = 100.0


@pytest.fixture(scope="module")
def recording(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = mne.io.read_raw_fif(recordings / "sub-01_ses-2_raw.fif", preload=True, verbose=False)
    out = tmp_path_factory.mktemp("stream") / "short_raw.fif"
    raw.crop(0, 30 - 0.01).save(out, verbose=False)
    return out


def offline(run: Path, recording: Path, folder: Path) -> pl.DataFrame:
    import diptych

    out = folder / "offline.csv"
    diptych.open_run(run, PIPELINE).predict(recording, out)
    return pl.read_csv(out)


def pushed(run: Path, recording: Path, chunk: int, *, cued: bool) -> pl.DataFrame:
    raw = mne.io.read_raw_fif(recording, preload=True, verbose=False)
    x = raw.get_data() * 1e6
    cues = mne.events_from_annotations(raw, verbose=False)[0][:, 0] - raw.first_samp if cued else []
    decoder = StreamDecoder(run, sfreq=SFREQ, cued=cued)
    rows = [
        {"onset_s": d.onset_s, "p": d.probabilities[0], "n_seen": d.n_seen, "flag": d.flag or None}
        for start in range(0, x.shape[1], chunk)
        for d in decoder.push(
            x[:, start : start + chunk],
            [int(cue - start) for cue in cues if start <= cue < start + chunk],
        )
    ]
    return pl.DataFrame(rows)


@pytest.mark.parametrize("chunk", [1, 7, 160])
@pytest.mark.parametrize("cued", [True, False])
def test_a_stream_decides_as_predict_whatever_the_chunks(
    causal_run: Path, recording: Path, tmp_path: Path, chunk: int, cued: bool
) -> None:
    if not cued:
        raw = mne.io.read_raw_fif(recording, preload=True, verbose=False)
        recording = tmp_path / "unmarked_raw.fif"
        raw.set_annotations(None).save(recording, verbose=False)
    expected = offline(causal_run, recording, tmp_path)
    found = pushed(causal_run, recording, chunk, cued=cued)
    assert found["onset_s"].to_list() == pytest.approx(expected["onset_s"].to_list(), abs=1e-6)
    np.testing.assert_allclose(found["p"], expected["p_left_hand"], atol=1e-5)
    assert found["n_seen"].to_list() == expected["n_seen"].to_list()
    assert found["flag"].to_list() == expected["flag"].to_list()


def test_a_replay_writes_the_decisions_of_predict(
    causal_run: Path, recording: Path, tmp_path: Path
) -> None:
    from diptych import verbs

    out = tmp_path / "decisions.csv"
    options = StreamOptions(replay=str(recording), out=str(out))
    verbs.run_verb(PIPELINE, "stream", causal_run, options)
    found, expected = pl.read_csv(out), offline(causal_run, recording, tmp_path)
    assert found["label"].to_list() == expected["label"].to_list()
    np.testing.assert_allclose(found["p_left_hand"], expected["p_left_hand"], atol=1e-5)


def test_a_stream_needs_one_source_and_causal_training(
    causal_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych import verbs
    from diptych_mvcnet import stream

    with pytest.raises(UsageError, match=r"one of --lsl"):
        verbs.run_verb(PIPELINE, "stream", causal_run, StreamOptions())
    decoder = stream._opened(causal_run)
    filters = {**decoder.facts["filter"], "phase": "zero"}
    zero = stream.Decoder(
        decoder.network,
        {**decoder.facts, "filter": filters},
        decoder.config,
        decoder.references,
        None,
    )
    with pytest.raises(DataError, match=r"stream\.phase_mismatch"):
        StreamDecoder(zero, sfreq=SFREQ)
    StreamDecoder(zero, sfreq=SFREQ, allow_phase_mismatch=True)


def test_a_wrong_number_of_channels_or_a_slow_stream_is_named(causal_run: Path) -> None:
    with pytest.raises(DataError, match="50 Hz"):
        StreamDecoder(causal_run, sfreq=50.0)
    with pytest.raises(DataError, match="FC5"):
        StreamDecoder(causal_run, sfreq=SFREQ).push(np.zeros((3, 10)))


def test_a_value_that_is_not_finite_stops_stream_and_prediction(
    causal_run: Path, tmp_path: Path
) -> None:
    import diptych
    from diptych_mvcnet.sample import CHANNELS

    chunk = np.ones((21, 50))
    chunk[3, 7] = np.nan
    with pytest.raises(DataError, match=r"signal\.nonfinite"):
        StreamDecoder(causal_run, sfreq=SFREQ).push(chunk)
    x = np.ones((4, 21, 160))
    x[2, 5, 9] = np.inf
    np.savez(tmp_path / "broken.npz", X=x, ch_names=CHANNELS, sfreq=80.0)
    with pytest.raises(DataError) as caught:
        diptych.open_run(causal_run, PIPELINE).predict(tmp_path / "broken.npz", tmp_path / "p.csv")
    assert caught.value.findings is not None
    assert [f.code for f in caught.value.findings.errors] == ["signal.nonfinite"]


def test_a_flat_signal_is_flagged_and_teaches_nothing(causal_run: Path) -> None:
    decoder = StreamDecoder(causal_run, sfreq=SFREQ)
    draw = np.random.default_rng(0)
    first = decoder.push(10 * draw.standard_normal((21, 400)))
    decoder.push(np.zeros((21, 100)))
    flat = decoder.push(np.zeros((21, 800)))
    assert first[-1].n_seen == len(first)
    assert flat[-1].flag.startswith("flat")
    assert flat[-1].n_seen == flat[-2].n_seen
    assert np.isfinite(flat[-1].probabilities).all()
