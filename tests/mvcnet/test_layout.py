from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.errors import UsageError
from diptych_mvcnet.config import EEGDataSection
from diptych_mvcnet.layout import compile_pattern, find_recordings, natural, suggest_pattern


def place(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def found(folder: Path, **data: object) -> list[tuple[str, str, str]]:
    located, _ = find_recordings(folder, EEGDataSection.model_validate(data))
    return [(one.subject, one.session, one.run) for one in located]


def test_a_pattern_names_subject_and_run_of_compressed_files_too(tmp_path: Path) -> None:
    place(tmp_path, "S010R12.edf.xz", "S002R04.edf", "S002R12.edf", "notes.txt")
    assert found(tmp_path, pattern="S{subject:03d}R{run:02d}.edf") == [
        ("2", "1", "4"),
        ("2", "1", "12"),
        ("10", "1", "12"),
    ]


def test_files_that_fit_nothing_are_named_with_a_pattern_that_would_fit(tmp_path: Path) -> None:
    place(tmp_path, "S001R04.edf.xz", "extra.edf")
    located, findings = find_recordings(tmp_path, EEGDataSection())
    assert located == []
    assert [(one.severity, one.code, one.where) for one in findings] == [
        ("warning", "file.unmatched", "S001R04.edf.xz"),
        ("warning", "file.unmatched", "extra.edf"),
    ]
    assert "S{subject:03d}R{run:02d}.edf" in findings[0].fix


def test_folders_are_subjects_and_sessions(tmp_path: Path) -> None:
    place(tmp_path, "anna/1.edf", "anna/2.edf", "bert/2020/a.edf", "bert/1999/a.edf")
    assert found(tmp_path) == [
        ("anna", "1", "1"),
        ("anna", "1", "2"),
        ("bert", "1999", "a"),
        ("bert", "2020", "a"),
    ]


def test_bids_entities_are_read_from_any_place(tmp_path: Path) -> None:
    place(tmp_path, "sub-02_ses-1_raw.fif", "sub-01/ses-2/eeg/sub-01_ses-2_run-3_eeg.vhdr")
    place(tmp_path, "sub-01/ses-2/eeg/sub-01_ses-2_run-3_eeg.eeg", "participants.tsv")
    assert found(tmp_path) == [("01", "2", "3"), ("02", "1", "1")]


def test_excluded_files_and_other_runs_are_left_out_silently(tmp_path: Path) -> None:
    place(tmp_path, "S1R4.edf", "S1R6.edf", "S2R4.edf", "odd.edf")
    data = {"pattern": "S{subject:d}R{run:d}.edf", "runs": [4], "exclude": ["odd.edf", "S2*"]}
    located, findings = find_recordings(tmp_path, EEGDataSection.model_validate(data))
    assert [one.name for one in located] == ["S1R4.edf"]
    assert findings == []


def test_a_single_file_is_a_subject_of_its_own(tmp_path: Path) -> None:
    place(tmp_path, "visit.edf")
    located, _ = find_recordings(tmp_path / "visit.edf", EEGDataSection())
    assert [(one.subject, one.name) for one in located] == [("visit", "visit.edf")]


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    ("data", "where", "fix"),
    [
        ({"exclude": ["*"]}, "data.exclude", "exclude fewer"),
        ({"runs": [9]}, "data.runs", "there are 4"),
        ({"pattern": "P{subject:d}.edf"}, "data.pattern", "S{subject:01d}R{run:01d}.edf"),
    ],
)
def test_what_leaves_no_recording_is_an_error_that_names_it(
    tmp_path: Path, single: bool, data: dict[str, object], where: str, fix: str
) -> None:
    place(tmp_path, "S1R4.edf")
    data = {"pattern": "S{subject:d}R{run:d}.edf", **data}
    source = tmp_path / "S1R4.edf" if single else tmp_path
    located, findings = find_recordings(source, EEGDataSection.model_validate(data))
    assert located == []
    assert [(one.severity, one.code, one.where) for one in findings] == [
        ("error", "file.none", where)
    ]
    assert fix in findings[0].fix


def test_a_wrong_pattern_reads_differently_from_a_forgotten_one(tmp_path: Path) -> None:
    place(tmp_path, "S1R4.edf", "S2R4.edf", "odd.edf")
    section = EEGDataSection(pattern="s{subject:03d}.edf")
    (wrong,) = find_recordings(tmp_path, section)[1]
    assert wrong.found == "'s{subject:03d}.edf' fits none of 3 file names, such as S1R4.edf"
    section = EEGDataSection(pattern="S{subject:d}R{run:d}.edf")
    (odd,) = find_recordings(tmp_path, section)[1]
    assert (odd.severity, odd.where) == ("warning", "odd.edf")
    assert "does not fit data.pattern" in odd.found


def test_companion_files_are_no_finding_and_foreign_ones_are(tmp_path: Path) -> None:
    place(tmp_path, "1/a.vhdr", "1/a.vmrk", "1/a.eeg", "1/old.xdf", "1/old.mat", ".cache/x.bin")
    for data in ({}, {"pattern": "{subject}.vhdr"}):
        _, findings = find_recordings(tmp_path, EEGDataSection.model_validate(data))
        assert [one.where for one in findings] == ["1/old.mat", "1/old.xdf"]


def test_a_folder_of_one_file_is_one_subject(tmp_path: Path) -> None:
    place(tmp_path / "flat", "visit.edf")
    assert found(tmp_path / "flat") == [("visit", "1", "1")]
    place(tmp_path / "deep", "anna/visit.edf")
    assert found(tmp_path / "deep") == [("anna", "1", "visit")]


def test_a_manifest_places_files_and_knows_the_side_of_a_lesion(tmp_path: Path) -> None:
    place(tmp_path, "x/a.edf", "b.edf")
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,subject,session,lesion_side\nx/a.edf,P2,2,left\nb.edf,P1,1,\n")
    located, _ = find_recordings(tmp_path, EEGDataSection(manifest=manifest))
    assert [(one.subject, one.session, one.lesion_side) for one in located] == [
        ("P1", "1", ""),
        ("P2", "2", "left"),
    ]


@pytest.mark.parametrize(
    "content",
    ["path,person\na.edf,1\n", "path,subject\nmissing.edf,1\n", "path,subject\na.edf,\n", ""],
)
def test_an_unusable_manifest_is_a_usage_error(tmp_path: Path, content: str) -> None:
    place(tmp_path, "a.edf")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UsageError, match=r"data\.manifest"):
        find_recordings(tmp_path, EEGDataSection(manifest=tmp_path / "list.csv"))


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        find_recordings(tmp_path / "nowhere", EEGDataSection())


@pytest.mark.parametrize("pattern", ["R{run}.edf", "{subject}{subject}.edf"])
def test_an_unusable_pattern_is_a_usage_error(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"data\.pattern"):
        compile_pattern(pattern)


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=3), st.sampled_from(["edf", "bdf.xz"]))
def test_a_suggested_pattern_fits_the_name_it_was_made_from(
    numbers: list[int], suffix: str
) -> None:
    name = "_".join(f"p{number:02d}" for number in numbers) + f".{suffix}"
    expression = compile_pattern(suggest_pattern(name))
    assert expression.fullmatch(name.removesuffix(".xz"))


def test_run_ten_comes_after_run_nine() -> None:
    assert sorted(["run10", "run9", "run1"], key=natural) == ["run1", "run9", "run10"]
