"""Encoder and decoder of AnisoUNet (Meyer et al., ISBI 2019), of which all paths are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych_pirads.config import HALVINGS

UpKernel = Literal["stride", "meyer"]
Norm = Literal["instance", "batch"]
Image = Float[Tensor, "n c z y x"]

IN_PLANE, ALL = (1, 2, 2), (2, 2, 2)  # poolings


class Encoded(NamedTuple):
    """Features from fine to coarse, down to the bottleneck, and the latter's means.

    The means are taken before the normalisation, after which they say nothing.
    """

    full: Float[Tensor, "n f1 z y x"]
    half: Float[Tensor, "n f2 z y/2 x/2"]
    quarter: Float[Tensor, "n f3 z y/4 x/4"]
    bottom: Float[Tensor, "n f4 z/2 y/8 x/8"]
    means: Float[Tensor, "n f4"]


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a network are made.

    Args:
        base: Filters of the first convolution.
        up_kernel: "stride": kernels of up-convolutions equal their strides; "meyer": 2 x 2 x 2
            everywhere, with the last slice cut, so that slices mix towards one side.
        norm: "instance" or "batch", after the activation.
        dropout: Probability of dropping a feature between the two convolutions of a deep block.
        checkpoint: Whether full-resolution blocks are computed again in the backward pass.
    """

    base: int = 16
    up_kernel: UpKernel = "stride"
    norm: Norm = "instance"
    dropout: float = 0.5
    checkpoint: bool = False

    def convolution(self, inputs: int, outputs: int) -> list[nn.Module]:
        """3 x 3 x 3 convolution, then activation, then normalisation."""
        norm: nn.Module
        if self.norm == "instance":
            norm = nn.InstanceNorm3d(outputs, affine=True)
        else:
            norm = nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)
        return [nn.Conv3d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), norm]

    def pair(self, inputs: int, middle: int, outputs: int, *, drop: bool) -> nn.Sequential:
        """Two convolutions, with dropout between them in deep blocks."""
        between = [nn.Dropout(self.dropout)] if drop else []
        return nn.Sequential(
            *self.convolution(inputs, middle), *between, *self.convolution(middle, outputs)
        )


class Stem(nn.Module):
    """The full-resolution block of the encoder."""

    def __init__(self, in_channels: int, blocks: Blocks) -> None:
        super().__init__()
        base = blocks.base
        self.recompute = blocks.checkpoint
        self.enc1 = blocks.pair(in_channels, base, 2 * base, drop=False)

    def forward(self, x: Image) -> Float[Tensor, "n f z y x"]:
        """Features of every voxel."""
        return _run(self.enc1, x, recompute=self.recompute)


class Trunk(nn.Module):
    """The encoder below the stem."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        base = blocks.base
        self.enc2 = blocks.pair(2 * base, 2 * base, 4 * base, drop=False)
        self.enc3 = blocks.pair(4 * base, 4 * base, 8 * base, drop=False)
        self.bottom = blocks.pair(8 * base, 16 * base, 16 * base, drop=True)

    def forward(self, full: Float[Tensor, "n f z y x"]) -> Encoded:
        """Features of all resolutions."""
        half = self.enc2(_pooled(full, IN_PLANE))
        quarter = self.enc3(_pooled(half, IN_PLANE))
        deepest = self.bottom[:-1](_pooled(quarter, ALL))
        means = deepest.detach().float().mean((2, 3, 4))
        return Encoded(full, half, quarter, self.bottom[-1](deepest), means)


class Decoder(nn.Module):
    """From the bottleneck back to every voxel."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        base = blocks.base
        self.recompute = blocks.checkpoint
        self.up3 = _up_convolution(16 * base, ALL, blocks)
        self.dec3 = blocks.pair(24 * base, 8 * base, 8 * base, drop=True)
        self.up2 = _up_convolution(8 * base, IN_PLANE, blocks)
        self.dec2 = blocks.pair(12 * base, 4 * base, 4 * base, drop=True)
        self.up1 = _up_convolution(4 * base, IN_PLANE, blocks)
        self.dec1 = blocks.pair(6 * base, 2 * base, 2 * base, drop=True)

    def forward(self, encoded: Encoded) -> Float[Tensor, "n f z y x"]:
        """Features of every voxel."""
        x = _merged(self.dec3, self.up3(encoded.bottom), encoded.quarter)
        x = _merged(self.dec2, self.up2(x), encoded.half)
        full = partial(_merged, self.dec1)
        return _run(full, self.up1(x), encoded.full, recompute=self.recompute)


def _up_convolution(
    filters: int, stride: tuple[int, int, int], blocks: Blocks
) -> nn.ConvTranspose3d:
    kernel = ALL if blocks.up_kernel == "meyer" else stride
    return nn.ConvTranspose3d(filters, filters, kernel, stride)


def _merged(block: nn.Sequential, up: Tensor, high: Tensor) -> Tensor:
    """A decoder's block on up-convolved features, activated, beside those of the encoder.

    Its first convolution is the sum of one over each, so that no copy of both has to be kept for
    the backward pass.
    """
    first, rest = block[0], block[1:]
    assert isinstance(first, nn.Conv3d)
    low = F.relu(up)[:, :, : high.shape[2]]
    of_low, of_high = first.weight[:, : low.shape[1]], first.weight[:, low.shape[1] :]
    merged = F.conv3d(low, of_low, first.bias, padding=1) + F.conv3d(high, of_high, padding=1)
    features: Tensor = rest(merged)
    return features


def _pooled(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Maximum over boxes; by reshaping, since CUDA's 3-D pooling has no deterministic backward."""
    if not x.is_cuda:
        return F.max_pool3d(x, factors)
    n, c, *size = x.shape
    (z, y, w), (fz, fy, fx) = size, factors
    return x.reshape(n, c, z // fz, fz, y // fy, fy, w // fx, fx).amax((3, 5, 7))


def _run(block: Callable[..., Tensor], *x: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        kept: Tensor = checkpoint(block, *x, use_reentrant=False)
        return kept
    return block(*x)


def initialise(module: nn.Module) -> None:
    """Kaiming-normal weights and no bias, for `nn.Module.apply`."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def require_divisible(x: Tensor) -> None:
    """Refuse an image that the poolings do not divide.

    Raises:
        ValueError: Names the axis and the factor.
    """
    for axis, size, factor in zip("zyx", x.shape[2:], HALVINGS, strict=True):
        if size % factor:
            raise ValueError(
                f"an image of {size} voxels along {axis} cannot be pooled: give a multiple of "
                f"{factor}"
            )
