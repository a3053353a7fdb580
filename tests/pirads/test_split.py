"""Who trains and who is tested."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import DataError, UsageError
from diptych.prepared import Prepared
from diptych.split import overlaps
from diptych_pirads.config import PiradsConfig, PiradsSplitSection
from diptych_pirads.plan import is_scored, plan
from diptych_pirads.split import splits_of

SCHEMES = ("zones4", "pz_tz", None)


def section(**values: object) -> PiradsSplitSection:
    return PiradsSplitSection.model_validate(values)


def index(schemes: list[str | None], split: list[str | None] | None = None) -> pl.DataFrame:
    """One study a subject; the volumes grow, the centers take turns."""
    n = len(schemes)
    schema = {"scheme": pl.String, "split": pl.String}
    return pl.DataFrame(
        {
            "item": range(n),
            "subject": [f"S-{17 * k + 100:08x}" for k in range(n)],
            "scheme": schemes,
            "split": split or [None] * n,
            "center": [f"center-{k % 2 + 1}" for k in range(n)],
            "gland_ml": [None if scheme is None else 20.0 + k for k, scheme in enumerate(schemes)],
        },
        schema_overrides=schema,
    )


@given(
    schemes=st.lists(st.sampled_from(SCHEMES), min_size=20, max_size=60),
    seed=st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_every_labelled_subject_is_in_exactly_one_part(
    schemes: list[str | None], seed: int
) -> None:
    schemes += ["zones4"] * 6
    table = index(schemes)
    (split,) = splits_of(section(seed=seed), table)
    assert not overlaps(split, table)
    together = [row for rows in split.parts.values() for row in rows]
    assert sorted(together) == list(range(len(schemes)))
    known = sum(scheme is not None for scheme in schemes)
    assert abs(len(split.test) - 0.2 * known) <= 1
    assert abs(len(split.validation) - 0.1 * known) <= 1
    assert all(schemes[row] is not None for row in (*split.test, *split.validation))


def test_schemes_centers_and_volumes_are_dealt_out_evenly() -> None:
    table = index(["zones4"] * 60 + ["pz_tz"] * 60)
    (split,) = splits_of(section(fractions=[0.5, 0.0, 0.5]), table)
    tested = table[list(split.test)]
    assert Counter(tested["scheme"]) == {"zones4": 30, "pz_tz": 30}
    assert max(abs(n - 30) for n in Counter(tested["center"]).values()) <= 2
    small = tested.filter(pl.col("gland_ml") < 60).height
    assert abs(small - 20) <= 2


def test_another_seed_gives_another_division_and_the_same_seed_the_same() -> None:
    table = index(["zones4"] * 40)
    made = [splits_of(section(seed=seed), table)[0].test for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_each_subject_is_tested_once_in_a_cross_validation() -> None:
    table = index(["zones4", "zones4", "pz_tz", None] * 8)
    splits = splits_of(section(kind="kfold", folds=4), table)
    tested = Counter(row for split in splits for row in split.test)
    assert tested == Counter(row for row in range(32) if row % 4 != 3)
    for split in splits:
        assert not overlaps(split, table)
        assert len(split.validation) in (1, 2)
        assert {row for row in range(32) if row % 4 == 3} <= set(split.train)


def test_the_users_own_division_wins() -> None:
    parts = ["train", "test", None, "validation", "train"]
    schemes = ["zones4", "zones4", "zones4", "pz_tz", None]
    (split,) = splits_of(section(), index(schemes, parts))
    assert (split.train, split.validation, split.test) == ((0, 4), (3,), (1,))
    with pytest.raises(UsageError, match="kfold"):
        splits_of(section(kind="kfold"), index(schemes, parts))


def test_unlabelled_studies_of_a_tested_patient_do_not_train() -> None:
    table = index(["zones4"] * 9 + [None])
    table = table.with_columns(
        subject=pl.when(pl.col("item") == 9).then(pl.lit(table["subject"][0])).otherwise("subject")
    )
    splits = splits_of(section(kind="kfold", folds=3), table)
    for split in splits:
        assert (9 in split.train) == (0 in split.train)


def test_folds_of_a_file_are_used_as_they_are() -> None:
    table = index(["zones4"] * 6).with_columns(fold=pl.Series(["a", "a", "b", "b", "c", None]))
    made = splits_of(section(kind="file", file="split.csv"), table)
    assert [split.test for split in made] == [(0, 1), (2, 3), (4,)]
    with pytest.raises(UsageError, match=r"split\.file"):
        splits_of(section(kind="file", file="split.csv"), index(["zones4"] * 6))


@pytest.mark.parametrize("schemes", [[None] * 5, ["zones4", None, None]])
def test_too_few_labelled_patients_are_refused(schemes: list[str | None]) -> None:
    with pytest.raises(DataError, match="no labelled study in"):
        splits_of(section(), index(schemes))


@pytest.mark.parametrize(
    "values", [{"fractions": [0.5, 0.2, 0.2]}, {"kind": "file"}, {"kind": "kfold", "folds": 1}]
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"sum to|split\.file|two folds"):
        section(**values)


def prepared(n: int = 20) -> Prepared:
    return Prepared.from_arrays(index(["zones4"] * n), {}, {})


def config(**sections: object) -> PiradsConfig:
    return PiradsConfig.model_validate(sections)


def test_one_division_gives_two_stages_and_a_fit_for_each_trained_baseline() -> None:
    fits = plan(config(), prepared())
    assert [fit.name for fit in fits] == ["stage-1", "final/aniso", "final/unet", "final"]
    stage_1, aniso, _, final = fits
    assert (final.starts_from, final.stage, stage_1.stage) == ("stage-1", "stage-2", "stage-1")
    assert len({fit.split for fit in fits}) == 1
    assert (aniso.method, aniso.starts_from) == ("aniso", None)
    assert aniso.overrides == {"model.name": "aniso", "train.epochs": 60 + 20}
    assert [fit.name for fit in fits if is_scored(fit, config())] == [
        "final/aniso",
        "final/unet",
        "final",
    ]


def test_further_seeds_are_trained_on_the_same_division() -> None:
    chosen = config(run={"seeds": [3, 4]}, evaluate={"baselines": ["mean_shape"]})
    fits = plan(chosen, prepared())
    assert [(fit.name, fit.seed) for fit in fits] == [
        ("stage-1", 3),
        ("seed-4/stage-1", 4),
        ("seed-4/final", 4),
        ("final", 3),
    ]
    assert fits[2].starts_from == "seed-4/stage-1"
    assert len({fit.split for fit in fits}) == 1


def test_a_cross_validation_ends_with_a_model_of_everyone() -> None:
    chosen = config(split={"kind": "kfold", "folds": 2}, evaluate={"baselines": ["aniso"]})
    fits = plan(chosen, prepared())
    assert [fit.name for fit in fits] == [
        *("seed-1/fold-1/stage-1", "seed-1/fold-1/final", "seed-1/fold-1/final/aniso"),
        *("seed-1/fold-2/stage-1", "seed-1/fold-2/final", "seed-1/fold-2/final/aniso"),
        *("stage-1", "final"),
    ]
    assert fits[-1].split.train == tuple(range(20))
    assert not is_scored(fits[-1], chosen)
    assert not is_scored(fits[0], chosen)


def test_a_single_stage_is_the_final_one() -> None:
    chosen = config(train={"stages": ["stage-1"]}, evaluate={"baselines": []})
    (fit,) = plan(chosen, prepared())
    assert (fit.name, fit.stage, fit.starts_from) == ("final", "stage-1", None)
    assert is_scored(fit, chosen)
