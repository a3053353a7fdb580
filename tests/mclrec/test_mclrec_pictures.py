"""The report's figures: which there are, and that they show what was measured."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from tests.mclrec.recommenders import fitted, recommender, trained

from diptych.contract import Evaluation, Picture
from diptych.prepared import Prepared
from diptych.report.pictures import save_pictures
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.geometry import view_geometry
from diptych_mclrec.pictures import pictures
from diptych_mclrec.queries import Queries, queries_of
from diptych_mclrec.scores import network_scorer, rank_all
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.tables import RARE, Scored, calibration, examples, neighbours, rows, strata

torch.set_num_threads(1)
CONFIG = MCLRecConfig.model_validate({"evaluate": {"k": [3, 5, 10], "min_count": 20}})
DAY = 86_400_000_000
EVERYTHING = {
    "hits", "repeats", "strata", "gaps", "calibration", "views", "examples", "neighbours"
}  # fmt: skip


def steps() -> Queries:
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, 31, 9).tolist() for _ in range(40)]
    plain = Sequences.from_lists(lists, [f"S-{row:08x}" for row in range(40)])
    times = np.tile(np.cumsum([0, 3, 20, 90, 500, 1, 1, 1, 30]), 40) * DAY
    dated = Sequences(plain.subjects, plain.offsets, plain.items, times)
    return queries_of(dated, np.ones(40, np.int64), "all")


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """A clinical model whose rare codes are those of fewer than 20 events."""
    model, queries = recommender(), steps()
    known = fitted(kind="clinical")
    ranked = rank_all(network_scorer(model.encoder, known), queries, CONFIG.evaluate, "keep", 30)
    scored = [Scored(m, 1, queries, ranked, known, "keep", (3, 5, 10)) for m in ("", "markov1")]
    modules = trained(model).modules("final")
    return Evaluation(
        rows=pl.concat([rows(one, clinical=True) for one in scored]),
        files={
            "strata": pl.DataFrame(strata(scored[0])),
            "strata-markov1": pl.DataFrame(strata(scored[1])),
            "calibration": calibration(scored[0]),
            "examples": examples(scored[0], 20),
            "neighbours": neighbours(model.weight().numpy(), known, 20),
            "views": view_geometry(modules, queries, CONFIG.views),
        },
    )


def drawn(evaluation: Evaluation) -> dict[str, Picture]:
    prepared = Prepared.from_arrays(pl.DataFrame({"subject": []}), {}, {})
    return {one.name: one for one in pictures(CONFIG, prepared, evaluation)}


def words(picture: Picture) -> str:
    return "\n".join(
        text.get_text() for axes in picture.figure.axes for text in axes.texts if text.get_text()
    )


def test_every_figure_is_drawn_and_can_be_saved(evaluation, tmp_path):
    found = drawn(evaluation)
    assert set(found) == EVERYTHING
    files = save_pictures(list(found.values()), tmp_path / "pictures")
    assert all(500 < file.stat().st_size < 1_000_000 for file in files)


def test_figures_without_their_data_are_left_out(evaluation):
    bare = Evaluation(rows=evaluation.rows.filter(pl.col("metric") == "hr@5", table=""))
    assert set(drawn(bare)) == {"hits"}


def test_the_line_of_the_model_is_the_mean_over_subjects(evaluation):
    axes = drawn(evaluation)["hits"].figure.axes[0]
    line = next(one for one in axes.lines if one.get_linewidth() > 2)
    own = evaluation.rows.filter(table="", condition="", method="")
    for k, height in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert height == pytest.approx(own.filter(metric=f"hr@{int(k)}")["value"].mean())


def test_tables_name_no_rare_code_and_tell_relative_days_only(evaluation):
    found = drawn(evaluation)
    for name in ("examples", "neighbours"):
        text = words(found[name])
        assert RARE in text
        for number in range(12, 31):  # of fewer than 20 events
            assert f"code-{number} " not in f"{text} ".replace(",", " ").replace("\n", " ")
    assert "S-00000000" in words(found["examples"])
    assert "(30)" in words(found["examples"])  # days from the last event to the target
    assert "days before" in found["examples"].caption


def test_equal_views_are_aligned_and_others_are_not():
    model, queries = recommender(), steps()
    modules = trained(model).modules("final")
    none = CONFIG.views.model_copy(update={"crop": 0.0, "mask": 0.0, "reorder": 0.0})
    same = view_geometry(modules, queries, none)
    apart = view_geometry(modules, queries, CONFIG.views)
    assert same["views"].to_list() == ["h", "z"]
    assert same["alignment"][0] == pytest.approx(0, abs=1e-6)
    assert apart["alignment"][0] > 0.01
    assert (apart["uniformity"] < 0).all()
    short = queries.select(queries.ends < 2)
    assert view_geometry(modules, short, CONFIG.views).height == 0
