"""The checks of arguments, each an error that says what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor

from diptych_contrast.errors import ContrastInputError


def readable(x: Tensor) -> bool:
    """Tell whether looking at values is free: on the CPU, neither compiling nor transformed."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_choice(function: str, argument: str, value: object, *choices: object) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        words = ", ".join(repr(choice) for choice in choices)
        raise ContrastInputError(function, argument, f"is {value!r}", f"pass one of {words}")


def check_known(function: str, argument: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is unknown, and offer the nearest."""
    names = list(known)
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        found = "is unknown" if argument == name else f"is {name!r}"
        fix = f"did you mean {near!r}? All names: {', '.join(names)}"
        raise ContrastInputError(function, argument, found, fix)


def check_positive(function: str, **numbers: float) -> None:
    """Refuse a number, given by argument name, that is not finite and above 0."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ContrastInputError(function, name, f"is {value}", "pass a finite number above 0")


def check_least(function: str, least: float, **numbers: float) -> None:
    """Refuse a number, given by argument name, that is not finite or below the least one."""
    for name, value in numbers.items():
        if not least <= value < math.inf:
            fix = f"pass a finite number, at least {least}"
            raise ContrastInputError(function, name, f"is {value}", fix)


def check_share(function: str, argument: str, value: float) -> None:
    """Refuse a number outside [0, 1)."""
    if not 0 <= value < 1:
        fix = "pass a share from 0 to below 1"
        raise ContrastInputError(function, argument, f"is {value}", fix)


def check_generator(function: str, generator: torch.Generator | None) -> torch.Generator:
    """Refuse to draw from the global random state."""
    if generator is None:
        fix = "pass a seeded torch.Generator"
        raise ContrastInputError(function, "generator", "is None", fix)
    return generator


def check_device(function: str, name: str, value: Tensor, first: str, reference: Tensor) -> None:
    """Refuse two tensors on unlike devices."""
    if value.device != reference.device:
        found = f"is on {value.device}, {first!r} on {reference.device}"
        raise ContrastInputError(function, name, found, "move both to one device")


def check_shape(function: str, argument: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse another shape, -1 being any length above 0, and what is not floating-point."""
    fits = x.dim() == len(shape) and 0 not in x.shape and x.is_floating_point()
    if not fits or any(a not in (-1, b) for a, b in zip(shape, x.shape, strict=True)):
        found = f"has shape {tuple(x.shape)} and dtype {x.dtype}"
        fix = f"pass floating-point values of shape {shape}".replace("-1", "any")
        raise ContrastInputError(function, argument, found, fix)


def check_rows(function: str, argument: str, x: Tensor, at_least: int = 1) -> None:
    """Refuse what is no floating-point matrix with so many rows and one column."""
    if x.ndim != 2 or not x.is_floating_point() or x.shape[0] < at_least or x.shape[1] == 0:
        found = f"has shape {tuple(x.shape)} and dtype {x.dtype}"
        fix = "pass floating-point embeddings of shape (samples, dimensions)"
        raise ContrastInputError(function, argument, found, f"{fix}, at least {at_least} row(s)")


def check_dimension(function: str, at_least: int = 1, /, **matrices: Tensor) -> None:
    """Refuse matrices, given by argument name, that differ in their number of columns."""
    (first, x), *others = matrices.items()
    check_rows(function, first, x, at_least)
    for name, y in others:
        check_rows(function, name, y)
        if y.shape[1] != x.shape[1]:
            found = f"has shape {tuple(y.shape)}, {first!r} has {tuple(x.shape)}"
            raise ContrastInputError(function, name, found, "pass the same number of dimensions")


def check_pair(function: str, at_least: int = 1, /, **matrices: Tensor) -> None:
    """Refuse matrices, given by argument name, of unlike shape or device."""
    check_dimension(function, at_least, **matrices)
    (first, x), *others = matrices.items()
    for name, y in others:
        if len(y) != len(x):
            found = f"has shape {tuple(y.shape)}, {first!r} has {tuple(x.shape)}"
            raise ContrastInputError(function, name, found, "pass the same number of rows")
        check_device(function, name, y, first, x)


def check_integers(function: str, argument: str, values: Tensor, count: int) -> None:
    """Refuse what is not one integer a row."""
    whole = not (values.is_floating_point() or values.is_complex() or values.dtype is torch.bool)
    if values.shape != (count,) or not whole:
        found = f"has shape {tuple(values.shape)} and dtype {values.dtype}"
        raise ContrastInputError(function, argument, found, f"pass {count} integers, one a row")


def check_squares(function: str, argument: str, x: Tensor) -> None:
    """Refuse finite values so large that sums of their squares overflow."""
    if readable(x):
        limit, largest = torch.finfo(x.dtype).max ** 0.25, float(x.detach().abs().amax())
        if limit < largest < math.inf:
            found = f"holds {largest:.0e}, whose square may overflow"
            fix = f"scale it to at most {limit:.0e}, or normalise where the function can"
            raise ContrastInputError(function, argument, found, fix)


def check_finite(function: str, argument: str, x: Tensor) -> None:
    """Refuse values that are not finite, and name the first rows that hold them."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        rows = torch.nonzero(bad.flatten(1).any(1) if x.ndim > 1 else bad).flatten()[:3].tolist()
        found = f"has {int(bad.sum())} values that are not finite, first in rows {rows}"
        fix = "leave these rows out, or look why the encoder gives them"
        raise ContrastInputError(function, argument, found, fix)
