"""What a user gets from a trained model: rankings, vectors, sessions and explanations."""

import time
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from tests.mclrec.recommenders import NAMES, fitted, recommender

from diptych.errors import DataError
from diptych_mclrec.baselines import Markov1
from diptych_mclrec.histories import list_table
from diptych_mclrec.metrics import evaluate
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.serve import Recommender
from diptych_mclrec.split import split_sequences

torch.set_num_threads(1)
HISTORIES = [["code-3", "code-9"], ["code-1", "code-4", "code-2", "code-8"], ["code-30"]]


def by_hand(model: Recommender, history: list[str]) -> np.ndarray:
    """Logits of ids 1..I from the encoder alone, in float64."""
    net = model.encoder
    ids = [NAMES.index(name) + 1 for name in history][-net.max_len :]
    h = net(torch.tensor([ids]), torch.tensor([len(ids)]))[0].double()
    return (net.item_embedding.weight[1:].double() @ h).numpy()


def test_a_list_is_the_sort_of_all_scores_with_its_probabilities():
    model = recommender()
    found = model.recommend(HISTORIES, k=4)
    assert found["subject"].to_list() == [str(row) for row in range(3) for _ in range(4)]
    assert found["rank"].to_list() == [1, 2, 3, 4] * 3
    for row, history in enumerate(HISTORIES):
        logits = by_hand(model, history)
        best = np.argsort(-logits, kind="stable")[:4]
        part = found.filter(subject=str(row))
        assert part["item"].to_list() == [NAMES[i] for i in best]
        assert part["score"].to_numpy() == pytest.approx(logits[best], abs=1e-5)
        share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert part["probability"].to_numpy() == pytest.approx(share[best], abs=1e-6)
    assert not found["fallback"].any()


def test_batches_and_tiles_change_no_list():
    model = recommender()
    lists = [[NAMES[(3 * row + step) % 30] for step in range(row % 9 + 1)] for row in range(40)]
    whole = model.recommend(lists, k=5)
    small = recommender(config=model.config.model_copy(
        update={"evaluate": model.config.evaluate.model_copy(update={"tile": 7})}
    ))  # fmt: skip
    parts = small.recommend(lists, k=5, batch_size=3)
    assert parts.drop("score", "probability").equals(whole.drop("score", "probability"))
    assert parts["score"].to_numpy() == pytest.approx(whole["score"].to_numpy(), abs=1e-5)


def test_seen_items_are_left_out_when_the_fit_says_so_or_the_caller():
    history = ["code-3", "code-9"]
    masks, keeps = recommender(seen="mask"), recommender(seen="keep")
    kept = keeps.recommend([history], k=30)["item"].to_list()
    assert set(history) <= set(kept)
    expected = [name for name in kept if name not in history]
    assert masks.recommend([history], k=30)["item"].to_list() == expected
    assert keeps.recommend([history], k=30, seen="mask")["item"].to_list() == expected
    assert masks.recommend([history], k=30, seen="keep")["item"].to_list() == kept
    without = keeps.recommend([history], k=30, exclude=[kept[0], "never heard of"])
    assert without["item"].to_list() == kept[1:]


def test_unknown_items_are_counted_and_left_out():
    model = recommender()
    with pytest.warns(UserWarning, match="2 events of 1 of 2 histories"):
        found = model.recommend([["code-3", "new", "code-9", "newer"], ["code-4"]], k=3)
    assert found.equals(model.recommend([["code-3", "code-9"], ["code-4"]], k=3))


def test_a_history_without_known_items_gets_what_is_popular_and_says_so():
    model = recommender()
    with pytest.warns(UserWarning, match="are left out"):
        found = model.recommend([[], ["new"], ["code-4"]], k=3)
    assert found["fallback"].to_list() == [True] * 6 + [False] * 3
    counts = model.fitted.counts[1:]
    for row in ("0", "1"):
        part = found.filter(subject=row)
        assert part["item"].to_list() == list(NAMES[:3])
        assert part["probability"].to_numpy() == pytest.approx(counts[:3] / counts.sum())
    with pytest.warns(UserWarning, match="left out"):
        vectors = model.embed([["new"], ["code-4"]])
    assert np.isnan(vectors[0]).all()
    assert np.isfinite(vectors[1]).all()


def test_a_history_of_thousands_of_events_is_read_from_its_end():
    model = recommender(seen="mask")
    long = [NAMES[row % 20] for row in range(5000)]
    assert model.embed([long]) == pytest.approx(model.embed([long[-6:]]))
    assert model.recommend([long], k=30)["item"].n_unique() == 10  # all it has seen is left out


def test_tables_lists_and_ids_are_the_same_histories():
    model = recommender()
    frame = list_table(HISTORIES)
    ids = Sequences.from_lists([[NAMES.index(name) + 1 for name in one] for one in HISTORIES])
    expected = model.recommend(HISTORIES, k=3)
    assert model.recommend(frame, k=3).equals(expected)
    assert model.recommend(ids, k=3).equals(expected)
    dated = pl.DataFrame(
        {
            "user_id": ["7", "7", "9"],
            "item_id": ["code-9", "code-3", "code-30"],
            "time": ["2024-05-02", "2024-05-01", "2024-05-01"],
        }
    )
    found = model.recommend(dated, k=3)
    assert found["subject"].unique(maintain_order=True).to_list() == ["7", "9"]
    assert (
        found.filter(subject="7")
        .drop("subject")
        .equals(expected.filter(subject="0").drop("subject"))
    )


def test_subjects_of_a_run_are_known_by_name_and_others_are_refused():
    ids = Sequences.from_lists([[3, 9], [4]], subjects=["S-1", "S-2"])
    model = recommender(known=ids)
    assert (
        model.recommend(["S-2"], k=3)
        .drop("subject")
        .equals(model.recommend([["code-4"]], k=3).drop("subject"))
    )
    assert (
        model.open("S-1")
        .push("code-4")
        .top(3)
        .drop("subject")
        .equals(model.recommend([["code-3", "code-9", "code-4"]], k=3).drop("subject"))
    )
    assert model.explain("S-1", "code-4")["item"].to_list() == ["code-3", "code-9"]
    with pytest.raises(ValueError, match="S-3"):
        model.recommend(["S-3"])
    with pytest.raises(ValueError, match="give histories"):
        recommender().recommend(["code-3", "code-9"])


def test_baskets_are_one_step_each():
    model = recommender(baskets=True)
    found = model.embed([[["code-3", "code-9"], ["code-4"]]])
    items = torch.tensor([[[3, 9], [4, 0]]])
    assert found == pytest.approx(model.encoder(items, torch.tensor([2])).numpy(), abs=1e-6)
    assert model.embed([[["code-9", "code-3", "code-9"], "code-4"]]) == pytest.approx(found)


@pytest.mark.parametrize("baskets", [False, True])
def test_a_session_says_what_the_whole_history_says(baskets):
    model = recommender(baskets=baskets, seen="mask")
    session = model.open()
    history = [NAMES[number] for number in (4, 8, 15, 16, 23, 2, 1, 4)]
    assert session.top(2)["fallback"].all()
    for step, name in enumerate(history):
        found = session.push(name).top(3)
        assert found.equals(model.recommend([history[: step + 1]], k=3))


def test_an_explanation_is_the_difference_to_the_history_without_the_event():
    model = recommender()
    history = [NAMES[number] for number in (9, 4, 8, 15, 4, 16, 20, 21)]
    found = model.explain(history, "code-6")
    window = history[-6:]
    assert found["item"].to_list() == window
    assert found["step"].to_list() == list(range(2, 8)) or found["step"].to_list() == list(range(6))
    whole = by_hand(model, window)[5]
    for event in range(6):
        less = by_hand(model, window[:event] + window[event + 1 :])[5]
        assert found["change"][event] == pytest.approx(whole - less, abs=1e-5)
    assert model.explain(["code-3"], "code-6")["change"].to_list() == [None]
    with pytest.raises(ValueError, match="not in the catalogue"):
        model.explain(["code-3"], "new")


def test_wrong_histories_are_refused_in_words():
    model = recommender()
    with pytest.raises(ValueError, match="k is 0"):
        model.recommend(HISTORIES, k=0)
    with pytest.raises(ValueError, match=r"history 1, step 0 is 2\.5"):
        model.recommend([["code-3"], [2.5]])
    with pytest.raises(DataError, match="the model knows 1 to 30"):
        model.recommend(Sequences.from_lists([[31]]))
    assert model.recommend([], k=3).height == 0


def test_a_catalogue_of_another_fit_is_refused():
    small = SequenceEncoder(4, dim=8, inner=8, layers=1)
    with pytest.raises(DataError, match="different fits"):
        Recommender(small, fitted(), recommender().config)


@pytest.mark.slow
def test_ten_thousand_histories_and_one_pushed_item_are_answered_in_time():
    size = 12_101
    net = SequenceEncoder(size).eval().requires_grad_(False)
    names = [str(number) for number in range(1, size + 1)]
    model = Recommender(net, fitted(names, seen="mask"), recommender().config)
    rng = np.random.default_rng(0)
    lists = [
        [names[i] for i in rng.integers(0, size, int(n))] for n in rng.geometric(1 / 9, 10_000) + 4
    ]
    start = time.process_time()
    found = model.recommend(lists, k=10)
    assert time.process_time() - start < 20
    assert found.height == 100_000
    session = model.open(lists[0])
    session.push("5").top(10)
    times = []
    for name in lists[1] + lists[2]:
        start = time.process_time()
        session.push(name).top(10)
        times.append(time.process_time() - start)
    assert min(times) < 0.005  # others may share the core


def test_a_model_and_a_count_are_evaluated_on_a_split_under_both_policies():
    model = recommender()
    rng = np.random.default_rng(1)
    sequences = Sequences.from_lists([rng.integers(1, 31, 6).tolist() for _ in range(25)])
    split = split_sequences(sequences, "leave_one_out")
    found = evaluate(model, split, ks=(5, 40))
    assert set(found["metric"]) == {"mrr", "hr@5", "ndcg@5", "mrr@5"}
    kept = dict(found.filter(policy="kept").select("metric", "value").rows())
    hits = [
        sequences[row][-1] in _ids(model.recommend([_names(sequences[row][:-1])], k=5))
        for row in range(25)
    ]
    assert kept["hr@5"] == pytest.approx(np.mean(hits))
    repeats = sum(sequences[row][-1] in sequences[row][:-1] for row in range(25))
    assert found.filter(policy="masked")["steps"][0] == 25 - repeats
    counted = evaluate(Markov1().fit(split.train, n_items=30), split, ks=(5,))
    assert counted["value"].is_between(0, 1).all()


def _names(ids) -> list[str]:
    return [NAMES[number - 1] for number in ids]


def _ids(ranked: pl.DataFrame) -> list[int]:
    return [NAMES.index(name) + 1 for name in ranked["item"]]


def test_known_items_alone_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommender().recommend(HISTORIES)
