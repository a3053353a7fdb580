"""What leaves a run computes what the model computes, for histories of any length."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.mclrec.recommenders import NAMES, recommender, trained

from diptych.errors import TrainingError
from diptych.export import export_part
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.export import RankingGraph, export, export_items
from diptych_mclrec.verbs import ItemsOptions

torch.set_num_threads(1)


def run_file(out: Path, form: str, items: torch.Tensor, lengths: torch.Tensor) -> list[np.ndarray]:
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found: Any = session.run(None, {"items": items.numpy(), "lengths": lengths.numpy()})
        return list(found)
    found = torch.export.load(out).module()(items, lengths)
    return [one.detach().numpy() for one in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize(
    ("form", "what", "baskets"),
    [
        ("pt2", "topk", False),
        pytest.param("onnx", "topk", False, marks=pytest.mark.slow),
        pytest.param("pt2", "scores", True, marks=pytest.mark.slow),
        pytest.param("onnx", "vector", True, marks=pytest.mark.slow),
    ],
)
def test_the_exported_graph_ranks_as_the_model_does(form, what, baskets, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    model = recommender(seen="mask", baskets=baskets)
    config = MCLRecConfig.model_validate({"export": {"what": what, "k": 5}})
    parts = export(config, trained(model), None)
    out = export_part(parts, None, form, tmp_path / f"graph.{form}")
    lists = [["code-3", "code-9"], [NAMES[(7 * n) % 30] for n in range(11)]]
    items = torch.zeros(2, 11, dtype=torch.int64)
    for row, one in enumerate(lists):
        items[row, : len(one)] = torch.tensor([NAMES.index(name) + 1 for name in one])
    items[0, 2:] = 17  # what stands behind a history is not read
    if baskets:
        items = torch.stack([items, torch.zeros_like(items), torch.zeros_like(items)], 2)
    found = run_file(out, form, items, torch.tensor([2, 11]))
    if what == "vector":
        assert found[0] == pytest.approx(model.embed(lists), abs=1e-4)
    elif what == "scores":
        assert found[0] == pytest.approx(model.scores(lists)[:, 1:], abs=1e-4)
    else:
        expected = model.recommend(lists, k=5)
        assert [NAMES[i - 1] for i in found[0].ravel()] == expected["item"].to_list()
        assert found[1].ravel() == pytest.approx(expected["score"].to_numpy(), abs=1e-4)


def test_256_histories_check_an_export_beyond_the_window_too():
    model = recommender()
    graph = export(MCLRecConfig(), trained(model), None)["topk"]
    lengths = graph.examples["lengths"]
    assert 200 < len(lengths) <= 256
    assert lengths.max() > model.encoder.max_len


def test_a_graph_that_ranks_otherwise_is_not_written(tmp_path, monkeypatch):
    parts = export(MCLRecConfig(), trained(recommender()), None)
    monkeypatch.setattr("diptych.export._to_pt2", lambda graph, path: lambda: _swapped(graph))
    with pytest.raises(TrainingError, match="whole numbers differ"):
        export_part(parts, None, "pt2", tmp_path / "graph.pt2")
    assert not list(tmp_path.iterdir())


def _swapped(graph) -> list[np.ndarray]:
    ids, scores = (one.numpy().copy() for one in graph.module(*graph.examples.values()))
    ids[0, :2] = ids[0, 1::-1]
    return [ids, scores]


def test_a_short_catalogue_gives_short_lists():
    model = recommender(NAMES[:4])
    graph = RankingGraph(model.encoder, 4, "topk", k=10)
    ids, _ = graph(torch.tensor([[1, 2, 0]]), torch.tensor([2]))
    assert sorted(ids[0].tolist()) == [1, 2, 3, 4]


def test_item_vectors_rank_with_history_vectors_as_the_model_does(tmp_path):
    model = recommender()
    export_items(MCLRecConfig(), trained(model), ItemsOptions(out=tmp_path / "items"))
    matrix = np.load(tmp_path / "items" / "items.npy")
    table = pl.read_parquet(tmp_path / "items" / "items.parquet")
    about = json.loads((tmp_path / "items" / "items.json").read_text())
    assert about == {"catalogue": model.fitted.catalogue.hash, "items": 30}
    scores = model.embed([["code-3", "code-9"]]) @ matrix.T
    best = table["item"][np.argsort(-scores[0])[:5].tolist()]
    assert best.to_list() == model.recommend([["code-3", "code-9"]], k=5)["item"].to_list()
    assert table["id"].to_list() == list(range(1, 31))
