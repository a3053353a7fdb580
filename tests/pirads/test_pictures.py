"""The report's figures: which there are, and that they show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.contract import Evaluation, Picture
from diptych.prepared import Prepared
from diptych.report.pictures import save_pictures
from diptych_pirads.cases import Case, case_page, from_arrays, shown_slices, to_arrays
from diptych_pirads.config import PiradsConfig
from diptych_pirads.metrics import evaluate_case
from diptych_pirads.phantom import make_phantom
from diptych_pirads.pictures import pictures
from diptych_pirads.scores import READERS, long_rows, long_table, table_rows
from diptych_pirads.volumetry import zone_volumes

RANKS = ("worst", "median", "best")


def case(number: int) -> Case:
    made = make_phantom(0, number)
    return Case(
        image=np.rint(255 * made.image.array).astype(np.uint8),
        predicted=made.reader2.array,
        reference=made.label.array,
        difference=np.where(made.reader2.array != made.label.array, 200, 5).astype(np.uint8),
        spacing=(3.0, 1.0, 1.0),
    )


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """The second reader of three phantoms stands for the model, an empty mask for a baseline."""
    rows: list[dict[str, Any]] = []
    long: dict[str, list[dict[str, Any]]] = {"": [], "mean_shape": []}
    review = []
    for number in range(3):
        made = make_phantom(0, number)
        place = {"subject": f"S-{number}", "unit": f"S-{number}-1", "fit": "seed-1"}
        blank = made.label.with_array(made.label.array * 0)
        for method, zones in {"": made.reader2, "mean_shape": blank}.items():
            own = {**place, "method": method}
            scores = {"first": evaluate_case(zones, made.label)}
            rows += table_rows(scores, own)
            long[method] += long_rows(scores, own)
        readers = table_rows(scores, {**place, "method": "second"})
        rows += [{**row, "table": READERS} for row in readers]
        volumes = {f"{zone}_ml": ml for zone, ml in zone_volumes(made.reader2).items()}
        review.append({**place, "method": "", **volumes})
    return Evaluation(
        rows=pl.DataFrame(rows, infer_schema_length=None),
        files={
            "metrics": long_table(long[""]),
            "metrics-mean_shape": long_table(long["mean_shape"]),
            "review": pl.DataFrame(review),
            "cases": to_arrays({rank: case(n) for n, rank in enumerate(RANKS)}),
        },
    )


def drawn(evaluation: Evaluation) -> dict[str, Picture]:
    prepared = Prepared.from_arrays(pl.DataFrame({"subject": ["S-0"]}), {}, {})
    return {one.name: one for one in pictures(PiradsConfig(), prepared, evaluation)}


@pytest.fixture(scope="module")
def found(evaluation: Evaluation) -> dict[str, Picture]:
    return drawn(evaluation)


def test_every_figure_is_drawn_and_saved(found: dict[str, Picture], tmp_path: Path) -> None:
    expected = ["outlines", "distances", "levels", "volumes", "sectors", "disagreement"]
    assert list(found) == expected
    files = save_pictures(list(found.values()), tmp_path / "pictures")
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_an_evaluation_without_studies_to_show_gives_tables_alone(evaluation: Evaluation) -> None:
    files = {name: file for name, file in evaluation.files.items() if name.startswith("metrics")}
    tables = drawn(Evaluation(rows=evaluation.rows, files=files))
    assert list(tables) == ["distances", "levels"]
    assert not drawn(Evaluation(rows=evaluation.rows))


def test_a_box_holds_the_values_of_the_test_patients(
    evaluation: Evaluation, found: dict[str, Picture]
) -> None:
    axes = found["distances"].figure.axes[0]
    held = evaluation.files["metrics"].filter(zone="pz", region="all", metric="masd")["value"]
    points = np.sort(np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in axes.collections]))
    assert np.allclose(points, np.sort(held.to_numpy()))


def test_bias_of_volumes_is_the_mean_error(
    evaluation: Evaluation, found: dict[str, Picture]
) -> None:
    errors = evaluation.files["metrics"].filter(
        zone="gland", region="all", metric="volume_error_ml"
    )["value"]
    gland = found["volumes"].figure.axes[-1]
    assert f"bias {errors.mean():+.1f} mL" in [
        text.get_text().split("\n")[0] for text in gland.texts
    ]


def test_cases_survive_being_arrays() -> None:
    one = case(0)
    (back,) = from_arrays(to_arrays({"worst": one})).values()
    for name, value in vars(one).items():
        assert np.array_equal(getattr(back, name), value)


def test_slices_go_from_apex_to_base_within_the_gland() -> None:
    one = case(1)
    slices = shown_slices(one)
    held = (one.predicted > 0).any(axis=(1, 2)) | (np.asarray(one.reference) > 0).any(axis=(1, 2))
    assert slices == sorted(slices)
    assert held[slices].all()


def test_a_page_says_what_it_is_not_for() -> None:
    figure = case_page(case(2), "P01", ["PZ: 20.0 mL"], ["Research use only. Not for diagnosis."])
    assert figure.get_suptitle() == "P01\nResearch use only. Not for diagnosis."
