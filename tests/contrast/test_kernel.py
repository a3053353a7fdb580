"""The pair kernel: sums, derivatives of first and second order, masks, settings."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diptych_contrast as dc
from diptych_contrast.kernel.api import log_sums
from diptych_contrast.kernel.masks import parse
from diptych_contrast.kernel.normalize import unit_rows

MASKS = {
    "not_self": lambda p, q: not (p[0] == q[0] and p[1] == q[1]),
    "any": lambda p, q: True,
    "same_label & not_self": lambda p, q: p[2] == q[2] and not (p[0] == q[0] and p[1] == q[1]),
    "~same_label | (same_id & other_view)": lambda p, q: (
        p[2] != q[2] or (p[0] == q[0] and p[1] != q[1])
    ),
}
ROWS = [(i % 4, i // 4, i % 3) for i in range(7)]
COLUMNS = [(i % 4, 1 - i // 4, i % 2) for i in range(6)]


def keys(symmetric: bool) -> dc.PairMask:
    rows = [torch.tensor(key) for key in zip(*ROWS, strict=True)]
    cols = [None] * 3 if symmetric else [torch.tensor(k) for k in zip(*COLUMNS, strict=True)]
    return dc.PairMask(
        row_id=rows[0], row_view=rows[1], row_label=rows[2],
        col_id=cols[0], col_view=cols[1], col_label=cols[2],
    )  # fmt: skip


def loop(a, b, betas, masks, row_bias, col_bias, symmetric) -> Tensor:
    """Log-sum-exp by a double loop over pairs; 0 in rows without pairs."""
    columns = ROWS if symmetric else COLUMNS
    result = []
    for i, row in enumerate(ROWS):
        for beta, mask in zip(betas, masks, strict=True):
            kept = [
                beta * (a[i] @ b[j])
                + (0 if row_bias is None else row_bias[i])
                + (0 if col_bias is None else col_bias[j])
                for j, column in enumerate(columns)
                if MASKS[mask](row, column)
            ]
            result.append(torch.stack(kept).logsumexp(0) if kept else a.new_zeros(()))
    return torch.stack(result).view(len(ROWS), len(masks))


def inputs(symmetric: bool, biased: bool, shift: float = 0.0) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(7, 3, generator=g, dtype=torch.float64)
    b = None if symmetric else torch.randn(6, 3, generator=g, dtype=torch.float64)
    beta = torch.tensor(1.3, dtype=torch.float64)
    r = torch.randn(7, generator=g, dtype=torch.float64) + shift if biased else None
    c = torch.randn(6, generator=g, dtype=torch.float64) if biased and not symmetric else None
    return [None if x is None else x.requires_grad_() for x in (a, b, beta, r, c)]


def run(values, masks, symmetric, tile):
    a, b, beta, r, c = values
    out = dc.pair_lse(a, b, beta, masks, keys(symmetric), r, c, symmetric=symmetric, tile=tile)
    return out.masked_fill(out == -math.inf, 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tile", [2, 3, 64])
@pytest.mark.parametrize("shift", [0.0, 2000.0])
def test_pair_lse_equals_a_double_loop_and_its_derivatives(symmetric, biased, tile, shift):
    values = inputs(symmetric, biased, shift)
    a, b, beta, r, c = values
    leaves = [x for x in values if x is not None]
    for masks in (("not_self",), ("any", *list(MASKS)[2:])):
        ours = run(values, masks, symmetric, tile)
        other = (a, r) if symmetric else (b, c)
        slow = loop(a, other[0], [beta] * len(masks), masks, r, other[1], symmetric)
        torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-11)
        weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
        first = torch.autograd.grad((ours * weight).sum(), leaves, create_graph=True)
        expected = torch.autograd.grad((slow * weight).sum(), leaves, create_graph=True)
        for got, want in zip(first, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for bend in (torch.sin, torch.square):
            second = torch.autograd.grad(
                sum(bend(x).sum() for x in first), leaves, retain_graph=True
            )
            wanted = torch.autograd.grad(
                sum(bend(x).sum() for x in expected), leaves, retain_graph=True
            )
            for got, want in zip(second, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tile", [3, 64])
def test_derivatives_pass_gradcheck_with_one_scale_for_each_mask(symmetric, tile):
    values = inputs(symmetric, True)
    values[2] = torch.tensor([0.7, 1.9], dtype=torch.float64, requires_grad=True)
    leaves = tuple(x for x in values if x is not None)
    present = [x is not None for x in values]

    def call(*given: Tensor) -> Tensor:
        each = iter(given)
        filled = [next(each) if there else None for there in present]
        return run(filled, ("not_self", "same_label & not_self"), symmetric, tile)

    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)


def test_columns_without_gradient_are_fused_into_the_forward_sweep():
    a, b, beta, *_ = inputs(False, False)
    leaves = (a, beta)
    fixed = b.detach()
    call = lambda x, t: dc.pair_lse(x, fixed, t, ("any",), tile=3)  # noqa: E731
    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)
    both = torch.autograd.grad(dc.pair_lse(a, b, beta, ("any",), tile=3).sum(), leaves)
    for got, want in zip(torch.autograd.grad(call(*leaves).sum(), leaves), both, strict=True):
        torch.testing.assert_close(got, want)


def test_one_sweep_gives_row_and_column_sums():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (7, 5))
    for scale in (1.0, 900.0):
        beta = torch.tensor(scale, dtype=torch.float64, requires_grad=True)

        def call(x, y, t):
            engine = dc.kernel.Engine(tile=3)
            return log_sums(x, y, t, ("any",), both=True, engine=engine)[0]

        s = beta * a @ b.t()
        torch.testing.assert_close(call(a, b, beta)[0], torch.cat([s.logsumexp(1), s.logsumexp(0)]))
        if scale == 1.0:
            torch.autograd.gradcheck(call, (a, b, beta))
            torch.autograd.gradgradcheck(call, (a, b, beta))


def test_an_empty_row_gets_zero_gradient():
    a = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    for scale in (1.0, 1e4):
        mask = dc.PairMask(row_label=labels)
        out = dc.pair_lse(a, None, scale, ("same_label & not_self",), mask, symmetric=True)
        assert out[2:, 0].tolist() == [-math.inf, -math.inf]
        (slope,) = torch.autograd.grad(out[:2].sum(), a, create_graph=True)
        assert bool(slope.isfinite().all())
        assert slope[2:].abs().max() == 0
        (bend,) = torch.autograd.grad(slope.square().sum(), a)
        assert bool(bend.isfinite().all())


def test_biases_of_a_million_stay_finite():
    a = torch.randn(5, 3).requires_grad_()
    bias = torch.tensor([1e6, -1e6, 0.0, 5.0, 1e6])
    out = dc.pair_lse(a, a, 10.0, ("any",), None, bias, bias, tile=2)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(a.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_and_streaming_sums_meet(dtype):
    """Scales on both sides of the bound give the sums of float64 logsumexp."""
    z = unit_rows(torch.randn(40, 8, dtype=dtype))
    for scale in (5.0, 70.0, 90.0, 1000.0):
        expected = (z.double() @ z.double().t() * scale).logsumexp(1)
        got = dc.pair_lse(z, z, scale, ("any",), tile=16)[:, 0].double()
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_third_derivatives_are_refused_in_words():
    a = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for value in (
        dc.pair_lse(a, None, 1.0, symmetric=True).sum(),
        dc.pair_sum(a, a, "exp", dc.PairMask(expr="any")).sum(),
    ):
        (first,) = torch.autograd.grad(value, a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), a, create_graph=True)
        with pytest.raises(RuntimeError, match="third derivatives are not available"):
            torch.autograd.grad(second.square().sum(), a)


@pytest.mark.parametrize(
    "fn", ["identity", "softplus", "softplus_negative", "relu", "relu_squared", "exp"]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_pair_sum_equals_a_dense_sum_and_its_derivatives(fn, weighted):
    plain = {
        "identity": lambda s: s,
        "softplus": lambda s: (1 + s.exp()).log(),
        "softplus_negative": lambda s: (1 + (-s).exp()).log(),
        "relu": lambda s: s.clamp_min(0),
        "relu_squared": lambda s: s.clamp_min(0) ** 2,
        "exp": lambda s: s.exp(),
    }[fn]
    a, b, *_ = inputs(False, False)
    mask = dc.PairMask(**{**vars(keys(False)), "expr": "~same_label"})
    kept = torch.tensor([[p[2] != q[2] for q in COLUMNS] for p in ROWS]).double()
    factors = (torch.rand(7, 2).double(), torch.rand(6, 2).double()) if weighted else None
    weight = kept if factors is None else kept * (factors[0] @ factors[1].t())
    expected = (plain(a @ b.t()) * weight).sum(1)
    call = lambda x, y: dc.pair_sum(x, y, fn, mask, factors, tile=4)  # noqa: E731
    torch.testing.assert_close(call(a, b), expected, rtol=1e-11, atol=1e-11)
    torch.autograd.gradcheck(call, (a, b))
    torch.autograd.gradgradcheck(call, (a, b))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("tile", [2, "auto"])
def test_pair_max_gives_value_and_lowest_column(largest, tile):
    a, b, *_ = inputs(False, False)
    b = b.detach().clone()
    b[4] = b[1]
    mask = dc.PairMask(**{**vars(keys(False)), "expr": "~same_label"})
    value, index = dc.pair_max(a, b, mask, largest, tile=tile)
    for i, row in enumerate(ROWS):
        allowed = [j for j, column in enumerate(COLUMNS) if row[2] != column[2]]
        found = [float((a[i] * b[j]).sum().detach()) for j in allowed]
        best = max(found) if largest else min(found)
        assert value[i].item() == pytest.approx(best)
        assert index[i].item() == min(
            j for j, x in zip(allowed, found, strict=True) if x == pytest.approx(best, abs=1e-12)
        )
    torch.autograd.gradcheck(lambda x: dc.pair_max(x, b, mask, largest)[0], a)
    nothing, nowhere = dc.pair_max(a[:1], a[:1], dc.PairMask(), largest)
    assert nothing.item() == (-math.inf if largest else math.inf)
    assert nowhere.item() == -1


@pytest.mark.parametrize("cost", ["score", "sqdist"])
def test_pair_expect_equals_a_dense_mean_and_its_derivative(cost):
    a, b, *_ = inputs(False, False)
    for kappa in (2.0, -1.3):
        s = 0.7 * a @ b.t()
        costs = s if cost == "score" else torch.cdist(a, b).square()
        expected = ((kappa * s).softmax(1) * costs).sum(1)
        log_sum, mean = dc.pair_expect(a, b, 0.7, kappa, cost, tile=4)
        torch.testing.assert_close(log_sum, (kappa * s).logsumexp(1))
        torch.testing.assert_close(mean, expected)
        for got, want in zip(
            torch.autograd.grad(mean.square().sum(), (a, b)),
            torch.autograd.grad(expected.square().sum(), (a, b)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.sampled_from(["any", "not_self", "same_id", "same_label", "other_view"]),
        lambda part: st.one_of(
            part.map(lambda x: f"~({x})"),
            st.tuples(part, st.sampled_from("&|"), part).map(lambda x: f"({x[0]}) {x[1]} ({x[2]})"),
        ),
        max_leaves=6,
    )
)
def test_any_mask_expression_means_the_same_in_every_tile(expression):
    truth = torch.zeros(7, 6, dtype=torch.bool)
    for i, p in enumerate(ROWS):
        for j, q in enumerate(COLUMNS):
            words = {
                "any": True,
                "same_id": p[0] == q[0],
                "not_self": not (p[0] == q[0] and p[1] == q[1]),
                "same_label": p[2] == q[2],
                "other_view": p[1] != q[1],
            }
            code = expression.replace("~", " not ").replace("&", " and ").replace("|", " or ")
            truth[i, j] = eval(code, {}, words)
    zeros = torch.zeros(7, 1), torch.zeros(6, 1)
    for tile in (1, 2, 64):
        counts = dc.pair_lse(*zeros, 1.0, (expression,), keys(False), tile=tile).exp()[:, 0]
        assert counts.round().long().tolist() == truth.sum(1).tolist()


@pytest.mark.parametrize("text", ["", "same", "same_id and any", "f(any)", "any + any", "1"])
def test_a_wrong_mask_expression_is_refused(text):
    with pytest.raises(dc.ContrastInputError, match="join the words any, not_self"):
        parse(text)


def test_unit_rows_differentiate_twice_and_keep_zero_rows():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(unit_rows, x)
    torch.autograd.gradgradcheck(unit_rows, x)
    zero = torch.zeros(1, 3, requires_grad=True)
    unit_rows(zero).sum().backward()
    assert zero.grad.abs().max() == 0
    for size in (1e-11, 1e20):
        long = torch.tensor([[3.0, 4.0]]) * size
        torch.testing.assert_close(unit_rows(long), torch.tensor([[0.6, 0.8]]))


def test_the_tile_follows_size_and_environment(monkeypatch):
    monkeypatch.delenv("DIPTYCH_TILE", raising=False)
    assert dc.default_tile(128, 100) == 128
    assert dc.default_tile(8192, 8192) == 512
    monkeypatch.setenv("DIPTYCH_TILE", "64")
    assert dc.default_tile(8192, 8192) == 64
    monkeypatch.setenv("DIPTYCH_TILE", "wide")
    with pytest.raises(dc.ContrastInputError, match="DIPTYCH_TILE"):
        dc.default_tile()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"backend": "triton"}, "backend"),
        ({"backend": "cuda"}, "backend"),
        ({"tile": 0}, "tile"),
        ({"masks": ()}, "masks"),
        ({"beta": torch.ones(3)}, "beta"),
        ({"a": torch.ones(3)}, "a"),
        ({"b": torch.ones(3, 5)}, "b"),
        ({"b": None}, "b"),
        ({"row_bias": torch.ones(5)}, "row_bias"),
        ({"symmetric": True, "col_bias": torch.ones(3)}, "symmetric"),
        ({"masks": ("same_label",)}, "keys"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, argument):
    call = {"a": torch.ones(3, 2), "b": torch.ones(3, 2), "beta": 1.0, **change}
    with pytest.raises(dc.ContrastInputError) as caught:
        dc.pair_lse(**call)
    assert caught.value.argument == argument


def test_keys_must_be_whole_numbers():
    with pytest.raises(dc.ContrastInputError, match="row_id"):
        dc.PairMask(row_id=torch.ones(3))


# torch.func and torch.compile (check 15).


def test_vmap_and_nested_grad_equal_loops():
    from torch.func import grad, vmap

    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 6, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, (3, 6), generator=g)
    dense = lambda z: dc.nt_xent(z[0], z[1], 0.3, backend="dense")  # noqa: E731
    tiled = lambda z: dc.nt_xent(z[0], z[1], 0.3, tile=5)  # noqa: E731

    def bend(loss):
        return lambda z: grad(loss)(z).square().sum()

    torch.testing.assert_close(vmap(grad(tiled))(x), torch.stack([grad(dense)(z) for z in x]))
    torch.testing.assert_close(grad(bend(tiled))(x[0]), grad(bend(dense))(x[0]))
    torch.testing.assert_close(
        vmap(grad(bend(tiled)))(x), torch.stack([grad(bend(dense))(z) for z in x])
    )
    pairwise = lambda z: dc.siglip(z[0], z[1], tile=5)  # noqa: E731
    torch.testing.assert_close(
        vmap(grad(bend(pairwise)))(x), torch.stack([grad(bend(pairwise))(z) for z in x])
    )
    soft = torch.rand(6, 2, generator=g, dtype=torch.float64)
    by_weight = lambda z, w: dc.soft_sup_con(z, w, 0.3, tile=5)  # noqa: E731
    torch.testing.assert_close(
        vmap(grad(by_weight), (0, None))(x, soft),
        torch.stack([grad(by_weight)(z, soft) for z in x]),
    )
    by_label = lambda z, y: dc.sup_con(z, y, 0.3, tile=5)  # noqa: E731
    torch.testing.assert_close(
        vmap(grad(by_label))(x, labels),
        torch.stack([grad(by_label)(*each) for each in zip(x, labels, strict=True)]),
    )


@pytest.mark.parametrize(
    "name",
    [
        "info_nce",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("nt_xent", "ids", "sup_con", "clip_loss")
        ),
    ],
)
def test_encoder_and_loss_compile_without_a_graph_break(name):
    torch.manual_seed(0)
    encoder = torch.nn.Linear(4, 6)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    labels = torch.arange(8) // 2
    queue = dc.KeyQueue(32, 6)
    queue.enqueue(torch.randn(16, 6))
    call = {
        "nt_xent": lambda: dc.nt_xent(encoder(x), encoder(y)),
        "ids": lambda: dc.nt_xent(encoder(x), encoder(y), ids=labels),
        "sup_con": lambda: dc.sup_con((encoder(x), encoder(y)), labels),
        "info_nce": lambda: dc.info_nce(
            encoder(x), encoder(y).detach(), negatives="queue", queue=queue
        ),
        "clip_loss": lambda: dc.clip_loss(encoder(x), encoder(y)),
    }[name]
    results = []
    for run_it in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        encoder.zero_grad()
        value = run_it()
        value.backward()
        results.append((value.detach(), encoder.weight.grad.clone()))
        with torch.no_grad():
            torch.testing.assert_close(run_it(), value.detach())
    torch.testing.assert_close(results[0], results[1])
    torch._dynamo.reset()


# Memory (check 10) and import (check 25), in processes of their own.

PEAK = """
import resource, sys, torch
import diptych_contrast as dc
torch.set_num_threads(1)
pairs, order = int(sys.argv[1]), int(sys.argv[2])
z = [torch.randn(pairs, 128, requires_grad=True) for _ in range(2)]
def step(x):
    loss = dc.nt_xent(x[0], x[1], 0.1)
    slopes = torch.autograd.grad(loss, x, create_graph=order == 2)
    if order == 2:
        torch.autograd.grad(sum(s.square().sum() for s in slopes), x)
step([v.detach()[:300].requires_grad_() for v in z])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(z)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the peak as Linux has it"
)


def extra_peak(pairs: int, order: int) -> float:
    """Extra memory of a step in MB, in a process of its own."""
    command = [sys.executable, "-c", PEAK, str(pairs), str(order)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(out.stdout)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "order", "limit"), [(4096, 1, 40), (16384, 1, 100), (4096, 2, 120)]
)
def test_extra_peak_memory_stays_within_its_limit(pairs, order, limit):
    assert extra_peak(pairs, order) <= limit


@linux
@pytest.mark.slow
def test_65536_rows_fit_into_two_gigabytes_and_memory_grows_as_they_do():
    large = extra_peak(32768, 1)
    assert large <= 2000
    assert large <= 4.5 * extra_peak(8192, 1)


IMPORT = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import diptych_contrast
print(time.process_time() - start)
print([name for name in ("sklearn", "scipy", "triton") if name in set(sys.modules) - before])
"""


def test_importing_costs_little_beyond_torch_and_needs_no_extras():
    command = [sys.executable, "-c", IMPORT]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(out[0]) < 0.4
    assert out[1] == "[]"


def test_fused_sweeps_with_a_running_maximum_equal_the_dense_form():
    a, b, *_ = inputs(False, False)
    fixed = b.detach()
    results = []
    for backend in ("tiled", "dense"):
        out = dc.pair_lse(a, fixed, 900.0, ("any",), tile=3, backend=backend)
        results.append((out, torch.autograd.grad(out.square().sum(), a)[0]))
    torch.testing.assert_close(results[0], results[1])
