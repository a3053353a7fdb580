"""Values, gradients, closed forms and refusals of the decoupled, corrected and metric losses."""

import math
from functools import partial

import pytest
import torch
from tests.contrast import loops_pairwise as loops
from tests.contrast.equal import assert_equals_loop, assert_same_under_autocast, every_size
from torch import Tensor

import diptych_contrast as dc


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def two_views(ours, loop):
    return lambda n, d, g: ([draw(g, n, d), draw(g, n, d)], ours, loop)


def weighted(n, d, g):
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    return (
        [draw(g, n, d), draw(g, n, d)],
        lambda a, b, **o: dc.dcl(a, b, 0.2, weight, **o),
        lambda a, b: loops.dcl(a, b, 0.2, [*weight]),
    )


def labelled(name, ours, loop):
    def case(n, d, g):
        labels = torch.randint(0, max(2, n // 3), (n,), generator=g)
        labels[0] = 0
        labels[-1] = 1
        if n > 2:
            labels[1] = 0
        return (
            [draw(g, n, d)],
            lambda z, **o: getattr(dc, name)(z, labels, **ours, **o),
            lambda z: getattr(loops, name)(z, labels.tolist(), *loop),
        )

    return case


def n_pairs_paper(n, d, g):
    labels = torch.randint(0, max(2, n // 2), (n,), generator=g)
    labels[0], labels[-1] = 0, 1
    common = {"labels": labels, "l2": 0.02, "normalize": False}
    return (
        [draw(g, n, d) / 3, draw(g, n, d) / 3],
        lambda a, b, **o: dc.n_pairs(a, b, 0.7, **common, **o),
        lambda a, b: loops.n_pairs(a, b, 0.7, labels.tolist(), 0.02, False),
    )


CASES = {
    "dcl": two_views(lambda a, b, **o: dc.dcl(a, b, 0.2, **o), lambda a, b: loops.dcl(a, b, 0.2)),
    "dcl-weight": weighted,
    "dclw": two_views(
        lambda a, b, **o: dc.dclw(a, b, 0.2, **o), lambda a, b: loops.dclw(a, b, 0.2, 0.5, True)
    ),
    "dclw-differentiated": two_views(
        lambda a, b, **o: dc.dclw(a, b, 0.2, sigma=0.7, detach_weights=False, **o),
        lambda a, b: loops.dclw(a, b, 0.2, 0.7, False),
    ),
    "hcl": two_views(
        lambda a, b, **o: dc.hcl(a, b, 0.4, **o), lambda a, b: loops.hcl(a, b, 0.4, 1.0, 0.1)
    ),
    "hcl-floor": two_views(
        lambda a, b, **o: dc.hcl(a, b, 0.4, 0.5, 0.7, **o),
        lambda a, b: loops.hcl(a, b, 0.4, 0.5, 0.7),
    ),
    "debiased": two_views(
        lambda a, b, **o: dc.debiased(a, b, 0.4, **o), lambda a, b: loops.hcl(a, b, 0.4, 0.0, 0.1)
    ),
    "n_pairs": two_views(
        lambda a, b, **o: dc.n_pairs(a, b, 0.3, **o),
        lambda a, b: loops.n_pairs(a, b, 0.3, list(range(len(a))), 0.0, True),
    ),
    "n_pairs-paper": n_pairs_paper,
    "contrastive_margin": labelled("contrastive_margin", {"margin": 1.3}, (1.3, False)),
    "contrastive_margin-cosine": labelled(
        "contrastive_margin", {"distance": "cosine", "margin": 0.6}, (0.6, True)
    ),
    "multi_similarity": labelled("multi_similarity", {}, (2.0, 50.0, 0.5, 0.1)),
    "circle": labelled("circle", {"gamma": 16.0}, (0.25, 16.0)),
}
LABELLED = ("contrastive_margin", "multi_similarity", "circle")


@pytest.mark.parametrize("name", CASES)
@every_size
def test_every_loss_equals_a_double_loop_at_every_tile(name, n, d, seed):
    assert_equals_loop(*CASES[name](n, d, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("circle")])
def test_losses_can_be_differentiated_twice(name):
    inputs, ours, _ = CASES[name](5, 3, torch.Generator().manual_seed(1))
    leaves = tuple(value.requires_grad_() for value in inputs)
    if name not in {"dclw", "multi_similarity"}:
        torch.autograd.gradcheck(lambda *z: ours(*z, tile=3), leaves)
        torch.autograd.gradgradcheck(lambda *z: ours(*z, tile=3), leaves)
    dense = ours(*leaves, backend="dense")
    torch.testing.assert_close(ours(*leaves, tile=4), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20])
def test_rows_of_any_length_give_finite_loss_and_gradient(name, size):
    if name == "n_pairs-paper" and size > 1:
        pytest.skip("takes embeddings as they are")
    inputs, ours, _ = CASES[name](6, 5, torch.Generator().manual_seed(4))
    leaves = [value.float() for value in inputs]
    leaves[0][::2] *= size
    leaves = [value.requires_grad_() for value in leaves]
    value = ours(*leaves)
    assert math.isfinite(value.item())
    for slope in torch.autograd.grad(value, leaves):
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("temperature", [0.01, 10.0])
def test_every_temperature_gives_the_value_of_the_dense_form(temperature):
    z = draw(torch.Generator().manual_seed(0), 2, 9, 5)
    for name in ("dcl", "dclw", "debiased", "hcl", "n_pairs"):
        ours = dc.loss(name, temperature=temperature)(*z.float())
        expected = dc.losses()[name].reference(*z, temperature=temperature)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_equal_vectors_have_their_closed_forms():
    z = torch.ones(8, 5, dtype=torch.float64)
    assert dc.dcl(z, z).item() == pytest.approx(math.log(14), abs=1e-12)
    assert dc.n_pairs(z, z).item() == pytest.approx(math.log(8), abs=1e-12)
    for loss in (dc.hcl, dc.debiased):
        assert loss(z, z, tau_plus=0.0).item() == pytest.approx(math.log(15), abs=1e-12)
        leaf = z.clone().requires_grad_()
        loss(leaf, z).backward()
        assert bool(leaf.grad.isfinite().all())
    leaf = z.clone().requires_grad_()
    labels = torch.arange(8) // 2
    dc.contrastive_margin(leaf, labels).backward()
    assert leaf.grad.abs().max() == 0


def test_adding_both_directions_doubles_the_loss():
    z = draw(torch.Generator().manual_seed(0), 2, 6, 4)
    torch.testing.assert_close(dc.dcl(*z, reduction_directions="sum"), 2 * dc.dcl(*z))


def official_dcl(z1: Tensor, z2: Tensor, t: float, sigma: float | None) -> Tensor:
    """One direction as the authors compute it: dense, not normalised, additive mask."""
    n = len(z1)
    cross = z1 @ z2.t()
    pull = -cross.diagonal() / t
    if sigma is not None:
        pull = pull * (2 - n * ((z1 * z2).sum(1) / sigma).softmax(0))
    every = torch.cat([z1 @ z1.t(), cross], 1) / t + torch.eye(n).repeat(1, 2) * math.log(1e-45)
    return (pull + every.logsumexp(1)).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_parity_with_the_authors_code_holds_also_where_its_mask_leaks(temperature):
    z = draw(torch.Generator().manual_seed(0), 2, 9, 5)
    leaves = (z / z.norm(dim=2, keepdim=True)).unbind(0)
    for leaf in (leaves := [leaf.clone().requires_grad_() for leaf in leaves]):
        assert leaf.is_leaf
    for ours, sigma in (
        (dc.dcl(*leaves, temperature, parity="official"), None),
        (dc.dclw(*leaves, temperature, parity="official"), 0.5),
    ):
        expected = sum(official_dcl(a, b, temperature, sigma) for a, b in (leaves, leaves[::-1]))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        for got, want in zip(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_dcl_tells_the_statistics_of_its_pairs():
    z1, z2 = draw(torch.Generator().manual_seed(0), 2, 9, 5)
    _, info = dc.dcl(z1, z2, 0.3, return_info=True)
    _, other = dc.nt_xent(z1, z2, 0.3, return_info=True)
    for field in ("pos_mean", "neg_mean", "neg_var", "exp_neg_mean", "top1", "logit_max"):
        torch.testing.assert_close(getattr(info, field), getattr(other, field))


# Two views that fit into one tile.


@pytest.mark.parametrize("loss", [dc.nt_xent, dc.dcl, partial(dc.dclw, detach_weights=False)])
def test_two_small_views_can_be_differentiated_twice(loss):
    z = draw(torch.Generator().manual_seed(0), 2, 4, 3).requires_grad_()
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, t: loss(*x, t), (z, t))
    torch.autograd.gradgradcheck(lambda x, t: loss(*x, t), (z, t))
    alone = lambda x: loss(x, z[1].detach(), 0.4)  # noqa: E731
    torch.autograd.gradgradcheck(alone, z[0].detach().requires_grad_())


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_autocast_keeps_single_precision(name):
    inputs, ours, _ = CASES[name](12, 8, torch.Generator().manual_seed(6))
    for tile in (5, "auto"):
        assert_same_under_autocast(inputs, partial(ours, tile=tile))


def test_a_backward_pass_alone_under_autocast_keeps_single_precision():
    z = draw(torch.Generator().manual_seed(0), 2, 9, 5).float().requires_grad_()
    loss = dc.nt_xent(*z, 0.3)
    (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (slope,) = torch.autograd.grad(loss, z)
    assert torch.equal(slope, expected)


@pytest.mark.parametrize("loss", [dc.nt_xent, dc.dcl])
def test_small_views_tell_what_tiles_tell(loss):
    z = draw(torch.Generator().manual_seed(0), 2, 9, 5)
    z[0, 3] = 0.0
    _, small = loss(*z, 0.3, return_info=True)
    _, tiled = loss(*z, 0.3, return_info=True, tile=7)
    for field, value in vars(tiled).items():
        got, want = (torch.as_tensor(x).double() for x in (getattr(small, field), value))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, msg=field)


@pytest.mark.parametrize("name", ["dcl", "hcl", "n_pairs", "circle", "multi_similarity"])
def test_half_precision_is_computed_in_float32(name):
    inputs, ours, _ = CASES[name](12, 8, torch.Generator().manual_seed(6))
    half = [value.bfloat16().requires_grad_() for value in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(*half)
        slopes = torch.autograd.grad(value, half)
    expected = ours(*[value.detach().float() for value in half])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert all(slope.dtype == torch.bfloat16 for slope in slopes)


Z, LABELS = torch.eye(6), torch.arange(6) // 2
REFUSED = [
    (lambda: dc.dcl(Z[:1], Z[:1]), "z1", "single row"),
    (lambda: dc.dcl(Z, Z, weight=torch.ones(5)), "weight", "one weight for each"),
    (lambda: dc.dcl(Z, Z, reduction_directions="both"), "reduction_directions", "'mean', 'sum'"),
    (lambda: dc.dcl(Z, Z, parity="paper"), "parity", "'official'"),
    (lambda: dc.dclw(Z, Z, sigma=0.0), "sigma", "above 0"),
    (lambda: dc.hcl(Z, Z, beta=-1.0), "beta", "at least 0"),
    (lambda: dc.debiased(Z, Z, tau_plus=1.0), "tau_plus", "below 1"),
    (lambda: dc.hcl(Z, Z, return_info=True), "return_info", "leave it out"),
    (lambda: dc.n_pairs(Z, Z[:5]), "z2", "number of rows"),
    (lambda: dc.n_pairs(Z, Z, labels=LABELS[:5]), "labels", "6 integers"),
    (lambda: dc.circle(Z, LABELS, gamma=0.0), "gamma", "above 0"),
    (lambda: dc.circle(Z, LABELS.float()), "labels", "integers"),
    (lambda: dc.circle(Z, LABELS, return_info=True), "return_info", "leave it out"),
    (lambda: dc.multi_similarity(Z, LABELS, alpha=-1.0), "alpha", "above 0"),
    (lambda: dc.multi_similarity(Z, LABELS, beta=math.inf), "beta", "above 0"),
    (lambda: dc.contrastive_margin(Z, LABELS, 0.0), "margin", "above 0"),
    (lambda: dc.contrastive_margin(Z, LABELS, distance="city"), "distance", "'cosine'"),
]


@pytest.mark.parametrize(("call", "argument", "fix"), REFUSED)
def test_a_refused_input_names_argument_and_fix(call, argument, fix):
    with pytest.raises(dc.ContrastInputError, match=fix) as caught:
        call()
    assert caught.value.argument == argument


@pytest.mark.parametrize("name", LABELLED)
def test_rows_of_a_lone_class_are_skipped_and_no_valid_row_is_warned_about(name):
    loss = getattr(dc, name)
    rows = loss(Z, torch.tensor([0, 0, 1, 2, 3, 4]), reduction="none")
    assert rows[2:].tolist() == [0.0] * 4
    z = Z.clone().requires_grad_()
    with pytest.warns(dc.ContrastWarning, match="no row with a positive"):
        value = loss(z, torch.arange(6))
    value.backward()
    assert value.item() == 0
    assert z.grad.abs().max() == 0


def test_decoupled_rows_of_equal_id_are_no_negatives():
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    z = torch.nn.functional.normalize(torch.cat([x, y]), dim=1)
    rows = []
    for i in range(12):
        apart = [z[i] @ z[j] / 0.1 for j in range(12) if ids[i % 6] != ids[j % 6]]
        rows.append(torch.stack(apart).logsumexp(0) - z[i] @ z[(i + 6) % 12] / 0.1)
    torch.testing.assert_close(dc.dcl(x, y, ids=ids), torch.stack(rows).mean())
    info = dc.dcl(x, y, ids=ids, return_info=True)[1]
    assert int(info.n_valid) == 12
    lone = dc.dcl(x, y, ids=torch.zeros(6, dtype=torch.long), reduction="none")
    assert lone.tolist() == [0.0] * 12
