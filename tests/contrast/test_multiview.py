"""Values, gradients, closed forms and errors of the multi-view losses."""

import math
from functools import partial

import pytest
import torch
from tests.contrast import loops_multiview as loops
from tests.contrast import references
from tests.contrast.equal import assert_equals_loop, assert_same_under_autocast, every_size
from torch import Tensor

import diptych_contrast as dc


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def averages(z: Tensor, t: float) -> list[Tensor]:
    unit = z / z.norm(dim=2, keepdim=True)
    losses = []
    for a in range(len(z)):
        mean = torch.stack([unit[b] for b in range(len(z)) if b != a]).mean(0)
        losses.append(torch.stack(references.nt_xent(z[a], mean, t)))
    return [*torch.stack(losses).mean(0)]


def pairs(z: Tensor, t: float) -> list[Tensor]:
    each = [torch.stack(references.nt_xent(z[b], z[a], t)) for a in range(len(z)) for b in range(a)]
    return [*torch.stack(each).mean(0)]


CASES = {
    "mv_info_nce": (dc.mv_info_nce, partial(loops.mv_info_nce, same_view=False)),
    "mv_info_nce-same-view": (
        partial(dc.mv_info_nce, same_view_negatives=True),
        partial(loops.mv_info_nce, same_view=True),
    ),
    "mv_dhel": (dc.mv_dhel, loops.mv_dhel),
    **{
        f"poly_view-{how}": (
            partial(dc.poly_view, aggregate=how),
            partial(loops.poly_view, aggregate=how),
        )
        for how in ("geometric", "arithmetic", "sufficient")
    },
    "pairwise_views": (partial(dc.pairwise_views, dc.nt_xent), pairs),
    "average_views": (partial(dc.average_views, dc.nt_xent), averages),
}
OWN = [name for name in CASES if not name.endswith("_views")]


@pytest.mark.parametrize("name", CASES)
@every_size
def test_every_loss_equals_a_double_loop_at_every_tile(name, n, d, seed):
    ours, loop = CASES[name]
    views = draw(seed, 2 if n == 64 else 2 + seed % 3, n, d)
    assert_equals_loop([views], partial(ours, temperature=0.3), lambda z: loop(z, 0.3))


@pytest.mark.parametrize("name", OWN)
def test_losses_can_be_differentiated_twice(name):
    views = draw(1, 3, 4, 3).requires_grad_()
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = lambda z, t: CASES[name][0](z, t, tile=5)  # noqa: E731
    torch.autograd.gradcheck(loss, (views, scale))
    torch.autograd.gradgradcheck(loss, (views, scale))


@pytest.mark.parametrize("name", CASES)
def test_reductions_and_back_ends_agree(name):
    ours, loop = CASES[name]
    views = draw(2, 3, 5, 4)
    rows = torch.stack(loop(views, 0.5))
    torch.testing.assert_close(ours(views, temperature=0.5, reduction="none"), rows)
    torch.testing.assert_close(ours(views, temperature=0.5, reduction="sum"), rows.sum())
    dense = ours(tuple(views), temperature=0.5, backend="dense")
    torch.testing.assert_close(dense, rows.mean())


@pytest.mark.parametrize("name", [*OWN, "nt_xent_multi"])
def test_the_registered_reference_is_the_loss(name):
    spec = dc.losses()[name.split("-")[0]]
    keywords = getattr(CASES.get(name, (None,))[0], "keywords", {})
    views = draw(3, 4, 6, 5)
    torch.testing.assert_close(
        spec.function(views, 0.2, **keywords), spec.reference(views, 0.2, **keywords)
    )


# Closed forms.


@pytest.mark.parametrize("how", ["geometric", "arithmetic", "sufficient"])
def test_poly_view_of_two_views_is_nt_xent(how):
    z = draw(0, 2, 9, 5)
    expected = dc.nt_xent(z[0], z[1], 0.3)
    torch.testing.assert_close(dc.poly_view(z, 0.3, aggregate=how), expected, rtol=1e-9, atol=1e-9)


def test_combining_two_views_is_the_loss_of_two_views():
    z = draw(0, 2, 9, 5)
    expected = dc.nt_xent(z[0], z[1], 0.3)
    torch.testing.assert_close(dc.pairwise_views(dc.nt_xent, z, temperature=0.3), expected)
    torch.testing.assert_close(dc.average_views(dc.nt_xent, z, temperature=0.3), expected)


def test_equal_vectors_have_the_losses_of_counting():
    v, m, t = 3, 8, 0.5
    z = torch.ones(v, m, 4, dtype=torch.float64)
    dhel = v * (1 / t + math.log(m - 1)) - 1 / t - math.log(v * (v - 1))
    assert dc.mv_dhel(z, t).item() == pytest.approx(dhel, abs=1e-12)
    assert dc.mv_info_nce(z, t).item() == pytest.approx(math.log(m), abs=1e-12)
    poly = math.log(1 + v * (m - 1))
    assert dc.poly_view(z, t).item() == pytest.approx(poly, abs=1e-12)


# The authors' forms.


def test_parity_gives_the_values_of_the_authors():
    views = draw(4, 4, 7, 6)
    torch.testing.assert_close(
        dc.mv_info_nce(views, 0.5, parity="official"), loops.official_mv_info_nce(views, 0.5)
    )
    torch.testing.assert_close(
        dc.mv_dhel(views, 0.5, parity="official"), loops.official_mv_dhel(views, 0.5)
    )
    official, ours = dc.mv_dhel(views, 0.5, parity="official"), dc.mv_dhel(views, 0.5)
    assert (official - ours).item() == pytest.approx(math.log(2), abs=1e-12)


def test_official_averages_are_left_short():
    unit = torch.nn.functional.normalize(draw(5, 3, 6, 4), dim=2)
    values = []
    for a in range(3):
        mean = (unit.sum(0) - unit[a]) / 2
        both = torch.cat([unit[a], mean])
        logits = (both @ both.t() / 0.5).fill_diagonal_(-math.inf)
        partner = torch.arange(12).roll(6)
        values.append(torch.nn.functional.cross_entropy(logits, partner))
    official = dc.average_views(dc.nt_xent, unit, parity="official", temperature=0.5)
    torch.testing.assert_close(official, torch.stack(values).mean())
    assert (dc.average_views(dc.nt_xent, unit, temperature=0.5) - official).abs() > 1e-3


# Extremes, precision, invariance.


@pytest.mark.parametrize(("v", "t"), [(40, 0.1), (16, 0.2), (13, 0.01)])
def test_many_views_do_not_overflow(v, t):
    for views in (draw(0, v, 64, 8).float(), torch.ones(v, 64, 8)):
        leaf = views.requires_grad_()
        value = dc.mv_dhel(leaf, t)
        (slope,) = torch.autograd.grad(value, leaf)
        assert math.isfinite(value.item())
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20])
def test_rows_of_any_length_give_finite_loss_and_gradient(name, size):
    views = draw(6, 3, 6, 5).float()
    views[:, ::2] *= size
    views.requires_grad_()
    for t in (0.01, 10.0):
        value = CASES[name][0](views, t)
        (slope,) = torch.autograd.grad(value, views)
        assert math.isfinite(value.item())
        assert bool(slope.isfinite().all())
        assert size > 0 or slope[:, ::2].abs().max() == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    half = draw(7, 3, 9, 8).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = CASES[name][0](half, temperature=0.3)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, CASES[name][0](half.detach().float(), temperature=0.3), rtol=1e-5, atol=1e-5
    )
    assert torch.autograd.grad(value, half)[0].dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_autocast_keeps_single_precision(name):
    for tile in (5, "auto"):
        loss = partial(CASES[name][0], temperature=0.3, tile=tile)
        assert_same_under_autocast([draw(7, 3, 9, 8)], loss)


@pytest.mark.parametrize("name", CASES)
def test_losses_do_not_depend_on_order_rotation_or_length(name):
    views = draw(8, 3, 7, 5)
    ours = partial(CASES[name][0], temperature=0.4)
    expected = ours(views)
    rotation = torch.linalg.qr(draw(9, 5, 5))[0]
    lengths = draw(10, 3, 7, 1).abs() + 0.5
    for other in (views[:, torch.randperm(7)], views.flip(0), views @ rotation, views * lengths):
        torch.testing.assert_close(ours(other), expected, rtol=1e-9, atol=1e-9)


def test_embeddings_are_taken_as_they_are_without_normalisation():
    views = draw(11, 3, 5, 4)
    rows = views[0] @ views[0].t() / 2.0
    expected = rows.fill_diagonal_(-math.inf).logsumexp(1)
    for view in views[1:]:
        expected = expected + (view @ view.t() / 2.0).fill_diagonal_(-math.inf).logsumexp(1)
    siblings = torch.stack(
        [(views[a] * views[b]).sum(1) for a in range(3) for b in range(3) if a != b]
    )
    expected = (expected - (siblings / 2.0).logsumexp(0)).mean()
    torch.testing.assert_close(dc.mv_dhel(views, 2.0, normalize=False), expected)
    means = (views.sum(0) - views) / 2
    by_hand = [
        dc.nt_xent(view, mean, 2.0, normalize=False)
        for view, mean in zip(views, means, strict=True)
    ]
    ours = dc.average_views(dc.nt_xent, views, temperature=2.0, normalize=False)
    torch.testing.assert_close(ours, torch.stack(by_hand).mean())


# Errors.


@pytest.mark.parametrize(
    ("call", "argument", "found"),
    [
        (lambda z: dc.mv_info_nce(z[:1]), "views", "is one view"),
        (lambda z: dc.nt_xent_multi(z[:1]), "views", "is one view"),
        (lambda z: dc.mv_dhel(z[:, :1]), "views", "has one sample"),
        (lambda z: dc.poly_view((z[0], z[1, :2])), "views[1]", "has shape (2, 4)"),
        (lambda z: dc.poly_view(z, aggregate="mean"), "aggregate", "is 'mean'"),
        (lambda z: dc.mv_dhel(z, parity="other"), "parity", "is 'other'"),
        (lambda z: dc.mv_info_nce(z, return_info=True), "return_info", "is given"),
        (lambda z: dc.pairwise_views(dc.nt_xent, z[:1]), "views", "is one view"),
        (lambda z: dc.pairwise_views(dc.nt_xent, z, return_info=True), "return_info", "is given"),
        (lambda z: dc.average_views(dc.nt_xent, z, parity="none"), "parity", "is 'none'"),
        (lambda z: dc.mv_info_nce(z, 0.0), "temperature", "is 0.0"),
    ],
)
def test_a_wrong_input_is_named(call, argument, found):
    with pytest.raises(dc.ContrastInputError) as caught:
        call(draw(0, 3, 5, 4))
    assert caught.value.argument == argument
    assert found in caught.value.found
    assert caught.value.fix
