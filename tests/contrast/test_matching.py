"""Triplets, ranking, boosting, label guidance: values, gradients, mining, memory, refusals."""

import itertools
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from tests.contrast import loops_matching as loops
from tests.contrast.equal import (
    assert_equals_loop,
    assert_finite_at_any_length,
    assert_same_under_autocast,
    every_size,
)

import diptych_contrast as dc


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def triplet_case(mining, distance="euclid", soft=False):
    def case(n, d, g):
        labels = torch.randint(0, max(2, n // 4), (n,), generator=g)
        labels[:2] = torch.tensor([0, 1])
        return (
            [draw(g, n, d)],
            lambda z, **o: dc.triplet(z, labels, 0.3, mining, distance, soft, **o),
            lambda z: loops.triplet(loops.unit(z), labels.tolist(), 0.3, mining, distance, soft),
        )

    return case


def score_case(name, masked, *arguments, **options):
    def case(n, d, g):
        anchor = draw(g, n, n)
        negatives = torch.rand(n, n, generator=g) < 0.6 if masked else None
        if masked:
            negatives[0, 1:] = negatives[1:, 0] = False
            negatives[0, 1] = True

        def negative(i, j):
            return i != j and (negatives is None or bool(negatives[i, j]))

        first = () if name == "birank" else (anchor,)

        def loop(s):
            rows = getattr(loops, name)(s, *first, *arguments, negative)
            if name == "birank":
                rows = loops.birank(s, *arguments, negative, **options)
            counted = [
                torch.as_tensor(row) for i, row in enumerate(rows)
                if name == "boost_abs" or any(negative(i, j) or negative(j, i) for j in range(n))
            ]  # fmt: skip
            return torch.stack(counted).mean()

        given = {"margin": arguments[0]} if arguments else {}
        given |= {"gamma": arguments[1]} if len(arguments) > 1 else {}
        return (
            [draw(g, n, n)],
            lambda s, **o: getattr(dc, name)(s, *first, **given, **options,
                                             negatives=negatives, **o),
            loop,
        )  # fmt: skip

    return case


def guided_case(kind):
    def case(n, d, g):
        labels = torch.randint(-1, 3, (n,), generator=g)
        labels[:2] = 1
        if kind == "sets":
            labels = (torch.rand(n, 4, generator=g) < 0.5).long()
            labels[:2] = 1
        real = draw(g, n, d) if kind == "generated" else None

        def share(i, j):
            if kind != "sets":
                return float(labels[i] == labels[j] and labels[i] >= 0)
            one, two = ({k for k in range(4) if labels[r, k]} for r in (i, j))
            return len(one & two) / max(1, len(one | two))

        return (
            [draw(g, n, d), draw(g, n, d)],
            lambda x, y, **o: dc.label_guided(x, y, labels, 0.7, 1.5, 0.3, real=real, **o),
            lambda x, y: loops.label_guided(
                loops.unit(x), loops.unit(y), share, 0.7, 1.5, 0.3,
                real=None if real is None else loops.unit(real)
            ),
        )  # fmt: skip

    return case


CASES = {
    **{mining: triplet_case(mining) for mining in ("all", "hard", "semi_hard", "easy_positive")},
    "all-soft": triplet_case("all", "squared", True),
    "semi_hard-cosine": triplet_case("semi_hard", "cosine"),
    "hard-soft": triplet_case("hard", "cosine", True),
    "birank": score_case("birank", True, 0.2),
    "birank-all": score_case("birank", False, 0.2, hardest=False),
    "boost_abs": score_case("boost_abs", True, 0.2, 0.3),
    "boost_rel": score_case("boost_rel", True, 0.2),
    "boost_kl": score_case("boost_kl", True),
    "boost_pro": score_case("boost_pro", True),
    "label_guided": guided_case("classes"),
    "label_guided-sets": guided_case("sets"),
    "label_guided-generated": guided_case("generated"),
}


@pytest.mark.parametrize("name", CASES)
@every_size
def test_every_loss_equals_a_double_loop_at_every_tile(name, n, d, seed):
    assert_equals_loop(*CASES[name](n, d, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", CASES)
def test_reductions_and_half_precision_agree_with_the_mean(name):
    inputs, ours, loop = CASES[name](9, 5, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(*inputs, backend="dense"), loop(*inputs))
    rows = ours(*inputs, reduction="none")
    assert rows.shape == (9,)
    if name.startswith(("b", "hard", "easy")):
        torch.testing.assert_close(ours(*inputs, reduction="sum"), rows.sum())
        torch.testing.assert_close(rows.mean(), ours(*inputs, empty="zero"))
    half = [value.to(torch.bfloat16) for value in inputs]
    expected = ours(*(value.float() for value in half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(*half, tile=4), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_autocast_keeps_single_precision(name):
    inputs, ours, _ = CASES[name](9, 5, torch.Generator().manual_seed(3))
    # Distances of Euclid have no second derivative.
    twice = not name.startswith(("all", "hard", "semi_hard", "easy_positive"))
    for tile in (4, "auto"):
        assert_same_under_autocast(inputs, partial(ours, tile=tile), twice=twice)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("label_guided")])
def test_rows_of_any_length_give_finite_loss_and_gradient(name):
    inputs, ours, _ = CASES[name](9, 5, torch.Generator().manual_seed(4))
    assert_finite_at_any_length(inputs, ours)


# Mining (check 17).


@pytest.mark.parametrize("mining", ["all", "hard", "semi_hard", "easy_positive"])
@pytest.mark.parametrize("distance", ["euclid", "squared", "cosine"])
def test_mining_equals_brute_force_with_ties_and_singletons(mining, distance):
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    z = corners[torch.randint(0, 8, (24,), generator=g)]
    labels = torch.randint(0, 4, (24,), generator=g)
    labels[-1] = 9
    for soft in (False, True):
        value = dc.triplet(z, labels, 0.3, mining, distance, soft, tile=7)
        expected = loops.triplet(loops.unit(z), labels.tolist(), 0.3, mining, distance, soft)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_among_equal_distances_the_lowest_row_gets_the_gradient():
    z = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]], requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1])
    dc.triplet(z, labels, 2.0, "hard", "squared", normalize=False, tile=2).backward()
    assert z.grad[2].abs().sum() < z.grad[0].abs().sum()
    assert z.grad[4].abs().sum() < z.grad[3].abs().sum()


@pytest.mark.parametrize("mining", ["all", "hard", "semi_hard", "easy_positive"])
def test_equal_and_zero_rows_give_a_finite_gradient(mining):
    for z in (torch.ones(6, 3), torch.zeros(6, 3), torch.full((6, 3), 1e20)):
        leaf = z.clone().requires_grad_()
        loss = dc.triplet(leaf, torch.tensor([0, 0, 1, 1, 2, 2]), mining=mining)
        assert loss.item() == pytest.approx(0.2)
        assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()


def test_anchors_without_a_positive_are_left_out_or_refused():
    z, labels = torch.eye(4), torch.tensor([0, 0, 1, 2])
    rows = dc.triplet(z, labels, 0.5, "hard", reduction="none")
    assert (rows > 0).tolist() == [True, True, False, False]
    with pytest.raises(dc.ContrastInputError, match="2 of 4"):
        dc.triplet(z, labels, empty="error")
    with pytest.warns(dc.ContrastWarning, match="no row"):
        assert dc.triplet(z, torch.arange(4)).item() == 0
    far = dc.triplet(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), 0.5)
    assert far.item() == 0


@pytest.mark.parametrize("mining", ["all", "hard", "semi_hard", "easy_positive"])
def test_names_of_classes_order_and_rotation_change_nothing(mining):
    g = torch.Generator().manual_seed(5)
    z, labels = draw(g, 12, 4), torch.arange(12) % 4
    value = dc.triplet(z, labels, mining=mining)
    assert torch.equal(dc.triplet(z, 7 - labels, mining=mining), value)
    turn, order = torch.linalg.qr(draw(g, 4, 4))[0], torch.randperm(12, generator=g)
    moved = dc.triplet(5 * z[order] @ turn, labels[order], mining=mining)
    torch.testing.assert_close(moved, value)


_MEMORY = """
import resource, torch, diptych_contrast as dc
torch.set_num_threads(1)
labels = torch.arange({n}) % 20
def step(n):
    z = torch.randn(n, 64, requires_grad=True)
    dc.triplet(z, labels[:n], 0.2, "{mining}", soft={soft}).backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({n})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mining", "soft"), [("all", False), ("all", True), ("semi_hard", False), ("hard", False)]
)
def test_2048_rows_take_at_most_60_mb(mining, soft):
    code = _MEMORY.format(n=2048, mining=mining, soft=soft)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 60


# Ranking and boosting.

N = 6
S = torch.tensor(
    [[round(0.4 * math.cos(1.3 * i + 0.7 * j) + 0.3 * (i == j), 6) for j in range(N)]
     for i in range(N)], dtype=torch.float64)  # fmt: skip
A = torch.tensor(
    [[round(0.4 * math.sin(0.9 * i - 0.4 * j) + 0.25 * (i == j), 6) for j in range(N)]
     for i in range(N)], dtype=torch.float64)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "expected", "ratio"),
    [
        ("birank", (), 3.624669, N),
        ("birank", (0.2, False), 7.990846, N),
        ("boost_abs", (A,), 10.672792, N),
        ("boost_rel", (A,), 9.972792, N),
        ("boost_kl", (A,), 5.079748, 1),
        ("boost_pro", (A,), 13.438598, 1),
    ],
)
def test_the_official_form_gives_the_official_value(name, first, expected, ratio):
    loss = getattr(dc, name)
    official = loss(S, *first, parity="official").item()
    assert official == pytest.approx(expected, abs=1e-6)
    assert loss(S, *first).item() == pytest.approx(official / ratio, abs=1e-12)
    assert loss(S, *first, parity="official", reduction="none").shape == (N,)


@pytest.mark.parametrize("name", ["boost_abs", "boost_rel", "boost_kl", "boost_pro"])
def test_no_gradient_reaches_the_anchor(name):
    target, anchor = S.clone().requires_grad_(), A.clone().requires_grad_()
    getattr(dc, name)(target, anchor).backward()
    assert anchor.grad is None
    assert float(target.grad.abs().sum()) > 0


def test_embeddings_stand_for_their_cosines():
    g = torch.Generator().manual_seed(0)
    x, y = draw(g, 5, 4), draw(g, 5, 4)
    scores = loops.unit(x) @ loops.unit(y).t()
    torch.testing.assert_close(dc.birank((x, y)), dc.birank(scores))
    torch.testing.assert_close(dc.boost_rel((x, y), (y, x)), dc.boost_rel(scores, scores.t()))


def test_a_batch_without_negatives_gives_zero_and_a_warning():
    leaf = S.clone().requires_grad_()
    none = torch.zeros(N, N, dtype=torch.bool)
    for name, first in (("birank", ()), ("boost_rel", (A,)), ("boost_kl", (A,)),
                        ("boost_pro", (A,))):  # fmt: skip
        with pytest.warns(dc.ContrastWarning):
            value = getattr(dc, name)(leaf, *first, negatives=none)
        assert value.item() == 0
        assert (torch.autograd.grad(value, leaf)[0] == 0).all()


def test_the_diagonal_is_never_a_negative():
    every = torch.ones(N, N, dtype=torch.bool)
    torch.testing.assert_close(dc.birank(S, negatives=every), dc.birank(S))


# Label guidance.


def test_unlabelled_samples_keep_their_own_pair():
    g = torch.Generator().manual_seed(0)
    x, y = draw(g, 5, 4), draw(g, 5, 4)
    value = dc.label_guided(x, y, torch.full((5,), -1), intra=0.0)
    torch.testing.assert_close(value, dc.clip_loss(x, y, 0.1))


def test_guidance_within_a_modality_is_supervised_contrast():
    g = torch.Generator().manual_seed(0)
    x, labels = draw(g, 8, 4), torch.arange(8) // 2
    value = dc.label_guided(x, x, labels, inter=0.0)
    torch.testing.assert_close(value, dc.sup_con(x, labels, 0.1))
    sets = torch.nn.functional.one_hot(labels)
    torch.testing.assert_close(dc.label_guided(x, x, sets, inter=0.0), value)


def test_real_images_get_no_gradient_from_generated_ones():
    z = [draw(torch.Generator().manual_seed(i), 4, 3).requires_grad_() for i in range(3)]
    dc.label_guided(z[0], z[1], torch.tensor([0, 0, 1, 1]), real=z[2]).backward()
    assert z[2].grad is None
    assert float(z[0].grad.abs().sum()) > 0


# Refusals.

Z, Y = torch.eye(4), torch.tensor([0, 0, 1, 1])
REFUSED = {
    "labels": lambda: dc.triplet(Z, Y * 0),
    "mining": lambda: dc.triplet(Z, Y, mining="random"),
    "distance": lambda: dc.triplet(Z, Y, distance="angle"),
    "margin": lambda: dc.triplet(Z, Y, -1.0),
    "group": lambda: dc.triplet(Z, Y, group=object()),
    "S": lambda: dc.birank(torch.ones(3, 4)),
    "S_anchor": lambda: dc.boost_kl(Z, torch.eye(3)),
    "negatives": lambda: dc.birank(Z, negatives=torch.ones(4, 4)),
    "parity": lambda: dc.boost_pro(Z, Z, parity="paper"),
    "temperature": lambda: dc.label_guided(Z, Z, Y, temperature=0.0),
    "real": lambda: dc.label_guided(Z, Z, Y, real=torch.eye(3)),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_does_not_fit_is_refused_by_name(argument):
    with pytest.raises(dc.ContrastInputError) as refusal:
        REFUSED[argument]()
    assert refusal.value.argument == argument


def test_label_sets_of_other_values_are_refused():
    with pytest.raises(dc.ContrastInputError, match="zeros and ones"):
        dc.label_guided(Z, Z, 2 * torch.eye(4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("triplet", {"mining": m, "soft": s}) for m in
          ("all", "hard", "semi_hard", "easy_positive") for s in (True, False)),
        ("triplet", {"distance": "squared"}),
        ("triplet", {"distance": "cosine", "normalize": False}),
        ("birank", {"hardest": False}),
        ("birank", {"negatives": S > 0.1}),
        ("boost_abs", {"gamma": 0.3}),
        ("boost_rel", {"beta": 2.0}),
        ("boost_kl", {"negatives": S > 0.1}),
        ("boost_pro", {"negatives": S > 0.1}),
        ("label_guided", {"temperature": 0.3}),
        ("label_guided", {"real": A + 1}),
    ],
)  # fmt: skip
def test_the_dense_reference_gives_the_same(name, options):
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    arguments = {"triplet": (S, labels), "birank": (S,), "label_guided": (S, A, labels)}
    given = arguments.get(name, (S, A))
    value = dc.loss(name, **options)(*given)
    options.pop("normalize", None)
    torch.testing.assert_close(value, dc.losses()[name].reference(*given, **options))


def test_the_dense_reference_reads_label_sets_and_embeddings():
    sets = (S > 0.1).long()
    reference = {name: dc.losses()[name].reference for name in ("label_guided", "birank")}
    torch.testing.assert_close(dc.label_guided(S, A, sets), reference["label_guided"](S, A, sets))
    torch.testing.assert_close(dc.birank((S, A)), reference["birank"]((S, A)))
