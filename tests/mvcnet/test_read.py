from __future__ import annotations

import errno
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, resample_poly, sosfilt, sosfilt_zi
from tests.mvcnet.files import CHANNELS, SFREQ, real_data, simulated, write

from diptych.errors import DataError
from diptych_mvcnet.config import EEGDataSection, FilterSection, MVCNetConfig
from diptych_mvcnet.filters import CausalFilter, filter_recording, margin_s
from diptych_mvcnet.read import cut_epochs, format_of, read_recording, repair_crlf

CONFIG = MVCNetConfig.model_validate({"data": {"resample_hz": 64.0}})


def codes(error: pytest.ExceptionInfo[DataError]) -> list[str]:
    return [finding.code for finding in error.value.findings or ()]


def write_bdf(raw: mne.io.BaseRaw, path: Path) -> Path:
    """A 24-bit BDF+ file, written byte by byte: 1 s records, 1/64 uV a step."""
    data = np.rint(raw.get_data() * 1e6 * 64).astype(int)
    rate, records = int(raw.info["sfreq"]), data.shape[1] // int(raw.info["sfreq"])
    labels = [*raw.ch_names, "BDF Annotations"]
    marks = list(zip(raw.annotations.onset, raw.annotations.description, strict=True))
    n = len(labels)

    def fields(width: int, values: Sequence[object]) -> bytes:
        return b"".join(str(value).encode().ljust(width) for value in values)

    head = b"\xffBIOSEMI" + fields(80, ["X X X X", "Startdate X X X X"])
    head += fields(8, ["01.01.20", "00.00.00", 256 * (n + 1)]) + fields(44, ["BDF+C"])
    head += fields(8, [records, 1]) + fields(4, [n]) + fields(16, list(labels))
    head += fields(80, [""] * n) + fields(8, ["uV"] * (n - 1) + [""])
    head += fields(8, [-131072] * (n - 1) + [-1]) + fields(8, [131071] * (n - 1) + [1])
    head += fields(8, [-8388608] * n) + fields(8, [8388544] * n)
    head += fields(80, [""] * n) + fields(8, [rate] * (n - 1) + [40]) + fields(32, [""] * n)
    body = bytearray()
    for second in range(records):
        block = data[:, second * rate : (second + 1) * rate]
        for samples in block:
            body += b"".join(struct.pack("<i", int(sample))[:3] for sample in samples)
        text = f"+{second}\x14\x14\x00".encode()
        for onset, name in marks:
            if second <= onset < second + 1:
                text += f"+{onset:.6f}\x14{name}\x14\x00".encode()
        body += text.ljust(120, b"\x00")
    path.write_bytes(head + bytes(body))
    return path


def write_gaps(path: Path, *, text: bytes = b"T1") -> Path:
    """EDF+D: ten records of 1 s, 30 s missing after the fifth, marks in record 7 and in the gap."""
    labels = ["C3", "C4", "EDF Annotations"]

    def fields(width: int, values: Sequence[object]) -> bytes:
        return b"".join(str(value).encode().ljust(width) for value in values)

    head = fields(8, ["0"]) + fields(80, ["X X X X", "Startdate X X X X"])
    head += fields(8, ["01.01.20", "00.00.00", 256 * 4]) + fields(44, ["EDF+D"])
    head += fields(8, [10, 1]) + fields(4, [3]) + fields(16, list(labels)) + fields(80, [""] * 3)
    head += fields(8, ["uV", "uV", ""]) + fields(8, [-1000, -1000, -1])
    head += fields(8, [1000, 1000, 1]) + fields(8, [-32768] * 3) + fields(8, [32767] * 3)
    head += fields(80, [""] * 3) + fields(8, [100, 100, 60]) + fields(32, [""] * 3)
    draw = np.random.default_rng(0)
    body = b""
    for record in range(10):
        clock = record if record < 5 else record + 30
        body += draw.integers(-900, 900, 200).astype("<i2").tobytes()
        marks = f"+{clock}\x14\x14\x00".encode()
        if record == 6:
            marks += b"+36.25\x14" + text + b"\x14\x00+20\x14T2\x14\x00"
        body += marks.ljust(120, b"\x00")
    path.write_bytes(head + body)
    return path


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.edf", 0.1), ("a.vhdr", 1e-3), ("a.set", 1e-3), ("a_raw.fif", 1e-3)]
)
def test_every_format_of_one_recording_gives_the_same_trials(
    tmp_path: Path, name: str, tolerance: float
) -> None:
    raw = simulated()
    expected = cut_epochs(read_recording(write(raw, tmp_path / "origin_raw.fif")), CONFIG)
    got = cut_epochs(read_recording(write(raw, tmp_path / "other" / name)), CONFIG)
    assert got.ch_names == expected.ch_names == CHANNELS
    assert got.rows.equals(expected.rows)
    assert got.x.shape == (12, 10, 192)
    np.testing.assert_allclose(got.x, expected.x, atol=tolerance)


def test_a_24_bit_bdf_file_gives_the_same_trials(tmp_path: Path) -> None:
    raw = simulated()
    raw.apply_function(lambda x: np.rint(x * 64e6) / 64e6)
    expected = cut_epochs(read_recording(write(raw, tmp_path / "a_raw.fif")), CONFIG)
    got = cut_epochs(read_recording(write_bdf(raw, tmp_path / "a.bdf")), CONFIG)
    assert got.rows.equals(expected.rows)
    np.testing.assert_allclose(got.x, expected.x, atol=1e-3)


@pytest.mark.parametrize(("suffix", "opener"), [(".xz", lzma.open), (".gz", gzip.open)])
def test_a_compressed_file_reads_like_the_plain_one(
    tmp_path: Path, suffix: str, opener: Callable[..., Any]
) -> None:
    plain = write(simulated(2), tmp_path / "a.edf")
    packed = tmp_path / f"a.edf{suffix}"
    with opener(packed, "wb") as stream:
        stream.write(plain.read_bytes())
    expected, got = read_recording(plain), read_recording(packed)
    np.testing.assert_array_equal(got.signal(CHANNELS), expected.signal(CHANNELS))
    assert format_of(packed) == ".edf"


def test_a_broken_archive_is_a_finding(tmp_path: Path) -> None:
    packed = tmp_path / "a.edf.xz"
    packed.write_bytes(lzma.compress(bytes(4000))[:60])
    with pytest.raises(DataError) as error:
        read_recording(packed)
    assert codes(error) == ["file.truncated"]


def test_a_cut_file_is_refused_and_its_whole_records_are_used_on_request(tmp_path: Path) -> None:
    path = write(simulated(4), tmp_path / "a.edf")
    whole = read_recording(path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(DataError) as error:
        read_recording(path)
    assert codes(error) == ["file.truncated"]
    cut = read_recording(path, data=EEGDataSection(allow_truncated=True))
    assert [finding.severity for finding in cut.findings][:1] == ["warning"]
    length = cut.raw.n_times
    assert 0 < length < whole.raw.n_times
    np.testing.assert_array_equal(cut.signal(CHANNELS), whole.signal(CHANNELS)[:, :length])


@pytest.mark.data
def test_the_repaired_file_is_the_one_before_the_damage() -> None:
    bad = real_data() / "bad"
    assert repair_crlf((bad / "crlf.edf").read_bytes()) == (bad / "ok_small.edf").read_bytes()
    got = read_recording(bad / "crlf.edf", data=EEGDataSection(repair_crlf=True))
    expected = read_recording(bad / "ok_small.edf")
    np.testing.assert_array_equal(got.raw.get_data(), expected.raw.get_data())


@pytest.mark.data
def test_the_gdf_file_gives_twenty_trials_of_each_hand() -> None:
    path = real_data() / "gdf" / "erds_sample_anonymised.gdf.xz"
    channels = [f"Channel {n}" for n in (1, 2, 3, 5)]
    cut = cut_epochs(read_recording(path), MVCNetConfig(), channels=channels)
    assert cut.rows["label"].value_counts(sort=False).sort("label").rows() == [
        ("left_hand", 20),
        ("right_hand", 20),
    ]
    assert cut.x.shape == (40, 4, 300)


def test_marks_after_a_gap_keep_their_samples_and_marks_inside_it_go(tmp_path: Path) -> None:
    recording = read_recording(write_gaps(tmp_path / "a.edf"))
    assert {finding.code for finding in recording.findings} == {
        "edf.discontinuous",
        "events.out_of_range",
    }
    marks = [(float(one["onset"]), one["description"]) for one in recording.raw.annotations]
    assert marks == [(5.0, "BAD boundary"), (6.25, "T1")]


def test_a_trial_across_a_gap_is_rejected(tmp_path: Path) -> None:
    recording = read_recording(write_gaps(tmp_path / "a.edf"))
    config = MVCNetConfig.model_validate({"data": {"window": [-1.5, 1.5]}})
    cut = cut_epochs(recording, config)
    assert cut.rows["reason"].to_list() == ["edge"]


def test_latin_1_annotations_are_read_and_named(tmp_path: Path) -> None:
    recording = read_recording(write_gaps(tmp_path / "a.edf", text="Händ".encode("latin-1")))
    assert "edf.annotation_encoding" in {finding.code for finding in recording.findings}
    assert "Händ" in recording.raw.annotations.description


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1.0), ("V", 1e6), ("nV", 1e-3)])
def test_the_stated_unit_wins_over_the_header(tmp_path: Path, unit: str, factor: float) -> None:
    path = write(simulated(1), tmp_path / "a.edf")
    expected = read_recording(path).signal(CHANNELS)  # the header says uV
    got = read_recording(path, data=EEGDataSection(unit=unit)).signal(CHANNELS)
    np.testing.assert_allclose(got, expected * factor, rtol=1e-9)


def test_bad_spans_peaks_and_flat_trials_are_rejected_by_name(tmp_path: Path) -> None:
    raw = simulated()
    raw.annotations.append(13.0, 0.7, "BAD_muscle")  # touches the window of the third cue
    raw._data[2, round(19.0 * SFREQ)] = 4e-3
    raw._data[4, round(23 * SFREQ) : round(27 * SFREQ)] = 0.0
    path = write(raw, tmp_path / "a_raw.fif")
    config = MVCNetConfig.model_validate(
        {"data": {"reject": {"peak_uv": 500.0, "flat_uv": 1.0}, "resample_hz": None}}
    )
    reason = cut_epochs(read_recording(path), config).rows["reason"].to_list()
    assert reason[:6] == ["", "", "bad_span", "peak", "flat", ""]


def test_a_trial_near_the_end_of_the_file_is_rejected_and_one_beyond_it_dropped(
    tmp_path: Path,
) -> None:
    raw = simulated(3).crop(0, 16.6)  # the third trial ends at 16.5 s
    cut = cut_epochs(read_recording(write(raw, tmp_path / "a_raw.fif")), CONFIG)
    assert cut.rows["reason"].to_list() == ["", "", "edge"]
    cut = cut_epochs(read_recording(write(raw.crop(0, 16.0), tmp_path / "b_raw.fif")), CONFIG)
    assert cut.rows["trial"].to_list() == [0, 1]


def test_an_edge_changes_no_accepted_trial_by_more_than_one_percent() -> None:
    draw = np.random.default_rng(0)
    signal, settings_ = draw.normal(0, 10, (4, 4000)), FilterSection()
    whole = filter_recording(signal, 160.0, settings_, None)
    cut = filter_recording(signal[:, :2000], 160.0, settings_, None)
    end = 2000 - round(margin_s(2000, 160.0, settings_) * 160)
    difference = cut[:, end - 480 : end] - whole[:, end - 480 : end]
    assert np.sqrt((difference**2).mean()) < 0.01 * whole.std()


def test_training_and_prediction_cut_the_same_trials(tmp_path: Path) -> None:
    recording = read_recording(write(simulated(), tmp_path / "a_raw.fif"))
    config = MVCNetConfig.model_validate({"data": {"cues": ["T1", "T2"]}})
    labelled = cut_epochs(recording, config)
    unlabelled = cut_epochs(recording, config, labelled=False)
    np.testing.assert_array_equal(labelled.x, unlabelled.x)
    assert unlabelled.rows["label"].is_null().all()


def test_windows_follow_each_other_where_there_are_no_cues(tmp_path: Path) -> None:
    recording = read_recording(write(simulated(1), tmp_path / "a_raw.fif"))  # 10 s
    config = MVCNetConfig.model_validate({"data": {"window_step_s": 0.5, "resample_hz": 64.0}})
    cut = cut_epochs(recording, config, labelled=False)
    np.testing.assert_allclose(cut.rows["onset_s"], np.arange(15) * 0.5)
    assert cut.x.shape == (15, 10, 192)


def test_a_missing_channel_is_refused_or_filled_in(tmp_path: Path) -> None:
    recording = read_recording(write(simulated(2).drop_channels(["C1"]), tmp_path / "a_raw.fif"))
    with pytest.raises(DataError) as error:
        cut_epochs(recording, CONFIG, channels=CHANNELS)
    assert codes(error) == ["channel.missing"]
    filling = MVCNetConfig.model_validate({"data": {"interpolate": True, "resample_hz": 64.0}})
    cut = cut_epochs(recording, filling, channels=CHANNELS)
    assert cut.interpolated == ("C1",)
    assert cut.x[:, CHANNELS.index("C1")].std() > 0.5
    with pytest.raises(DataError):  # four of thirteen are more than a fifth
        cut_epochs(recording, filling, channels=(*CHANNELS, "P3", "P4", "POz"))


def test_events_match_without_blanks_and_by_their_last_part(tmp_path: Path) -> None:
    raw = simulated(2)
    raw.annotations.description = np.array(["Stimulus/S  7", "S 8"])
    config = MVCNetConfig.model_validate(
        {"data": {"events": {"left_hand": ["S7"], "right_hand": ["S  8"]}}}
    )
    cut = cut_epochs(read_recording(write(raw, tmp_path / "a_raw.fif")), config)
    assert cut.rows["label"].to_list() == ["left_hand", "right_hand"]


def test_pulses_of_a_trigger_channel_are_events_where_there_are_no_annotations(
    tmp_path: Path,
) -> None:
    raw = simulated(2)
    pulses = np.zeros((1, raw.n_times))
    for second, code in ((3, 769), (8, 770)):
        pulses[0, round(second * SFREQ) : round(second * SFREQ) + 5] = code
    trigger = mne.io.RawArray(pulses, mne.create_info(["STI"], SFREQ, "stim"), verbose="error")
    raw.set_annotations(None).add_channels([trigger], force_update_info=True)
    cut = cut_epochs(read_recording(write(raw, tmp_path / "a_raw.fif")), CONFIG)
    assert cut.rows["label"].to_list() == ["left_hand", "right_hand"]
    assert cut.rows["onset_s"].to_list() == [3.0, 8.0]


def test_mne_epochs_give_their_trials_in_microvolt(tmp_path: Path) -> None:
    raw = simulated()
    events, ids = mne.events_from_annotations(raw, verbose="error")
    epochs = mne.Epochs(raw, events, ids, 0.5, 3.5, baseline=None, preload=True, verbose="error")
    epochs.save(tmp_path / "a-epo.fif", fmt="double", verbose="error")
    recording = read_recording(tmp_path / "a-epo.fif")
    assert recording.epochs is not None
    cut = cut_epochs(recording, MVCNetConfig.model_validate({"data": {"resample_hz": None}}))
    assert cut.rows["label"].to_list() == ["left_hand", "right_hand"] * 6
    np.testing.assert_allclose(cut.x, epochs.get_data() * 1e6, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    rates=st.sampled_from([(160.0, 100.0), (128.0, 64.0), (100.0, 100.0), (512.0, 250.0)]),
)
def test_causal_filtering_does_not_depend_on_the_chunks(
    chunks: list[int], rates: tuple[float, float]
) -> None:
    sfreq, wanted = rates
    signal = np.random.default_rng(1).normal(50, 10, (3, sum(chunks) + 1))
    settings_ = FilterSection(phase="causal", notch=50.0 if sfreq > 100 else None)
    whole = CausalFilter(sfreq, settings_, wanted).push(signal)
    stream = CausalFilter(sfreq, settings_, wanted)
    parts, start = [], 0
    for size in (*chunks, 1):
        parts.append(stream.push(signal[:, start : start + size]))
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-9)


def test_the_causal_form_is_butterworth_and_a_delayed_polyphase_resampler() -> None:
    signal = np.random.default_rng(2).normal(0, 10, (2, 1600))
    causal = CausalFilter(160.0, FilterSection(), 100.0)
    got = causal.push(signal)
    sos = butter(4, [8.0, 30.0], "bandpass", fs=160.0, output="sos")
    start = sosfilt_zi(sos)[:, None, :] * signal[None, :, :1]
    filtered, _ = sosfilt(sos, signal, axis=1, zi=start)
    expected = resample_poly(filtered, 5, 8, axis=1)  # without delay
    delay = round(causal.delay_s * 100)
    assert causal.delay_s == pytest.approx(0.1)
    np.testing.assert_allclose(got[:, delay + 20 :], expected[:, 20 : -delay or None], atol=1e-6)


def test_a_causal_filter_never_looks_ahead() -> None:
    signal = np.random.default_rng(3).normal(0, 10, (2, 800))
    changed = signal.copy()
    changed[:, 400:] += 100
    settings_ = FilterSection(phase="causal")
    first = filter_recording(signal, 160.0, settings_, 100.0)
    second = filter_recording(changed, 160.0, settings_, 100.0)
    np.testing.assert_array_equal(first[:, :250], second[:, :250])
    assert not np.allclose(first[:, 252:], second[:, 252:])


def test_a_full_disk_is_not_blamed_on_a_compressed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.edf.gz"
    path.write_bytes(gzip.compress(b"x" * 1000))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diptych_mvcnet.read._copy_limited", full)
    with pytest.raises(OSError, match="No space left"):
        read_recording(path)
