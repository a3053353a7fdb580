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
