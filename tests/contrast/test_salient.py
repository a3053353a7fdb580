"""SepCLR: its terms, its independence term, its disentangling variant, and what it separates."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from tests.contrast.equal import assert_equals_loop, assert_same_under_autocast, every_size
from torch import Tensor

import diptych_contrast as dc
from diptych_contrast import testing


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gap(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance over 2t at t = 0.5."""
    return (x - y).square().sum()


def uniform(rows: list[Tensor]) -> Tensor:
    pairs = [torch.exp(-gap(rows[i], rows[j])) for j in range(len(rows)) for i in range(j)]
    return torch.stack(pairs).mean().log()


def loop(common: Tensor, salient: Tensor, target: list[int], weights: dc.SepWeights) -> Tensor:
    """SepCLR pair by pair, with the published terms."""
    c = [[row / row.norm() for row in view] for view in common]
    s = [[row * y for row, y in zip(view, target, strict=True)] for view in salient]
    n = len(target)
    loss = torch.stack([gap(c[0][i], c[1][i]) for i in range(n)]).mean()
    loss = loss + uniform(c[0]) + uniform(c[1])
    attract = torch.stack([gap(salient[0][i], salient[1][i]) for i in range(n) if target[i]]).mean()
    loss = loss + weights.salient * (attract + uniform(s[0]) + uniform(s[1]))
    lost = [salient[v][i].square().sum() for v in range(2) for i in range(n) if not target[i]]
    loss = loss + weights.information_less * torch.stack(lost).mean()
    shared = []
    for v in range(2):
        for i in range(n):
            kernel = [torch.exp(-gap(c[v][i], c[v][j]) - gap(s[v][i], s[v][j])) for j in range(n)]
            shared.append(torch.stack(kernel).mean().log())
    return loss + weights.independence * torch.stack(shared).mean()


@every_size
def test_the_loss_equals_a_loop_at_every_tile(n, d, seed):
    parity = None if seed % 2 else "official"
    target = [int(i % 3 > 0) for i in range(n)] if n > 3 else [0, 1, 1][:n]
    weights = dc.SepWeights() if seed % 2 else dc.SepWeights(100, 3, 7)
    weights = replace(weights, salient=0.0) if sum(target) < 2 else weights

    def ours(c, s, **options):
        given = {"weights": weights, "parity": parity, **options}
        return dc.sep_clr(c, (s[0], s[1]), torch.tensor(target), **given)[0]

    inputs = [draw(seed, 2, n, d), draw(seed + 9, 2, n, 2)]
    assert_equals_loop(inputs, ours, lambda c, s: loop(c, s, target, weights), (1e-5, 1e-4))


def test_the_parts_are_the_terms_before_their_weights():
    c, s, y = draw(0, 2, 17, 8), draw(1, 2, 17, 3), torch.arange(17) % 3 > 0
    weights = dc.SepWeights(100, 3, 7)
    value, parts = dc.sep_clr(c.requires_grad_(), s, y.long(), weights=weights)
    whole = parts.common + weights.salient * parts.salient
    whole = whole + weights.information_less * parts.information_less
    torch.testing.assert_close(whole + weights.independence * parts.independence, value.detach())
    assert not parts.independence.requires_grad
    assert (parts.n_target.item(), parts.n_background.item()) == (11, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single, _ = dc.sep_clr(c.float(), s.float(), y.long(), weights=weights)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), value, rtol=2e-6, atol=2e-6)


def test_a_step_under_autocast_keeps_single_precision():
    target = torch.arange(9) % 2
    for tile in (4, "auto"):
        loss = lambda c, s, tile=tile: dc.sep_clr(c, s, target, tile=tile)[0]  # noqa: E731
        assert_same_under_autocast([draw(0, 2, 9, 8), draw(1, 2, 9, 3)], loss)


def test_the_registered_reference_is_the_loss():
    c, s, y = draw(2, 2, 9, 4), draw(3, 2, 9, 3), torch.arange(9) % 2
    spec = dc.losses()["sep_clr"]
    torch.testing.assert_close(spec.function(c, s, y)[0], spec.reference(c, s, y))


@pytest.mark.parametrize("n_target", [0, 1, 6])
def test_groups_without_samples_leave_their_terms_out(n_target):
    c, s = draw(4, 2, 6, 3).requires_grad_(), draw(5, 2, 6, 2).requires_grad_()
    target = (torch.arange(6) < n_target).long()
    value, parts = dc.sep_clr(c, s, target)
    slopes = torch.autograd.grad(value, (c, s))
    assert all(bool(slope.isfinite().all()) for slope in slopes)
    assert (parts.salient == 0).item() == (n_target < 2)
    assert (parts.information_less == 0).item() == (n_target == 6)
    assert parts.n_target.item() == n_target
    official = dc.sep_clr(c, s, target, parity="official")[1]
    assert (official.salient == 0).item() == (n_target == 0)
    if n_target < 2:
        with pytest.raises(dc.ContrastInputError, match=f"holds {n_target} targets"):
            dc.sep_clr(c, s, target, empty="error")


def test_the_loss_can_be_differentiated_twice():
    c, s = draw(6, 2, 4, 2).requires_grad_(), draw(7, 2, 4, 2).requires_grad_()
    target = torch.tensor([0, 1, 1, 0])
    torch.autograd.gradcheck(lambda c, s: dc.sep_clr(c, s, target)[0], (c, s))
    torch.autograd.gradgradcheck(lambda c, s: dc.sep_clr(c, s, target)[0], (c, s))


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20])
def test_common_rows_of_any_length_give_finite_loss_and_gradient(size):
    c, s = draw(8, 2, 6, 3).float(), draw(9, 2, 6, 2).float().requires_grad_()
    c[:, ::2] *= size
    c.requires_grad_()
    value, _ = dc.sep_clr(c, s, torch.arange(6) % 2)
    assert math.isfinite(value.item())
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(value, (c, s)))


@pytest.mark.parametrize("size", [1e9, 1e20])
def test_vectors_that_are_never_normalised_are_finite_or_refused_at_any_length(size):
    c, s, y = draw(8, 2, 6, 3).float(), draw(9, 2, 6, 2).float(), torch.arange(6) % 2
    for call in (
        lambda z: dc.sep_clr(c, size * z, y)[0],
        lambda z: dc.sep_clr(size * z, s, y, normalize=False)[0],
        lambda z: dc.joint_entropy(c[0], size * z[0]),
        lambda z: dc.sup_alignment(size * z[0], s[0]),
        lambda z: dc.uniformity(size * z[0], normalize=False),
        lambda z: dc.alignment(*(size * z), normalize=False),
    ):
        leaf = s.clone().requires_grad_()
        if size > 1e10:
            with pytest.raises(dc.ContrastInputError, match="whose square may overflow"):
                call(leaf)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*longer than 100")
                value = call(leaf)
            assert math.isfinite(value.item())
            assert bool(torch.autograd.grad(value, leaf)[0].isfinite().all())


# The two published pieces.


def test_joint_entropy_is_that_of_the_product_kernel():
    c, s, t = draw(10, 9, 3), draw(11, 9, 2), 0.8
    kernels = [torch.cdist(x, x).square().div(-2 * t).exp() for x in (c, s)]
    expected = (kernels[0] * kernels[1]).mean(1).log().mean()
    torch.testing.assert_close(dc.joint_entropy(c, s, t), expected)
    torch.testing.assert_close(dc.joint_entropy(torch.cat([c, s], 1), 0 * s, t), expected)
    far = 100 * torch.eye(9, dtype=torch.float64)
    assert dc.joint_entropy(far, far).item() == pytest.approx(-math.log(9))


def test_sup_alignment_weighs_pairs_by_their_attributes():
    s, y, t = draw(12, 7, 3), draw(13, 7, 3), 0.025
    total = []
    for d in range(3):
        apart = torch.pdist(s[:, d : d + 1]).square()
        total.append((torch.pdist(y[:, d : d + 1]).square().div(-2 * t).exp() * apart).mean())
    torch.testing.assert_close(dc.sup_alignment(s, y), torch.stack(total).mean())
    # Discrete attributes: equal ones attract, others do not.
    kinds = torch.tensor([[0.0], [0.0], [1.0]])
    value = dc.sup_alignment(torch.tensor([[0.0], [3.0], [50.0]]), kinds, t=5e-6)
    assert value.item() == pytest.approx(9 / 3)


# What it separates.


def explained(features: Tensor, factor: Tensor) -> float:
    """Share of a factor's variance that a linear regression on the features explains."""
    design = torch.cat([features, torch.ones(len(features), 1)], 1)
    rest = factor - design @ torch.linalg.lstsq(design, factor).solution
    return 1.0 - float(rest.square().sum() / (factor - factor.mean(0)).square().sum())


def encode(weights: dc.SepWeights, steps: int) -> dict[str, float]:
    drawn = testing.salient(128, seed=0)
    source = torch.Generator().manual_seed(1)
    encoders = [torch.randn(24, dim, generator=source).div(5).requires_grad_() for dim in (4, 2)]
    optimizer = torch.optim.Adam(encoders, lr=0.05)
    for _ in range(steps):
        common, salient = (drawn.views @ encoder for encoder in encoders)
        loss, _ = dc.sep_clr(common, salient, drawn.target, weights=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    common, salient = (drawn.views[0] @ encoder.detach() for encoder in encoders)
    common, ill = torch.nn.functional.normalize(common), drawn.target == 1
    return {
        "salient from common": explained(common[ill], drawn.salient[ill, None]),
        "salient from salient": explained(salient[ill], drawn.salient[ill, None]),
        "common from common": explained(common, drawn.common),
    }


def test_the_salient_factor_leaves_the_common_space():
    found = encode(dc.SepWeights(), 110)
    assert found["salient from common"] <= 0.1
    assert found["salient from salient"] >= 0.8
    assert found["common from common"] >= 0.7
    assert encode(dc.SepWeights(independence=0.0), 30)["salient from common"] >= 0.5


def test_generated_samples_hold_the_salient_factor_in_targets_alone():
    drawn = testing.salient(4000, seed=3)
    again = testing.salient(4000, seed=3)
    assert torch.equal(drawn.views, again.views)
    assert not torch.equal(drawn.views, testing.salient(4000, seed=4).views)
    for view in drawn.views:
        ill, well = drawn.target == 1, drawn.target == 0
        assert explained(view[ill], drawn.salient[ill, None]) > 0.95
        assert explained(view[well], drawn.salient[well, None]) < 0.03
        assert explained(view, drawn.common) > 0.95
    assert drawn.views.shape == (2, 4000, 24)


# Errors.

C, S, Y = torch.ones(2, 4, 3), torch.ones(2, 4, 2), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "argument", "found"),
    [
        (lambda: dc.sep_clr(C[:1], S[:1], Y), "salient", "has shape (1, 4, 2)"),
        (lambda: dc.sep_clr(C, S[:, :3], Y), "salient", "has shape (2, 3, 2)"),
        (lambda: dc.sep_clr(C, S, Y[:3]), "target", "has shape (3,)"),
        (lambda: dc.sep_clr(C, S, Y + 1), "target", "holds [1, 2, 1, 2]"),
        (lambda: dc.sep_clr(C[:, :1], S[:, :1], Y[:1]), "target", "holds [0]"),
        (lambda: dc.sep_clr(C, S, Y.float()), "target", "float32"),
        (lambda: dc.sep_clr(C, S, Y, parity="other"), "parity", "is 'other'"),
        (lambda: dc.sep_clr(C, S, Y, reduction="none"), "reduction", "is 'none'"),
        (lambda: dc.sep_clr(C, S, Y, return_info=True), "return_info", "is given"),
        (lambda: dc.joint_entropy(C[0], S[0, :2]), "s", "has 2 rows"),
        (lambda: dc.joint_entropy(C[0], S[0], 0.0), "t", "is 0.0"),
        (lambda: dc.sup_alignment(C[0], S[0]), "y", "has shape (4, 2)"),
        (lambda: dc.sup_alignment(S[0, :1], S[0, :1]), "s", "has shape (1, 2)"),
        (lambda: testing.salient(1, 0), "n", "is 1"),
    ],
)
def test_a_wrong_input_is_named(call, argument, found):
    with pytest.raises(dc.ContrastInputError) as caught:
        call()
    assert caught.value.argument == argument
    assert found in caught.value.found
    assert caught.value.fix
