"""Networks: AnisoUNet of Meyer et al. (ISBI 2019), the dual-path network, MONAI's UNet.

All of them map an image to logits. The dual-path network has two paths, each for zones that touch
one another and for the rest; `fuse` makes five classes of them (after Das, Ghosh and Stober,
arXiv 2309.12970, whose abstract leaves the zones of the paths open).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych_pirads.blocks import (
    ALL,
    IN_PLANE,
    Blocks,
    Decoder,
    Encoded,
    Image,
    Norm,
    Stem,
    Trunk,
    UpKernel,
    initialise,
    require_divisible,
)
from diptych_pirads.config import ModelSection
from diptych_pirads.fusion import (
    PATHS,
    Fuse,
    Paths,
    common_maps,
    common_zones,
    fuse,
    log_fuse,
    path_classes,
)
from diptych_pirads.labels import ZONES

__all__ = [
    "AnisoUNet",
    "DualOut",
    "DualPathNet",
    "ZoneProbabilities",
    "fuse",
    "log_fuse",
    "network",
    "network_input",
    "probabilities",
]

Share = Literal["none", "encoder", "stem"]
Head = Literal["sdf", "presence", "reconstruct"]
Answer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

HEADS: tuple[Head, ...] = ("sdf", "presence")


class DualOut(NamedTuple):
    """What the two paths say; channel 0 of the logits is the rest.

    Args:
        a: Logits of path a, one channel for the rest and one for each of its zones.
        b: Logits of path b.
        sdf_a: Signed distance to each zone's border in units of 10 mm, in [-1, 1].
        sdf_b: Likewise.
        presence_a: Logits that a slice holds each zone.
        presence_b: Likewise.
        reconstruct_a: The image as path a restores it.
        reconstruct_b: Likewise.
    """

    a: Float[Tensor, "n 1+ka z y x"]
    b: Float[Tensor, "n 1+kb z y x"]
    sdf_a: Float[Tensor, "n ka z y x"] | None = None
    sdf_b: Float[Tensor, "n kb z y x"] | None = None
    presence_a: Float[Tensor, "n ka z"] | None = None
    presence_b: Float[Tensor, "n kb z"] | None = None
    reconstruct_a: Image | None = None
    reconstruct_b: Image | None = None


@dataclass(frozen=True, eq=False)
class ZoneProbabilities:
    """What a network says about an image.

    Args:
        fused: Probabilities of background, PZ, TZ, DPU and AFS.
        a: Path a's probability of each zone that both paths know, by zone name; None for a
            network with one path.
        b: Path b's.
        features: Means of the bottleneck's features over the image, before normalisation; None
            where not asked for.
    """

    fused: Float[Tensor, "n 5 z y x"]
    a: Mapping[str, Float[Tensor, "n z y x"]] | None
    b: Mapping[str, Float[Tensor, "n z y x"]] | None
    features: Float[Tensor, "n f"] | None = None


class AnisoUNet(nn.Module):
    """U-Net for slices that are thicker than their pixels, Meyer et al. (ISBI 2019).

    Of the three poolings two act within slices alone.

    Args:
        in_channels: Input channels.
        out_channels: Classes.
        base: Filters of the first convolution; 16 in the paper.
        up_kernel: See `Blocks`; "meyer" as in the paper's code.
        norm: "batch" as in the paper.
        dropout: 0.5 in the paper.
        checkpoint: Less memory for more time in training.

    Example:
        ``AnisoUNet(1, 5, 16, "meyer", "batch")`` has the paper's 6,098,245 parameters.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 5,
        base: int = 16,
        up_kernel: UpKernel = "stride",
        norm: Norm = "instance",
        dropout: float = 0.5,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        blocks = Blocks(base, up_kernel, norm, dropout, checkpoint)
        self.stem, self.trunk = Stem(in_channels, blocks), Trunk(blocks)
        self.decoder = Decoder(blocks)
        self.head = nn.Conv3d(2 * base, out_channels, 1)
        self.apply(initialise)

    def forward(self, x: Image) -> Float[Tensor, "n k z y x"]:
        """Logits of every voxel.

        Raises:
            ValueError: A size that the poolings do not divide.
        """
        return self.decode(self.encode(x))

    def encode(self, x: Image) -> Encoded:
        """Features of all resolutions."""
        require_divisible(x)
        encoded: Encoded = self.trunk(self.stem(x))
        return encoded

    def decode(self, encoded: Encoded) -> Float[Tensor, "n k z y x"]:
        """Logits from features."""
        logits: Tensor = self.head(self.decoder(encoded))
        return logits


class Path(nn.Module):
    """Decoder and heads of one path.

    Args:
        zones: Number of its zones.
        in_channels: Channels of the image.
        heads: Auxiliary heads.
        blocks: How blocks are made.
    """

    def __init__(self, zones: int, in_channels: int, heads: Sequence[Head], blocks: Blocks) -> None:
        super().__init__()
        features = 2 * blocks.base
        self.decoder = Decoder(blocks)
        self.head = nn.Conv3d(features, 1 + zones, 1)
        self.sdf = nn.Conv3d(features, zones, 1) if "sdf" in heads else None
        self.presence = nn.Linear(2 * features, zones) if "presence" in heads else None
        restored = nn.Conv3d(features, in_channels, 1) if "reconstruct" in heads else None
        self.reconstruct = restored

    def forward(
        self, encoded: Encoded
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Logits, signed distances, logits of presence, restored image."""
        features = self.decoder(encoded)
        presence = None
        if self.presence is not None:
            pooled = torch.cat([features.amax((3, 4)), features.mean((3, 4))], 1)
            presence = self.presence(pooled.transpose(1, 2)).transpose(1, 2)
        return (
            self.head(features),
            None if self.sdf is None else self.sdf(features).tanh(),
            presence,
            None if self.reconstruct is None else self.reconstruct(features),
        )


class DualPathNet(nn.Module):
    """Two paths, each for the zones that touch one another.

    Args:
        in_channels: Input channels.
        paths: Zones of path "a" and "b", as positions in `labels.ZONES`; together all zones.
        base: Filters of the first convolution.
        share: What the paths have in common: "none", the "stem", or the whole "encoder".
        up_kernel: See `Blocks`.
        norm: See `Blocks`.
        dropout: See `Blocks`.
        heads: Auxiliary heads of both paths.
        fuse: How `probabilities` makes five classes of the paths, see `fuse`.
        checkpoint: Less memory for more time in training.

    Example:
        >>> net = DualPathNet(base=4, share="encoder")
        >>> net(torch.zeros(1, 1, 2, 16, 16)).b.shape
        torch.Size([1, 4, 2, 16, 16])
    """

    def __init__(
        self,
        in_channels: int = 1,
        paths: Paths = PATHS,
        base: int = 16,
        share: Share = "none",
        up_kernel: UpKernel = "stride",
        norm: Norm = "instance",
        dropout: float = 0.5,
        heads: Sequence[Head] = HEADS,
        fuse: Fuse = "product",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        blocks = Blocks(base, up_kernel, norm, dropout, checkpoint)
        self.paths = {name: tuple(paths[name]) for name in ("a", "b")}
        self.fuse, self.share = fuse, share
        self.stem_a, self.trunk_a = Stem(in_channels, blocks), Trunk(blocks)
        self.stem_b = Stem(in_channels, blocks) if share == "none" else None
        self.trunk_b = Trunk(blocks) if share != "encoder" else None
        self.path_a = Path(len(paths["a"]), in_channels, heads, blocks)
        self.path_b = Path(len(paths["b"]), in_channels, heads, blocks)
        self.apply(initialise)

    def forward(self, x: Image, other: Image | None = None) -> DualOut:
        """What both paths say.

        Args:
            x: The image.
            other: The same image with other intensities, for path b; None: as `x`.

        Raises:
            ValueError: A size that the poolings do not divide.
        """
        return self.decode(*self.encode(x, other))

    def encode(self, x: Image, other: Image | None = None) -> tuple[Encoded, Encoded]:
        """Features for both paths; the same where the encoder is shared."""
        require_divisible(x)
        full_a = self.stem_a(x)
        alone = self.stem_b or (self.stem_a if other is not None else None)
        full_b = full_a if alone is None else alone(x if other is None else other)
        a: Encoded = self.trunk_a(full_a)
        if self.trunk_b is None and full_b is full_a:
            return a, a
        return a, (self.trunk_b or self.trunk_a)(full_b)

    def decode(self, a: Encoded, b: Encoded) -> DualOut:
        """Logits and heads from features."""
        of_a, of_b = self.path_a(a), self.path_b(b)
        pairs = [part for both in zip(of_a, of_b, strict=True) for part in both]
        return DualOut(*pairs)


def probabilities(module: nn.Module, x: Image) -> ZoneProbabilities:
    """Zones of an image, by any of the networks.

    Args:
        module: From `network`, or one of the classes above.
        x: Image channels; one of zeros is a missing one.

    Returns:
        Probabilities in single precision, and the features of the bottleneck.
    """
    x = network_input(x)
    if isinstance(module, DualPathNet):
        encoded = module.encode(x)
        out = module.decode(*encoded)
        common = common_zones(module.paths)
        a, b = (
            dict(zip([ZONES[c] for c in common], maps.unbind(1), strict=True))
            for maps in (
                common_maps(out.a, module.paths["a"], common),
                common_maps(out.b, module.paths["b"], common),
            )
        )
        shared = encoded[0] is encoded[1]
        means = encoded[0].means if shared else torch.cat([part.means for part in encoded], 1)
        return ZoneProbabilities(fuse(out.a, out.b, module.paths, module.fuse), a, b, means)
    if isinstance(module, AnisoUNet):
        one = module.encode(x)
        logits = module.decode(one)
        return ZoneProbabilities(logits.float().softmax(1), None, None, one.means)
    means = _unet_bottleneck(module, x).float().mean((2, 3, 4))
    return ZoneProbabilities(module(x).float().softmax(1), None, None, means)


def network(settings: ModelSection, channels: int, heads: Sequence[Head] = ()) -> nn.Module:
    """A fresh network.

    Args:
        settings: The config's section ``model``.
        channels: Number of image channels.
        heads: Auxiliary heads of the dual-path network.

    Returns:
        A `DualPathNet`, an `AnisoUNet` or MONAI's `UNet` with the same poolings.
    """
    inputs = 2 * channels - 1
    if settings.name == "unet":
        return _unet(inputs, settings)
    shape: dict[str, Any] = {
        "base": settings.base,
        "up_kernel": settings.up_kernel,
        "norm": settings.norm,
        "dropout": settings.dropout,
        "checkpoint": settings.checkpoint,
    }
    if settings.name == "aniso":
        return AnisoUNet(inputs, len(ZONES), **shape)
    paths = path_classes(settings.paths)
    return DualPathNet(
        inputs, paths, share=settings.share, heads=heads, fuse=settings.fuse, **shape
    )


def network_input(image: Image) -> Float[Tensor, "n 2c-1 z y x"]:
    """Image channels, then for each but the first a constant channel: whether it is there.

    Args:
        image: Channels, T2-weighted first; one of zeros is a missing one.

    Returns:
        What networks take; `image` itself where it has one channel.
    """
    others = image[:, 1:]
    there = (others != 0).any(-1).any(-1).any(-1)[:, :, None, None, None]
    return torch.cat([image, there.to(image.dtype).expand_as(others)], 1)


def _unet(inputs: int, settings: ModelSection) -> nn.Module:
    from monai.networks.nets.unet import UNet

    base = settings.base
    strides: Any = (IN_PLANE, IN_PLANE, ALL)  # each may be a number an axis
    unet: nn.Module = UNet(
        spatial_dims=3,
        in_channels=inputs,
        out_channels=len(ZONES),
        channels=(2 * base, 4 * base, 8 * base, 16 * base),
        strides=strides,
        num_res_units=2,
        norm=settings.norm,
        dropout=settings.dropout,
    )
    return unet


def _unet_bottleneck(unet: nn.Module, x: Tensor) -> Tensor:
    """The way down through MONAI's nested blocks: each is a step down, the rest, a step up."""
    block: Any = unet.model
    while isinstance(block, nn.Sequential):
        x = block[0](x)
        block = block[1].submodule
    features: Tensor = block(x)
    return features
