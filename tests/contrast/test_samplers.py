import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import diptych_contrast as dc

LABELS = [0] * 30 + [1] * 5 + [2] * 12 + [-1] * 7 + [3]


def test_every_batch_has_so_many_samples_of_so_many_classes():
    sampler = dc.ClassBalancedSampler(LABELS, 3, 4)
    batches = list(sampler)
    assert len(batches) == 48 // 12
    for batch in batches:
        classes = [LABELS[index] for index in batch]
        assert len(set(classes)) == 3
        assert all(classes.count(label) == 4 for label in set(classes))
        assert -1 not in classes


def test_samples_of_a_class_come_in_turns():
    drawn = list(itertools.chain(*dc.ClassBalancedSampler([0] * 8 + [1] * 8, 2, 2)))
    assert sorted(drawn) == list(range(16))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60).flatmap(
        lambda groups: st.tuples(st.just(groups), st.integers(1, len(set(groups))))
    )
)
def test_no_two_samples_of_a_subject_meet(case):
    groups, size = case
    drawn = list(dc.SubjectSampler(groups, size))
    for batch in drawn:
        assert len(batch) == size
        assert len({groups[index] for index in batch}) == size
    used = list(itertools.chain(*drawn))
    assert len(used) == len(set(used))
    # as many batches as any way of drawing can fill
    counts = [groups.count(group) for group in set(groups)]
    possible = max(n for n in range(len(groups) + 1) if sum(min(c, n) for c in counts) >= n * size)
    assert len(drawn) == possible


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: dc.ClassBalancedSampler(LABELS, 2, 3, seed=seed),
        lambda seed: dc.SubjectSampler([str(label) for label in LABELS], 2, seed=seed),
    ],
)
def test_epochs_are_keyed_and_can_be_resumed(make):
    whole = make(1)
    first, second = list(whole), list(whole)
    assert first != second
    assert len(make(1)) == len(first)
    assert list(make(2)) != first
    again = make(1)
    again.set_epoch(1)
    assert list(again) == second
    broken = make(1)
    seen = list(itertools.islice(broken, 3))
    state = broken.state_dict()
    resumed = make(1)
    resumed.load_state_dict(state)
    assert seen + list(resumed) == first
    assert list(resumed) == second
    with pytest.raises(dc.ContrastInputError, match="seed"):
        make(2).load_state_dict(state)


def test_a_data_loader_takes_them():
    sampler = dc.SubjectSampler(["a", "a", "b", "c"], 2)
    assert [len(batch) for batch in DataLoader(range(4), batch_sampler=sampler)] == [2, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: dc.ClassBalancedSampler([0, 1], 3, 1),
        lambda: dc.ClassBalancedSampler([0, 1], 0, 1),
        lambda: dc.ClassBalancedSampler([0, 1], 2, 0),
        lambda: dc.SubjectSampler(["a", "a"], 2),
        lambda: dc.SubjectSampler(["a", "a"], 0),
    ],
)
def test_impossible_batches_are_refused(make):
    with pytest.raises(dc.ContrastInputError):
        make()
