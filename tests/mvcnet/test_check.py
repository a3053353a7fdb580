from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.mvcnet.files import CHANNELS, real_data, simulated, write

from diptych.errors import UsageError
from diptych.findings import Findings
from diptych_mvcnet.check import check
from diptych_mvcnet.config import MVCNetConfig

BAD = {
    "ok_small.edf": None,
    "truncated.edf": "file.truncated",
    "crlf.edf": "file.text_mode",
    "empty.edf": "file.empty",
    "html_page.edf": "file.not_eeg",
    "no_events.edf": "events.none",
    "unit_volt.edf": "unit.implausible",
    "phi.edf": "header.phi",
    "duplicate_channel.edf": "channel.duplicate",
    "flat_channel.edf": "channel.flat",
    "records_unknown.edf": "file.records_unknown",
    "nonfinite.npz": "signal.nonfinite",
    "length_mismatch.npz": "npz.shape",
    "text_dtype.npz": "npz.dtype",
    "one_class.npz": "events.one_class",
    "duplicate_trial.npz": "trial.duplicate",
}
WARNINGS = {"header.phi", "channel.flat", "file.records_unknown", "trial.duplicate"}


def config(**data: object) -> MVCNetConfig:
    return MVCNetConfig.model_validate({"data": {"resample_hz": 64.0, **data}})


def named(findings: Findings, *codes: str) -> list[tuple[str, str]]:
    return [(one.severity, one.code) for one in findings if not codes or one.code in codes]


def save_trials(
    path: Path, *, seed: int = 0, subject: list[str] | None = None, **more: Any
) -> Path:
    draw = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "X": draw.normal(0, 20, (40, 3, 100)).astype(np.float32),
        "y": np.arange(40) % 2,
        "ch_names": np.array(["C3", "Cz", "C4"]),
        "sfreq": 100.0,
    }
    if subject is not None:
        content["subject"] = np.array(subject)
    np.savez(path, **{**content, **more})
    return path


@pytest.mark.data
@pytest.mark.parametrize("name", BAD)
def test_each_broken_file_has_exactly_its_own_finding(name: str) -> None:
    findings = check(MVCNetConfig(), real_data() / "bad" / name)
    seen = [one for one in findings if one.code != "events.few" and one.severity != "note"]
    code = BAD[name]
    assert {one.code for one in seen} == ({code} if code else set())
    severity = "warning" if code in WARNINGS else "error"
    assert all(one.severity == severity for one in seen)
    assert all(one.where and one.found and one.fix for one in findings)


@pytest.mark.data
def test_no_value_of_an_identifying_field_is_ever_repeated() -> None:
    findings = check(MVCNetConfig(), real_data() / "bad" / "phi.edf")
    text = json.dumps(findings.to_json()) + json.dumps(findings.redacted().to_json())
    assert not any(word in text for word in ("Doe", "Jane", "1961", "Nurse", "MRN"))


@pytest.mark.data
def test_the_place_of_every_value_that_is_not_finite_is_named() -> None:
    findings = check(MVCNetConfig(), real_data() / "bad" / "nonfinite.npz")
    places = [(one.where, one.found[:2]) for one in findings if one.code == "signal.nonfinite"]
    assert places == [
        ("nonfinite.npz, trial 7, channel Cz", "1 "),
        ("nonfinite.npz, trial 12, channel C4", "4 "),
    ]


@pytest.mark.data
def test_a_repeated_trial_is_an_error_only_where_it_leaks() -> None:
    path = real_data() / "bad" / "duplicate_trial.npz"
    for kind, severity in (("within_cv", "warning"), ("loso", "error")):
        findings = check(MVCNetConfig.model_validate({"split": {"kind": kind}}), path)
        assert named(findings, "trial.duplicate") == [(severity, "trial.duplicate")]


@pytest.mark.data
def test_a_trial_in_two_parts_of_the_users_split_is_an_error() -> None:
    bad = real_data() / "bad"
    split = {"kind": "fixed", "file": str(bad / "split_overlap.csv")}
    findings = check(MVCNetConfig.model_validate({"split": split}), bad / "duplicate_trial.npz")
    (overlap,) = (one for one in findings if one.code == "split.overlap")
    assert overlap.severity == "error"
    assert "subject a, session 1, run 1, trial 3" in overlap.where


@pytest.mark.data
def test_the_uncalibrated_gdf_file_is_refused_in_both_ways() -> None:
    path = real_data() / "gdf" / "erds_sample_anonymised.gdf.xz"
    assert named(check(MVCNetConfig(), path)) == [
        *[("warning", "channel.untyped")] * 4,
        ("error", "channel.none"),
    ]
    channels = [f"Channel {n}" for n in (1, 2, 3, 5)]
    findings = check(MVCNetConfig.model_validate({"data": {"channels": channels}}), path)
    assert ("error", "unit.implausible") in named(findings)
    assert not named(findings, "events.none", "events.few", "channel.untyped")


def test_sound_recordings_have_no_finding_but_few_trials(tmp_path: Path) -> None:
    for subject in "ab":
        write(simulated(20, seed=ord(subject)), tmp_path / subject / "1_raw.fif")
    assert named(check(config(), tmp_path)) == [("warning", "events.few")] * 2


def test_check_never_stops_at_the_first(tmp_path: Path) -> None:
    write(simulated(12), tmp_path / "a" / "1.edf")
    cut = write(simulated(12, seed=1), tmp_path / "b" / "1.edf")
    cut.write_bytes(cut.read_bytes()[:-5000])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.edf").write_bytes(b"")
    codes = [code for _, code in named(check(config(), tmp_path))]
    assert codes == ["file.truncated", "file.empty", "events.few"]


def test_files_with_errors_are_left_out_on_request_and_said_so(tmp_path: Path) -> None:
    write(simulated(12), tmp_path / "a" / "1.edf")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.edf").write_bytes(b"")
    findings = check(config(on_error="skip"), tmp_path)
    assert not findings.errors
    (left_out,) = (one for one in findings if one.code == "file.empty")
    assert "left out" in left_out.fix
    assert "data.exclude" in check(config(), tmp_path).errors[0].fix


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    for name in ("S1R1.edf", "S1R2.edf"):
        (tmp_path / name).write_bytes(b"")
    assert named(check(config(), tmp_path)) == [
        ("warning", "file.unmatched"),
        ("warning", "file.unmatched"),
        ("error", "file.none"),
    ]


def test_the_users_names_are_replaced_in_what_is_kept(tmp_path: Path) -> None:
    write(simulated(6), tmp_path / "Mueller" / "visit.edf")
    findings = check(config(), tmp_path)
    assert "Mueller" in json.dumps(findings.to_json())
    assert "Mueller" not in json.dumps(findings.redacted().to_json())
    assert "visit" not in json.dumps(findings.redacted().to_json())


def test_two_subjects_with_one_signal_are_an_error(tmp_path: Path) -> None:
    for subject in "ab":
        write(simulated(12), tmp_path / subject / "1.edf")
    assert ("error", "subject.duplicate") in named(check(config(), tmp_path))


def test_recordings_with_other_channels_or_rates_are_named(tmp_path: Path) -> None:
    write(simulated(12), tmp_path / "a" / "1.edf")
    write(simulated(12, seed=1), tmp_path / "a" / "2.edf")
    write(simulated(12, seed=2, channels=CHANNELS[:-1]), tmp_path / "b" / "1.edf")
    write(simulated(12, seed=3, sfreq=256.0), tmp_path / "c" / "1.edf")
    findings = check(config(), tmp_path)
    assert [(one.severity, one.code, one.where) for one in findings][:2] == [
        ("error", "channel.missing", "b/1.edf"),
        ("warning", "sfreq.differs", "c/1.edf"),
    ]
    assert f"[{', '.join(CHANNELS[:-1])}]" in findings.errors[0].fix
    fixed = check(config(interpolate=True), tmp_path)
    assert named(fixed, "channel.missing") == [("warning", "channel.missing")]
    raised = check(config(resample_hz=200.0), tmp_path)
    assert Counter(named(raised, "sfreq.differs"))[("error", "sfreq.differs")] == 3


def test_signal_findings_name_the_channel(tmp_path: Path) -> None:
    raw = simulated(12)
    signal = raw._data
    signal[1] *= 40
    signal[2] = 0
    signal[3] = np.clip(signal[3], -2e-5, 2e-5)
    signal[6:8] += 6e-5 * np.sin(2 * np.pi * 50 * raw.times)
    findings = check(
        config(filter={"band": [4.0, 60.0]}, resample_hz=None),
        write(raw, tmp_path / "a_raw.fif"),
    )
    places = {(one.code, one.where.rpartition("channel ")[2]) for one in findings}
    assert {
        ("channel.noisy", "FCz"),
        ("channel.flat", "FC4"),
        ("signal.clipped", "C3"),
        ("signal.line", "C2 and 1 more"),
    } <= places
    assert "rank.deficient" not in {code for code, _ in places}


def test_an_average_reference_is_named_as_lost_rank(tmp_path: Path) -> None:
    raw = simulated(12)
    raw._data -= raw._data.mean(axis=0)
    findings = check(config(), write(raw, tmp_path / "a_raw.fif"))
    (rank,) = (one for one in findings if one.code == "rank.deficient")
    assert "10 channels of rank 9" in rank.found


def test_values_that_are_not_finite_are_found_in_recordings(tmp_path: Path) -> None:
    raw = simulated(12)
    raw._data[4, 100:103] = np.nan
    findings = check(config(), write(raw, tmp_path / "a_raw.fif"))
    (wrong,) = (one for one in findings if one.code == "signal.nonfinite")
    assert wrong.where.endswith("channel C1")
    assert "3 samples" in wrong.found


@pytest.mark.parametrize(
    "data",
    [
        {"filter": {"band": [8.0, 40.0]}},
        {"filter": {"band": [0.5, 30.0]}},
    ],
)
def test_a_band_that_the_trials_cannot_hold_is_an_error(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    findings = check(config(**data), write(simulated(12), tmp_path / "a.edf"))
    assert ("error", "filter.band") in named(findings)


def test_labels_that_are_there_are_listed_where_none_fits(tmp_path: Path) -> None:
    path = write(simulated(12), tmp_path / "a.edf")
    events = {"left_hand": ["left"], "right_hand": ["right"]}
    (none,) = (one for one in check(config(events=events), path) if one.code == "events.none")
    assert none.severity == "error"
    assert "T1 (6), T2 (6)" in none.found


def test_trials_outside_the_recording_and_unequal_classes_are_named(tmp_path: Path) -> None:
    raw = simulated(30)
    raw.annotations.description[3:28] = "T1"
    raw.annotations.append(raw.times[-1] - 1.0, 0.5, "T1")
    codes = {one.code for one in check(config(), write(raw, tmp_path / "a_raw.fif"))}
    assert {"events.out_of_range", "events.imbalance", "events.few"} <= codes


def test_lateral_electrodes_without_a_partner_are_named(tmp_path: Path) -> None:
    path = write(simulated(20, channels=("C3", "C4", "CP3")), tmp_path / "a.edf")
    (alone,) = (one for one in check(config(), path) if one.code == "montage.unpaired")
    assert alone.severity == "warning"
    assert "CP3 have" in alone.found


def test_npz_subjects_are_subjects_and_a_flat_folder_needs_them(tmp_path: Path) -> None:
    save_trials(tmp_path / "x.npz", subject=["a"] * 20 + ["b"] * 20)
    assert not check(config(), tmp_path).errors
    save_trials(tmp_path / "x.npz")
    assert [code for _, code in named(check(config(), tmp_path), "subject.unknown")]


@pytest.mark.parametrize("labels", [np.arange(40) % 2, np.where(np.arange(40) % 2, "T2", "T1")])
def test_npz_labels_may_be_numbers_or_annotations(tmp_path: Path, labels: np.ndarray) -> None:
    path = save_trials(tmp_path / "x.npz", y=labels)
    assert not check(config(), path).errors


def test_an_npz_file_with_python_objects_is_refused_unread(tmp_path: Path) -> None:
    path = save_trials(tmp_path / "x.npz", X=np.array([object()] * 40))
    assert named(check(config(), path)) == [("error", "npz.dtype")]


@pytest.mark.parametrize("content", ["who,split\na,train\n", "subject,part\na,train\n"])
def test_a_split_file_without_its_columns_is_a_usage_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "split.csv").write_text(content)
    wrong = MVCNetConfig.model_validate({"split": {"file": str(tmp_path / "split.csv")}})
    with pytest.raises(UsageError, match=r"split\.file"):
        check(wrong, save_trials(tmp_path / "x.npz"))


def test_a_split_file_that_fits_no_trial_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("subject,split\nnobody,train\n")
    wrong = MVCNetConfig.model_validate(
        {"split": {"kind": "fixed", "file": str(tmp_path / "split.csv")}}
    )
    findings = check(wrong, save_trials(tmp_path / "x.npz"))
    assert ("error", "split.unmatched") in named(findings)


def test_the_users_split_is_called_by_its_name_on_the_terminal_alone(tmp_path: Path) -> None:
    split = tmp_path / "Mueller.csv"
    split.write_text("subject,split\na,train\na,test\n")
    values = {"split": {"kind": "fixed", "file": str(split)}}
    trials = save_trials(tmp_path / "x.npz", subject=["a"] * 20 + ["b"] * 20)
    findings = check(MVCNetConfig.model_validate(values), trials)
    (overlap,) = (one for one in findings if one.code == "split.overlap")
    assert overlap.where == f"{split}, subject a"
    split.write_text("subject,split\na,train\n")
    findings = check(MVCNetConfig.model_validate(values), trials)
    wheres = {one.code: one.where for one in findings if one.code.startswith("split.")}
    assert wheres == {"split.unmatched": str(split), "split.impossible": str(split)}
    assert "Mueller" not in json.dumps(findings.redacted().to_json())


def test_a_protocol_that_the_data_do_not_allow_names_the_subject(tmp_path: Path) -> None:
    trials = save_trials(tmp_path / "x.npz", subject=["a"] * 20 + ["b"] * 20)
    values = {"split": {"kind": "cross_run"}}
    findings = check(MVCNetConfig.model_validate(values), trials)
    (impossible,) = (one for one in findings if one.code == "split.impossible")
    assert impossible.where == "subject a"


@pytest.mark.parametrize(
    ("factor", "fix"),
    [
        (1e-3, "--set data.unit=mV makes it"),
        (1e-6, "--set data.unit=V makes it"),
        (1e3, "--set data.unit=nV makes it"),
        (1e6, "no unit makes them plausible"),
    ],
)
def test_an_implausible_amplitude_names_the_one_unit_that_would_fit(
    tmp_path: Path, factor: float, fix: str
) -> None:
    x = np.random.default_rng(0).normal(0, 20, (40, 3, 200)) * factor
    (unit,) = check(config(), save_trials(tmp_path / "x.npz", X=x)).errors
    assert unit.code == "unit.implausible"
    assert unit.fix.startswith(fix)


def test_identifying_fields_of_other_headers_are_found(tmp_path: Path) -> None:
    raw = simulated(20)
    raw.info["subject_info"] = {"last_name": "Doe"}
    findings = check(config(), write(raw, tmp_path / "a_raw.fif"))
    assert ("warning", "header.phi") in named(findings)
    header = write(simulated(20), tmp_path / "b.vhdr")
    header.write_text(header.read_text() + "\n[Comment]\nPatient: Jane Doe\nOperator = Smith\n")
    findings = check(config(), header)
    (phi,) = (one for one in findings if one.code == "header.phi")
    assert phi.found == "the header identifies people: patient, operator (not repeated here)"


@pytest.mark.parametrize("name", ["a.edf", "a.vhdr", "a.set", "a_raw.fif", "a.npz"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_file_cut_anywhere_is_findings_and_never_a_traceback(
    tmp_path: Path, name: str, part: float
) -> None:
    path = tmp_path / name
    path = save_trials(path) if path.suffix == ".npz" else write(simulated(12), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert check(config(), path).errors


def test_damaged_bytes_in_a_header_are_findings_and_never_a_traceback(tmp_path: Path) -> None:
    path = write(simulated(12), tmp_path / "a.edf")
    content, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(content)
        for place in draw.integers(0, 2000, 20):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(damaged)
        assert isinstance(check(config(), path), Findings)
