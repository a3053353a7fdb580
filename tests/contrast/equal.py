"""A loss against its loop: value and gradient, at every tile, in both precisions."""

import torch


def assert_equals_loop(inputs, ours, loop):
    """Compare ``ours(*inputs, tile=...)`` with ``loop(*inputs)``, float64 tensors."""
    leaves = [value.requires_grad_() for value in inputs]
    expected = loop(*leaves)
    slopes = torch.autograd.grad(expected, leaves)
    for tile in (4, 8, 64, "auto"):
        value = ours(*leaves, tile=tile)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        for own, slope in zip(torch.autograd.grad(value, leaves), slopes, strict=True):
            torch.testing.assert_close(own, slope, rtol=1e-9, atol=1e-9)
    single = [value.detach().float().requires_grad_() for value in inputs]
    value = ours(*single, tile=8)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    for own, slope in zip(torch.autograd.grad(value, single), slopes, strict=True):
        torch.testing.assert_close(own.double(), slope, rtol=2e-5, atol=2e-5)
