"""Ridge regression on frozen embeddings, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_dimension, check_finite, check_integers
from diptych_contrast.probes.linear import (
    Penalty,
    check_penalty,
    choose_penalty,
    deal_folds,
    reduce_basis,
    standardise,
)


@dataclass(frozen=True)
class RidgeProbe:
    """A fitted regression and what it says of the test rows.

    Weights act on standardised features, ``(x - mean) / scale``. Scores are None without test
    targets: ``r2`` by target (None where the target does not vary over the test rows) and the mean
    absolute error by target, in its unit.
    """

    weight: Float[Tensor, "d t"]
    bias: Float[Tensor, " t"]
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    l2: float
    held_out_losses: Mapping[float, float]
    predictions: Float[Tensor, "q t"]
    r2: tuple[float | None, ...] | None
    mean_absolute_error: tuple[float, ...] | None


def ridge_probe(
    train: Float[Tensor, "n d"],
    y: Float[Tensor, "n t"] | Float[Tensor, " n"],
    test: Float[Tensor, "q d"],
    l2: Penalty = "cv",
    groups: Int[Tensor, " n"] | None = None,
    *,
    test_y: Float[Tensor, "q t"] | Float[Tensor, " q"] | None = None,
) -> RidgeProbe:
    """Linear regression with squared penalty on embeddings standardised by the training rows.

    Minimises ``mean squared error + l2 ||W||^2`` for each target, bias free, in fp64:
    ``W = (X^T X / n + l2)^-1 X^T y / n``. ``"cv"`` chooses one l2 for all targets among 1e2 ..
    1e-6 by the held-out squared error, in units of each target's variance, in 5 folds.

    Example:
        >>> x = torch.randn(50, 3)
        >>> ridge_probe(x, x[:, 0], x, l2=1e-6, test_y=x[:, 0]).r2[0] > 0.999
        True
    """
    check_dimension("ridge_probe", train=train, test=test)
    check_finite("ridge_probe", "train", train)
    check_finite("ridge_probe", "test", test)
    targets = _columns("y", y, train.shape[0])
    if groups is not None:
        check_integers("ridge_probe", "groups", groups, train.shape[0])
    check_penalty("ridge_probe", l2, zero=False)
    features, mean, scale = standardise(train)
    rows, basis = reduce_basis(features)
    losses: dict[float, float] = {}
    if l2 == "cv":
        l2, losses = _choose(rows, targets, groups)
    weight, bias = _Solver(rows, targets).solve(l2)
    weight = weight if basis is None else basis @ weight
    predictions = (test.detach().double() - mean) / scale @ weight + bias
    scores = (None, None) if test_y is None else _scores(predictions, test_y, targets.shape[1])
    return RidgeProbe(weight, bias, mean, scale, l2, losses, predictions, *scores)


class _Solver:
    """The regression for any penalty, after one eigendecomposition."""

    def __init__(self, rows: Tensor, targets: Tensor) -> None:
        self.centre, self.level = rows.mean(0), targets.mean(0)
        centred = rows - self.centre
        self.values, self.vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        self.moments = self.vectors.T @ (centred.T @ (targets - self.level)) / len(rows)

    def solve(self, l2: float) -> tuple[Tensor, Tensor]:
        spread = self.values.clamp_min(0)[:, None] + l2
        weight = self.vectors @ (self.moments / spread)
        return weight, self.level - self.centre @ weight


def _choose(
    rows: Tensor, targets: Tensor, groups: Tensor | None
) -> tuple[float, dict[float, float]]:
    nothing = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    fold = deal_folds("ridge_probe", nothing, groups)
    variance = targets.var(0, correction=0)
    unit = torch.where(variance > 0, variance, 1)
    parts = [
        (_Solver(rows[fold != number], targets[fold != number]), fold == number)
        for number in torch.unique(fold).tolist()
    ]

    def held_out_loss(l2: float) -> float:
        errors = []
        for solver, held_out in parts:
            weight, bias = solver.solve(l2)
            errors.append((rows[held_out] @ weight + bias - targets[held_out]).square() / unit)
        return float(torch.cat(errors).mean())

    return choose_penalty("ridge_probe", held_out_loss)


def _columns(argument: str, y: Tensor, count: int, width: int | None = None) -> Tensor:
    columns = y.detach().double()
    columns = columns[:, None] if columns.ndim == 1 else columns
    fits = columns.ndim == 2 and columns.shape[0] == count and columns.shape[1] > 0
    if not fits or (width is not None and columns.shape[1] != width):
        found, fix = f"has shape {tuple(y.shape)}", f"pass {count} rows with one column a target"
        raise ContrastInputError("ridge_probe", argument, found, fix)
    check_finite("ridge_probe", argument, columns)
    return columns


def _scores(
    predictions: Tensor, test_y: Tensor, width: int
) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
    truth = _columns("test_y", test_y, predictions.shape[0], width)
    errors = predictions - truth
    spread = (truth - truth.mean(0)).square().sum(0).tolist()
    residual = errors.square().sum(0).tolist()
    r2 = tuple(1 - a / b if b > 0 else None for a, b in zip(residual, spread, strict=True))
    return r2, tuple(errors.abs().mean(0).tolist())
