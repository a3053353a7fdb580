"""What leaves a run computes what the network computes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.pirads.studies import prepared_of

from diptych.export import export_part
from diptych_pirads.config import ModelSection, PiradsConfig
from diptych_pirads.export import export
from diptych_pirads.model import network, probabilities

torch.set_num_threads(1)
SIZE = (8, 32, 32)


def trained(name: str, channels: int = 1) -> Any:
    torch.manual_seed(0)
    net = network(ModelSection(name=name, base=2), channels, ("sdf",))  # type: ignore[arg-type]
    facts = {"size": list(SIZE), "spacing": [3.0, 1.0, 1.0], "channels": ["t2", "adc"][:channels]}

    def modules(fit: str) -> Mapping[str, torch.nn.Module]:
        return {"model": net}

    return SimpleNamespace(final="final", facts=lambda fit: facts, modules=modules)


@pytest.mark.parametrize(
    ("form", "name", "channels"),
    [
        ("onnx", "dualpath", 1),
        pytest.param("pt2", "dualpath", 2, marks=pytest.mark.slow),
        pytest.param("pt2", "unet", 1, marks=pytest.mark.slow),
        pytest.param("onnx", "aniso", 1, marks=pytest.mark.slow),
    ],
)
def test_the_exported_graph_agrees_with_the_network(
    form: str, name: str, channels: int, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    run = trained(name, channels)
    parts = export(PiradsConfig(), run, None)
    assert parts["zones"].examples["t2"].shape == (3, channels, *SIZE)
    out = export_part(parts, None, form, tmp_path / f"zones.{form}")
    x = torch.rand(1, channels, *SIZE)  # another number of crops than was exported
    with torch.no_grad():
        expected = probabilities(run.modules("final")["model"].eval(), x).fused.numpy()
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        (found,) = session.run(["prob"], {"t2": x.numpy()})
    else:
        found = torch.export.load(out).module()(x).detach().numpy()
    assert np.abs(found - expected).max() < 1e-4
    written = out.read_bytes()  # which is not packed in either form
    for place in (sys.prefix, str(Path(__file__).parents[2])):
        assert place.encode() not in written


def test_prepared_crops_check_the_export() -> None:
    prepared = prepared_of(["zones4", None], SIZE)
    x = export(PiradsConfig(), trained("aniso"), prepared)["zones"].examples["t2"]
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])
