"""Keyed draws: what a number depends on, and what it does not."""

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diptych.randomness import Draw, isolated_globals, philox, seed_globals

IDS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40, unique=True)
DRAW = Draw(seed=5, stage="train").at(3).of("mask")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_test_vectors_of_random123(counter, key, expected):
    words = philox(np.array(counter, np.uint64)[:, None], key)
    assert words[:, 0].tolist() == expected


def test_philox_over_many_blocks_equals_block_by_block():
    counter = np.random.default_rng(0).integers(0, 2**32, (4, 40_000), dtype=np.uint64)
    whole = philox(counter, 12345)
    some = [0, 1, 16383, 16384, 39_999]
    for block in some:
        assert (philox(counter[:, [block]], 12345)[:, 0] == whole[:, block]).all()


@settings(deadline=None, max_examples=30)
@given(IDS, st.integers(1, 11))
def test_a_row_depends_on_its_own_id_alone(ids, n):
    for method in (
        lambda known, count: DRAW.uniform(known, count, -2.0, 3.0),
        DRAW.normal,
        lambda known, count: DRAW.integers(known, count, 17),
    ):
        whole = method(ids, n)
        assert whole.shape == (len(ids), n)
        for row, item in enumerate(ids):
            assert (method([item], n)[0] == whole[row]).all()


@settings(deadline=None, max_examples=30)
@given(IDS)
def test_a_permutation_ignores_the_order_it_is_given(ids):
    ordered = DRAW.permutation(ids)
    assert sorted(ordered) == sorted(ids)
    assert (DRAW.permutation(sorted(ids)) == ordered).all()
    left = [item for item in ordered if item != ids[0]]
    assert DRAW.permutation(ids[1:]).tolist() == left


def test_a_short_draw_is_the_start_of_a_long_one():
    assert (DRAW.normal(range(5), 3) == DRAW.normal(range(5), 10)[:, :3]).all()
    assert DRAW.uniform(range(5), 0).shape == (5, 0)
    assert DRAW.uniform([], 3).shape == (0, 3)


@pytest.mark.parametrize(
    "other",
    [
        Draw(6).at(3).of("mask"),
        Draw(5, "pretrain").at(3).of("mask"),
        Draw(5).at(4).of("mask"),
        Draw(5).at(3).of("noise"),
        Draw(5).at(3),
    ],
)
def test_each_part_of_the_key_changes_every_number(other):
    assert not (other.uniform(range(50), 4) == DRAW.uniform(range(50), 4)).any()


def test_kinds_of_numbers_are_independent_and_purposes_nest():
    uniform, normal = DRAW.uniform(range(5000))[:, 0], DRAW.normal(range(5000))[:, 0]
    assert abs(np.corrcoef(uniform, normal)[0, 1]) < 0.05
    assert Draw(1).of("a").of("b") == Draw(1).of("a/b")


def test_numbers_have_the_distributions_they_are_named_after():
    assert stats.kstest(DRAW.uniform(range(2000), 10).ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(DRAW.normal(range(2000), 10).ravel(), "norm").pvalue > 1e-3
    counts = np.bincount(DRAW.integers(range(2000), 10, 7).ravel(), minlength=7)
    assert stats.chisquare(counts).pvalue > 1e-3
    first = [int(Draw(seed).permutation(range(6))[0]) for seed in range(1200)]
    assert stats.chisquare(np.bincount(first, minlength=6)).pvalue > 1e-3


def test_integers_take_a_bound_for_each_item_and_refuse_an_empty_range():
    bounds = np.array([1, 2, 1000])
    values = DRAW.integers([1, 2, 3], 200, bounds)
    assert (values < bounds[:, None]).all()
    assert (values >= 0).all()
    assert values[2].max() > 900
    assert DRAW.integers([1], 50, 2**32).max() > 2**31
    with pytest.raises(ValueError, match="between 1 and"):
        DRAW.integers([1], 1, 0)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The generator as the paper writes it, one counter at a time, in python's integers."""
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & 0xFFFFFFFF,
            (left >> 32) ^ counter[3] ^ key[1],
            left & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_the_numbers_of_a_seed_never_change():
    item = 7 + (9 << 32)
    digest = hashlib.blake2b(b'[5, "train", 3, "mask"]', digest_size=16).digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    words = [word for block in (0, 1) for word in scalar_philox([7, 9, block, 0], key)]
    assert DRAW.uniform([item], 6)[0].tolist() == [(word + 0.5) / 2**32 for word in words[:6]]
    words = scalar_philox([7, 9, 0, 2], key)
    assert DRAW.integers([item], 4, 100)[0].tolist() == [word * 100 >> 32 for word in words]


def test_global_generators_follow_from_seed_stage_step_and_rank():
    def numbers(*key):
        with isolated_globals():
            seed_globals(*key)
            return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert numbers(1, "train", 5, 0) == numbers(1, "train", 5, 0)
    others = [(2, "train", 5, 0), (1, "test", 5, 0), (1, "train", 6, 0), (1, "train", 5, 1)]
    for other in others:
        for a, b in zip(numbers(*other), numbers(1, "train", 5, 0), strict=True):
            assert a != b


def disturb(threads: int) -> None:
    with isolated_globals():
        seed_globals(9, "train", 0)
        torch.set_num_threads(threads + 1)
        torch.use_deterministic_algorithms(True)
        raise RuntimeError("inside")


def test_isolated_globals_give_everything_back_even_after_an_error():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    expected = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"):
            disturb(threads)
        assert torch.get_num_threads() == threads
        assert not torch.are_deterministic_algorithms_enabled()
        expected.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
    assert expected[0] == expected[1]
