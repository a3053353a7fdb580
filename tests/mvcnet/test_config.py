from importlib.resources import files

import pytest
from pydantic import BaseModel, ValidationError

from diptych.config import load
from diptych_mvcnet.config import MVCNetConfig, align_test_mode

RECIPES = files("diptych_mvcnet") / "recipes"
NAMES = ("demo", "fast", "loso", "official", "paper", "stream")


def settings_of(name: str) -> MVCNetConfig:
    return load(MVCNetConfig, recipe=name, recipes=RECIPES, file=None, sets=())


def every_field(model: type[BaseModel]):
    for name, field in model.model_fields.items():
        yield f"{model.__name__}.{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from every_field(field.annotation)


def differences(left: dict, right: dict, path: str = "") -> dict:
    found = {}
    for key, value in left.items():
        where = f"{path}{key}"
        if isinstance(value, dict) and isinstance(right[key], dict):
            found |= differences(value, right[key], where + ".")
        elif value != right[key]:
            found[where] = (value, right[key])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_valid_and_says_what_it_is_for(name):
    settings_of(name)
    assert (RECIPES / f"{name}.yaml").read_text(encoding="utf8").startswith(f"# {name}: ")


def test_the_recipe_fast_is_the_defaults():
    assert settings_of("fast") == MVCNetConfig()


def test_official_differs_from_paper_by_the_quirks_of_the_official_code_alone():
    official, paper = (settings_of(name).model_dump() for name in ("official", "paper"))
    assert set(differences(official, paper)) == {
        "align.online_prior",
        "align.parity_double",
        "views.freq_shift.parity_dt",
        "views.reflect.parity_binary_swap",
        "split.kind",
        "split.parity_class_sorted",
    }


def test_every_value_is_described():
    undescribed = [where for where, field in every_field(MVCNetConfig) if not field.description]
    assert undescribed == []


def test_only_what_reads_other_recordings_may_change_when_predicting():
    marked = {
        where
        for where, field in every_field(MVCNetConfig)
        if (field.json_schema_extra or {}).get("at_predict")
    }
    reading = (
        *("exclude", "on_error", "pattern", "manifest", "runs", "unit", "rename", "interpolate"),
        *("cues", "window_step_s", "repair_crlf", "allow_truncated"),
    )
    assert marked == {"AlignSection.test", *(f"EEGDataSection.{name}" for name in reading)}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"data": {"classes": ["left_hand", "feet"]}}, "feet"),
        ({"data": {"window": [3.5, 0.5]}}, "lower value first"),
        ({"data": {"class_mirror": {"left_hand": "right_hand", "right_hand": "feet"}}}, "back"),
        ({"data": {"colour": 1}}, "colour"),
        ({"views": {"use": ["flip", "flip"]}}, "once"),
        ({"views": {"use": ["half_sample"]}}, "half_sample"),
        ({"model": {"cnn": {"kernel": 64}}}, "65"),
        ({"model": {"transformer": {"embed_dim": 33}}}, "multiple"),
        ({"model": {"transformer": {"tokens": "time", "embed_dim": None}}}, "embed_dim"),
        ({"objective": {"negatives": "supcon", "cvc_pairs": "all"}}, "label_consistent"),
        ({"evaluate": {"baselines": ["csp"]}}, "csp_lda"),
        ({"evaluate": {"baselines": ["fbcsp_lda"]}}, "data.filter.band=[4, 40]"),
        ({"evaluate": {"baselines": ["ifnet_two_band"]}}, "data.filter.band=[4, 40]"),
        ({"model": {"cnn": {"bands": [[4, 16]]}}}, "data.filter.band=[4, 30]"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(values, word):
    with pytest.raises(ValidationError, match=r"(?s).*") as refused:
        MVCNetConfig.model_validate(values)
    assert word in str(refused.value)


def test_event_codes_may_be_numbers():
    config = MVCNetConfig.model_validate(
        {"data": {"events": {"left_hand": 769, "right_hand": ["T2", 770]}, "cues": [768]}}
    )
    assert config.data.events == {"left_hand": ("769",), "right_hand": ("T2", "770")}
    assert config.data.cues == ("768",)


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({}, "train"),
        ({"split": {"kind": "co"}}, "train"),
        ({"split": {"kind": "loso"}}, "online"),
        ({"split": {"kind": "cross_session"}}, "online"),
        ({"align": {"test": "block"}}, "block"),
        ({"align": {"train": False}}, "none"),
    ],
)
def test_alignment_of_test_trials_follows_the_protocol(values, mode):
    assert align_test_mode(MVCNetConfig.model_validate(values)) == mode
