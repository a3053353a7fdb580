"""Configurations: precedence, every error at once, and files that can be read again."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from diptych.config import (
    DataSection,
    PredictSection,
    RunSection,
    Section,
    TrainSection,
    default_recipe,
    digest,
    dump_yaml,
    list_recipes,
    load,
    load_yaml,
    merge,
    override,
    resolve,
)
from diptych.contract import Fit
from diptych.errors import UsageError
from diptych.split import Split


class ToyData(DataSection):
    events: dict[str, tuple[str, ...]] = Field(
        {"left": ("T1",), "right": ("T2",)}, description="Class -> labels."
    )
    window: tuple[float, float] = Field((0.5, 3.5), description="Start and end, s.")
    note: str = Field("", description="Any words.")
    cues: tuple[str, ...] = Field((), description="Cues.", json_schema_extra={"at_predict": True})

    @model_validator(mode="after")
    def window_runs_forward(self) -> ToyData:
        if self.window[0] >= self.window[1]:
            raise ValueError("the window ends before it starts: exchange its two numbers")
        return self


class ToyModel(Section):
    width: int = Field(8, ge=1, le=512, description="Channels.")
    kind: Literal["small", "large"] = Field("small", description="Size.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Probability.")


class Toy(Section):
    """A toy."""

    data: ToyData = Field(ToyData(), description="Data.")
    model: ToyModel = Field(ToyModel(), description="Network.")
    train: TrainSection = Field(TrainSection(epochs=7), description="Loop.")
    predict: PredictSection = Field(PredictSection(), description="Prediction.")
    run: RunSection = Field(RunSection(), description="Run.")
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Stages.")


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "fast.yaml").write_text("# Quick.\ntrain:\n  epochs: 2\n  batch: 16\n")
    (folder / "paper.yaml").write_text("# As published.\ntrain: {epochs: 100}\n")
    return folder


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(**keywords: Any) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(Toy, **keywords)
    return str(caught.value).splitlines()


def fit(**keywords: Any) -> Fit:
    return Fit("fold-1", Split((0,), (), (1,)), seed=1, **keywords)


def test_set_wins_over_file_over_recipe_over_defaults(tmp_path: Path, recipes: Path) -> None:
    file = written(tmp_path, "train:\n  batch: 32\n  clip: 1.5\n")
    config = load(Toy, recipe="fast", recipes=recipes, file=file, sets=["train.clip=2"])
    assert (config.train.epochs, config.train.batch, config.train.clip) == (2, 32, 2.0)


def test_a_partial_section_keeps_the_pipelines_own_defaults(tmp_path: Path) -> None:
    config = load(Toy, file=written(tmp_path, "train:\n  batch: 3\n"))
    assert (config.train.epochs, config.train.batch) == (7, 3)


def test_a_section_with_everything_commented_out_means_defaults(tmp_path: Path) -> None:
    assert load(Toy, file=written(tmp_path, "train:\n  # epochs: 3\nmodel: {}\n")) == Toy()


def test_an_unknown_key_is_named_with_file_line_and_nearest_name(tmp_path: Path) -> None:
    file = written(tmp_path, "model:\n  width: 4\n\n# more\n\ntrain:\n  epoch: 3\n")
    assert problems(file=file) == [
        f"{file}, line 7, train.epoch: unknown key; nearest valid name: train.epochs"
    ]


def test_a_key_in_the_wrong_section_leads_to_the_right_one() -> None:
    assert problems(sets=["model.epochs=3"])[0].endswith("nearest valid name: train.epochs")


def test_a_key_like_no_other_lists_the_names_of_its_section() -> None:
    line = problems(sets=["model.qqqq=3"])[0]
    assert line.endswith("valid names: model.width, model.kind, model.dropout")


def test_every_error_is_told_at_once(tmp_path: Path, recipes: Path) -> None:
    file = written(
        tmp_path,
        "train:\n  epochs: abc\n  batch: 0\nmodel:\n  kind: big\n  dropout: 1\n"
        "run:\n  seeds: []\nstages:\n  pretrain:\n    model.width: 0\n",
    )
    found = problems(recipe="fst", recipes=recipes, file=file, sets=["nothing", "a.b=1"])
    assert sorted(found) == sorted(
        [
            "--recipe fst: unknown recipe; nearest valid name: fast "
            "(a file of your own goes to --config)",
            "--set nothing: write KEY=VALUE, such as --set train.epochs=10",
            "--set a.b=1, a: unknown key; valid names: data, model, train, predict, run, stages",
            f"{file}, line 2, train.epochs: given 'abc', allowed: a whole number >= 0",
            f"{file}, line 3, train.batch: given 0, allowed: a whole number > 0",
            f"{file}, line 5, model.kind: given 'big', allowed: one of small, large",
            f"{file}, line 6, model.dropout: given 1, allowed: a number >= 0 and < 1",
            f"{file}, line 8, run.seeds: given [], allowed: a list (at least 1), "
            "each a whole number",
            f"{file}, line 11, stages.pretrain.model.width: given 0, "
            "allowed: a whole number >= 1 and <= 512",
        ]
    )


def test_a_wrong_option_is_named_as_it_was_typed() -> None:
    assert problems(sets=["train.epochs=x"]) == [
        "--set train.epochs=x, train.epochs: given 'x', allowed: a whole number >= 0"
    ]


def test_the_strongest_source_of_a_wrong_value_is_blamed(tmp_path: Path) -> None:
    file = written(tmp_path, "train:\n  epochs: 3\n")
    assert problems(file=file, sets=["train.epochs=x"])[0].startswith("--set train.epochs=x")


def test_a_rule_between_two_values_speaks_its_own_words(tmp_path: Path) -> None:
    file = written(tmp_path, "data:\n  note: a\n  window: [4, 1]\n")
    assert problems(file=file) == [
        f"{file}, line 3, data: the window ends before it starts: exchange its two numbers"
    ]


def test_a_value_in_the_place_of_a_section_is_refused_whatever_follows(tmp_path: Path) -> None:
    file = written(tmp_path, "model: {width: 4}\ndata: hello\n")
    (line,) = problems(file=file, sets=["data.note=a"])
    assert line.startswith(f"{file}, line 2, data: given 'hello', allowed: a section with the keys")
    (line,) = problems(sets=["data=null", "data.note=a"])
    assert line.startswith("--set data=null, data: given null, allowed: a section")


def test_an_option_takes_no_blame_for_a_file_of_the_same_section(tmp_path: Path) -> None:
    file = written(tmp_path, "data:\n  note: a\n  window: [4, 1]\n  events: {up: 5}\n")
    assert [line.partition(", data")[0] for line in problems(file=file, sets=["data.note=b"])] == [
        f"{file}, line 4"
    ]
    file = written(tmp_path, "data:\n  window: [4, 1]\n")
    assert problems(file=file, sets=["data.note=b"])[0].startswith(f"{file}, line 2, data: the win")
    (line,) = problems(
        file=written(tmp_path, "data: {events: {up: [U]}}"), sets=["data.events.a=5"]
    )
    assert line.startswith("--set data.events.a=5, data.events: given")


def test_a_file_replaces_a_mapping_and_an_option_reaches_into_it(tmp_path: Path) -> None:
    file = written(tmp_path, "data:\n  events: {up: [U]}\n")
    assert load(Toy, file=file).data.events == {"up": ("U",)}
    config = load(Toy, sets=["data.events.left=[769]", "data.events.left=['769']"])
    assert config.data.events == {"left": ("769",), "right": ("T2",)}


@pytest.mark.parametrize("value", ["007", "true", "1e3", "2024-01-01", "*.edf"])
def test_an_option_for_text_takes_the_text_as_it_stands(value: str) -> None:
    assert load(Toy, sets=[f"predict.subject={value}"]).predict.subject == value


def test_null_gives_an_optional_text_back() -> None:
    assert load(Toy, sets=["predict.subject=a", "predict.subject=null"]).predict.subject is None


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "train: {epochs: 1}\ntrain: {epochs: 2}",
        "- 1",
        "5",
        "a: &x {b: *x}",
        "train: &x {epochs: 1}\nmodel: *x",
        "a: !!python/object/apply:os.system [ls]",
        "a: 1\n b: 2",
        "\t- x",
        "? [1, 2]\n: 3",
        "a: " + "[" * 1000,
        "a\x00: 1",
        "train: 5",
        "stages: {pretrain: 5}",
        "run: {seeds: {a: 1}}",
        "data: {window: [0, .inf]}",
    ],
)
def test_a_broken_file_is_a_sentence_that_names_it(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, text)
    found = problems(file=file)
    assert found
    assert all(line.startswith(str(file)) for line in found)


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "big.yaml").write_text("#" * 1_000_001)
    for name in ("binary.yaml", "big.yaml", "absent.yaml", "."):
        found = problems(file=tmp_path / name)
        assert len(found) == 1
        assert found[0].startswith(str(tmp_path / name))


def test_umlauts_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "für Ärzte.yaml"
    file.write_bytes("data:\n  note: größer\n".encode("utf-8-sig"))
    assert load(Toy, file=file).data.note == "größer"


def test_stages_may_be_nested_or_dotted(tmp_path: Path) -> None:
    nested = load(Toy, file=written(tmp_path, "stages:\n  a:\n    train:\n      epochs: 3\n"))
    dotted = load(Toy, sets=["stages.a.train.epochs=3"])
    assert nested == dotted
    assert resolve(nested, fit(stage="a")).train.epochs == 3
    assert resolve(nested, fit()).train.epochs == 7


def test_a_fits_own_values_win_over_its_stages() -> None:
    config = load(Toy, sets=["stages.a.train.epochs=3", "stages.a.train.batch=5"])
    merged = resolve(config, fit(stage="a", overrides={"train.epochs": 4}))
    assert (merged.train.epochs, merged.train.batch) == (4, 5)


def test_a_wrong_override_names_the_fit() -> None:
    with pytest.raises(UsageError, match=r"fit fold-1, train\.epoch: unknown key"):
        resolve(Toy(), fit(overrides={"train.epoch": 4}))


def test_merge_leaves_its_argument_alone_and_validates() -> None:
    config = Toy()
    assert merge(config, {"model.width": 16}).model.width == 16
    assert config == Toy()
    with pytest.raises(UsageError, match=r"overrides, model\.width: given 0"):
        merge(config, {"model.width": 0})


keys = st.sampled_from(["model.width", "train.epochs", "run.seeds", "train.batch"])
values = st.integers(1, 50)


@given(first=st.dictionaries(keys, values), second=st.dictionaries(keys, values))
@settings(max_examples=30, deadline=None)
def test_merging_twice_is_merging_the_union(first: dict[str, Any], second: dict[str, Any]) -> None:
    first, second = (
        {key: [value] if key == "run.seeds" else value for key, value in part.items()}
        for part in (first, second)
    )
    assert merge(merge(Toy(), first), second) == merge(Toy(), {**first, **second})


@example(note="", words=["?0"], dropout=0, window=0, subject=None)
@example(note="\x85\u2028\ufeff\x7f😀", words=["\n", ""], dropout=0, window=0, subject=None)
@given(
    note=st.text(max_size=20),
    words=st.lists(st.text(string.printable, max_size=8), max_size=3),
    dropout=st.floats(0, 1, exclude_max=True),
    window=st.floats(-1e12, 0.4),
    subject=st.none() | st.sampled_from(["007", "null", "true", "1e5", "~", "- a", "#x", "a: b"]),
)
@settings(max_examples=40, deadline=None)
def test_a_written_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    note: str,
    words: list[str],
    dropout: float,
    window: float,
    subject: str | None,
) -> None:
    config = merge(
        Toy(),
        {
            "data.note": note,
            "data.exclude": words,
            "data.window": [window, 1.0],
            "data.events": {"a": words, "b": []},
            "model.dropout": dropout,
            "predict.subject": subject,
            "stages.a.train.epochs": 3,
        },
    )
    path = tmp_path_factory.mktemp("written") / "config.yaml"
    path.write_text(dump_yaml(config, "Words\nabove"), encoding="utf-8", newline="\n")
    assert load_yaml(Toy, path) == config


def test_a_written_configuration_explains_every_value() -> None:
    text = dump_yaml(merge(Toy(), {"train.epochs": 9}))
    assert "  # Epochs of training. A whole number >= 0; default 7.\n  epochs: 9\n" in text
    assert "  # Largest gradient norm. A number > 0, or null; default null.\n  clip: null\n" in text
    assert "\n# Network.\nmodel:\n" in text


def test_the_digest_follows_everything_but_run_and_its_seeds() -> None:
    own = digest(Toy())
    assert own == digest(load(Toy, sets=["run.threads=2", "run.device=cpu"]))
    assert own != digest(load(Toy, sets=["run.seeds=[2]"]))
    assert own != digest(load(Toy, sets=["model.width=9"]))
    assert own != digest(load(Toy, sets=["stages.a.train.epochs=3"]))


def test_after_training_only_free_fields_may_change() -> None:
    sets = ["predict.subject=a", "run.threads=2", "data.cues=[go]"]
    changed = override(Toy(), sets, "predict")
    assert (changed.predict.subject, changed.run.threads, changed.data.cues) == ("a", 2, ("go",))
    with pytest.raises(UsageError) as caught:
        override(Toy(), ["train.epochs=3", "train.epoch=3", "predict.subject=[1]"], "predict")
    assert str(caught.value).splitlines() == [
        "--set train.epochs=3: train.epochs is fixed once a model is trained; "
        "allowed: predict.*, run.*, data.exclude, data.on_error, data.cues",
        "--set train.epoch=3, train.epoch: unknown key; nearest valid name: train.epochs",
        "--set predict.subject=[1], predict.subject: given [1], allowed: text, or null",
    ]


@pytest.mark.parametrize("option", ["data.events.left=[a]", "stages.a.train.epochs=3"])
def test_nothing_inside_a_fixed_field_may_change(option: str) -> None:
    with pytest.raises(UsageError, match="is fixed once a model is trained"):
        override(Toy(), [option], "predict")


def test_recipes_are_listed_with_their_first_comment(recipes: Path) -> None:
    assert list_recipes(recipes) == {"fast": "Quick.", "paper": "As published."}


def test_a_pipeline_without_recipes_starts_from_its_defaults() -> None:
    assert default_recipe(Toy) is None
