"""The checks of tensors and numbers, each an error that says what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diptych_contrast.errors import ContrastInputError


def check_rows(function: str, argument: str, x: Tensor, at_least: int = 1) -> None:
    """Refuse what is no floating-point matrix with so many rows and one column."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ContrastInputError(
            function,
            argument,
            f"has shape {tuple(x.shape)} and dtype {x.dtype}",
            "pass floating-point embeddings of shape (samples, dimensions)",
        )
    if x.shape[0] < at_least or x.shape[1] == 0:
        raise ContrastInputError(
            function,
            argument,
            f"has shape {tuple(x.shape)}",
            f"pass at least {at_least} row(s) and one dimension",
        )


def check_dimension(function: str, at_least: int = 1, **matrices: Tensor) -> None:
    """Refuse matrices, given by argument name, that differ in their number of columns."""
    (first, x), *others = matrices.items()
    check_rows(function, first, x, at_least)
    for name, y in others:
        check_rows(function, name, y)
        if y.shape[1] != x.shape[1]:
            raise ContrastInputError(
                function,
                name,
                f"has {y.shape[1]} dimensions, {first!r} has {x.shape[1]}",
                "pass embeddings of one space",
            )


def check_pair(function: str, at_least: int = 1, **matrices: Tensor) -> None:
    """Refuse two matrices, given by argument name, of unlike shape."""
    check_dimension(function, at_least, **matrices)
    (first, x), (second, y) = matrices.items()
    if x.shape != y.shape:
        raise ContrastInputError(
            function,
            second,
            f"has shape {tuple(y.shape)}, {first!r} has {tuple(x.shape)}",
            "pass the same samples in the same order",
        )


def check_integers(function: str, argument: str, values: Tensor, count: int) -> None:
    """Refuse what is not one integer a row."""
    if values.shape != (count,) or values.is_floating_point():
        raise ContrastInputError(
            function,
            argument,
            f"has shape {tuple(values.shape)} and dtype {values.dtype}",
            f"pass {count} integers, one a row",
        )


def check_finite(function: str, argument: str, x: Tensor) -> None:
    """Refuse values that are not finite, and name the first rows that hold them."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        rows = torch.nonzero(bad.flatten(1).any(1) if x.ndim > 1 else bad).flatten()
        raise ContrastInputError(
            function,
            argument,
            f"has {int(bad.sum())} values that are not finite, first in rows {rows[:3].tolist()}",
            "leave these rows out, or look why the encoder gives them",
        )


def check_positive(function: str, argument: str, value: float) -> None:
    """Refuse a number that is not finite and above 0."""
    if not 0 < value < math.inf:
        raise ContrastInputError(function, argument, f"is {value}", "pass a finite number above 0")
