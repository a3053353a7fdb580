"""Steps to predict and their scores, against loops over the definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.mclrec.tables import write_csv
from tests.mclrec.test_mclrec_task import SMALL, events, settings

from diptych import loop
from diptych.config import load, resolve
from diptych.randomness import Draw, seed_globals
from diptych.split import Split
from diptych_mclrec.baselines import Markov1, Recency
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.evaluate import evaluate, evaluate_baseline, held_out
from diptych_mclrec.fitting import divide
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.pipeline import METRICS
from diptych_mclrec.plan import plan
from diptych_mclrec.prepare import prepare
from diptych_mclrec.queries import DAY, queries_of
from diptych_mclrec.sample import bayes_scores, make_demo, write_sample
from diptych_mclrec.scores import baseline_scorer, network_scorer, rank_all, validation_ranks
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.store import load as load_events
from diptych_mclrec.tables import RARE, shown_names
from diptych_mclrec.task import build, modules
from diptych_mclrec.truth import findings, judged
from diptych_mclrec.windows import encode_histories

torch.set_num_threads(1)


def steps_of(sequences: Sequences, row: int) -> list[list[int]]:
    own = sequences.steps[sequences.rows == row]
    return [sequences[row][own == step].tolist() for step in range(sequences.step_counts[row])]


def with_unknown(baskets: bool) -> Sequences:
    """Histories in which every fifth event has an item outside the catalogue."""
    given = events(baskets=baskets, seed=4).sequences
    items = given.items.copy()
    items[::5] = 0
    times = np.cumsum(np.random.default_rng(2).integers(0, 3 * DAY, len(items)))
    return Sequences(given.subjects, given.offsets, items, times, given.baskets)


@pytest.mark.parametrize("baskets", [False, True])
@pytest.mark.parametrize("steps", ["last", "all"])
def test_a_query_knows_what_came_before_it_and_nothing_else(baskets, steps):
    part = with_unknown(baskets)
    found = queries_of(part, np.full(len(part), 2), steps)
    histories = found.histories()
    place = 0
    for row in range(len(part)):
        own = steps_of(part, row)
        first = part.steps[: part.offsets[row + 1]][part.offsets[row] :]
        moments = [part.times[part.offsets[row] : part.offsets[row + 1]][first == s].min()
                   for s in range(len(own))]  # fmt: skip
        for step in range(len(own) - 1 if steps == "last" else 2, len(own)):
            known = [[item for item in one if item] for one in own[:step]]
            known = [one for one in known if one]
            assert steps_of(histories, place) == known
            assert found.ends[place] == len(known)
            wanted = [item or -1 for item in own[step]]
            assert sorted(x for x in found.targets[place].tolist() if x) == sorted(wanted)
            assert found.is_last[place] == (step == len(own) - 1)
            assert found.gap[place] == pytest.approx((moments[step] - moments[step - 1]) / DAY)
            repeated = found.repeated(histories)[place]
            inside = {item for one in known for item in one}
            flags = [item in inside for item in found.targets[place].tolist() if item]
            assert repeated[found.targets[place] != 0].tolist() == flags
            place += 1
    assert place == len(found)


@pytest.mark.parametrize("baskets", [False, True])
def test_histories_are_encoded_as_if_each_were_alone(baskets):
    torch.manual_seed(0)
    part = with_unknown(baskets)
    queries = queries_of(part, np.ones(len(part), int), "all")
    queries = queries.select(queries.ends > 0)
    net = SequenceEncoder(12, dim=8, layers=2, inner=8, max_len=4).eval()
    torch.nn.init.normal_(net.item_embedding.weight)
    found = encode_histories(net, queries.table, queries.subject, queries.ends)
    histories = queries.histories()
    for row in range(0, len(queries), 3):
        own = steps_of(histories, row)[-4:]
        width = max(map(len, own))
        padded = torch.tensor([[one + [0] * (width - len(one)) for one in own]])
        items = padded if baskets else padded[..., 0]
        alone = net(items, torch.tensor([len(own)]))[0]
        assert torch.allclose(found[row], alone, atol=1e-5)


def counted(scores: np.ndarray, history: list[int], targets: list[int], mask: bool) -> list[float]:
    """Pessimistic ranks by definition; None where the target is left out."""
    ranks = []
    for target in targets:
        if mask and target in history:
            continue
        if target < 0:
            ranks.append(float(len(scores)))
            continue
        rivals = [i for i in range(1, len(scores)) if i != target and not (mask and i in history)]
        ranks.append(1.0 + sum(scores[i] >= scores[target] for i in rivals))
    return sorted(ranks)


@pytest.mark.parametrize("baskets", [False, True])
def test_ranks_under_both_policies_are_those_of_the_definition(baskets):
    part = with_unknown(baskets)
    queries = queries_of(part, np.ones(len(part), int), "all")
    train = part.keep(part.items > 0)
    baseline = Recency().fit(train, n_items=12)
    ranked = rank_all(baseline_scorer(baseline), queries, settings().evaluate, "keep", 12)
    histories = queries.histories()
    scores = baseline.scores(histories)
    for row in range(len(queries)):
        targets = [item for item in queries.targets[row].tolist() if item]
        for mask, ranks in ((False, ranked.kept[row]), (True, ranked.masked[row])):
            expected = counted(scores[row], histories[row].tolist(), targets, mask)
            assert sorted(ranks[~np.isnan(ranks)].tolist()) == expected
    order = np.argsort(-scores[:, 1:], axis=1, kind="stable") + 1
    best = np.take_along_axis(scores, order[:, :1], 1)
    assert np.array_equal(np.take_along_axis(scores, ranked.head[:, :1], 1), best)


def test_validation_ranks_are_those_of_the_evaluation():
    torch.manual_seed(1)
    config = settings("split.kind=subject", "split.fractions=[0.5,0.2,0.3]")
    parts = divide(events(), config)
    net = SequenceEncoder(12, dim=8, layers=1, inner=8, max_len=5).eval()
    queries = queries_of(parts.split.valid, parts.split.valid_start, "all")
    for policy in ("keep", "mask"):
        section = config.evaluate.model_copy(update={"seen": policy, "tile": 5})
        ranks, subjects = validation_ranks(net, queries, parts.fitted, section)
        scorer = network_scorer(net, parts.fitted)
        whole = rank_all(scorer, queries, section, policy, 12).under(policy)
        left = ~np.isnan(whole).all(1) & (queries.ends > 0)
        assert np.array_equal(ranks, whole[left])
        assert np.array_equal(subjects, queries.subject[left])


def test_ranks_among_random_items_are_keyed_and_never_worse_than_among_all():
    part = events(seed=4).sequences
    queries = queries_of(part, np.ones(len(part), int), "all")
    section = settings("evaluate.sampled_negatives=4").evaluate
    scorer = baseline_scorer(Recency().fit(part, n_items=12))
    whole = rank_all(scorer, queries, section, "keep", 12, Draw(1))
    assert whole.sampled.max() <= 5
    half = rank_all(scorer, queries.select(np.arange(9)), section, "keep", 12, Draw(1))
    assert np.array_equal(half.sampled, whole.sampled[:9])
    assert (whole.sampled.mean() < whole.kept.mean()).all()


class Run:
    """A run in memory: prepared data, trained fits, what they left."""

    def __init__(self, source: Path, folder: Path, *sets: str, recipe: str | None = None) -> None:
        self.config = load(MCLRecConfig, recipe=recipe, sets=[*SMALL, *sets])
        self.prepared = prepare(self.config, source, folder / "prepared")
        self.fits = plan(self.config, self.prepared)
        self.final = "final"
        self._modules: dict[str, Any] = {}
        self._artifacts: dict[str, Any] = {}
        for fit in self.fits:
            own = resolve(self.config, fit)
            seed_globals(fit.seed, fit.stage, 0, 0)
            built = modules(own, {}, fit)
            task = build(own, self.prepared, fit, built, {})
            result = loop.fit(task, loop.Settings(own.train, own.run, fit.seed, better="higher"))
            for part in built.values():
                part.eval()
            self._modules[fit.name], self._artifacts[fit.name] = built, result.artifacts

    def modules(self, fit: str) -> Any:
        return self._modules[fit]

    def artifacts(self, fit: str) -> Any:
        return self._artifacts.get(fit, {})

    def facts(self, fit: str) -> Any:
        return self.prepared.facts

    def scored(self, name: str = "") -> Any:
        if name:
            return evaluate_baseline(name, self.config, self.prepared, self)
        return evaluate(self.config, self.prepared, self)


def table_of(given, path: Path) -> Path:
    found = given.sequences
    days = np.concatenate([np.arange(n) for n in found.lengths])
    table = [
        (found.subjects[row], f"item-{item}", f"2020-01-{1 + day:02d}")
        for row, item, day in zip(found.rows, found.items, days, strict=True)
    ]
    return write_csv(path, table)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("shop")
    source = table_of(events(), folder / "shop.csv")
    return Run(source, folder, "evaluate.k=[1, 3, 10, 50]", "run.seeds=[1, 2]")


def mean(evaluation, method: str, metric: str, table: str = "", fit: str = "seed-1") -> float:
    chosen = evaluation.rows.filter(
        (pl.col("table") == table) & (pl.col("condition") == "") & (pl.col("method") == method)
        & (pl.col("metric") == metric) & (pl.col("fit") == fit)
    )  # fmt: skip
    return float(chosen["value"].mean())


def test_every_fit_is_scored_on_every_subject(run):
    found = run.scored()
    assert set(found.rows["method"]) == {"", "sasrec"}
    assert set(found.rows["fit"]) == {"seed-1", "seed-2"}
    head = found.rows.filter(
        (pl.col("metric") == "ndcg@10") & (pl.col("method") == "") & (pl.col("fit") == "seed-2")
    )
    assert sorted(head["subject"]) == sorted(run.prepared.index["subject"])
    assert set(found.rows["metric"]) <= METRICS.keys()
    assert "hr@50" not in set(found.rows["metric"])
    assert any("Lists of 50 hold every item" in note for note in found.notes)
    assert "seen=kept" in found.notes


@pytest.mark.parametrize("name", ["popularity", "recency", "markov1"])
def test_a_baselines_figures_follow_from_loops_over_the_definition(run, name):
    found = run.scored(name)
    split = divide(load_events(run.prepared), run.config).split
    lists = [split.test[row].tolist() for row in range(len(split.test))]
    counts = np.zeros(13)
    follows = np.zeros((13, 13))
    for row in range(len(split.train)):
        own = split.train[row].tolist()
        np.add.at(counts, own, 1)
        np.add.at(follows, (own[:-1], own[1:]), 1)
    hits = []
    for own in lists:
        history, target = own[:-1], own[-1]
        share = counts / counts.sum()
        if name == "markov1":
            row = follows[history[-1]]
            scores = row / max(row.sum(), 1) + 1e-6 * share
        else:
            scores = share.copy()
        if name == "recency":
            for place, item in enumerate(history):
                scores[item] = place + 1
        hits.append(counted(scores, history, [target], mask=False)[0])
    ranks = np.array(hits)
    assert mean(found, name, "hr@3") == pytest.approx((ranks <= 3).mean())
    gain = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
    assert mean(found, name, "ndcg@10") == pytest.approx(gain.mean())
    assert mean(found, name, "mrr") == pytest.approx((1 / ranks).mean())


def test_counts_are_fitted_with_and_without_the_validation_part(run):
    assert set(run.scored("markov1").rows["method"]) == {"markov1", "markov1 (train+valid)"}
    assert set(run.scored("recency").rows["method"]) == {"recency"}
    refit = held_out(run.config, load_events(run.prepared), run, run.fits[-1]).refit
    split = divide(load_events(run.prepared), run.config).split
    assert refit.items.tolist() == split.valid.items.tolist()


def test_repeated_and_new_targets_add_up(run):
    found = run.scored("frequency").rows.filter(pl.col("subject") != "")
    wide = found.pivot("metric", index="subject", values="value")
    both = wide.filter(pl.col("hr@10_repeat").is_not_null())
    assert 0 < both.height < wide.height
    assert wide["hr@10_novel"].null_count() == both.height
    assert both["hr@10"].to_list() == both["hr@10_repeat"].to_list()
    assert wide["hr@10_masked"].null_count() == both.height


def test_a_blend_is_scored_for_every_seed_and_says_its_weight(run):
    found = run.scored("blend")
    assert set(found.rows["fit"]) == {"seed-1", "seed-2"}
    said = [note for note in found.notes if note.startswith("blend_weight_of_markov1=")]
    assert said
    assert all(float(note.split("=")[1]) in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5) for note in said)


def test_the_strata_hold_every_step_once(run):
    found = run.scored().files["strata"]
    for _, part in found.group_by("by", "method", "fit"):
        assert part["steps"].sum() == run.prepared.index.height
    assert set(found["by"]) == {"length of the history", "frequency of the target"}


def test_the_calibration_counts_hits_by_confidence(run):
    found = run.scored().files["calibration"]
    assert found.group_by("method", "fit").agg(pl.col("steps").sum())["steps"].to_list() == [20] * 4
    assert found["hits"].is_between(0, 1).all()


def test_examples_have_names_and_days_before_the_target(run):
    found = run.scored().files["examples"]
    assert found["subject"].str.starts_with("S-").all()
    row = found.row(0, named=True)
    assert row["days"] == sorted(row["days"], reverse=True)
    assert row["days"][-1] == 1
    assert all(name.startswith("item-") for name in [*row["history"], *row["top"], *row["target"]])


def test_other_data_are_tested_whole_by_the_kept_counts(run, tmp_path):
    other = events(seed=9)
    prepared = prepare(run.config, table_of(other, tmp_path / "b.csv"), tmp_path / "prepared")
    fit = replace(run.fits[-1], split=Split((), (), tuple(range(prepared.index.height))))
    states = run.scored("markov1").artifacts["markov1"]["final"]
    view = SimpleNamespace(
        fits=(fit,), final="final", modules=run.modules, facts=run.facts,
        artifacts=lambda name: states if name == "markov1/final" else run.artifacts(name),
    )  # fmt: skip
    model = evaluate(run.config, prepared, view)
    assert set(model.rows["method"]) == {""}
    assert "protocol=every subject is a test subject" in model.notes
    found = evaluate_baseline("markov1", run.config, prepared, view)
    split = divide(load_events(run.prepared), run.config).split
    markov = Markov1().fit(split.train, n_items=12)
    part = held_out(run.config, load_events(prepared), view, fit)
    ranks = rank_all(baseline_scorer(markov), part.queries, run.config.evaluate, "keep", 12).kept
    assert mean(found, "markov1", "mrr") == pytest.approx(float((1 / ranks).mean()))
    nothing = evaluate_baseline("itemknn", run.config, prepared, view)
    assert nothing.rows.is_empty()
    assert "not scored" in nothing.notes[0]


def test_every_step_can_be_scored_and_gaps_are_conditions(tmp_path):
    source = table_of(events(), tmp_path / "ward.csv")
    found = Run(
        source, tmp_path, "data.kind=clinical", "split.fractions=[0.5, 0.2, 0.3]",
        "evaluate.steps=all", "evaluate.baselines=[]", "objective.unit=sequence",
        "evaluate.min_count=18", "train.epochs=1",
    )  # fmt: skip
    scored = found.scored()
    steps = scored.rows.filter(pl.col("table") == "all steps")
    assert set(steps["condition"]) == {"", "gap up to 7 days"}
    whole = held_out(found.config, load_events(found.prepared), found, found.fits[-1]).queries
    assert len(whole) > whole.is_last.sum() == len(found.fits[-1].split.test)
    assert "Unanchored: no baseline was scored on the same splits." in scored.notes
    assert any("not treatments to choose" in note for note in scored.notes)
    assert RARE in {name for row in scored.files["examples"]["history"] for name in row}


@pytest.mark.slow
def test_the_generated_sample_is_known_and_judged(tmp_path):
    write_sample(tmp_path / "data", 5)
    config = load(MCLRecConfig, recipe="demo")
    prepared = prepare(config, tmp_path / "data", tmp_path / "prepared")
    assert prepared.facts["generated"] == 5
    parts = divide(load_events(prepared), config)
    queries = queries_of(parts.split.test, parts.split.test_start)
    part = SimpleNamespace(fitted=parts.fitted, queries=queries, train=parts.split.train)
    demo = make_demo(5)
    best = bayes_scores([demo.sequences[row][:-1] for row in range(len(demo.sequences))], demo)
    last = demo.sequences.items[demo.sequences.offsets[1:] - 1]
    rank = (best[:, 1:] >= best[np.arange(len(last)), last][:, None]).sum(1)
    expected = np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean()
    ranks = np.resize([70.0, 2.0, 3.0, 2.0], 1500)[:, None]  # NDCG@10 0.44, HR@10 0.75
    ranked = SimpleNamespace(
        kept=ranks, masked=ranks, repeated=np.zeros(ranks.shape, bool), sampled=None,
        under=lambda policy: ranks,
    )  # fmt: skip
    scored = SimpleNamespace(
        method="", seed=1, queries=queries, ranked=ranked, ks=(10,), fitted=parts.fitted,
        policy="keep", cold=None,
    )  # fmt: skip
    found = judged(config, prepared, part, [scored])
    assert found.findings == ()
    assert f"bayes_ndcg@10={expected:.4f}" in found.notes
    lines = (tmp_path / "data" / "events.csv").read_text().splitlines()
    (tmp_path / "data" / "events.csv").write_text("\n".join(lines[:-1]) + "\n")
    other = prepare(config, tmp_path / "data", tmp_path / "other")
    assert "generated" not in other.facts


@pytest.mark.parametrize(
    ("hits", "gain", "said"),
    [
        (0.75, 0.46, None),
        (0.96, 0.46, "leaked"),
        (0.71, 0.39, "learnt nothing"),
        (0.75, 0.55, "outside 0.43-0.52"),
    ],
)
def test_scores_that_the_truth_forbids_are_errors(hits, gain, said):
    means = {
        "model": {"hr@10": hits, "ndcg@10": gain},
        "bayes": {"hr@10": 0.94, "ndcg@10": 0.60},
        "markov1": {"hr@10": 0.70, "ndcg@10": 0.40},
    }
    found = findings(means, 1500)
    assert any(said in finding.found for finding in found) if said else found == ()


def test_clinical_codes_of_few_people_have_no_name():
    fitted = divide(events(kind="clinical"), settings("split.kind=leave_one_out")).fitted
    names = shown_names(fitted, int(np.median(fitted.holders[1:])))
    assert RARE in names[1:]
    assert set(shown_names(fitted, 0)) == {"", *fitted.catalogue.names}
