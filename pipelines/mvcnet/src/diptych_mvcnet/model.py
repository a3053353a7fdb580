r"""MVCNet: a small convolutional decoder, and a Transformer that regularises it in training.

Wang et al., "MVCNet: Multi-View Contrastive Network for Motor Imagery Classification", 2025,
arXiv 2502.17482. The convolutional branch is IFNet (Wang et al., IEEE TNSRE 2023).

    x (B, C, T) --IFNetBranch--------> z_cnn (B, D) --Linear--> logits (B, K)
                \-TransformerBranch--> z_tr  (B, D), in training only
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych_mvcnet.config import CNNSection, ModelSection, MVCNetConfig

PATCH_S = 0.1  # a token of ``tokens: time``, in seconds


class MVCNetOutput(NamedTuple):
    """What a forward pass gives.

    Args:
        logits: (B, K).
        z_cnn: Features of the convolutional branch (B, D).
        z_tr: Features of the Transformer branch (B, D).
    """

    logits: Float[Tensor, "B K"]
    z_cnn: Float[Tensor, "B D"]
    z_tr: Float[Tensor, "B D"]


def odd(number: float) -> int:
    """The next odd number upward from the rounded number."""
    whole = round(number)
    return whole if whole % 2 else whole + 1


def kernel_samples(settings: CNNSection, sfreq: float) -> int:
    """Temporal kernel in samples: ``kernel``, or ``kernel_s`` at this sampling rate in Hz."""
    return settings.kernel or odd(settings.kernel_s * sfreq)


def pool_samples(settings: CNNSection, sfreq: float) -> int:
    """Average pooling in samples: ``pool``, or ``pool_s`` at this sampling rate in Hz."""
    return settings.pool or max(round(settings.pool_s * sfreq), 1)


class ViewBatchNorm(nn.BatchNorm1d):
    """Batch norm over stacked views: each view has its own statistics.

    Running statistics are updated view after view, as separate passes would do. Decoding corrects
    them for their start at mean 0 and variance 1, as Adam does with its moments: narrow kernels
    give variances so small that after few steps the start would hide the data. After a hundred
    updates there is nothing left to correct.
    """

    def forward(self, x: Float[Tensor, "VB F T"], views: int = 1) -> Float[Tensor, "VB F T"]:
        """Normalise ``views`` equal parts of the batch, each by itself."""
        if not self.training:
            mean, variance = self._corrected()
            return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        if views == 1:
            return super().forward(x)
        normalise = super().forward
        return torch.cat([normalise(part) for part in x.chunk(views)])

    def _corrected(self) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
        mean, variance, updates = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert updates is not None
        assert self.momentum is not None
        start = torch.where(updates > 0, (1.0 - self.momentum) ** updates, 0.0)
        return mean / (1.0 - start), ((variance - start) / (1.0 - start)).clamp_min(0.0)


class BandSplit(nn.Module):
    """Fixed zero-phase FIR band-pass filters; the bands are stacked on the channels.

    They are part of the network, not of the data, so that prediction, streams and exported
    graphs need no second filter. Windowed sinc (Hamming), with reflected edges.

    Args:
        bands: Pass bands in Hz.
        sfreq: Sampling rate in Hz.
        n_times: Samples of an epoch; no filter is longer than two epochs.
    """

    taps: Tensor

    def __init__(self, bands: Sequence[tuple[float, float]], sfreq: float, n_times: int) -> None:
        super().__init__()
        half = min(round(1.65 * sfreq / 2.0), n_times - 1)  # transition of 2 Hz at the edges
        time = torch.arange(-half, half + 1, dtype=torch.float64) / sfreq
        window = torch.hamming_window(2 * half + 1, periodic=False, dtype=torch.float64)
        taps = [
            window * 2 / sfreq * (high * torch.sinc(2 * high * time))
            - window * 2 / sfreq * (low * torch.sinc(2 * low * time))
            for low, high in bands
        ]
        self.register_buffer("taps", torch.stack(taps).float(), persistent=False)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B bandsC T"]:
        """Filter every channel into every band."""
        batch, n_chans, n_times = x.shape
        half = self.taps.shape[-1] // 2
        padded = F.pad(x, (half, half), mode="reflect").reshape(batch * n_chans, 1, -1)
        split = F.conv1d(padded, self.taps.to(x.dtype)[:, None])
        split = split.reshape(batch, n_chans, -1, n_times).transpose(1, 2)
        return split.reshape(batch, -1, n_times)


def depthwise_in_blocks(
    x: Float[Tensor, "B F T"], weight: Float[Tensor, "F 1 k"]
) -> Float[Tensor, "B F T"]:
    """Depth-wise convolution as products of blocks of time with banded matrices.

    Equal to ``conv1d(x, weight, padding=k // 2, groups=F)``; on CPUs, where the gradient of that
    is slow, it halves the time of a training step's convolutions.

    Args:
        x: Signals.
        weight: One kernel of odd length k a channel.

    Returns:
        Filtered signals of the same length.
    """
    n_batch, n_filters, n_times = x.shape
    kernel = weight.shape[-1]
    block = 2 * kernel
    n_blocks = -(-n_times // block)
    half = kernel // 2
    padded = F.pad(x, (half, half + n_blocks * block - n_times))
    pieces = padded.unfold(2, block + kernel - 1, block).transpose(0, 1)
    lag = torch.arange(block + kernel - 1)[:, None] - torch.arange(block)
    band = (lag >= 0) & (lag < kernel)
    banded = torch.where(band, weight[:, 0][:, lag.clamp(0, kernel - 1)], 0.0)
    blocks = torch.bmm(pieces.reshape(n_filters, n_batch * n_blocks, -1), banded)
    return blocks.reshape(n_filters, n_batch, -1)[..., :n_times].transpose(0, 1)


class IFNetBranch(nn.Module):
    """The convolutional branch: spatial filters, temporal filters, average pooling.

    Args:
        n_chans: Channels C of a band.
        n_times: Samples T.
        filters: Spatial filters F of a band.
        kernel: Temporal kernel of the first band in samples; each further band has half of the
            one before, made odd (63 and 31 in the original with two bands).
        pool: Average pooling in samples.
        bands: Bands stacked on the channels of the input.
        dropout: Probability of dropping a feature.

    Raises:
        ValueError: The epoch is shorter than the pool.

    Example:
        >>> IFNetBranch(22, 1001).out_dim
        512
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        *,
        filters: int = 64,
        kernel: int = 63,
        pool: int = 125,
        bands: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if n_times < pool:
            raise ValueError(
                f"the epoch has {n_times} samples, the pool {pool}: use a longer data.window or "
                "a shorter model.cnn.pool_s"
            )
        self.bands, self.pool = bands, pool
        self.out_dim = filters * (n_times // pool)
        self.spatial = nn.Conv1d(bands * n_chans, bands * filters, 1, bias=False, groups=bands)
        self.spatial_norm = ViewBatchNorm(bands * filters)
        kernels = [odd(max(kernel >> band, 1)) if band else kernel for band in range(bands)]
        self.temporal = nn.ModuleList(
            nn.Conv1d(filters, filters, k, padding=k // 2, groups=filters, bias=False)
            for k in kernels
        )
        self.temporal_norm = nn.ModuleList(ViewBatchNorm(filters) for _ in kernels)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, x: Float[Tensor, "VB bandsC T"], views: int = 1) -> Float[Tensor, "VB D"]:
        """Features of ``views`` stacked views of a batch."""
        n_batch, n_times = x.shape[0], x.shape[-1]  # len(x) would fix the size in an export
        # a matrix product: with its gradient three times as fast as a convolution on CPUs
        weight = self.spatial.weight.reshape(self.bands, -1, self.spatial.weight.shape[1])
        h = torch.matmul(weight, x.reshape(n_batch, self.bands, -1, n_times)).flatten(1, 2)
        parts = self.spatial_norm(h, views).chunk(self.bands, dim=1)
        summed = [
            norm(self._filter(part, conv), views)
            for part, conv, norm in zip(parts, self.temporal, self.temporal_norm, strict=True)
        ]
        h = torch.stack(summed).sum(0) if self.bands > 1 else summed[0]
        h = F.gelu(h)
        h = F.avg_pool1d(h, self.pool)  # the last samples that fill no pool are dropped
        features: Tensor = self.dropout(h).flatten(1)
        return features

    def _filter(self, x: Float[Tensor, "B F T"], conv: nn.Module) -> Float[Tensor, "B F T"]:
        if self.training and x.device.type == "cpu":
            weight: Tensor = conv.weight  # type: ignore[assignment]
            return depthwise_in_blocks(x, weight)
        filtered: Tensor = conv(x)
        return filtered


class Projector(nn.Module):
    """Tokens to D features.

    Args:
        n_tokens: Tokens L.
        width: Features E of a token.
        out_dim: D.
        form: "parity" is the official projector on the L * E flattened features; "factorised"
            first maps every token by one Linear(E, rank), a rank-restricted form of the same map.
        rank: Features of a token in the factorised form.
    """

    def __init__(self, n_tokens: int, width: int, out_dim: int, form: str, rank: int) -> None:
        super().__init__()
        factorised = form == "factorised"
        self.shared = nn.Linear(width, rank) if factorised else nn.Identity()
        self.hidden = nn.Linear(n_tokens * (rank if factorised else width), 4 * out_dim)
        self.norm = nn.LayerNorm(4 * out_dim)
        self.out = nn.Linear(4 * out_dim, out_dim)

    def forward(self, tokens: Float[Tensor, "B L E"]) -> Float[Tensor, "B D"]:
        """Features in (-1, 1)."""
        h = self.hidden(self.shared(tokens).flatten(1))
        return torch.tanh(self.out(F.relu(self.norm(h))))


class TransformerBranch(nn.Module):
    """The attention branch with its projector.

    Args:
        n_chans: Channels C.
        n_times: Samples T.
        out_dim: Features D of the convolutional branch.
        tokens: "channels": a token is the time course of a channel, without position, so that
            the encoder is equivariant to the order of channels. "time": a token is a patch of
            all channels, with a learned position.
        embed_dim: Width E of a token; None takes T less the rest by ``heads`` (official).
        heads: Attention heads.
        layers: Encoder layers.
        dropout: Probability of dropping a feature.
        projector: "parity" | "factorised".
        rank: Of the factorised projector.
        patch: Samples of a time token.

    Raises:
        ValueError: Time tokens without ``embed_dim`` or ``patch``, or with an epoch too short.
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        out_dim: int,
        *,
        tokens: str = "channels",
        embed_dim: int | None = None,
        heads: int = 2,
        layers: int = 1,
        dropout: float = 0.1,
        projector: str = "parity",
        rank: int = 32,
        patch: int | None = None,
    ) -> None:
        super().__init__()
        self.over_time = tokens == "time"
        self.width = embed_dim or n_times - n_times % heads
        self.embed: nn.Module = nn.Identity()
        self.position: nn.Parameter | None = None
        n_tokens = n_chans
        if self.over_time:
            if embed_dim is None or patch is None or n_times < patch:
                raise ValueError(
                    f"tokens='time' has embed_dim {embed_dim}, patch {patch} and {n_times} "
                    "samples: pass embed_dim and a patch within the epoch"
                )
            n_tokens = n_times // patch
            self.embed = nn.Conv1d(n_chans, embed_dim, patch, stride=patch)
            self.position = nn.Parameter(0.02 * torch.randn(n_tokens, embed_dim))
        elif embed_dim is not None:
            self.embed = nn.Linear(n_times, embed_dim)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.width, heads, max(2 * self.width, 128), dropout, batch_first=True
            )
            for _ in range(layers)
        )
        self.projector = Projector(n_tokens, self.width, out_dim, projector, rank)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B D"]:
        """Features of a batch."""
        h = self.embed(x)
        h = h.transpose(1, 2) if self.over_time else h[..., : self.width]
        if self.position is not None:
            h = h + self.position
        for layer in self.encoder:
            h = layer(h)
        features: Tensor = self.projector(h)
        return features


class MVCNet(nn.Module):
    """Both branches and the classifier.

    Args:
        n_chans: Channels C.
        n_times: Samples T of an epoch.
        n_classes: Classes K.
        sfreq: Sampling rate in Hz.
        config: The configuration; its section ``model`` is used.

    Example:
        >>> net = MVCNet(21, 300, 2, sfreq=100.0, config=MVCNetConfig())
        >>> net.decode(torch.zeros(1, 21, 300)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self, n_chans: int, n_times: int, n_classes: int, *, sfreq: float, config: MVCNetConfig
    ) -> None:
        super().__init__()
        settings = config.model
        self.bands, self.cnn = convolutional(n_chans, n_times, sfreq, settings)
        self.transformer = TransformerBranch(
            n_chans,
            n_times,
            self.cnn.out_dim,
            **settings.transformer.model_dump(),
            projector=settings.projector.form,
            rank=settings.projector.rank,
            patch=round(PATCH_S * sfreq),
        )
        self.fused = settings.head == "fused"
        self.head = nn.Linear(self.cnn.out_dim * (1 + self.fused), n_classes)

    def forward(self, x: Float[Tensor, "VB C T"], views: int = 1) -> MVCNetOutput:
        """Logits and the features of both branches.

        Args:
            x: Aligned trials; ``views`` views of a batch may be stacked.
            views: Stacked views, each with batch statistics of its own in training mode.
        """
        z_cnn, z_tr = self.cnn(self.bands(x), views), self.transformer(x)
        features = torch.cat([z_cnn, z_tr], dim=1) if self.fused else z_cnn
        return MVCNetOutput(self.head(features), z_cnn, z_tr)

    def decode(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits, by the modules that they need.

        Args:
            x: Aligned trials.
        """
        if self.fused:
            return self.forward(x).logits
        logits: Tensor = self.head(self.cnn(self.bands(x)))
        return logits


def convolutional(
    n_chans: int, n_times: int, sfreq: float, settings: ModelSection
) -> tuple[nn.Module, IFNetBranch]:
    """The convolutional branch of a configuration, and the band filters before it.

    Args:
        n_chans: Channels C.
        n_times: Samples T of an epoch.
        sfreq: Sampling rate in Hz.
        settings: Section ``model``.

    Returns:
        The band filters (the identity without ``cnn.bands``) and the branch.
    """
    cnn = settings.cnn
    branch = IFNetBranch(
        n_chans,
        n_times,
        filters=cnn.filters,
        kernel=kernel_samples(cnn, sfreq),
        pool=pool_samples(cnn, sfreq),
        bands=len(cnn.bands or (None,)),
        dropout=cnn.dropout,
    )
    return (BandSplit(cnn.bands, sfreq, n_times) if cnn.bands else nn.Identity()), branch


def forward_views(
    net: MVCNet, views: Sequence[Float[Tensor, "B C T"]], *, grouped: bool = True
) -> list[MVCNetOutput]:
    """Pass all views of a batch through the network.

    Args:
        net: The network.
        views: V views of the same trials, raw first.
        grouped: One pass over the stacked views (faster), or V passes; equal to rounding.

    Returns:
        One output a view.
    """
    if not grouped:
        return [net(view) for view in views]
    stacked = net(torch.cat(list(views)), len(views))
    parts = [output.chunk(len(views)) for output in stacked]
    return [MVCNetOutput(*one) for one in zip(*parts, strict=True)]
