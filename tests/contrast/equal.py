"""A loss against its loop: value and gradient, at every tile, in both precisions.

``every_size`` gives a test five seeds, 2, 3, 17 and 64 samples, 3 and 32 dimensions: each value
for each loss, pairs of values as far as the loops are fast enough.
"""

import warnings

import pytest
import torch

SIZES = ((2, 3, 0), (2, 32, 1), (3, 3, 2), (3, 32, 3), (17, 32, 4), (17, 3, 0), (64, 3, 1))
every_size = pytest.mark.parametrize(("n", "d", "seed"), SIZES)


def assert_equals_loop(inputs, ours, loop, single=(2e-6, 2e-5)):
    """Compare ``ours(*inputs, tile=...)`` with ``loop(*inputs)``: its mean, or one value a row.

    Inputs are of float64; ``single`` are the tolerances of value and gradient in float32.
    """
    leaves = [value.requires_grad_() for value in inputs]
    expected = loop(*leaves)
    if isinstance(expected, list):  # without any valid row the loss is 0
        rows = expected or [0.0 * sum(leaf.sum() for leaf in leaves)]
        expected = torch.stack(rows).mean()
    slopes = torch.autograd.grad(expected, leaves, materialize_grads=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(no row with a positive|no two rows|more proto)")
        for tile in (4, 8, 64, "auto"):
            compare(ours(*leaves, tile=tile), leaves, expected, slopes, (1e-10, 1e-9))
        narrow = [value.detach().float().requires_grad_() for value in inputs]
        compare(ours(*narrow, tile=8), narrow, expected, slopes, single)


def compare(value, leaves, expected, slopes, tolerances):
    first, second = tolerances
    torch.testing.assert_close(value.double(), expected, rtol=first, atol=first)
    found = torch.autograd.grad(value, leaves, materialize_grads=True)
    for own, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(own.double(), slope, rtol=second, atol=second)


def assert_finite_at_any_length(inputs, ours):
    """Every second row of the first input is zero, tiny or huge: loss and gradients are finite."""
    for size in (0.0, 1e-20, 1e20):
        leaves = [value.detach().float() for value in inputs]
        leaves[0].flatten(0, -2)[::2] *= size
        leaves = [value.requires_grad_() for value in leaves]
        value = ours(*leaves)
        assert bool(value.isfinite())
        slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
        assert all(bool(slope.isfinite().all()) for slope in slopes)


def assert_same_under_autocast(inputs, ours, *, twice=True, tolerance=1e-5):
    """Compare ``ours(*inputs)`` in float32 with itself under bfloat16 autocast, backward as well.

    ``twice`` compares the gradient of the squared gradient too.
    """
    results = []
    for on in (False, True):
        leaves = [value.detach().float().requires_grad_() for value in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            value = ours(*leaves)
            found = torch.autograd.grad(value, leaves, create_graph=twice, materialize_grads=True)
            if twice:
                squares = sum(slope.square().sum() for slope in found)
                found += torch.autograd.grad(squares, leaves, materialize_grads=True)
        results.append([value, *found])
    for plain, under in zip(*results, strict=True):
        torch.testing.assert_close(under, plain, rtol=tolerance, atol=tolerance)
