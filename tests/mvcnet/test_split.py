from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import DataError, UsageError
from diptych_mvcnet.split import PROTOCOLS, inner_validation, make_splits


def index_of(
    subjects: int = 3, sessions: int = 2, runs: int = 2, trials: int = 12, windows: int = 1
) -> pl.DataFrame:
    rows = [
        {
            "subject": f"S-{subject}",
            "session": str(session),
            "run": str(run),
            "trial": trial,
            "label": ("left_hand", "right_hand")[(trial * 7 + run) % 2],
            "rejected": False,
        }
        for subject, session, run, trial, _ in product(
            range(subjects), range(sessions), range(runs), range(trials), range(windows)
        )
    ]
    return pl.DataFrame(rows)


def recorded(labels: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"subject": "a", "label": labels})


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "fixed"])
def test_training_and_test_rows_share_nothing_and_test_each_subject(protocol: str) -> None:
    index = index_of(windows=2)
    splits = make_splits(index, protocol)
    trials = index.select("subject", "session", "run", "trial").rows()
    for split in splits:
        assert not set(split.train) & set(split.test)
        assert not {trials[row] for row in split.train} & {trials[row] for row in split.test}
        assert set(index["subject"][list(split.test)]) == {split.subject}
    assert {split.subject for split in splits} == {"S-0", "S-1", "S-2"}


@given(counts=st.tuples(st.integers(5, 40), st.integers(5, 40)), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_within_cv_tests_every_trial_once_in_blocks_of_each_class(
    counts: tuple[int, int], seed: int
) -> None:
    labels = np.repeat(["left", "right"], counts)
    np.random.default_rng(seed).shuffle(labels)
    splits = make_splits(recorded(labels.tolist()), "within_cv")
    assert sorted(row for split in splits for row in split.test) == list(range(sum(counts)))
    for name, count in zip(("left", "right"), counts, strict=True):
        rank = {row: r for r, row in enumerate(np.flatnonzero(labels == name))}
        for fold, split in enumerate(splits):
            for row in split.test:
                if labels[row] == name:
                    assert rank[row] * 5 // count == fold


def test_within_cv_on_45_trials_has_folds_of_8_to_10() -> None:
    labels = (["left", "right"] * 23)[:45]
    sizes = [len(split.test) for split in make_splits(recorded(labels), "within_cv")]
    assert len(sizes) == 5
    assert sum(sizes) == 45
    assert all(8 <= size <= 10 for size in sizes)


def test_co_trains_on_the_first_36_of_45_trials() -> None:
    (split,) = make_splits(recorded((["left", "right"] * 23)[:45]), "co")
    assert split.train == tuple(range(36))
    assert split.test == tuple(range(36, 45))


def test_co_per_class_on_144_trials_gives_116_and_28() -> None:
    (split,) = make_splits(recorded(["left", "right"] * 72), "co_per_class")
    assert (len(split.train), len(split.test)) == (116, 28)


def test_a_later_session_is_tested_with_all_sessions_before_it() -> None:
    index = index_of(subjects=1, sessions=3)
    splits = make_splits(index, "cross_session")
    sessions = index["session"].to_list()
    found = [({sessions[r] for r in s.train}, {sessions[r] for r in s.test}) for s in splits]
    assert found == [({"0"}, {"1"}), ({"0", "1"}, {"2"})]
    assert {split.disjoint_by for split in splits} == {"session"}


def test_one_session_or_one_run_or_one_subject_is_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match="one session only"):
        make_splits(index_of(sessions=1), "cross_session")
    with pytest.raises(DataError, match="one run only"):
        make_splits(index_of(sessions=1, runs=1), "cross_run")
    with pytest.raises(DataError, match=r"within_cv or co"):
        make_splits(index_of(subjects=1), "loso")
    with pytest.raises(DataError, match=r"4 trials of class left for 5 folds"):
        make_splits(recorded(["left"] * 4 + ["right"] * 9), "within_cv")


def test_an_unknown_protocol_or_a_bad_setting_is_a_usage_error() -> None:
    for wrong in ({"folds": 1}, {"train_fraction": 1.0}, {"gap_trials": -1}):
        with pytest.raises(UsageError):
            make_splits(index_of(), "within_cv", **wrong)
    with pytest.raises(UsageError, match="cross_run"):
        make_splits(index_of(), "crossrun")


def test_gap_trials_leave_training_at_the_borders_of_a_test_block() -> None:
    labels = (["left", "right"] * 20)[:40]
    plain = make_splits(recorded(labels), "within_cv_plain")
    gapped = make_splits(recorded(labels), "within_cv_plain", gap_trials=2)
    assert set(plain[1].train) - set(gapped[1].train) == {6, 7, 16, 17}
    assert plain[1].test == gapped[1].test


def test_rejected_trials_are_in_no_part() -> None:
    index = index_of().with_columns(rejected=pl.col("trial") == 3)
    dropped = set(np.flatnonzero(index["rejected"].to_numpy()))
    for protocol in ("within_cv", "co", "loso", "cross_run"):
        for split in make_splits(index, protocol):
            assert not dropped & {*split.train, *split.test}


def test_a_users_file_decides_and_its_level_is_found() -> None:
    index = index_of(subjects=4)
    parts = {"S-0": "train", "S-1": "train", "S-2": "validation", "S-3": "test"}
    split_column = index.with_columns(split=pl.col("subject").replace_strict(parts))
    (split,) = make_splits(split_column, "fixed")
    assert split.disjoint_by == "subject"
    assert set(index["subject"][list(split.validation)]) == {"S-2"}
    folds = index.with_columns(fold=pl.col("session"))
    first, second = make_splits(folds, "fixed")
    assert first.disjoint_by == "session"
    assert first.test == tuple(sorted(second.train))
    with pytest.raises(UsageError, match=r"split\.file"):
        make_splits(index, "fixed")


def test_the_official_order_sorts_test_trials_by_class() -> None:
    labels = ["right", "left"] * 20
    (split,) = make_splits(recorded(labels), "co", parity_class_sorted=True)
    assert [labels[row] for row in split.test] == ["left"] * 4 + ["right"] * 4


def test_inner_validation_takes_the_last_fifth_of_each_class() -> None:
    labels = ["left"] * 10 + ["right"] * 10
    split = inner_validation(recorded(labels), range(20))
    assert split.validation == (8, 9, 18, 19)
    assert split.train == (*range(8), *range(10, 18))
    assert not split.test


def test_other_subjects_change_no_split_of_a_subject() -> None:
    index = index_of()
    alone = index.filter(pl.col("subject") == "S-0")
    for protocol in ("within_cv", "co", "cross_run"):
        both = [s for s in make_splits(index, protocol) if s.subject == "S-0"]
        assert [s.test for s in both] == [s.test for s in make_splits(alone, protocol)]
