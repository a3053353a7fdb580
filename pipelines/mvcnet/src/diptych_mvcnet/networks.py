"""The networks beside MVCNet: IFNet in its forms, EEGNet and ShallowConvNet.

All of them give logits from ``decode(x)``, so that evaluation, prediction and export treat every
network alike. They are trained with cross-entropy alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import UsageError
from diptych_mvcnet.config import BRAINDECODE, MVCNetConfig
from diptych_mvcnet.model import MVCNet, convolutional

RADIX_2_HZ = ((4.0, 16.0), (16.0, 40.0))


class IFNet(nn.Module):
    """The convolutional branch of MVCNet with its classifier and nothing else.

    Args:
        n_chans: Channels C.
        n_times: Samples T of an epoch.
        n_classes: Classes K.
        sfreq: Sampling rate in Hz.
        config: The configuration; ``model.cnn`` is used.
    """

    def __init__(
        self, n_chans: int, n_times: int, n_classes: int, *, sfreq: float, config: MVCNetConfig
    ) -> None:
        super().__init__()
        self.bands, self.cnn = convolutional(n_chans, n_times, sfreq, config.model)
        self.head = nn.Linear(self.cnn.out_dim, n_classes)

    def forward(self, x: Float[Tensor, "VB C T"], views: int = 1) -> Float[Tensor, "VB K"]:
        """Logits of ``views`` stacked views."""
        logits: Tensor = self.head(self.cnn(self.bands(x), views))
        return logits

    def decode(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.forward(x)


class EEGNet(nn.Module):
    """EEGNet-8,2 (Lawhern et al., J. Neural Eng. 2018), lengths scaled from 128 Hz.

    Args:
        n_chans: Channels C.
        n_times: Samples T of an epoch.
        n_classes: Classes K.
        sfreq: Sampling rate in Hz.
        dropout: Probability of dropping a feature.

    Raises:
        ValueError: The epoch is shorter than both pools.
    """

    def __init__(
        self, n_chans: int, n_times: int, n_classes: int, *, sfreq: float, dropout: float = 0.5
    ) -> None:
        super().__init__()
        first = max(round(sfreq / 32), 1)
        pooled = n_times // first // 8
        _need_samples("eegnet", n_times, 8 * first)
        kernel = max(round(sfreq / 2), 1)
        self.temporal = nn.Sequential(_same(kernel), nn.Conv2d(1, 8, (1, kernel), bias=False))
        self.temporal_norm = nn.BatchNorm2d(8)
        self.spatial = nn.Conv2d(8, 16, (n_chans, 1), groups=8, bias=False)
        self.spatial_norm = nn.BatchNorm2d(16)
        self.pool = nn.AvgPool2d((1, first))
        self.separable = nn.Sequential(
            _same(16),
            nn.Conv2d(16, 16, (1, 16), groups=16, bias=False),
            nn.Conv2d(16, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ELU(),
            nn.AvgPool2d((1, 8)),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16 * pooled, n_classes)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits; spatial filters and classifier rows keep norms of at most 1 and 0.25."""
        h = self.temporal_norm(self.temporal(x[:, None]))
        h = F.conv2d(h, _at_most(self.spatial.weight, 1.0), groups=8)
        h = self.dropout(self.pool(F.elu(self.spatial_norm(h))))
        h = self.dropout(self.separable(h)).flatten(1)
        return F.linear(h, _at_most(self.head.weight, 0.25), self.head.bias)

    def decode(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.forward(x)


class ShallowConvNet(nn.Module):
    """Log power of learned spatial and temporal filters (Schirrmeister et al., HBM 2017).

    Args:
        n_chans: Channels C.
        n_times: Samples T of an epoch.
        n_classes: Classes K.
        sfreq: Sampling rate in Hz; lengths are scaled from 250 Hz.
        dropout: Probability of dropping a feature.

    Raises:
        ValueError: The epoch is shorter than filter and pool together.
    """

    def __init__(
        self, n_chans: int, n_times: int, n_classes: int, *, sfreq: float, dropout: float = 0.5
    ) -> None:
        super().__init__()
        kernel, pool = max(round(0.1 * sfreq), 1), max(round(0.3 * sfreq), 1)
        self.pool, self.stride = pool, max(round(0.06 * sfreq), 1)
        _need_samples("shallow", n_times, kernel + pool - 1)
        self.temporal = nn.Conv2d(1, 40, (1, kernel))
        self.spatial = nn.Conv2d(40, 40, (n_chans, 1), bias=False)
        self.norm = nn.BatchNorm2d(40)
        self.dropout = nn.Dropout(dropout)
        pooled = (n_times - kernel + 1 - pool) // self.stride + 1
        self.head = nn.Linear(40 * pooled, n_classes)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits."""
        h = self.norm(self.spatial(self.temporal(x[:, None]))).squeeze(2).square()
        h = F.avg_pool1d(h, self.pool, self.stride).clamp_min(1e-6).log()
        logits: Tensor = self.head(self.dropout(h).flatten(1))
        return logits

    def decode(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.forward(x)


class Braindecode(nn.Module):
    """A model of the library braindecode, by its class name (extra ``braindecode``).

    Args:
        name: Class in ``braindecode.models``.
        n_chans: Channels C.
        n_times: Samples T of an epoch.
        n_classes: Classes K.
        sfreq: Sampling rate in Hz.

    Raises:
        UsageError: braindecode does not import, or has no such class.
    """

    def __init__(
        self, name: str, n_chans: int, n_times: int, n_classes: int, *, sfreq: float
    ) -> None:
        super().__init__()
        try:
            models = importlib.import_module("braindecode.models")
        except (ImportError, OSError) as error:
            raise UsageError(
                f"baseline {BRAINDECODE}{name}: braindecode does not import ({error}): install "
                "diptych-mvcnet[braindecode] with a torchaudio that matches torch (same version, "
                "CPU or CUDA alike), or leave the baseline out"
            ) from error
        kind = getattr(models, name, None)
        if kind is None:
            raise UsageError(f"braindecode.models has no class '{name}': see its list of models")
        self.network: nn.Module = kind(
            n_chans=n_chans, n_outputs=n_classes, n_times=n_times, sfreq=sfreq
        )

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits."""
        logits: Tensor = self.network(x)
        return logits

    def decode(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.forward(x)


def network(method: str, facts: Mapping[str, Any], config: MVCNetConfig) -> nn.Module:
    """The network of a method, from facts alone.

    Args:
        method: "" for MVCNet, or a network baseline of ``evaluate.baselines``.
        facts: ch_names, n_times, classes and sfreq of the prepared data.
        config: The configuration.

    Returns:
        A fresh network with ``decode(x) -> logits``.

    Raises:
        UsageError: An epoch that is too short for the network, or an unknown method.
    """
    n_chans, n_times = len(facts["ch_names"]), int(facts["n_times"])
    shape = (n_chans, n_times, len(facts["classes"]))
    sfreq = float(facts["sfreq"])
    try:
        if method == "":
            return MVCNet(*shape, sfreq=sfreq, config=config)
        if method in ("ifnet", "ifnet_views"):
            return IFNet(*shape, sfreq=sfreq, config=_with_bands(config, None))
        if method == "ifnet_two_band":
            return IFNet(*shape, sfreq=sfreq, config=_with_bands(config, RADIX_2_HZ))
        if method == "eegnet":
            return EEGNet(*shape, sfreq=sfreq)
        if method == "shallow":
            return ShallowConvNet(*shape, sfreq=sfreq)
    except ValueError as error:
        raise UsageError(f"{method or 'mvcnet'}: {error}") from error
    if method.startswith(BRAINDECODE):
        return Braindecode(method.removeprefix(BRAINDECODE), *shape, sfreq=sfreq)
    raise UsageError(f"'{method}' is no network: see evaluate.baselines in the configuration")


def _with_bands(
    config: MVCNetConfig, bands: tuple[tuple[float, float], ...] | None
) -> MVCNetConfig:
    cnn = config.model.cnn.model_copy(update={"bands": bands})
    model = config.model.model_copy(update={"cnn": cnn})
    return config.model_copy(update={"model": model})


def _same(kernel: int) -> nn.Module:
    """Padding in time after which a kernel gives as many samples as it got."""
    return nn.ZeroPad2d(((kernel - 1) // 2, kernel // 2, 0, 0))


def _at_most(weight: Tensor, norm: float) -> Tensor:
    """Rows scaled down to a largest norm."""
    return torch.renorm(weight, 2, 0, norm)


def _need_samples(name: str, n_times: int, needed: int) -> None:
    if n_times < needed:
        raise ValueError(
            f"the epoch has {n_times} samples and {name} needs {needed}: use a longer data.window"
        )
