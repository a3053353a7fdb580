"""Keyed random numbers: every draw follows from (seed, stage, epoch, purpose) and an item's id.

Augmentation is therefore the same whatever the batch, the worker, the number of processes or
the device: row i depends on its own id alone. The generator is Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over items.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt32
from numpy.typing import NDArray

Ids = Sequence[int] | NDArray[np.integer]

_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORDS = 4
_CHUNK = 1 << 14  # blocks at a time, so that the sixteen working arrays stay in the cache

_UNIFORM, _NORMAL, _INTEGERS, _PERMUTATION = range(4)


@dataclass(frozen=True)
class Draw:
    """A source of random numbers that knows no order: the same question has the same answer.

    Two draws of one item, purpose and kind are the same numbers: ask under another purpose where
    they must differ (``draw.of("view-1")`` and ``draw.of("view-2")``).

    Args:
        seed: The fit's seed.
        stage: The fit's stage.
        epoch: Epoch, counted from 0.
        purpose: What is drawn: "mask", "view-1/noise".

    Example:
        >>> mask = Draw(1).at(0).of("mask").uniform([3, 7], 2)
        >>> bool((mask[1] == Draw(1).at(0).of("mask").uniform([7], 2)[0]).all())
        True
    """

    seed: int
    stage: str = "train"
    epoch: int = 0
    purpose: str = ""

    def at(self, epoch: int) -> Draw:
        """The same source in another epoch."""
        return replace(self, epoch=epoch)

    def of(self, purpose: str) -> Draw:
        """The source for one purpose; purposes nest: ``of("a").of("b")`` is ``of("a/b")``."""
        return replace(self, purpose=f"{self.purpose}/{purpose}" if self.purpose else purpose)

    def uniform(
        self, ids: Ids, n: int = 1, low: float = 0.0, high: float = 1.0
    ) -> Float64[np.ndarray, "items n"]:
        """Uniform numbers between two bounds.

        Args:
            ids: Item ids, any 64-bit integers.
            n: Numbers an item; the first of many are those of few.
            low: Lower bound.
            high: Upper bound.

        Returns:
            One row an item, with 32 random bits a number; the bounds themselves do not occur
            (apart from rounding in ``low + u * (high - low)``).
        """
        return low + _unit(self._words(ids, n, _UNIFORM)) * (high - low)

    def normal(self, ids: Ids, n: int = 1) -> Float64[np.ndarray, "items n"]:
        """Standard normal numbers by inversion, up to 6.3 standard deviations.

        Args:
            ids: Item ids, any 64-bit integers.
            n: Numbers an item; the first of many are those of few.

        Returns:
            One row an item.
        """
        from scipy.special import ndtri

        normal: NDArray[np.float64] = ndtri(_unit(self._words(ids, n, _NORMAL)))
        return normal

    def integers(
        self, ids: Ids, n: int, high: int | NDArray[np.integer]
    ) -> Int64[np.ndarray, "items n"]:
        """Integers from 0 to below a bound.

        Args:
            ids: Item ids, any 64-bit integers.
            n: Numbers an item; the first of many are those of few.
            high: Exclusive bound, 1 to 2**32; or one bound an item.

        Returns:
            One row an item; a value's probability is off by less than 2**-32.

        Raises:
            ValueError: A bound is out of range.
        """
        bound = np.asarray(high, dtype=np.int64)
        if bound.size and (bound.min() < 1 or bound.max() > 1 << 32):
            raise ValueError(
                f"integers: high has values from {bound.min()} to {bound.max()}: "
                "pass bounds between 1 and 2**32"
            )
        factor = bound.astype(np.uint64).reshape(-1, 1)
        words = self._words(ids, n, _INTEGERS).astype(np.uint64)
        return (words * factor >> _WORD_BITS).astype(np.int64)

    def permutation(self, ids: Ids) -> Int64[np.ndarray, " items"]:
        """The ids in a random order that does not depend on the order they came in.

        Args:
            ids: Item ids, any 64-bit integers.

        Returns:
            The same ids; without some of them, the others keep their relative order.
        """
        known = np.asarray(ids, dtype=np.int64)
        words = self._words(known, 2, _PERMUTATION)
        return known[np.lexsort((known, words[:, 1], words[:, 0]))]

    def _words(self, ids: Ids, n: int, kind: int) -> UInt32[np.ndarray, "items n"]:
        key = int.from_bytes(_digest(self.seed, self.stage, self.epoch, self.purpose)[:8], "little")
        item = np.asarray(ids, dtype=np.int64).astype(np.uint64)
        blocks = -(-n // _WORDS)
        counter = np.zeros((_WORDS, len(item), blocks), np.uint64)
        counter[0] = (item & _LOW_WORD)[:, None]
        counter[1] = (item >> _WORD_BITS)[:, None]
        counter[2] = np.arange(blocks, dtype=np.uint64)
        counter[3] = np.uint64(kind)
        words = philox(counter.reshape(_WORDS, -1), key)
        return words.T.reshape(len(item), blocks * _WORDS)[:, :n]


def philox(counter: NDArray[np.uint64], key: int) -> UInt32[np.ndarray, "4 blocks"]:
    """Philox4x32-10: four 32-bit words of random bits for every counter.

    Args:
        counter: (4, blocks) 32-bit words held in 64 bits.
        key: 64 bits.

    Returns:
        The words, equal to the test vectors of the Random123 library.
    """
    output = np.empty(counter.shape, np.uint32)
    for start in range(0, counter.shape[1], _CHUNK):
        block = slice(start, start + _CHUNK)
        output[:, block] = _philox_rounds(counter[:, block], key)
    return output


def _philox_rounds(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    even, odd = np.array(counter[0::2]), np.array(counter[1::2])  # words 0, 2 and words 1, 3
    factors = np.array(_MULTIPLIERS, np.uint64)[:, None]
    product = np.empty_like(even)
    for step in range(_ROUNDS):
        keys = [((key >> 32 * word) + step * _WEYL[word]) & 0xFFFFFFFF for word in (0, 1)]
        np.multiply(even, factors, out=product)
        np.right_shift(product[::-1], _WORD_BITS, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, np.array(keys, np.uint64)[:, None], out=even)
        np.bitwise_and(product[::-1], _LOW_WORD, out=odd)
    return np.stack([even[0], odd[0], even[1], odd[1]])


def _unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def _digest(*parts: int | str) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def seed_globals(seed: int, stage: str, step: int, rank: int = 0, purpose: str = "") -> None:
    """Seed the generators of python, numpy and torch from where a fit stands.

    Done before modules are built and at every step, so that dropout and every other use of a
    global generator follow from the fit's seed and no generator state has to be saved.

    Args:
        seed: The fit's seed.
        stage: The fit's stage.
        step: Steps done in this fit.
        rank: Rank of this process.
        purpose: Keeps apart what happens at one step: loading, training, validation.
    """
    digest = _digest(seed, stage, step, rank, purpose)
    number = int.from_bytes(digest[:8], "little")
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002 - the global generator is what is meant
    # torch.manual_seed would format a stack trace for every device that was not yet used
    torch.default_generator.manual_seed(number)
    if _cuda_is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def _cuda_is_initialized() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def isolated_globals() -> Iterator[None]:
    """Give back the global generators and torch's global switches as they were."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if _cuda_is_initialized() else None
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
