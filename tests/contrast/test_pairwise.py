"""Values, gradients and invariances of the pairwise losses."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.contrast import references as loops
from tests.contrast.equal import assert_equals_loop, assert_same_under_autocast, every_size
from torch import Tensor

import diptych_contrast as dc

Case = Callable[[int, int, torch.Generator], tuple[list[Tensor], Callable, Callable]]


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole(generator: torch.Generator, high: int, count: int) -> Tensor:
    return torch.randint(0, high, (count,), generator=generator)


def nt_xent_plain(n, d, g):
    z = [draw(g, n, d), draw(g, n, d)]
    return z, lambda a, b, **o: dc.nt_xent(a, b, 0.3, **o), lambda a, b: loops.nt_xent(a, b, 0.3)


def nt_xent_ids(n, d, g):
    ids, labels = whole(g, max(2, n // 2), n), whole(g, 3, n)
    ids[0], ids[-1], labels[0], labels[-1] = 0, 1, 0, 1
    return (
        [draw(g, n, d), draw(g, n, d)],
        lambda a, b, **o: dc.nt_xent(a, b, 0.3, ids=ids, labels=labels, **o),
        lambda a, b: loops.nt_xent(a, b, 0.3, ids.tolist(), labels.tolist()),
    )


def info_nce_batch(n, d, g):
    z = [draw(g, n, d), draw(g, n, d)]
    return z, lambda a, b, **o: dc.info_nce(a, b, 0.2, **o), lambda a, b: loops.info_nce(a, b, 0.2)


def info_nce_queue(n, d, g):
    queue = draw(g, 7, d)
    return (
        [draw(g, n, d), draw(g, n, d)],
        lambda a, b, **o: dc.info_nce(a, b, 0.2, negatives="queue", queue=queue, **o),
        lambda a, b: loops.info_nce(a, b, 0.2, in_batch=False, queue=queue),
    )


def info_nce_combined(n, d, g):
    queue = draw(g, 5, d)
    sources = ("in_batch", "queue", "rows")
    return (
        [draw(g, n, d), draw(g, n, d), draw(g, n, 3, d)],
        lambda a, b, c, **o: dc.info_nce(
            a, b, 0.2, negatives=sources, queue=queue, row_negatives=c, **o
        ),
        lambda a, b, c: loops.info_nce(a, b, 0.2, queue=queue, own=c),
    )


def sup_con_case(mode, views):
    def case(n, d, g):
        labels = whole(g, max(1, n // 3), n) - (1 if views > 1 else 0)
        labels[:2] = 0
        samples = list(range(n)) * views
        return (
            [draw(g, views, n, d)],
            lambda z, **o: dc.sup_con(z if views > 1 else z[0], labels, 0.2, mode=mode, **o),
            lambda z: loops.sup_con(
                [*z.flatten(0, 1)], labels.tolist() * views, samples, 0.2, mode
            ),
        )

    return case


def soft_sup_con_case(factors):
    def case(n, d, g):
        u, v = draw(g, n, 3).abs(), draw(g, n, 3).abs()
        v = v if factors else u
        given = {"weights": (u, v)} if factors else {"soft_labels": u}
        return (
            [draw(g, 2, n, d)],
            lambda z, **o: dc.soft_sup_con(z, temperature=0.2, **given, **o),
            lambda z: loops.soft_sup_con(
                [*z.flatten(0, 1)], [*u, *u], [*v, *v], list(range(n)) * 2, 0.2
            ),
        )

    return case


def clip_case(n, d, g):
    z = [draw(g, n, d), draw(g, n, d)]
    return (
        z,
        lambda a, b, **o: dc.clip_loss(a, b, 0.2, **o),
        lambda a, b: loops.clip_loss(a, b, 0.2),
    )


def siglip_case(n, d, g):
    z = [draw(g, n, d), draw(g, n, d)]
    return (
        z,
        lambda a, b, **o: dc.siglip(a, b, 1.0, -2.0, **o),
        lambda a, b: loops.siglip(a, b, 1.0, -2.0),
    )


def siglip_soft(n, d, g):
    share = torch.rand(n, n, generator=g, dtype=torch.float64)
    return (
        [draw(g, n, d), draw(g, n, d)],
        lambda a, b, **o: dc.siglip(a, b, 1.0, -2.0, positives=share, **o),
        lambda a, b: loops.siglip(a, b, 1.0, -2.0, share),
    )


def multi_case(n, d, g):
    return (
        [draw(g, 3, n, d)],
        lambda z, **o: dc.nt_xent_multi(z, 0.4, **o),
        lambda z: loops.sup_con(
            [*z.flatten(0, 1)], list(range(n)) * 3, list(range(n)) * 3, 0.4, "out"
        ),
    )


CASES: dict[str, Case] = {
    "nt_xent": nt_xent_plain,
    "nt_xent-ids-labels": nt_xent_ids,
    "info_nce": info_nce_batch,
    "info_nce-queue": info_nce_queue,
    "info_nce-combined": info_nce_combined,
    "sup_con-out": sup_con_case("out", 1),
    "sup_con-out-views": sup_con_case("out", 2),
    "sup_con-in-views": sup_con_case("in", 2),
    "soft_sup_con": soft_sup_con_case(False),
    "soft_sup_con-factors": soft_sup_con_case(True),
    "clip_loss": clip_case,
    "siglip": siglip_case,
    "siglip-soft": siglip_soft,
    "nt_xent_multi": multi_case,
}


@pytest.mark.parametrize("name", CASES)
@every_size
def test_every_loss_equals_a_double_loop_at_every_tile(name, n, d, seed):
    assert_equals_loop(*CASES[name](n, d, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", [name for name in CASES if "siglip" not in name])
def test_losses_can_be_differentiated_twice(name):
    inputs, ours, _ = CASES[name](4, 3, torch.Generator().manual_seed(1))
    leaves = tuple(value.requires_grad_() for value in inputs)
    torch.autograd.gradcheck(lambda *z: ours(*z, tile=3), leaves)
    torch.autograd.gradgradcheck(lambda *z: ours(*z, tile=3), leaves)


@pytest.mark.parametrize("name", CASES)
def test_the_dense_backend_gives_the_same(name):
    inputs, ours, _ = CASES[name](9, 5, torch.Generator().manual_seed(2))
    leaves = [value.requires_grad_() for value in inputs]
    tiled, dense = ours(*leaves, tile=4), ours(*leaves, backend="dense")
    torch.testing.assert_close(tiled, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions_agree_with_the_mean(name, reduction):
    inputs, ours, loop = CASES[name](6, 5, torch.Generator().manual_seed(3))
    rows = ours(*inputs, reduction="none")
    value = rows.sum() if reduction == "none" else ours(*inputs, reduction="sum")
    torch.testing.assert_close(value, torch.stack(loop(*inputs)).sum(), rtol=1e-10, atol=1e-10)


# Closed forms (check 3).


def test_nt_xent_of_equal_vectors_is_log_of_the_other_rows():
    z = torch.ones(8, 5, dtype=torch.float64)
    assert dc.nt_xent(z, z, 0.1).item() == pytest.approx(math.log(15), abs=1e-12)


def test_nt_xent_of_orthogonal_samples_reaches_its_optimum():
    z = torch.eye(8, dtype=torch.float64)
    expected = math.log(1 + 14 * math.exp(-1 / 0.2))
    assert dc.nt_xent(z, z, 0.2).item() == pytest.approx(expected, abs=1e-12)


def test_sup_con_on_a_simplex_reaches_its_minimum():
    k, n, t = 4, 3, 0.5
    simplex = torch.eye(k, dtype=torch.float64) - 1.0 / k
    labels = torch.arange(k).repeat_interleave(n)
    expected = math.log((n - 1) + (k - 1) * n * math.exp(-(k / (k - 1)) / t))
    assert dc.sup_con(simplex[labels], labels, t).item() == pytest.approx(expected, abs=1e-12)


def test_nt_xent_multi_of_two_views_is_nt_xent():
    z = draw(torch.Generator().manual_seed(0), 2, 9, 5)
    torch.testing.assert_close(dc.nt_xent_multi(z, 0.3), dc.nt_xent(z[0], z[1], 0.3))


def test_info_nce_bounds_the_mutual_information_of_gaussians():
    """Optimal critic of correlated Gaussians, its squares as biases (check 4)."""
    rho, n = 0.5, 4096
    pairs = dc.gaussian_pairs(n, 4, rho, seed=0)
    x, y = torch.as_tensor(pairs.x).double(), torch.as_tensor(pairs.y).double()
    factor = 1.0 / (1 - rho**2)
    bias = -0.5 * rho**2 * factor * y.square().sum(1)
    lse = dc.pair_lse(x, y, rho * factor, ("any",), None, None, bias)[:, 0]
    positive = rho * factor * (x * y).sum(1) + bias
    bound = math.log(n) - (lse - positive).mean().item()
    assert bound == pytest.approx(-2 * math.log(1 - rho**2), abs=0.03)


# Frozen values of other libraries (check 5).


def peers_input(n: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    z1 = torch.nn.functional.normalize(torch.randn(n, 128), dim=1)
    z2 = torch.nn.functional.normalize(torch.randn(n, 128), dim=1)
    return z1, z2, torch.randint(0, 100, (n,))


@pytest.mark.parametrize(("n", "expected"), [(256, 6.670585), (4096, 9.403240)])
def test_nt_xent_equals_lightly(n, expected):
    z1, z2, _ = peers_input(n)
    assert dc.nt_xent(z1, z2, 0.1).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("n", "expected"), [(256, 6.668575), (4096, 9.403116)])
def test_dcl_equals_lightly(n, expected):
    z1, z2, _ = peers_input(n)
    assert dc.dcl(z1, z2, 0.1).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("n", "expected"), [(256, 5.244523), (4096, 5.237964)])
def test_swav_equals_lightly(n, expected):
    z1, z2, _ = peers_input(n)
    assert dc.swav_loss((z1, z2)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("n", "expected"), [(256, 6.632187), (4096, 9.399376)])
def test_sup_con_equals_pytorch_metric_learning(n, expected):
    z1, z2, labels = peers_input(n)
    assert dc.sup_con((z1, z2), labels, 0.1).item() == pytest.approx(expected, abs=1e-5)


def test_sup_con_official_is_scaled_by_the_base_temperature():
    z, labels = draw(torch.Generator().manual_seed(0), 9, 5), torch.arange(9) % 3
    plain = dc.sup_con(z, labels, 0.2)
    torch.testing.assert_close(dc.sup_con(z, labels, 0.2, parity="official"), plain * 0.2 / 0.07)


# Extremes (check 7).


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20])
def test_rows_of_any_length_give_finite_loss_and_gradient(name, size):
    inputs, ours, _ = CASES[name](6, 5, torch.Generator().manual_seed(4))
    leaves = [value.float() for value in inputs]
    leaves[0].view(-1, 5)[::2] *= size
    leaves = [value.requires_grad_() for value in leaves]
    value = ours(*leaves)
    slopes = torch.autograd.grad(value, leaves)
    assert math.isfinite(value.item())
    assert all(bool(slope.isfinite().all()) for slope in slopes)
    if size == 0.0:
        assert slopes[0].view(-1, 5)[::2].abs().max() == 0


@pytest.mark.parametrize("temperature", [0.01, 0.05, 10.0])
@pytest.mark.parametrize("tile", [4, "auto"])
def test_every_temperature_gives_finite_exact_results(temperature, tile):
    z1, z2, labels = peers_input(16)
    for ours, loop in (
        (
            dc.nt_xent(z1, z2, temperature, tile=tile),
            loops.nt_xent(z1.double(), z2.double(), temperature),
        ),
        (
            dc.sup_con(z1, labels % 3, temperature, tile=tile),
            loops.sup_con([*z1.double()], (labels % 3).tolist(), [], temperature, "out"),
        ),
        (
            dc.clip_loss(z1, z2, temperature, tile=tile),
            loops.clip_loss(z1.double(), z2.double(), temperature),
        ),
    ):
        expected = torch.stack(loop).mean().item()
        assert ours.item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


def test_one_class_is_nt_xent_with_all_rows_positive():
    z = draw(torch.Generator().manual_seed(0), 6, 4)
    assert math.isfinite(dc.sup_con(z, torch.zeros(6, dtype=torch.int64)).item())


@pytest.mark.filterwarnings("ignore::diptych_contrast.ContrastWarning")
def test_rows_without_positive_give_a_zero_that_is_attached_to_the_graph():
    z = draw(torch.Generator().manual_seed(0), 5, 4).requires_grad_()
    value = dc.sup_con(z, torch.arange(5))
    value.backward()
    assert value.item() == 0
    assert z.grad is not None
    assert z.grad.abs().max() == 0


def test_rows_of_one_trial_are_left_out_when_they_have_no_negative():
    z = draw(torch.Generator().manual_seed(0), 2, 4, 3)
    ids = torch.tensor([0, 0, 0, 1])
    rows = dc.nt_xent(z[0], z[1], ids=ids, reduction="none")
    assert bool((rows > 0).all())
    with pytest.warns(dc.ContrastWarning, match="no row with a positive"):
        assert dc.nt_xent(z[0], z[1], ids=torch.zeros(4, dtype=torch.int64)).item() == 0


def test_empty_rows_count_as_zero_or_are_refused_on_request():
    z, labels = draw(torch.Generator().manual_seed(0), 5, 4), torch.tensor([0, 0, 1, 2, 3])
    skipped = dc.sup_con(z, labels)
    torch.testing.assert_close(dc.sup_con(z, labels, empty="zero"), skipped * 2 / 5)
    with pytest.raises(dc.ContrastInputError, match="3 of 5 rows"):
        dc.sup_con(z, labels, empty="error")


# Invariances (check 8).


def test_losses_do_not_depend_on_order_rotation_scale_or_label_names():
    g = torch.Generator().manual_seed(5)
    z, labels = draw(g, 2, 12, 6), whole(g, 4, 12)
    order = torch.randperm(12, generator=g)
    rotation = torch.linalg.qr(draw(g, 6, 6))[0]
    lengths = torch.rand(2, 12, 1, generator=g, dtype=torch.float64) + 0.5
    for loss in (
        lambda x, _: dc.nt_xent(x[0], x[1]),
        lambda x, _: dc.clip_loss(x[0], x[1]),
        lambda x, _: dc.siglip(x[0], x[1]),
        dc.sup_con,
    ):
        expected = loss(z, labels)
        for other, names in (
            (z[:, order], labels[order]),
            (z @ rotation, labels),
            (z * lengths, labels),
        ):
            torch.testing.assert_close(loss(other, names), expected, rtol=1e-9, atol=1e-9)
    renamed = torch.tensor([7, 2, 9, 4])[labels]
    assert torch.equal(dc.sup_con(z, labels), dc.sup_con(z, renamed))


# Precision (check 9).


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name, dtype):
    inputs, ours, _ = CASES[name](12, 8, torch.Generator().manual_seed(6))
    half = [value.to(dtype).requires_grad_() for value in inputs]
    wide = [value.detach().float().requires_grad_() for value in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(*half)
    assert value.dtype == torch.float32
    expected = ours(*wide)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    slopes = torch.autograd.grad(value, half)
    assert all(slope.dtype == dtype for slope in slopes)


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_autocast_keeps_single_precision(name):
    inputs, ours, _ = CASES[name](12, 8, torch.Generator().manual_seed(6))
    for how in ({"tile": 5}, {"tile": "auto"}, {"backend": "dense"}):
        assert_same_under_autocast(inputs, partial(ours, **how))


def test_a_learned_temperature_gets_its_gradient():
    z = draw(torch.Generator().manual_seed(0), 2, 9, 5)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for loss in (dc.nt_xent, dc.clip_loss, dc.info_nce):
        torch.autograd.gradcheck(lambda t, loss=loss: loss(z[0], z[1], t, tile=4), temperature)
    learned = dc.Temperature(0.3, learnable=True)
    dc.clip_loss(z[0], z[1], learned).backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in learned.parameters())


def test_a_queue_that_is_not_full_counts_only_what_was_put_in():
    g = torch.Generator().manual_seed(0)
    q, k, keys = draw(g, 4, 5).float(), draw(g, 4, 5).float(), draw(g, 3, 5).float()
    queue = dc.KeyQueue(8, 5)
    queue.enqueue(keys)
    ours = dc.info_nce(q, k, negatives="queue", queue=queue)
    torch.testing.assert_close(ours, dc.info_nce(q, k, negatives="queue", queue=keys))


def test_the_same_call_gives_the_same_bits():
    z1, z2, _ = peers_input(256)
    assert torch.equal(dc.nt_xent(z1, z2, tile=64), dc.nt_xent(z1, z2, tile=64))
