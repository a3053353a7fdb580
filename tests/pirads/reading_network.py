"""A network that reads the zone off the intensity, so that what it should say is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.config import merge
from diptych_pirads import infer
from diptych_pirads.config import PiradsConfig
from diptych_pirads.labels import PZ, ZONES
from diptych_pirads.model import ZoneProbabilities

SIZE = [16, 64, 64]
FACTS = {"size": SIZE, "channels": ["t2"], "spacing": [3.0, 1.0, 1.0]}
CONFIG = merge(
    PiradsConfig(),
    {
        "data.geometry": {"spacing": [3.0, 1.0, 1.0], "size": SIZE},
        "data.normalize": {"low": 0.0, "high": 100.0},
    },
)


class Reader(nn.Module):
    """Class c has the intensity c / 4; its second path is shifted to the patient's left."""

    def __init__(self, sharpness: float = 400.0, drift: float = 0.0, shift: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sharpness, self.drift, self.shift = sharpness, drift, shift
        self.coarse = nn.Conv3d(1, 6, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        ramp = self.drift * torch.linspace(0, 1, x.shape[-1])
        levels = torch.arange(len(ZONES)).reshape(-1, 1, 1, 1) / 4
        return torch.softmax(-self.sharpness * (x + ramp - levels) ** 2, dim=1)


class Fitted:
    """A run whose final fit is one network."""

    final = "final"
    fits = ()

    def __init__(self, network: nn.Module, artifacts: Mapping[str, Any] | None = None) -> None:
        self.network, self.left = network, artifacts or {}

    def modules(self, fit: str) -> dict[str, nn.Module]:
        return {"model": self.network}

    def facts(self, fit: str) -> dict[str, Any]:
        return FACTS

    def artifacts(self, fit: str) -> Mapping[str, Any]:
        return self.left


def use_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `infer` understand a `Reader`."""

    def probabilities(module: Reader, x: Tensor) -> ZoneProbabilities:
        fused = module(x)
        a = {"pz": fused[:, PZ]}
        b = {"pz": fused[:, PZ].roll(module.shift, -1)}
        return ZoneProbabilities(fused, a, b, module.coarse(x).mean(dim=(2, 3, 4)))

    monkeypatch.setattr(infer, "probabilities", probabilities)
