"""The published Beauty weights, and what counting reaches on three public data sets."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import DataError
from diptych_mclrec.baselines import (
    Blend,
    Frequency,
    ItemKNN,
    Markov1,
    MarkovRepeat,
    Popularity,
    Recency,
    baseline_counts,
)
from diptych_mclrec.metrics import ranking_metrics, step_metrics, tiled_counts, tiled_ranks
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.parity import load_published
from diptych_mclrec.sequences import Sequences

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DIPTYCH_TEST_DATA", ROOT.parent / "shared" / "data")) / "recsys"
WEIGHTS = DATA / "mclrec_beauty_published.safetensors"
needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason="the recommendation data are not there"),
]
BASELINES = {
    "popularity": Popularity,
    "recency": Recency,
    "markov1": Markov1,
    "itemknn": lambda: ItemKNN(decay=1.0),
    "itemknn_decay0.7": ItemKNN,
}
PUBLISHED = {
    "test_kept": (1299, 1947, 2780, 4144),
    "test_masked": (1549, 2126, 2921, 4230),
    "valid_kept": (1611, 2420, 3314, 4936),
}


@cache
def reference() -> dict:
    return json.loads((DATA / "reference.json").read_text())


@cache
def sequences(name: str) -> Sequences:
    if name == "ml":
        table = pl.read_parquet(DATA / "ml_latest_small_ratings.parquet")
        table = table.sort("userId", "timestamp", maintain_order=True)
        ids = {
            movie: row + 1 for row, movie in enumerate(table["movieId"].unique(maintain_order=True))
        }
        movies = table["movieId"].replace_strict(ids)
        grouped = table.with_columns(movies).group_by("userId", maintain_order=True)
        return Sequences.from_lists(grouped.agg("movieId")["movieId"].to_list())
    return Sequences.from_lists(
        pl.read_parquet(DATA / f"amazon_{name}_sequences.parquet")["item_ids"].to_list()
    )


def without_last(given: Sequences, count: int) -> Sequences:
    return given.keep(given.steps < given.lengths[given.rows] - count)


def targets(given: Sequences, back: int = 1) -> np.ndarray:
    return given.items[given.offsets[1:] - back].astype(np.int64)


@cache
def published() -> SequenceEncoder:
    return load_published(WEIGHTS)


@torch.no_grad()
def encoded(histories: Sequences) -> torch.Tensor:
    """Vectors of the last 50 events of each history."""
    net, vectors = published(), torch.empty(len(histories), 64)
    lengths = np.minimum(histories.lengths, 50)
    order = np.argsort(lengths, kind="stable")
    for part in np.array_split(order, len(order) // 512 + 1):
        steps = np.arange(lengths[part].max())
        first = histories.offsets[part + 1] - lengths[part]
        inside = steps < lengths[part, None]
        items = histories.items[np.where(inside, first[:, None] + steps, 0)] * inside
        vectors[part] = net(torch.as_tensor(items).long(), torch.as_tensor(lengths[part]))
    return vectors


@cache
def beauty_test() -> tuple[torch.Tensor, np.ndarray]:
    return encoded(without_last(sequences("beauty"), 1)), targets(sequences("beauty"))


class TestPublishedWeights:
    pytestmark = needs_data

    def test_all_parameters_are_found(self):
        assert sum(p.numel() for p in published().parameters()) == 877_888

    @pytest.mark.parametrize("case", range(3))
    def test_vectors_and_best_items_are_those_measured(self, case):
        expected = reference()["encoder_vectors"][case]
        items, length = torch.tensor([expected["items"]]), torch.tensor([expected["length"]])
        with torch.no_grad():
            h = published()(items, length)
            scores, best = published().scores(h)[0].topk(5)
        assert h[0, :4].tolist() == pytest.approx(expected["h4"], abs=1e-4)
        assert h.norm().item() == pytest.approx(expected["norm"], abs=1e-4)
        assert best.tolist() == expected["top5"]
        assert scores.tolist() == pytest.approx(expected["scores"], abs=1e-4)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_the_published_figures_are_reached(self, name):
        given, masked = sequences("beauty"), name.endswith("masked")
        back = 2 if name.startswith("valid") else 1
        histories = without_last(given, back)
        queries = beauty_test()[0] if back == 1 else encoded(histories)
        seen = [histories[row] for row in range(len(histories))] if masked else None
        weight = published().item_weight()
        ranks = tiled_ranks(queries, weight, targets(given, back), seen=seen)
        hits = [int((ranks <= k).sum()) for k in (5, 10, 20, 50)]
        assert np.abs(np.subtract(hits, PUBLISHED[name])).max() <= 2
        found, expected = ranking_metrics(ranks), reference()["published_beauty"][name]
        for key, value in expected.items():
            if key != "hits":
                ours = key.replace("HR", "hr").replace("N@", "ndcg@").replace("MRR", "mrr")
                assert found[ours] == pytest.approx(value, abs=1e-4)
        known = pl.read_parquet(DATA / "mclrec_beauty_published_ranks.parquet")
        difference = np.abs(ranks - known[f"rank_{name}"].to_numpy())
        assert (difference == 0).mean() >= 0.999
        assert difference.max() <= 2

    def test_tiles_change_next_to_no_rank_of_real_scores(self):
        queries, wanted = beauty_test()
        queries, wanted = queries[:1024], wanted[:1024]
        weight = published().item_weight()
        whole = tiled_counts(queries, weight, wanted, tile=len(weight))
        for tile in (997, 8192):
            tiled = tiled_counts(queries, weight, wanted, tile=tile)
            assert (tiled.ranks() == whole.ranks()).mean() >= 0.9999
            assert (tiled.ranks("optimistic") <= tiled.ranks("average")).all()
            assert (tiled.ranks("average") <= tiled.ranks("pessimistic")).all()

    @pytest.mark.slow
    def test_counts_help_the_published_weights(self):
        queries, wanted = beauty_test()
        given = sequences("beauty")
        weight = published().item_weight()
        rows = {name: row for row, name in enumerate(given.subjects)}

        def logits(histories: Sequences) -> np.ndarray:
            own = torch.as_tensor([rows[name] for name in histories.subjects])
            return (queries[own] @ weight.t()).detach().numpy()

        blend = Blend(logits, weight=0.3).fit(without_last(given, 2), n_items=12101)
        ranks = baseline_counts(blend, without_last(given, 1), wanted).ranks()
        found = ranking_metrics(ranks)
        assert found["ndcg@10"] == pytest.approx(0.0457, abs=2e-4)
        assert found["hr@10"] == pytest.approx(0.0831, abs=2e-4)


def check_baseline(data: str, method: str, fit: str) -> None:
    """Both policies of one baseline against the measured figures."""
    given = sequences(data)
    histories, wanted = without_last(given, 1), targets(given)
    baseline = BASELINES[method]()
    baseline.fit(
        histories if fit == "train+valid" else without_last(given, 2),
        n_items=int(given.items.max()),
    )
    tolerance = 2e-3 if data == "ml" else 2e-4
    for row in reference()["baselines"]:
        if (row["data"], row["method"], row["fit"]) != (data, method, fit):
            continue
        masked = row["history"] == "masked"
        found = ranking_metrics(
            baseline_counts(baseline, histories, wanted, mask_seen=masked).ranks()
        )
        for k in (5, 10, 20):
            assert found[f"hr@{k}"] == pytest.approx(row[f"HR@{k}"], abs=tolerance)
            assert found[f"ndcg@{k}"] == pytest.approx(row[f"N@{k}"], abs=tolerance)
        assert found["mrr"] == pytest.approx(row["MRR"], abs=tolerance)


class TestCounts:
    pytestmark = needs_data

    @pytest.mark.parametrize("fit", ["train", "train+valid"])
    @pytest.mark.parametrize("method", ["popularity", "recency", "markov1"])
    def test_figures_on_films_are_those_measured(self, method, fit):
        check_baseline("ml", method, fit)

    @pytest.mark.slow
    @pytest.mark.parametrize("fit", ["train", "train+valid"])
    @pytest.mark.parametrize("method", ["itemknn", "itemknn_decay0.7"])
    def test_figures_of_neighbours_on_films_are_those_measured(self, method, fit):
        check_baseline("ml", method, fit)

    @pytest.mark.slow
    @pytest.mark.parametrize("fit", ["train", "train+valid"])
    @pytest.mark.parametrize("method", BASELINES)
    @pytest.mark.parametrize("data", ["beauty", "toys"])
    def test_figures_on_shops_are_those_measured(self, data, method, fit):
        check_baseline(data, method, fit)


def patients(split: str, prefix: str, names: dict[str, int], *, learn: bool) -> Sequences:
    """Baskets of equal time of the subjects of one part of the MEDS folder."""
    table = pl.read_parquet(DATA / "meds" / "data" / split / "0.parquet")
    table = table.filter(
        pl.col("time").is_not_null() & pl.col("code").str.contains("^(RxNorm|SNOMED)/")
    )
    table = table.filter(pl.col("code").str.starts_with(prefix))
    table = table.unique(["subject_id", "time", "code"], maintain_order=True)
    table = table.sort("subject_id", "time", maintain_order=True)
    if learn:
        for code in table["code"].unique(maintain_order=True):
            names.setdefault(code, len(names) + 1)
    table = table.with_columns(
        item=pl.col("code").replace_strict(names, default=0, return_dtype=pl.Int32),
        basket=pl.col("time").rank("dense").over("subject_id").cast(pl.Int32) - 1,
    ).filter(pl.col("item") > 0)
    table = table.with_columns(
        basket=pl.col("basket").rank("dense").over("subject_id").cast(pl.Int32) - 1
    )
    subjects, counts = np.unique(table["subject_id"].to_numpy(), return_counts=True)
    return Sequences(
        subjects.astype(str),
        np.r_[0, np.cumsum(counts)],
        table["item"].to_numpy(),
        None,
        table["basket"].to_numpy(),
    )


def recall_of_steps(baseline, given: Sequences, last_only: bool) -> float:
    """Mean over subjects of the mean recall@10 over their predicted baskets."""
    values, owners = [], []
    for step in range(1, int(given.steps.max()) + 1):
        has = given.step_counts > step
        if last_only:
            has &= given.step_counts == step + 1
        rows = np.flatnonzero(has)
        if not len(rows):
            continue
        chosen = given.select(rows)
        wanted = [chosen[row][chosen.steps[chosen.rows == row] == step] for row in range(len(rows))]
        padded = np.zeros((len(rows), max(map(len, wanted))), np.int64)
        for row, one in enumerate(wanted):
            padded[row, : len(one)] = one
        counts = baseline_counts(baseline, chosen.keep(chosen.steps < step), padded)
        values.append(step_metrics(counts.ranks(), ks=(10,))["recall@10"])
        owners.append(rows)
    value, owner = np.concatenate(values), np.concatenate(owners)
    means = np.bincount(owner, weights=value) / np.maximum(np.bincount(owner), 1)
    return float(means[np.unique(owner)].mean())


@pytest.mark.slow
class TestPatients:
    pytestmark = needs_data

    @pytest.mark.parametrize("codes", ["all_codes", "rxnorm", "snomed"])
    def test_figures_on_baskets_of_codes_are_those_measured(self, codes):
        prefix = {"all_codes": "", "rxnorm": "RxNorm/", "snomed": "SNOMED/"}[codes]
        names: dict[str, int] = {}
        train = patients("train", prefix, names, learn=True)
        held_out = patients("held_out", prefix, names, learn=False)
        held_out = held_out.select(np.flatnonzero(held_out.step_counts > 1))
        expected = reference()["synthea_recall10"][codes]
        assert (len(held_out), len(names)) == (expected["subjects"], expected["codes"])
        for method, baseline in {
            "popularity": Popularity(),
            "recency": Recency(),
            "frequency": Frequency(),
            "markov1": Markov1(),
            "markov1+0.3frequency": MarkovRepeat(0.3),
        }.items():
            baseline.fit(train, n_items=len(names))
            for last_only, figure in zip((True, False), expected[method], strict=True):
                found = recall_of_steps(baseline, held_out, last_only)
                assert found == pytest.approx(figure, abs=2e-3), (method, last_only)


@pytest.mark.parametrize("broken", ["missing", "damaged", "other network", "no tensors"])
def test_what_is_no_published_checkpoint_is_refused_with_a_reason(tmp_path, broken):
    path = tmp_path / "weights.pth"
    if broken == "damaged":
        path.write_bytes(b"not a checkpoint")
    if broken == "other network":
        torch.save({"state_dict": {"item_embedding.weight": torch.ones(5, 4)}}, path)
    if broken == "no tensors":
        torch.save({"state_dict": {"epoch": 3}}, path)
    with pytest.raises(DataError, match=r"weights\.pth: "):
        load_published(path)


def test_a_checkpoint_is_read_from_either_format_into_its_own_shape(tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 8, "layers": 1, "inner": 6, "max_len": 5}
    net = SequenceEncoder(7, mask_row=True, **sizes).eval()
    official = {}
    for key, value in net.state_dict().items():
        name = key.replace("input_norm", "LayerNorm").replace("blocks.", "trm_encoder.layer.")
        name = name.replace("feed_forward.0", "feed_forward.dense_1")
        name = name.replace("feed_forward.2", "feed_forward.dense_2")
        name = name.replace("feed_forward_norm", "feed_forward.LayerNorm")
        name = name.replace("attention.output", "multi_head_attention.dense")
        name = name.replace("attention_norm", "multi_head_attention.LayerNorm")
        for part in ("query", "key", "value"):
            name = name.replace(f"0.attention.{part}", f"0.multi_head_attention.{part}")
        official[name] = value
    torch.save({"state_dict": official}, tmp_path / "model.pth")
    save_file(official, tmp_path / "model.safetensors")
    items, lengths = torch.tensor([[3, 0, 5]]), torch.tensor([3])
    for name in ("model.pth", "model.safetensors"):
        found = load_published(tmp_path / name)
        assert torch.equal(found(items, lengths), net(items, lengths))
        assert found.max_len == 5
    if WEIGHTS.is_file():
        assert official.keys() == {
            key for key in load_file(WEIGHTS) if not key.startswith("trm_encoder.layer.1")
        }
