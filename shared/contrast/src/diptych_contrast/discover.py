"""Balanced discovery of new classes beside known ones (Bai et al., 2023, BaCon), in pieces.

The authors' mix: 0.65 (`self_distillation` + `balanced_regulariser`) + 0.35 cross-entropy for the
classifier; 0.65 `info_nce` (temperature 1) + 0.175 `sup_con` + 0.175 `soft_con` for the embedding,
before epoch 1 0.35 `sup_con` instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from diptych_contrast.cluster import spherical_kmeans
from diptych_contrast.common import Common, LossResult, Parity, TemperatureLike, read_options
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import (
    check_choice,
    check_generator,
    check_integers,
    check_least,
    check_positive,
    check_shape,
    readable,
)
from diptych_contrast.pairwise import soft_sup_con
from diptych_contrast.rowwise import LOCAL


def soft_con(
    features: Float[Tensor, "v n d"] | tuple[Float[Tensor, "n d"], ...],
    probs: Float[Tensor, "n c"],
    temperature: TemperatureLike = 0.07,
    *,
    labels: Int[Tensor, " n"] | None = None,
    labelled: Literal["one_hot", "predicted"] = "one_hot",
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Contrast pairs as far as they probably share a class (Bai et al., 2023, BaCon).

    ``log sum_{a != i} exp(s_ia / t) - sum_j w_ij s_ij / t / sum_j w_ij``, ``w_ij = p_i.p_j``
    without gradient: `soft_sup_con` with predicted probabilities. Known classes replace the
    prediction (``labels``, -1: unlabelled), unless ``labelled`` says ``predicted``, as the authors
    do, who also multiply the loss by ``t / 0.07``.
    """
    check_choice("soft_con", "labelled", labelled, "one_hot", "predicted")
    check_choice("soft_con", "parity", parity, None, "official")
    probs = probs.detach()
    if labels is not None:
        check_integers("soft_con", "labels", labels, len(probs))
        if labelled == "one_hot" and parity is None:
            hot = F.one_hot(labels.clamp_min(0).long(), probs.shape[1]).to(probs.dtype)
            probs = torch.where(labels[:, None] >= 0, hot, probs)
    result = soft_sup_con(features, probs, temperature, **common)
    if parity is None:
        return result
    factor = (temperature() if callable(temperature) else temperature) / 0.07
    return (result[0] * factor, result[1]) if isinstance(result, tuple) else result * factor


def balanced_regulariser(
    logits: Float[Tensor, "n k"],
    counts: Float[Tensor, " k"],
    temperature: float = 0.1,
    power: float = 1.1,
) -> Float[Tensor, ""]:
    """Keep the mean prediction in proportion to the class sizes (BaCon).

    With p the mean of ``softmax(logits / temperature)``, times ``counts^-power``, normalised:
    ``log k - H(p)``, 0 where p is uniform. Counts are class sizes or shares, > 0.
    """
    _check_classes("balanced_regulariser", logits, counts, temperature)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mean = (wide / temperature).log_softmax(1).logsumexp(0)
    logs = (mean - power * counts.to(wide).log()).log_softmax(0)
    loss: Tensor = math.log(logits.shape[1]) + (logs.exp() * logs).sum()
    return loss


def logit_adjust(
    logits: Float[Tensor, "n k"],
    counts: Float[Tensor, " k"],
    temperature: float = 0.1,
    power: float = 0.5,
) -> Float[Tensor, "n k"]:
    """Take the class prior out of logits (Menon et al., 2021; BaCon).

    ``logits / temperature - log(prior^power + 1e-12)``, prior the shares of the counts, which are
    class sizes or shares, > 0.

    Example:
        >>> logit_adjust(torch.zeros(1, 2), torch.tensor([9.0, 1.0])).argmax().item()
        1
    """
    _check_classes("logit_adjust", logits, counts, temperature)
    prior = counts.to(logits) / counts.sum()
    return logits / temperature - (prior**power + 1e-12).log()


def _check_classes(function: str, logits: Tensor, counts: Tensor, temperature: float) -> None:
    check_positive(function, temperature=temperature)
    check_shape(function, "logits", logits, (-1, -1))
    if counts.shape != logits.shape[1:] or (readable(counts) and bool((counts <= 0).any())):
        found = f"has shape {tuple(counts.shape)}, or a value not above 0"
        fix = "pass one positive number for each class"
        raise ContrastInputError(function, "counts", found, fix)


@torch.no_grad()
def estimate_class_distribution(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    mask_labelled: Bool[Tensor, " n"],
    k: int,
    *,
    seed: int = 0,
) -> Float[Tensor, " k"]:
    """Estimate the share of every class, known and new, from clusters (BaCon).

    k-means over all features; clusters are given to classes so that the sum of
    ``labelled of class c in cluster p / size of p`` is largest. The sizes of known clusters go to
    known classes by the rank of their labelled counts, those of the others in decreasing order.
    The centres are directions (`spherical_kmeans`); the authors normalise features, not centres.
    Where ``mask_labelled`` is false labels may be anything.

    Example:
        >>> x, y = torch.eye(4)[[0, 0, 0, 1]], torch.tensor([0, 0, -1, -1])
        >>> estimate_class_distribution(x, y, y >= 0, 2).tolist()
        [0.75, 0.25]
    """
    name = "estimate_class_distribution"
    check_integers(name, "labels", labels, len(features))
    if mask_labelled.shape != labels.shape or mask_labelled.dtype != torch.bool:
        found = f"has shape {tuple(mask_labelled.shape)} and dtype {mask_labelled.dtype}"
        raise ContrastInputError(name, "mask_labelled", found, "pass one bool a sample")
    known = labels[mask_labelled].long()
    if bool(((known < 0) | (known >= k)).any()):
        found, fix = f"lies outside 0 to {k - 1}", "number the known classes from 0"
        raise ContrastInputError(name, "labels", found, fix)
    clusters = spherical_kmeans(features, k, seed=seed).assignments
    sizes = clusters.bincount(minlength=k)
    table = torch.bincount(clusters[mask_labelled] * k + known, minlength=k * k).view(k, k)
    profit = table / sizes[:, None].clamp_min(1)
    of_class = torch.from_numpy(match(profit.t().double().cpu().numpy())).to(sizes.device)
    counts = known.bincount(minlength=k)
    classes = counts.nonzero().flatten()
    fresh = (counts == 0).nonzero().flatten()
    share = torch.zeros(k, device=features.device)
    order = classes[torch.argsort(counts[classes], stable=True)]
    share[order] = sizes[of_class[classes]].sort().values.to(share)
    share[fresh] = sizes[of_class[fresh]].sort(descending=True).values.to(share)
    return share / share.sum()


def sampling_rates(
    counts: Float[Tensor, " k"], labels: Int[Tensor, " n"], alpha: float = 0.8, beta: float = 0.5
) -> Float[Tensor, " k"]:
    """Rates of `self_balanced_sampling`: ``(n_min / n_c)^beta``, rare classes more (BaCon).

    Classes labelled in this batch (``labels``, -1: none) take alpha for beta, in the authors'
    CIFAR scripts 0. Counts are class sizes or shares, > 0.

    Example:
        >>> sampling_rates(torch.tensor([4.0, 1.0]), torch.tensor([-1])).tolist()
        [0.5, 1.0]
    """
    present = torch.zeros_like(counts, dtype=torch.bool)
    present[labels[labels >= 0]] = True
    ratio = counts.min() / counts
    return torch.where(present, ratio**alpha, ratio**beta)


def self_balanced_sampling(
    confidence: Float[Tensor, " n"],
    prediction: Int[Tensor, " n"],
    rate: Float[Tensor, " k"],
    *,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, " n"]:
    """Choose which unlabelled samples take part, fewer of frequent classes (BaCon).

    Of every predicted class as many as heads fall among one coin of its rate (`sampling_rates`) a
    sample, the most confident first. The generator of the coins is on the device of ``confidence``.

    Example:
        >>> y, g = torch.tensor([0, 0, 1]), torch.Generator().manual_seed(0)
        >>> sample = self_balanced_sampling(torch.rand(3), y, torch.tensor([1.0, 0.0]), generator=g)
        >>> sample.tolist()
        [True, True, False]
    """
    name = "self_balanced_sampling"
    generator = check_generator(name, generator)
    check_integers(name, "prediction", prediction, len(confidence))
    if readable(prediction) and int(prediction.max()) >= len(rate):
        found = f"has {len(rate)} values for class {prediction.max()}"
        raise ContrastInputError(name, "rate", found, "pass one rate for each class")
    coins = torch.rand(prediction.shape, dtype=rate.dtype, device=rate.device, generator=generator)
    heads = torch.zeros(len(rate), dtype=torch.int64, device=rate.device)
    heads = heads.index_add(0, prediction, (coins < rate[prediction]).long())
    order = torch.argsort(confidence, descending=True, stable=True)
    order = order[torch.argsort(prediction[order], stable=True)]
    sizes = prediction.bincount(minlength=len(rate))
    rank = torch.arange(len(order), device=order.device)
    rank = rank - (sizes.cumsum(0) - sizes)[prediction[order]]
    chosen = torch.zeros_like(prediction, dtype=torch.bool)
    chosen[order] = rank < heads[prediction[order]]
    return chosen


def self_distillation(
    student: Float[Tensor, "v n k"] | tuple[Float[Tensor, "n k"], ...],
    epoch: int,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.07, 0.04),
    warmup: int = 30,
    **common: Unpack[Common],
) -> LossResult:
    """Predict a view from the sharpened others (Caron et al., 2021, DINO; Bai et al., 2023, BaCon).

    ``-sum_k q_k log softmax_k(student / student_temperature)``, q the mean over the other views of
    ``softmax(student / t)``, without gradient; t goes linearly from the first to the second teacher
    temperature over ``warmup`` epochs. The student holds the logits of two views or more.
    """
    name = "self_distillation"
    options = read_options(name, common, *LOCAL)
    first, last = teacher_temperature
    check_positive(name, student_temperature=student_temperature)
    check_positive(name, teacher_temperature=min(first, last))
    check_least(name, 0, epoch=epoch)
    logits = student if isinstance(student, Tensor) else torch.stack(student)
    check_shape(name, "student", logits, (-1, -1, -1))
    check_least(name, 2, student=len(logits))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    share = min(epoch / (warmup - 1), 1.0) if warmup > 1 else 1.0
    teacher = (logits.detach() / (first + (last - first) * share)).softmax(2)
    target = (teacher.sum(0) - teacher) / (len(logits) - 1)
    rows = -(target * (logits / student_temperature).log_softmax(2)).sum(2)
    return options.reduce(rows, None)


@dataclass(frozen=True)
class ClusterAccuracy:
    """Accuracy of clusters under the best one-to-one assignment to classes.

    A part without samples is None. ``macro_*`` are means over classes instead of samples;
    ``many``, ``medium`` and ``few`` thirds of the classes by size; ``assignment[p]`` is the class
    of cluster p.
    """

    all: float
    old: float | None
    new: float | None
    many: float | None
    medium: float | None
    few: float | None
    macro_all: float
    macro_old: float | None
    macro_new: float | None
    assignment: tuple[int, ...]


def cluster_accuracy(
    y: Int[Tensor, " n"],
    pred: Int[Tensor, " n"],
    known: Int[Tensor, " c"] | None = None,
    *,
    counts: Int[Tensor, " k"] | None = None,
) -> ClusterAccuracy:
    """Score clusters against classes, known and new (Vaze et al., 2022).

    One assignment over all classes, so that a cluster cannot serve an old and a new class. The
    thirds follow ``counts``, training samples of every class; None: those of ``y``.

    Example:
        >>> cluster_accuracy(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])).all
        1.0
    """
    name = "cluster_accuracy"
    for argument, value in (("y", y), ("pred", pred)):
        check_integers(name, argument, value, len(y))
        if len(value) == 0 or int(value.min()) < 0:
            fix = "number the classes from 0"
            raise ContrastInputError(name, argument, "is empty or negative", fix)
    truth, clusters = (value.cpu().numpy().astype(np.int64) for value in (y, pred))
    size = int(max(truth.max(), clusters.max())) + 1
    table = np.zeros((size, size))
    np.add.at(table, (clusters, truth), 1)
    of_cluster = match(table)
    hits = np.zeros(size)
    hits[of_cluster] = table[np.arange(size), of_cluster]
    totals = table.sum(0)
    if counts is not None and len(counts) <= truth.max():
        fix = f"pass one a class, {truth.max() + 1}"
        raise ContrastInputError(name, "counts", "has too few values", fix)
    weight = totals if counts is None else counts.cpu().numpy()
    present = np.flatnonzero(totals)
    ranked = present[np.argsort(-weight[present], kind="stable")]
    old = np.isin(present, [] if known is None else known.cpu().numpy())
    parts = {"all": present, "old": present[old], "new": present[~old]}
    parts |= dict(zip(("many", "medium", "few"), np.array_split(ranked, 3), strict=True))
    micro = {
        part: float(hits[of].sum() / totals[of].sum()) if len(of) else None
        for part, of in parts.items()
    }
    macro = {
        f"macro_{part}": float((hits[of] / totals[of]).mean()) if len(of) else None
        for part, of in list(parts.items())[:3]
    }
    if known is None:
        micro |= {"old": None, "new": None}
        macro |= {"macro_old": None, "macro_new": None}
    return ClusterAccuracy(**micro, **macro, assignment=tuple(of_cluster.tolist()))  # type: ignore[arg-type]


def match(profit: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Give every row its own column so that the sum is largest (Kuhn, 1955; shortest paths)."""
    size = len(profit)
    # Column `size` is where the search for the next row starts.
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    row_of = np.full(size + 1, -1)
    for row in range(size):
        row_of[size], column = row, size
        gap, before = np.full(size, np.inf), np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            at = row_of[column]
            slack = -profit[at] - row_price[at] - column_price[:size]
            closer = ~done[:size] & (slack < gap)
            gap[closer], before[closer] = slack[closer], column
            nearest = int(np.where(done[:size], np.inf, gap).argmin())
            step = gap[nearest]
            row_price[row_of[done]] += step
            column_price[done] -= step
            gap[~done[:size]] -= step
            column = nearest
        while column != size:
            row_of[column], column = row_of[before[column]], int(before[column])
    result = np.empty(size, dtype=np.int64)
    result[row_of[:size]] = np.arange(size)
    return result
