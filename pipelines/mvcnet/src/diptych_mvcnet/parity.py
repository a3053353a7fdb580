"""Bridges to the official MVCNet code, so that its results can be compared number by number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diptych.errors import DataError
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.model import MVCNet

MAX_BYTES = 1 << 30
OFFICIAL_KERNEL = 63
KEYS = {
    "0.stem.sconv.conv.weight": "cnn.spatial.weight",
    "0.stem.tconv.0.conv.weight": "cnn.temporal.0.weight",
    "1.fc.weight": "head.weight",
    "1.fc.bias": "head.bias",
    **{
        f"0.stem.{theirs}.bn.{value}": f"cnn.{ours}.{value}"
        for theirs, ours in (("sconv", "spatial_norm"), ("tconv.0", "temporal_norm.0"))
        for value in ("weight", "bias", "running_mean", "running_var")
    },
}

# Left and right electrodes exchanged by the official code (0-based), by MOABB data set.
OFFICIAL_PAIRS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "BNCI2014001": ((1, 2, 6, 7, 8, 13, 14, 18), (5, 4, 12, 11, 10, 17, 16, 20)),
    "Zhou2016": ((0, 2, 5, 8, 11), (1, 4, 7, 10, 13)),
    "BNCI2014002": ((0, 3, 4, 5, 6, 12), (2, 11, 10, 9, 8, 14)),
    "BNCI2015001": ((0, 3, 4, 5, 10), (2, 9, 8, 7, 12)),
    "BNCI2014004": ((0,), (2,)),
}


def official_mirror(dataset: str, n_chans: int) -> Tensor:
    """The reflection of the official code.

    Args:
        dataset: MOABB name, a key of ``OFFICIAL_PAIRS``.
        n_chans: Channels C.

    Returns:
        A permutation for :func:`diptych_mvcnet.views.reflect`, shape (C,).
    """
    mirror = torch.arange(n_chans)
    left, right = (torch.tensor(side) for side in OFFICIAL_PAIRS[dataset])
    mirror[left], mirror[right] = right, left
    return mirror


def load_official_checkpoint(
    path: Path | str, n_chans: int, n_times: int, n_classes: int, pool: int
) -> MVCNet:
    """Open the weights of the official decoder (CNN and classifier).

    Args:
        path: File written by ``torch.save(model.state_dict())``.
        n_chans: Channels C.
        n_times: Samples T.
        n_classes: Classes K.
        pool: Average pooling in samples: 125, or 128 at 512 Hz.

    Returns:
        A network in evaluation mode whose ``decode`` is the official one. Its Transformer, which
        decoding does not use and checkpoints do not hold, is freshly initialised.

    Raises:
        DataError: The file is too large, is no checkpoint, or has other tensors.
    """
    tensors = _read(Path(path))
    # The official IFNet holds a classifier of its own that nothing calls; without the counters of
    # batches the running statistics are taken as they are.
    found = {
        key: value
        for key, value in tensors.items()
        if not key.startswith("0.fc.") and not key.endswith(".num_batches_tracked")
    }
    missing = sorted(set(KEYS) - set(found))
    unknown = sorted(set(found) - set(KEYS))
    if missing or unknown:
        raise DataError(
            f"{path}: is no official MVCNet decoder: missing {missing}, unknown {unknown}: pass "
            "the state dictionary of the pair (IFNet, classifier)"
        )
    net = MVCNet(n_chans, n_times, n_classes, sfreq=250.0, config=_official_network(pool))
    own = net.state_dict()
    for key, value in found.items():
        if own[KEYS[key]].shape != value.shape:
            raise DataError(
                f"{path}: {key} has shape {tuple(value.shape)}, {n_chans} channels, {n_times} "
                f"samples, {n_classes} classes and pool {pool} need {tuple(own[KEYS[key]].shape)}"
            )
    net.load_state_dict(own | {KEYS[key]: value for key, value in found.items()})
    return net.eval()


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such file: give the checkpoint's path")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: has {path.stat().st_size} bytes: a decoder has under {MAX_BYTES}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds for damaged files
        raise DataError(f"{path}: is no checkpoint of tensors ({type(error).__name__})") from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise DataError(f"{path}: holds no state dictionary: save model.state_dict()")
    return tensors


def _official_network(pool: int) -> MVCNetConfig:
    # a narrow Transformer: it is not loaded and would hold 54 million numbers
    return MVCNetConfig.model_validate(
        {"model": {"cnn": {"kernel": OFFICIAL_KERNEL, "pool": pool}}}
    )
