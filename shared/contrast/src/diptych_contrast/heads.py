"""Projection heads, and one forward pass over crops of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice, check_known, check_least

Norm = Literal["batch", "layer"] | None


class ProjectionHead(nn.Module):
    """A multi-layer perceptron from features to the embedding that a loss sees.

    Every layer but the last is Linear, norm, ReLU; the last is Linear, with ``last_norm`` and a
    norm. Without ``bias`` linear layers that a norm follows have none: batch norm makes it idle.

    Example:
        >>> ProjectionHead(2048, 2048, 128)(torch.randn(4, 2048)).shape
        torch.Size([4, 128])
    """

    def __init__(
        self,
        dim_in: int,
        hidden: int,
        out: int,
        layers: int = 2,
        norm: Norm = "batch",
        last_norm: bool = False,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_least("ProjectionHead", 1, dim_in=dim_in, hidden=hidden, out=out, layers=layers)
        check_choice("ProjectionHead", "norm", norm, "batch", "layer", None)
        if last_norm and norm is None:
            found, fix = "is True without a norm", "pass norm='batch' or norm='layer'"
            raise ContrastInputError("ProjectionHead", "last_norm", found, fix)
        widths = [dim_in] + [hidden] * (layers - 1) + [out]
        parts: list[nn.Module] = []
        for position in range(layers):
            is_last = position == layers - 1
            normed = norm is not None and (last_norm or not is_last)
            width = widths[position + 1]
            parts.append(nn.Linear(widths[position], width, bias=bias or not normed))
            if normed:
                parts.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
            if not is_last:
                parts.append(nn.ReLU())
        self.layers = nn.Sequential(*parts)

    def forward(self, features: Float[Tensor, "n dim_in"]) -> Float[Tensor, "n out"]:
        """Embeddings of a batch of features, not normalised: the losses do that."""
        embeddings: Tensor = self.layers(features)
        return embeddings


class MultiHead(nn.Module):
    """Several independent projection heads on the same features (AMCL, DBL)."""

    def __init__(
        self,
        dim_in: int,
        hidden: int,
        out: int,
        heads: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        check_least("MultiHead", 1, heads=heads)
        self.heads = nn.ModuleList(
            ProjectionHead(dim_in, hidden, out, layers, norm) for _ in range(heads)
        )

    def forward(self, features: Float[Tensor, "n dim_in"]) -> Float[Tensor, "heads n out"]:
        """Embeddings of a batch of features under every head."""
        return torch.stack([head(features) for head in self.heads])


PRESETS: Mapping[str, Callable[[int], nn.Module]] = {
    "simclr": lambda dim: ProjectionHead(dim, dim, 128, last_norm=True, bias=False),
    "moco_v2": lambda dim: ProjectionHead(dim, dim, 128, norm=None),
    "swav": lambda dim: ProjectionHead(dim, 2048, 128),
    "byol": lambda dim: ProjectionHead(dim, 4096, 256),
    "multi_head": lambda dim: MultiHead(dim, dim, 128),
}


def head(name: str, dim_in: int) -> nn.Module:
    """The projection head of a published method.

    ============  ==========================================================  ==========
    name          layers (Linear sizes)                                       parameters
    ============  ==========================================================  ==========
    simclr        dim-dim without bias, BN, ReLU, dim-128 without bias, BN     4,460,800
    moco_v2       dim-dim, ReLU, dim-128                                       4,458,624
    swav          dim-2048, BN, ReLU, 2048-128                                 4,462,720
    byol          dim-4096, BN, ReLU, 4096-256                                 9,449,728
    multi_head    three of dim-dim, BN, ReLU, dim-128                         13,388,160
    ============  ==========================================================  ==========

    Parameters are counted at 2,048 features.

    Example:
        >>> head("moco_v2", 512)(torch.randn(4, 512)).shape
        torch.Size([4, 128])
    """
    check_known("head", "name", name, PRESETS)
    return PRESETS[name](dim_in)


def multi_crop_forward(
    encoder: Callable[[Tensor], Tensor], crops: Sequence[Float[Tensor, "n ..."]]
) -> list[Float[Tensor, "n dim"]]:
    """Encode crops of several sizes with one forward pass for each size (Caron et al., 2020).

    Crops of equal shape, wherever they stand, share a pass and with it the batch norm statistics.
    Outputs come in the order of the crops.
    """
    if not crops:
        fix = "pass at least one crop"
        raise ContrastInputError("multi_crop_forward", "crops", "is empty", fix)
    groups: dict[torch.Size, list[int]] = {}
    for position, crop in enumerate(crops):
        groups.setdefault(crop.shape[1:], []).append(position)
    outputs: dict[int, Tensor] = {}
    for positions in groups.values():
        batch = torch.cat([crops[position] for position in positions])
        encoded = encoder(batch)
        if encoded.shape[0] != batch.shape[0]:
            found = f"gives {encoded.shape[0]} rows for {batch.shape[0]}"
            fix = "pass an encoder with one output a row"
            raise ContrastInputError("multi_crop_forward", "encoder", found, fix)
        sizes = [crops[position].shape[0] for position in positions]
        outputs.update(zip(positions, encoded.split_with_sizes(sizes), strict=True))
    return [outputs[position] for position in range(len(crops))]
