"""The graph that leaves a run: a crop of an image to class probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.contract import Exportable, Trained
from diptych.prepared import Prepared
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import Volume
from diptych_pirads.model import probabilities
from diptych_pirads.phantom import make_phantom
from diptych_pirads.prepare import crop_image
from diptych_pirads.store import study

EXAMPLES = 3  # on which the graph has to agree with the network


class ZoneGraph(nn.Module):
    """A network with its fusion, and nothing else.

    Args:
        network: One that `model.probabilities` knows.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t2: Float[Tensor, "n c z y x"]) -> Float[Tensor, "n 5 z y x"]:
        """Probabilities of background, PZ, TZ, DPU and AFS.

        Args:
            t2: Normalised crops on the working grid; further channels follow T2, of zeros where
                they are missing.
        """
        return probabilities(self.network, t2).fused


def export(
    config: PiradsConfig, trained: Trained, prepared: Prepared | None
) -> Mapping[str, Exportable]:
    """The graph that segments crops in another program.

    Args:
        config: The run's configuration.
        trained: The run's fits.
        prepared: The run's data, three crops of which check the export; without them generated
            prostates do.

    Returns:
        One part, ``zones``: any number of crops of the size that was trained on.
    """
    facts = trained.facts(trained.final)
    network = trained.modules(trained.final)["model"]
    graph = Exportable(
        module=ZoneGraph(network).eval().cpu(),
        examples={
            "t2": _examples(facts["size"], facts["spacing"], len(facts["channels"]), prepared)
        },
        outputs=("prob",),
        dynamic_axes={"t2": {0: "batch"}},
        tolerance=config.export.tolerance,
    )
    return {"zones": graph}


def _examples(
    size: list[int], spacing: list[float], channels: int, prepared: Prepared | None
) -> Float[Tensor, "3 c z y x"]:
    crops = np.zeros((EXAMPLES, channels, *size), np.float32)
    for k, crop in enumerate(crops):
        if prepared is not None and prepared.index.height:
            case = study(prepared, k % prepared.index.height)
            crop[:] = crop_image(case, case.center, size).array
        else:
            image: Volume = make_phantom(0, k, size, spacing).image
            crop[:] = image.array
    return torch.from_numpy(crops)
