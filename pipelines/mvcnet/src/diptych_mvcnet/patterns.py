"""What the convolutional branch looks at: where on the head, and in which frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from diptych.contract import Fit
from diptych_mvcnet.align import training_reference
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.model import MVCNet
from diptych_mvcnet.parts import training_part, trials

if TYPE_CHECKING:
    from torch import nn

    from diptych.prepared import Prepared

_MOST_TRIALS = 512


def describe_network(
    config: MVCNetConfig, prepared: Prepared, fit: Fit, network: nn.Module
) -> dict[str, np.ndarray]:
    """Spatial patterns and temporal kernels of a fit, the most used filters first.

    A filter's weights do not say where its signal comes from; its pattern does: A = Cov(x) w /
    Var(w^T x) (Haufe et al., NeuroImage 2014, eq. 7), here mapped back through the mean inverse
    whitener to microvolt on the head.

    Args:
        config: The configuration.
        prepared: The data; training trials of the fit are read, at most 512 evenly spaced.
        fit: The fit.
        network: Its network, an :class:`~diptych_mvcnet.model.MVCNet`.

    Returns:
        ``patterns`` (filters, channels), ``kernels`` (filters, samples), ``importance``
        (filters,): mean absolute weight of the filter's features in the classifier times their
        standard deviation, and ``sign``: the class (of the first two) that more power favours.
    """
    assert isinstance(network, MVCNet)
    rows = fit.split.train
    few = rows[:: max(1, -(-len(rows) // _MOST_TRIALS))]
    x = trials(prepared, rows)
    aligned, references = training_part(config, prepared.index, fit, x)
    chosen = np.isin(rows, few)
    device = next(network.parameters()).device
    with torch.inference_mode():
        signal = network.bands(torch.as_tensor(aligned[chosen], device=device))
        features = network.cnn(signal)
    groups = network.cnn.bands
    per_band = np.split(_numpy(network.cnn.spatial.weight.squeeze(-1)), groups)
    signals = np.split(_numpy(signal), groups, axis=1)
    back = _mean_inverse_whitener(references) if config.align.train else np.eye(x.shape[1])
    patterns = [
        haufe_patterns(weights, part) @ back
        for weights, part in zip(per_band, signals, strict=True)
    ]
    n_filters = len(per_band[0])
    importance, sign = _use_of_filters(network, _numpy(features), n_filters)
    kernels = [_numpy(weight[:, 0]) for weight in network.cnn.temporal.parameters()]
    longest = max(kernel.shape[1] for kernel in kernels)
    padded = [
        np.pad(kernel, ((0, 0), ((longest - kernel.shape[1]) // 2,) * 2)) for kernel in kernels
    ]
    order = np.argsort(-np.tile(importance, groups), kind="stable")
    return {
        "patterns": np.concatenate(patterns)[order],
        "kernels": np.concatenate(padded)[order],
        "importance": np.tile(importance, groups)[order],
        "sign": np.tile(sign, groups)[order],
    }


def haufe_patterns(
    weights: Float[np.ndarray, "f c"], x: Float[np.ndarray, "n c t"]
) -> Float[np.ndarray, "f c"]:
    """Activation patterns of linear filters: A = Cov(x) w / Var(w^T x).

    Args:
        weights: One filter a row.
        x: The signals that they were trained on.

    Returns:
        One pattern a row, in the units of ``x`` for a unit of filter output.
    """
    flat = x.astype(np.float64) - x.mean(axis=-1, keepdims=True)
    covariance = np.einsum("nct,ndt->cd", flat, flat, optimize=True) / (len(x) * x.shape[-1])
    seen = weights @ covariance
    power = np.maximum(np.einsum("fc,fc->f", seen, weights), np.finfo(np.float64).tiny)
    return np.asarray(seen / power[:, None])


def _mean_inverse_whitener(references: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean over sessions of R^(1/2), which undoes the whitener."""
    roots = []
    for subject in sorted(set(references["subject"].tolist())):
        reference = training_reference(references, subject, "")
        if reference is not None:
            values, vectors = np.linalg.eigh(reference)
            roots.append((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
    return np.asarray(np.mean(roots, axis=0))


def _use_of_filters(
    network: MVCNet, features: np.ndarray, n_filters: int
) -> tuple[np.ndarray, np.ndarray]:
    """How much each filter moves the decision between the first two classes, and to which."""
    weight = _numpy(network.head.weight)[:, : features.shape[1]]
    difference = weight[1] - weight[0]
    spread = features.std(axis=0)
    use = (difference * spread).reshape(n_filters, -1)
    return np.abs(use).mean(axis=1), np.sign(use.sum(axis=1))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
