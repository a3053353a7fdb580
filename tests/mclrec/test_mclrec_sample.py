from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np

from diptych_mclrec.events import order_events, repeat_share
from diptych_mclrec.read import read_events
from diptych_mclrec.sample import Demo, bayes_scores, make_demo, write_sample
from diptych_mclrec.split import split_sequences

SHA256 = "cd55f2cf594b523ddae8903d9e027ae911775b3c76b0ea381aca778afccd2fdc"


@cache
def demo() -> Demo:
    return make_demo()


def test_the_sample_has_the_same_bytes_everywhere() -> None:
    items = demo().sequences.items - 1
    assert hashlib.sha256(items.astype("<i4").tobytes()).hexdigest() == SHA256
    assert len(items) == 34_624
    assert items[:10].tolist() == [19, 5, 57, 79, 24, 21, 6, 37, 50, 24]
    assert (demo().times[:3] // 1440).tolist() == [31, 51, 53]


def test_the_share_of_repeated_targets_is_the_published_one() -> None:
    test = split_sequences(demo().sequences, "leave_one_out").test
    repeats = [test[row][-1] in test[row][:-1] for row in range(len(test))]
    assert round(float(np.mean(repeats)), 4) == 0.4447


def test_the_best_answer_scores_as_published() -> None:
    test = split_sequences(demo().sequences, "leave_one_out").test
    scores = bayes_scores([test[row][:-1].tolist() for row in range(len(test))], demo())
    assert np.allclose(np.exp(np.log(scores[:, 1:])).sum(1), 1)
    assert bool((scores[:, 0] == -np.inf).all())
    targets = np.array([test[row][-1] for row in range(len(test))])
    own = scores[np.arange(len(test)), targets]
    rank = (scores[:, 1:] >= own[:, None]).sum(1)
    hits = [round(float((rank <= k).mean()), 4) for k in (1, 5, 10)]
    assert hits == [0.3187, 0.7447, 0.9387]
    assert round(float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean()), 4) == 0.6041
    assert round(float((1 / rank).mean()), 4) == 0.5013


def test_the_written_sample_reads_back_as_generated(tmp_path: Path) -> None:
    write_sample(tmp_path, 7)
    ordered = order_events(read_events(tmp_path))
    names = [f"item-{item - 1:03d}" for item in demo().sequences.items]
    assert ordered.catalogue.decode(ordered.sequences.items) == names
    assert np.array_equal(ordered.sequences.offsets, demo().sequences.offsets)
    assert ordered.sequences.equals(demo().sequences.with_items(ordered.sequences.items))
    repeats = [
        item in ordered.sequences[row][:place]
        for row in range(len(ordered.sequences))
        for place, item in enumerate(ordered.sequences[row])
        if place
    ]
    assert np.isclose(repeat_share(ordered.sequences)[0], np.mean(repeats), atol=1e-12)
