"""What the probes share: standardised features, folds, choice of the penalty, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError

GRID = tuple(10.0**power for power in range(2, -7, -1))
Penalty = float | Literal["cv"]
Interval = tuple[float, float]


def standardise(
    x: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Features in fp64 with mean 0 and standard deviation 1, the mean, and the scale.

    A dimension that does not vary gets scale 1 and becomes 0.
    """
    wide = x.detach().double()
    mean, scale = wide.mean(0), wide.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * wide.abs().amax(0), scale, 1)
    return (wide - mean) / scale, mean, scale


def reduce_basis(
    x: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "d r"] | None]:
    """The same rows in an orthonormal basis of their span, where that is smaller, and the basis.

    The penalised solution lies in this span, so fits are the same and cost less.
    """
    if x.shape[0] >= x.shape[1]:
        return x, None
    basis, coordinates = torch.linalg.qr(x.T)
    return coordinates.T, basis


def check_penalty(function: str, l2: object, *, zero: bool) -> None:
    """Refuse a penalty that is neither ``"cv"`` nor a finite number, from or above 0."""
    if l2 == "cv":
        return
    if not isinstance(l2, int | float) or not (0 < l2 < math.inf or (zero and l2 == 0)):
        raise ContrastInputError(
            function, "l2", f"is {l2!r}", f"pass 'cv' or a number {'from' if zero else 'above'} 0"
        )


def choose_penalty(
    function: str,
    held_out_loss: Callable[[float], float],
) -> tuple[float, dict[float, float]]:
    """The penalty of lowest held-out loss, looked for from strong to weak.

    Stops after two values in a row without improvement.
    """
    losses: dict[float, float] = {}
    best = GRID[0]
    for position, l2 in enumerate(GRID):
        losses[l2] = held_out_loss(l2)
        if math.isnan(losses[l2]):
            found = "is 'cv', but no fold holds a class that the others hold too"
            fix = "pass a number, or at least two rows (groups) a class"
            raise ContrastInputError(function, "l2", found, fix)
        if losses[l2] < losses[best]:
            best = l2
        elif position - GRID.index(best) >= 2:
            break
    return best, losses


def deal_folds(
    function: str, y: Int[Tensor, " n"], groups: Int[Tensor, " n"] | None, folds: int = 5
) -> Int[Tensor, " n"]:
    """Number of the fold of every row: classes spread evenly, groups kept whole.

    Fewer rows or groups than folds give fewer folds.
    """
    classes = y.cpu().numpy()
    if groups is None:
        _check_count(function, "train", len(classes))
        fold = np.empty(len(classes), dtype=np.int64)
        fold[np.argsort(classes, kind="stable")] = np.arange(len(classes)) % folds
        return torch.from_numpy(fold).to(y.device)
    _, member = np.unique(groups.cpu().numpy(), return_inverse=True)
    table = np.zeros((member.max() + 1, classes.max() + 1), dtype=np.int64)
    np.add.at(table, (member, classes), 1)
    _check_count(function, "groups", len(table))
    load = np.zeros((min(folds, len(table)), table.shape[1]))
    of_group = np.empty(len(table), dtype=np.int64)
    major = table.argmax(1)
    for group in np.lexsort((-table.sum(1), major)):
        lightest = np.lexsort((load.sum(1), load[:, major[group]]))[0]
        of_group[group] = lightest
        load[lightest] += table[group]
    return torch.from_numpy(of_group[member]).to(y.device)


def _check_count(function: str, argument: str, count: int) -> None:
    if count < 2:
        found, fix = f"holds {count}, too few for cross-validation", "pass l2 as a number"
        raise ContrastInputError(function, argument, found, fix)


def bootstrap_classes(
    y: npt.NDArray[np.int64],
    correct: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.int64],
    resamples: int,
    seed: int,
) -> tuple[Interval, Interval]:
    """95 % percentile intervals of accuracy and balanced accuracy, resampling whole groups.

    A class that a resample does not hold is left out of its balanced accuracy.
    """
    source = np.random.default_rng(seed)
    _, member = np.unique(groups, return_inverse=True)
    n_groups, n_classes = int(member.max()) + 1, int(y.max()) + 1
    values = np.empty((resamples, 2))
    for row in values:
        counts = np.bincount(source.integers(n_groups, size=n_groups), minlength=n_groups)
        weight = counts[member]
        total = np.bincount(y, weight, n_classes)
        right = np.bincount(y, weight * correct, n_classes)
        present = total > 0
        row[:] = right.sum() / total.sum(), (right[present] / total[present]).mean()
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
