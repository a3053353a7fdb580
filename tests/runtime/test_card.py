"""The model card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from diptych.card import model_card
from diptych.errors import DataError


def test_card_header_is_yaml_with_the_values_of_results_json(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    run = make_run()
    text = model_card(run, pipeline).read_text()
    assert text.startswith("---\n")
    header = YAML(typ="safe").load(text.split("---\n")[1])
    results = json.loads((run / "evaluation" / "results.json").read_text())
    metrics = header["model-index"][0]["results"][0]["metrics"]
    own = results["methods"]["mvcnet"]
    assert {m["type"]: m["value"] for m in metrics} == {
        name: pytest.approx(score["value"], abs=1e-6) for name, score in own.items()
    }
    assert "mvcnet" in header["tags"]


def test_card_has_results_use_and_limits_and_no_path(
    make_run: Callable[..., Path], pipeline: Any, tmp_path: Path
) -> None:
    run = make_run()
    text = model_card(run, pipeline).read_text()
    for part in ("## Results", "| tangent_lr |", "## Notes", "## Use", "not a medical device"):
        assert part in text
    assert "best baseline tangent_lr" in text
    assert str(tmp_path) not in text
    assert "jane" not in text


def test_card_of_a_run_without_evaluation_is_refused(tmp_path: Path, pipeline: Any) -> None:
    with pytest.raises(DataError, match="evaluate"):
        model_card(tmp_path, pipeline)
    assert not (tmp_path / "model_card.md").exists()
