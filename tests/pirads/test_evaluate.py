"""Scores in the original geometry, against every reader, beside the shape baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.pirads.volumes import texture, two_zones, write_manifest, write_nifti
from torch import nn

from diptych.contract import Fit
from diptych.evaluate import Setting, summarise
from diptych.prepared import Prepared
from diptych.split import Split
from diptych_pirads import evaluate as room
from diptych_pirads.baselines import classes_of
from diptych_pirads.cases import from_arrays
from diptych_pirads.config import PiradsConfig
from diptych_pirads.evaluate import evaluate, evaluate_baseline
from diptych_pirads.geometry import Volume, crop_pad, to_grid
from diptych_pirads.infer import Segmentation
from diptych_pirads.pipeline import METRICS
from diptych_pirads.scores import labels_of, whole_reference
from diptych_pirads.store import prepare, study

TEST = (3, 4)


def config(**sections: object) -> PiradsConfig:
    grid = {"spacing": [3.0, 1.5, 1.5], "size": [16, 48, 48]}
    return PiradsConfig.model_validate({"data": {"geometry": grid}, **sections})


@dataclass
class Trained:
    """One fit whose network is never asked: `segment` is replaced."""

    fits: list[Fit]
    final: str = "final"

    def modules(self, fit: str) -> Mapping[str, nn.Module]:
        network = nn.Linear(1, 1)
        torch.nn.init.constant_(network.weight, len(fit))
        torch.nn.init.zeros_(network.bias)
        return {"model": network}

    def facts(self, fit: str) -> dict[str, Any]:
        return {"size": [16, 48, 48]}

    def artifacts(self, fit: str) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Five patients; the last two are tested, the very last by two readers."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for n in range(5):
        t2 = write_nifti(folder / f"{n}.nii.gz", texture(seed=n))
        for reader in range(2 if n == 4 else 1):
            label = np.roll(two_zones(), reader, axis=1)
            file = write_nifti(folder / f"{n}-{reader}.nii.gz", label)
            row = {"subject_id": f"p{n}", "study_id": "s", "t2": t2.name, "label": file.name}
            rows.append(row | {"scheme": "pz_tz", "reader": f"r{reader}"})
    write_manifest(folder / "studies.csv", *rows)
    return prepare(config(), folder, tmp_path_factory.mktemp("prepared") / "p")


def fit(name: str = "final", seed: int = 1, method: str = "", **more: Any) -> Fit:
    split = more.pop("split", Split((0, 1, 2), (), TEST))
    return Fit(name, split, seed, stage=more.pop("stage", "stage-2"), method=method, **more)


def seen(one: Any, zones: Volume) -> Segmentation:
    grid = crop_pad(Volume(one.image.array[0], one.image.affine), one.center, (16, 48, 48))
    prob = np.zeros((5, *grid.size), np.float32)
    prob[0] = 1
    return Segmentation(
        grid.with_array(prob), zones, {"pz": 0.1, "tz": 0.0}, None, 0.2, 1, one.center, np.zeros(2)
    )


def perfect(network: nn.Module, one: Any, config: Any, facts: Any) -> Segmentation:
    """What reader 1 drew."""
    return seen(one, to_grid(whole_reference(one.label), one.original, "label"))


def nothing(network: nn.Module, one: Any, config: Any, facts: Any) -> Segmentation:
    return seen(one, one.original.with_array(np.zeros(one.original.size, np.uint8)))


def values(rows: pl.DataFrame, **where: str) -> list[float]:
    wanted = {"table": "", "condition": "", "method": "", **where}
    return rows.filter(**wanted)["value"].to_list()


def test_a_perfect_segmentation_has_dice_1_and_distance_0(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", perfect)
    found = evaluate(config(), prepared, Trained([fit()]))
    for zone in ("pz", "tz", "gland"):
        assert values(found.rows, metric=f"dice/{zone}") == [1.0, 1.0]
        assert values(found.rows, metric=f"masd/{zone}") == [0.0, 0.0]
        assert values(found.rows, metric=f"miss/{zone}", table="misses") == [0.0, 0.0]
    assert values(found.rows, metric="dice/dpu") == []  # two-zone labels do not tell it


def test_a_second_reader_is_a_condition_and_a_line_beside_the_model(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", perfect)
    found = evaluate(config(), prepared, Trained([fit()]))
    (shifted,) = values(found.rows, metric="dice/pz", condition="reader2")
    own, moved = two_zones() == 1, np.roll(two_zones(), 1, axis=1) == 1
    expected = 2 * (own & moved).sum() / (own.sum() + moved.sum())
    assert shifted == pytest.approx(expected, abs=1e-12)
    assert values(found.rows, metric="dice/pz", table="readers", method="reader2") == [shifted]
    assert values(found.rows, metric="dice/pz", table="readers") == [1.0]


def test_a_zone_that_is_not_found_has_no_distance_and_counts_as_a_miss(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", nothing)
    found = evaluate(config(), prepared, Trained([fit()]))
    assert values(found.rows, metric="dice/pz") == [0.0, 0.0]
    assert values(found.rows, metric="masd/pz") == [None, None]
    assert values(found.rows, metric="miss/pz", table="misses") == [1.0, 1.0]
    z, y, x = np.nonzero(two_zones())
    box = [(n.max() - n.min() + 1) * mm for n, mm in ((z, 3), (y, 1), (x, 1))]
    penalty = values(found.rows, metric="masd_penalised/pz", table="misses")
    np.testing.assert_allclose(penalty, np.linalg.norm(box) / 2)
    assert any("PZ 2" in note for note in found.notes)
    zero = evaluate(config(evaluate={"empty": "zero"}), prepared, Trained([fit()]))
    assert values(zero.rows, metric="masd/pz") == [0.0, 0.0]


def test_what_is_predicted_far_from_the_gland_counts(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def island(network: nn.Module, one: Any, config: Any, facts: Any) -> Segmentation:
        found = perfect(network, one, config, facts)
        found.zones.array[0, 0, :10] = 1
        return found

    monkeypatch.setattr(room, "segment", island)
    found = evaluate(config(), prepared, Trained([fit()]))
    size = np.count_nonzero(two_zones() == 1)
    assert values(found.rows, metric="dice/pz") == [pytest.approx(2 * size / (2 * size + 10))] * 2


def test_stages_before_the_last_are_not_scored_and_seeds_are_kept_apart(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", perfect)
    fits = [
        fit("stage-1", stage="stage-1"),
        fit("seed-2/final", 2),
        fit("final/aniso", method="aniso", stage="train", overrides={"model.name": "aniso"}),
        fit(),
    ]
    rows = evaluate(config(), prepared, Trained(fits)).rows
    assert set(rows.filter(table="", condition="")["fit"]) == {"seed-1", "seed-2"}
    assert set(rows["method"]) == {"", "aniso", "reader2"}
    assert len(values(rows, metric="dice/pz")) == 2 * len(TEST)


def test_the_files_hold_every_region_the_quality_and_three_cases(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", perfect)
    files = evaluate(config(), prepared, Trained([fit()])).files
    table = files["metrics"]
    assert set(table["region"]) == {"all", "apex", "mid", "base"}
    assert set(table["reader"]) == {"reader1", "reader2"}
    assert table.filter(zone="gland", region="all", metric="dice").height == 3
    assert files["review"]["components"].to_list() == [1, 1]
    assert files["review"]["pz_ml"][0] == pytest.approx((two_zones() == 1).sum() * 0.003)
    assert set(from_arrays(files["cases"])) == {"worst", "best"}  # each of the two once


@pytest.mark.parametrize("name", ["mean_shape", "box_atlas"])
def test_shapes_are_fitted_on_the_training_part_and_restored_from_their_artifacts(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(room, "segment", perfect)
    trained = Trained([fit()])
    found = evaluate_baseline(name, config(), prepared, trained)
    scores = values(found.rows, metric="dice/pz", method=name)
    assert min(scores) > 0.9  # every gland has one shape here

    class Other(Trained):
        def artifacts(self, fit: str) -> dict[str, Any]:
            assert fit == f"{name}/final"
            return dict(found.artifacts[name]["final"])

    other = Other([fit(split=Split((), (), TEST))])
    again = evaluate_baseline(name, config(), prepared, other)
    assert values(again.rows, metric="dice/pz", method=name) == pytest.approx(scores)
    told = values(found.rows, metric="dice/pz", method=name, table="reference box")
    assert len(told) == (2 if name == "box_atlas" else 0)


def test_baselines_start_where_the_network_found_the_gland_and_segment_nothing_again(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(network: nn.Module, one: Any, config: Any, facts: Any) -> Segmentation:
        found = perfect(network, one, config, facts)
        zones = found.zones.with_array(np.roll(found.zones.array, 6, axis=2))
        return seen(one, zones)

    def never(*_: object) -> None:
        raise AssertionError

    chosen, trained = config(predict={"tta": "none"}), Trained([fit()])
    monkeypatch.setattr(room, "segment", moved)
    evaluate(chosen, prepared, trained)
    monkeypatch.setattr(room, "segment", never)
    rows = evaluate_baseline("box_atlas", chosen, prepared, trained).rows
    own = values(rows, metric="dice/gland", method="box_atlas")
    told = values(rows, metric="dice/gland", method="box_atlas", table="reference box")
    assert max(own) < 0.9 < min(told)


def test_two_zone_labels_become_classes_and_gland_labels_none(prepared: Prepared) -> None:
    label = study(prepared, 0).label
    assert label is not None
    classes = classes_of(label)
    assert classes is not None
    np.testing.assert_array_equal(np.unique(classes), [0, 1, 2])
    assert list(labels_of(prepared, 4)) == ["reader1", "reader2"]


def test_the_tables_take_their_binding_form_with_every_metric_declared(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", perfect)
    found = evaluate(config(), prepared, Trained([fit()]))
    setting = Setting(METRICS, "pirads", "holdout", "patient", [1])
    results = summarise(found, setting)
    tables = [results, *results["tables"]]
    assert {t["name"] for t in results["tables"]} >= {"apex", "mid", "base", "misses", "readers"}
    for table in tables:
        for scores in table["methods"].values():
            assert set(scores) <= set(METRICS)


def test_a_generated_sample_below_its_band_is_an_error(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "segment", nothing)
    generated = Prepared(prepared.path, prepared.index, {**prepared.facts, "generated": True})
    found = evaluate(config(), generated, Trained([fit()]))
    assert [f.code for f in found.findings.errors] == ["sample.dice"] * 4
    assert not evaluate(config(), prepared, Trained([fit()])).findings.errors
