"""The embedded sample: a mixture of Markov chains with repeats, whose best answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from diptych.files import read_json, write_atomically, write_json
from diptych_mclrec.sequences import Catalogue, Sequences

SUCCESSOR_SHARES = (0.45, 0.25, 0.15, 0.10, 0.05)
NEW_SESSION = 0.4
DAY_MINUTES = 24 * 60
MINUTE = 60_000_000  # microseconds
BEGIN = 1_577_836_800_000_000  # 2020-01-01, microseconds
EVENTS_FILE, TRUTH_FILE = "events.csv", "truth.json"


@dataclass(frozen=True)
class Demo:
    """A generated sample and everything that generated it.

    Args:
        sequences: The events; item i of the generator has id i + 1.
        times: Minutes since the first day of the sample, int64 (E,).
        regimes: Each subject's hidden regime.
        P: Probability of each next item after each item, by regime.
        start: Probability of each first item, by regime.
        rho: Probability that an event repeats one of the last.
        window: How many last events a repeat chooses from.
    """

    sequences: Sequences
    times: Int[np.ndarray, " events"]
    regimes: Int[np.ndarray, " subjects"]
    P: Float[np.ndarray, "regimes items items"]
    start: Float[np.ndarray, "regimes items"]
    rho: float
    window: int


def make_demo(
    seed: int = 7,
    subjects: int = 1500,
    items: int = 80,
    regimes: int = 3,
    rho: float = 0.25,
    eps: float = 0.1,
    lo: int = 6,
    hi: int = 40,
    window: int = 5,
) -> Demo:
    """Generate the sample; the order of the draws is fixed, so a seed gives the same bytes.

    Args:
        seed: Of numpy's PCG64.
        subjects: Number of subjects.
        items: Number of items, at least 5.
        regimes: Hidden kinds of subjects.
        rho: Probability that an event repeats one of the last ``window``.
        eps: Probability mass of a transition that is spread over all items.
        lo: Fewest events of a subject.
        hi: Most events of a subject.
        window: Events that a repeat chooses from.

    Returns:
        The sample with its truth.

    Example:
        >>> make_demo(subjects=1).sequences.items[:3].tolist()
        [20, 6, 58]
    """
    g = np.random.default_rng(seed)
    P = np.full((regimes, items, items), eps / items)
    for regime in range(regimes):
        for item in range(items):
            successors = g.choice(items, len(SUCCESSOR_SHARES), replace=False)
            P[regime, item, successors] += (1 - eps) * np.array(SUCCESSOR_SHARES)
    start = g.dirichlet(np.full(items, 0.3), size=regimes)
    lists, times, hidden = [], [], []
    for _ in range(subjects):
        regime = int(g.integers(regimes))
        count = int(g.integers(lo, hi + 1))
        chosen = [int(g.choice(items, p=start[regime]))]
        minute = int(g.integers(0, 365)) * DAY_MINUTES
        minutes = [minute]
        while len(chosen) < count:
            if g.random() < rho:
                recent = chosen[-window:]
                chosen.append(recent[int(g.integers(len(recent)))])
            else:
                chosen.append(int(g.choice(items, p=P[regime, chosen[-1]])))
            if g.random() < NEW_SESSION:
                minute += int(g.integers(1, 31)) * DAY_MINUTES
            else:
                minute += int(g.integers(1, 61))
            minutes.append(minute)
        lists.append([item + 1 for item in chosen])
        times.extend(minutes)
        hidden.append(regime)
    plain = Sequences.from_lists(lists, [f"s-{row:04d}" for row in range(subjects)])
    clock = np.array(times, np.int64)
    dated = Sequences(plain.subjects, plain.offsets, plain.items, BEGIN + clock * MINUTE)
    return Demo(dated, clock, np.array(hidden), P, start, rho, window)


def bayes_scores(
    histories: Sequences | Sequence[Sequence[int]], demo: Demo
) -> Float[np.ndarray, "histories items_and_one"]:
    """The best possible prediction: probability of each next item, given what generates them.

    Args:
        histories: Item ids 1..I, each history with at least one event.
        demo: The sample's parameters.

    Returns:
        Column i holds the probability of id i; column 0 is -inf.
    """
    size = demo.P.shape[1]
    scores = np.full((len(histories), size + 1), -np.inf)
    for row in range(len(histories)):
        items = np.asarray(histories[row], dtype=np.int64) - 1
        belief = demo.start[:, items[0]].copy()
        for place in range(1, len(items)):
            recent = items[max(0, place - demo.window) : place]
            share = float((recent == items[place]).mean())
            step = demo.P[:, items[place - 1], items[place]]
            belief *= demo.rho * share + (1 - demo.rho) * step
            belief /= belief.sum()
        belief /= belief.sum()
        recent = items[-demo.window :]
        repeat = np.bincount(recent, minlength=size) / len(recent)
        scores[row, 1:] = demo.rho * repeat + (1 - demo.rho) * (belief @ demo.P[:, items[-1]])
    return scores


def sample_seed(source: Path, sequences: Sequences, catalogue: Catalogue) -> int | None:
    """The seed of the sample, where the data are an unchanged one.

    Args:
        source: Folder of the data.
        sequences: What was read from it, in ids of the catalogue.
        catalogue: Its items.
    """
    try:
        truth = read_json(source / TRUTH_FILE)
        seed = int(truth["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    demo = make_demo(seed).sequences
    names = np.array(["", *catalogue.names])[sequences.items]
    same = np.array_equal(names, [item_name(item) for item in demo.items.tolist()])
    return seed if same and np.array_equal(sequences.offsets, demo.offsets) else None


def item_name(item: int) -> str:
    """Name of an item in the written sample.

    Args:
        item: Its id, from 1.
    """
    return f"item-{item - 1:03d}"


def write_sample(folder: Path, seed: int) -> None:
    """Write the sample as a table with subject_id, item_id and time, beside its truth.

    Args:
        folder: Made where it does not exist.
        seed: Of the sample.
    """
    demo = make_demo(seed)
    sequences = demo.sequences
    folder.mkdir(parents=True, exist_ok=True)
    table = pl.DataFrame(
        {
            "subject_id": sequences.subjects[sequences.rows],
            "item_id": [item_name(item) for item in sequences.items.tolist()],
            "time": pl.Series(sequences.times, dtype=pl.Datetime("us")),
        }
    )
    text = table.write_csv(datetime_format="%Y-%m-%dT%H:%M:%S")
    write_atomically(folder / EVENTS_FILE, lambda stream: stream.write(text.encode()))
    write_json(folder / TRUTH_FILE, {"generator": "make_demo", "seed": seed})
