"""Reweighting losses: values, gradients, closed forms, extremes, refusals."""

import math
from functools import partial

import pytest
import torch
from tests.contrast import loops_reweight as loops
from tests.contrast.equal import (
    assert_equals_loop,
    assert_finite_at_any_length,
    assert_same_under_autocast,
    every_size,
)

import diptych_contrast as dc


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cacr_case(views=2, queued=False, **options):
    def case(n, d, g):
        queue = draw(g, 5, d) if queued else None
        freeze = options.get("detach_weights", True)
        other = {key: value for key, value in options.items() if key != "detach_weights"}
        return (
            [draw(g, views, n, d)],
            lambda z, **o: dc.cacr(z, 1.0, 1.5, queue=queue, **options, **o),
            lambda z: loops.cacr(
                loops.unit(z), 1.0, 1.5, freeze=freeze,
                queue=loops.unit(queue) if queued else (), **other
            ),
        )  # fmt: skip

    return case


def official_case(**options):
    def case(n, d, g):
        return (
            [draw(g, 3, n, d)],
            lambda z, **o: dc.cacr(z, 1.0, 1.5, parity="official", **options, **o),
            lambda z: loops.official_cacr(loops.unit(z), 1.0, 1.5, **options),
        )

    return case


def amcl_case(kind):
    def case(n, d, g):
        torch.manual_seed(n)
        net = dc.PairTemperature(d, 2, kind, low=0.1, hidden=8).double()
        return (
            [draw(g, 2, n, d), draw(g, 2, n, d)],
            lambda a, b, **o: dc.amcl(a, b, net, 0.2, **o),
            lambda a, b: loops.amcl(loops.unit(a), loops.unit(b), net, 0.2),
        )

    return case


def pairs_case(official=False, **options):
    def case(n, d, g):
        labels = torch.arange(n) % 4 if n > 2 else torch.arange(n) % 2
        partners = labels.roll(1)
        if n > 2:
            partners[0] = labels[0]
        gates = torch.rand(n, d, generator=g, dtype=torch.float64)
        cosine, pool = options.get("subspace_cosine", False), options.get("pool", "rows")
        # Two samples leave no third class: give the columns of one more.
        labels = torch.tensor([0, 1, 2, 3, 1, 2])[:6] if n < 6 else labels
        partners = labels.roll(2) if n < 6 else partners
        gates = torch.rand(len(labels), d, generator=g, dtype=torch.float64)
        return (
            [draw(g, len(labels), d), draw(g, len(labels), d), gates],
            lambda z, k, w, **o: dc.arbitrary_pairs(
                z, k, labels, partners, lambda *_: w, 0.3,
                parity="official" if official else None, **options, **o
            ),
            lambda z, k, w: loops.arbitrary_pairs(
                loops.unit(z), loops.unit(k), labels.tolist(), partners.tolist(), w, 0.3,
                pool=pool, cosine=cosine, official=official
            ),
        )  # fmt: skip

    return case


CASES = {
    "cacr": cacr_case(),
    "cacr-attached": cacr_case(3, detach_weights=False, alpha=0.5, beta=2.0),
    "cacr-rbf": cacr_case(kernel="rbf"),
    "cacr-queue-debiased": cacr_case(queued=True, tau_plus=0.1),
    "cacr-official": official_case(tau_plus=0.1),
    "cacr-official-rbf": official_case(kernel="rbf"),
    "amcl-bilinear": amcl_case("bilinear"),
    "amcl-mlp": amcl_case("mlp"),
    "pairs": pairs_case(),
    "pairs-cosine-pooled": pairs_case(subspace_cosine=True, pool="pairs"),
    "pairs-official": pairs_case(official=True),
    "pairs-official-pooled": pairs_case(official=True, pool="pairs"),
}


@pytest.mark.parametrize("name", CASES)
@every_size
def test_every_loss_equals_a_double_loop_at_every_tile(name, n, d, seed):
    assert_equals_loop(*CASES[name](n, d, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", ["cacr-attached", "amcl-bilinear", "pairs-cosine-pooled"])
def test_losses_can_be_differentiated_twice(name):
    inputs, ours, _ = CASES[name](4, 3, torch.Generator().manual_seed(1))
    leaves = tuple(value.requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(lambda *z: ours(*z, tile=3), leaves)
    assert torch.autograd.gradgradcheck(lambda *z: ours(*z, tile=3), leaves)


@pytest.mark.parametrize("name", [n for n in CASES if "rbf" not in n and "cacr-o" not in n])
def test_reductions_agree_with_the_mean(name):
    inputs, ours, loop = CASES[name](9, 5, torch.Generator().manual_seed(3))
    rows = ours(*inputs, reduction="none")
    torch.testing.assert_close(ours(*inputs, reduction="sum"), rows.sum())
    counted = rows != 0
    torch.testing.assert_close(rows[counted].mean(), loop(*inputs))
    torch.testing.assert_close(ours(*inputs, backend="dense"), loop(*inputs))


def test_half_precision_and_autocast_give_the_single_precision_of_the_rounded_input():
    g = torch.Generator().manual_seed(0)
    for name in ("cacr", "amcl-bilinear", "pairs-cosine-pooled"):
        inputs, ours, _ = CASES[name](9, 8, g)
        half = [value.to(torch.bfloat16) for value in inputs]
        expected = ours(*(value.float() for value in half))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(ours(*half, tile=4), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_autocast_keeps_single_precision(name):
    inputs, ours, _ = CASES[name](9, 8, torch.Generator().manual_seed(6))
    for tile in (4, "auto"):
        assert_same_under_autocast(inputs, partial(ours, tile=tile))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("cacr")])
def test_rows_of_any_length_give_finite_loss_and_gradient(name):
    inputs, ours, _ = CASES[name](9, 5, torch.Generator().manual_seed(4))
    assert_finite_at_any_length(inputs, ours)


def test_rotation_and_order_change_nothing():
    g = torch.Generator().manual_seed(4)
    z = draw(g, 3, 9, 5)
    turn = torch.linalg.qr(draw(g, 5, 5))[0]
    order = torch.randperm(9, generator=g)
    torch.testing.assert_close(dc.cacr(3 * z @ turn), dc.cacr(z))
    torch.testing.assert_close(dc.cacr(z[:, order]), dc.cacr(z))


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf"}, {"detach_weights": False}])
def test_cacr_stays_finite_at_extremes(options):
    for views in (
        torch.zeros(2, 4, 3), torch.ones(2, 4, 3), 1e20 * torch.eye(4).expand(2, 4, 4),
        1e-20 * torch.eye(4).expand(2, 4, 4),
    ):  # fmt: skip
        for t_neg in (0.0, 100.0):
            z = views.clone().requires_grad_()
            loss = dc.cacr(z, 50.0, t_neg, **options)
            assert torch.isfinite(loss)
            assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_debiasing_punishes_distant_positives_and_the_official_sign_rewards_them():
    z = draw(torch.Generator().manual_seed(0), 2, 6, 4)
    far = torch.stack([z[0], -z[0]])

    def gain(**options):
        with_it, without = (dc.cacr(far, tau_plus=t, alpha=0.0, **options) for t in (0.1, 0.0))
        return (0.9 * with_it - without).item()

    assert gain() == pytest.approx(0.1 * 4.0)
    assert gain(parity="official") == pytest.approx(-0.1 * 4.0)


def test_cacr_reads_the_filled_slots_of_a_queue_without_gradient():
    g = torch.Generator().manual_seed(0)
    z, keys = draw(g, 2, 4, 3).float(), draw(g, 3, 3).float()
    queue = dc.KeyQueue(8, 3)
    queue.enqueue(keys)
    torch.testing.assert_close(dc.cacr(z, queue=queue), dc.cacr(z, queue=keys))
    assert torch.isfinite(dc.cacr(z[:, :1], queue=queue))


def test_the_prior_of_amcl_is_lowest_at_two_over_the_dimension():
    z = draw(torch.Generator().manual_seed(0), 1, 4, 8).float()
    net = dc.PairTemperature(8, 1, high=1.0)
    values = {}
    for t in (0.1, 0.25, 0.7):
        with torch.no_grad():
            net.left.zero_()
            net.bias.fill_(torch.logit(torch.tensor((t - 0.01) / 0.99)))
        values[t] = (dc.amcl(z, z, net, 1.0) - dc.amcl(z, z, net, 0.0)).item()
    assert min(values, key=values.get) == 0.25
    assert values[0.25] == pytest.approx(4 * math.log(0.25) + 4, rel=1e-5)


def test_pair_networks_have_the_published_sizes():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(dc.PairGate(1000)) == 1_302_784
    assert count(dc.PairTemperature(64, 1, "mlp")) == 2 * 64 * 128 + 128 + 128 + 1
    assert count(dc.PairTemperature(64, 3)) == 3 * (64 * 16 + 1)


def test_amcl_trains_its_temperatures():
    z = draw(torch.Generator().manual_seed(0), 3, 6, 8).float()
    net = dc.PairTemperature(8)
    dc.amcl(z, z + 0.1, net, tile=5).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.parameters())


# Feature transformation (check 22).


def test_a_scalar_weight_changes_the_score_by_its_law_and_the_queue_keeps_its_keys():
    g = torch.Generator().manual_seed(0)
    q, k = (loops.unit(draw(g, 50, 16)) for _ in range(2))
    keys = loops.unit(draw(g, 20, 16))
    queue = dc.KeyQueue(32, 16)
    queue.enqueue(keys.float())
    before = queue.keys.clone()
    x, y, mixed = dc.feature_transform(q, k, queue, per_dimension=False, generator=g)
    assert torch.equal(queue.keys, before)
    a = ((x - k) / (q - k)).mean(1)
    assert ((a >= 1) & (a <= 2)).all()
    s = (q * k).sum(1)
    torch.testing.assert_close((x * y).sum(1), s - 2 * a * (a - 1) * (1 - s), rtol=1e-6, atol=1e-6)
    assert mixed.shape == (20, 16)


def test_mixed_negatives_lie_between_two_keys_and_follow_the_generator():
    g = torch.Generator().manual_seed(0)
    q = draw(g, 3, 4).requires_grad_()
    keys = draw(g, 6, 4)
    results = [
        dc.feature_transform(q, q, keys, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    x, y, mixed = results[0]
    assert x.requires_grad
    assert not y.requires_grad
    assert (mixed >= keys.amin(0)).all()
    assert (mixed <= keys.amax(0)).all()
    for part in dc.feature_transform(q, q, keys, renormalize=True, generator=g):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(len(part), dtype=torch.float64))


def test_beta_weights_have_their_mean_and_variance():
    g = torch.Generator().manual_seed(0)
    zero, one = torch.zeros(4000, 8), torch.ones(4000, 8)
    _, y, _ = dc.feature_transform(zero, one, one, alpha_pos=2.0, generator=g)
    assert y.mean().item() == pytest.approx(1.5, abs=0.01)
    assert y.var().item() == pytest.approx(1 / (4 * 5), abs=0.002)


# Arbitrary pairs.


def test_partners_follow_their_rule():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=g)
    other = dc.sample_partners(labels, "distinct", 5, g)
    assert (other != labels).all()
    assert set(other.tolist()) == set(range(5))
    assert dc.sample_partners(labels, "identical", 5, g) is labels
    shuffled = dc.sample_partners(labels, "arbitrary", 5, g)
    assert torch.equal(shuffled.sort().values, labels.sort().values)


def test_an_open_gate_between_equal_classes_is_a_supervised_contrast_per_positive():
    g = torch.Generator().manual_seed(0)
    z, labels = draw(g, 8, 4), torch.arange(8) // 2
    value = dc.arbitrary_pairs(z, z, labels, labels, lambda a, b: torch.ones(8, 4), 0.5)
    torch.testing.assert_close(value, dc.sup_con(z, labels, 0.5))


def test_rows_without_a_positive_or_a_negative_are_left_out():
    z = draw(torch.Generator().manual_seed(0), 4, 3)
    gate = lambda a, b: torch.ones(4, 3)  # noqa: E731
    labels = torch.tensor([0, 0, 1, 2])
    rows = dc.arbitrary_pairs(z, z, labels, labels, gate, reduction="none")
    assert (rows[:2] > 0).all()
    assert (rows[2:] == 0).all()
    zero = dc.arbitrary_pairs(z, z, labels, labels, gate, empty="zero")
    torch.testing.assert_close(zero, rows.mean())
    with pytest.raises(dc.ContrastInputError, match="2 of 4 rows"):
        dc.arbitrary_pairs(z, z, labels, labels, gate, empty="error")
    leaf = z.clone().requires_grad_()
    with pytest.warns(dc.ContrastWarning):
        loss = dc.arbitrary_pairs(leaf, leaf, labels * 0, labels * 0, gate, pool="pairs")
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, leaf)[0] == 0).all()


def test_the_penalty_closes_half_open_gates():
    y = torch.tensor([0, 1, 2])
    gate = lambda a, b: torch.full((3, 4), 0.5)  # noqa: E731
    z = torch.ones(3, 4)
    plain, more = (dc.arbitrary_pairs(z, z, y, y.roll(1), gate, penalty=p) for p in (0.0, 2.0))
    assert (more - plain).item() == pytest.approx(0.5)


def test_a_gate_learns_from_the_loss_in_blocks():
    labels = torch.arange(12) % 4
    gate = dc.PairGate(4, 8, 6, 10)
    z = draw(torch.Generator().manual_seed(0), 12, 8).float()
    dc.arbitrary_pairs(z, z, labels, labels.roll(1), gate, tile=5).backward()
    assert all(p.grad is not None for p in gate.parameters())


# Refusals.

Z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)
OPEN = lambda a, b: torch.ones(4, 3)  # noqa: E731
SEED = torch.Generator()
REFUSED = {
    "views": lambda: dc.cacr(Z[:1]),
    "tau_plus": lambda: dc.cacr(Z, tau_plus=1.0),
    "t_pos": lambda: dc.cacr(Z, -1.0),
    "t_neg": lambda: dc.cacr(Z, 1.0, math.inf),
    "kernel": lambda: dc.cacr(Z, kernel="linear"),
    "parity": lambda: dc.cacr(Z, parity="paper"),
    "reduction": lambda: dc.cacr(Z, kernel="rbf", reduction="none"),
    "queue": lambda: dc.cacr(Z, queue=torch.ones(3, 7)),
    "group": lambda: dc.cacr(Z, group=object()),
    "return_info": lambda: dc.cacr(Z, return_info=True),
    "heads_a": lambda: dc.amcl(Z, Z, dc.PairTemperature(3)),
    "heads_b": lambda: dc.amcl(Z, Z[:, :3], dc.PairTemperature(3, 2)),
    "kind": lambda: dc.PairTemperature(3, kind="cubic"),
    "low": lambda: dc.PairTemperature(3, low=3.0),
    "generator": lambda: dc.feature_transform(Z[0], Z[1], Z[0]),
    "alpha_neg": lambda: dc.feature_transform(Z[0], Z[1], Z[0], alpha_neg=0.0, generator=SEED),
    "how": lambda: dc.sample_partners(Y, "random", 4, SEED),
    "pool": lambda: dc.arbitrary_pairs(Z[0], Z[1], Y, Y, OPEN, pool="all"),
    "gate": lambda: dc.arbitrary_pairs(Z[0], Z[1], Y, Y, lambda a, b: torch.ones(4, 2)),
    "labels": lambda: dc.arbitrary_pairs(Z[0], Z[1], Y - 1, Y, OPEN),
}  # fmt: skip


@pytest.mark.parametrize("argument", REFUSED)
def test_what_does_not_fit_is_refused_by_name(argument):
    with pytest.raises(dc.ContrastInputError) as refusal:
        REFUSED[argument]()
    assert refusal.value.argument == argument
    assert refusal.value.found
    assert refusal.value.fix


@pytest.mark.parametrize(
    "call",
    [
        lambda: dc.cacr(Z[:, :1]),
        lambda: dc.cacr(Z, kernel="rbf", tau_plus=0.1),
        lambda: dc.cacr(Z, queue=torch.ones(3, 3), parity="official"),
    ],
)
def test_combinations_without_meaning_are_refused(call):
    with pytest.raises(dc.ContrastInputError):
        call()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cacr", {"alpha": 0.5, "tau_plus": 0.1, "queue": Z[0] + 1}),
        ("cacr", {"kernel": "rbf", "detach_weights": False}),
        ("amcl", {"reg": 0.3}),
        ("arbitrary_pairs", {"pool": "pairs", "penalty": 0.5}),
        ("arbitrary_pairs", {"subspace_cosine": True}),
    ],
)
def test_the_dense_reference_gives_the_same(name, options):
    z = Z.double()
    arguments = {
        "cacr": (z,),
        "amcl": (z, z + 0.3, dc.PairTemperature(3, 2, low=0.1).double()),
        "arbitrary_pairs": (z[0], z[1], Y % 3, Y.roll(1) % 3, OPEN),
    }[name]
    value = dc.loss(name, **options)(*arguments)
    torch.testing.assert_close(value, dc.losses()[name].reference(*arguments, **options))
