"""Every term of the objective against loops over its formula, in float64."""

import math

import numpy as np
import pytest
import torch

from diptych_contrast import ContrastWarning
from diptych_mclrec.objective import (
    contrastive_regulariser,
    gbce_loss,
    info_nce,
    meta_contrast,
    next_item_loss,
    sampled_softmax_loss,
)

torch.set_num_threads(1)
INDEX = torch.arange(12, dtype=torch.float64).view(3, 4) + 1
A, C = INDEX.sin(), INDEX.cos()
D = A + 0.1 * C


def vectors(rows: int, seed: int = 0, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, width, generator=draw, dtype=torch.float64)
    return pair[0], pair[1]


def pairs(x1, x2, groups=None):
    """Score, whether positive, whether negative, of all pairs of rows of both views."""
    z = torch.cat([x1, x2]).numpy()
    count = len(x1)
    ids = np.tile(np.arange(count) if groups is None else np.asarray(groups), 2)
    for row in range(2 * count):
        for column in range(2 * count):
            score = sum(z[row, k] * z[column, k] for k in range(z.shape[1]))
            partner = column == (row + count) % (2 * count)
            yield row, column, score, partner, ids[row] != ids[column]


def looped_nce(x1, x2, tau=1.0, sim="dot", groups=None) -> float:
    if sim == "cos":
        x1, x2 = (x / x.square().sum(1, keepdim=True).sqrt() for x in (x1, x2))
    sums, positives = np.zeros(2 * len(x1)), np.zeros(2 * len(x1))
    for row, _, score, partner, negative in pairs(x1, x2, groups):
        if partner or negative:
            sums[row] += math.exp(score / tau)
        if partner:
            positives[row] = score / tau
    return float(np.mean(np.log(sums) - positives))


def looped_regulariser(x1, x2, form) -> float:
    rows = 2 * len(x1)
    positive, negatives = [0.0] * rows, [[] for _ in range(rows)]
    for row, _, score, partner, negative in pairs(x1, x2):
        if partner:
            positive[row] = score
        if negative:
            negatives[row].append(score)
    hardest = [max(one) for one in negatives]
    low = [min(pair) for pair in zip(positive, hardest, strict=True)]
    high = [max(pair) for pair in zip(positive, hardest, strict=True)]
    if form == "paper":
        scalars = min(positive), max(hardest)
        low, high = [min(scalars)] * rows, [max(scalars)] * rows
    above = [max(p - o, 0.0) for p, o in zip(positive, low, strict=True)]
    below = [max(o - n, 0.0) for o, one in zip(high, negatives, strict=True) for n in one]
    return float(np.mean(above) + np.mean(below))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: info_nce(A, C), 2.078389532731865),
        (lambda: info_nce(A, C, tau=0.5), 3.542282226090707),
        (lambda: info_nce(A, C, sim="cos"), 1.6450518565478374),
        (lambda: info_nce(A, D), 0.24389099443127962),
        (lambda: contrastive_regulariser(A, C, form="official"), 2.1625813143931385),
        (lambda: contrastive_regulariser(A, C, form="paper"), 2.75210354369304),
        (lambda: contrastive_regulariser(A, D, form="official"), 5.496550223216499),
        (lambda: contrastive_regulariser(A, D, form="paper"), 4.522700604442278),
    ],
)
def test_terms_give_the_reference_values(found, expected):
    assert found().item() == pytest.approx(expected, abs=1e-9)


def test_learnt_views_give_the_reference_values():
    z1, z2 = (x / x.norm(dim=1, keepdim=True) for x in (A, C))
    paper = meta_contrast(A, C, z1, z2, gamma=0.1, form="paper")
    official = meta_contrast(A, C, z1, z2, gamma=0.1, form="official")
    assert paper["cl2"].item() == pytest.approx(5.205449324263634, abs=1e-9)
    assert paper["reg"].item() == pytest.approx(1.385039155179956, abs=1e-9)
    assert official["reg"].item() == pytest.approx(4.176507560552201, abs=1e-9)
    total = official["cl2"] + 0.1 * official["reg"]
    assert official["total"].item() == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 7])
@pytest.mark.parametrize("sim", ["dot", "cos"])
def test_info_nce_equals_a_double_loop(rows, sim):
    x1, x2 = vectors(rows)
    for tau in (0.3, 1.0):
        found = info_nce(x1, x2, tau=tau, sim=sim).item()
        assert found == pytest.approx(looped_nce(x1, x2, tau, sim), abs=1e-12)


def test_prefixes_of_one_subject_are_no_negatives_of_each_other():
    x1, x2 = vectors(5)
    groups = torch.tensor([0, 1, 0, 2, 1])
    found = info_nce(x1, x2, groups=groups).item()
    assert found == pytest.approx(looped_nce(x1, x2, groups=groups), abs=1e-12)
    assert info_nce(x1, x2, groups=torch.arange(5)).item() == pytest.approx(
        info_nce(x1, x2).item(), abs=1e-12
    )
    with pytest.warns(ContrastWarning, match="no negatives"):
        assert contrastive_regulariser(x1, x2, groups=torch.zeros(5).long()).item() == 0


@pytest.mark.parametrize("rows", [2, 3, 7])
@pytest.mark.parametrize("form", ["paper", "official"])
def test_the_regulariser_equals_a_loop_over_all_pairs(rows, form):
    for seed in range(4):
        x1, x2 = vectors(rows, seed)
        found = contrastive_regulariser(x1, x2, form=form).item()
        assert found == pytest.approx(looped_regulariser(x1, x2, form), abs=1e-12)


def test_the_official_form_regularises_three_pairs_and_the_paper_one():
    (h1, h2), (z1, z2) = vectors(4), vectors(4, 1)
    all_pairs = [(h1, z2), (h2, z1), (z1, z2)]
    found = meta_contrast(h1, h2, z1, z2, gamma=1.0, form="official")
    expected = sum(looped_regulariser(a, b, "official") for a, b in all_pairs)
    assert found["reg"].item() == pytest.approx(expected, abs=1e-12)
    assert found["cl2"].item() == pytest.approx(sum(looped_nce(a, b) for a, b in all_pairs))
    found = meta_contrast(h1, h2, z1, z2, gamma=1.0, form="paper")
    assert found["reg"].item() == pytest.approx(looped_regulariser(z1, z2, "paper"), abs=1e-12)


@pytest.mark.parametrize(
    "term",
    [
        lambda x1, x2: info_nce(x1, x2, tau=0.7),
        lambda x1, x2: info_nce(x1, x2, sim="cos", groups=torch.tensor([0, 1, 0])),
        lambda x1, x2: contrastive_regulariser(x1, x2, form="paper"),
        lambda x1, x2: contrastive_regulariser(x1, x2, form="official"),
    ],
)
def test_gradients_pass_minima_and_maxima_and_can_be_differentiated_again(term):
    x1, x2 = (x.requires_grad_() for x in vectors(3, 2, 2))
    assert torch.autograd.gradcheck(term, (x1, x2))
    assert torch.autograd.gradgradcheck(term, (x1, x2))


@pytest.mark.parametrize("term", [info_nce, contrastive_regulariser])
def test_a_single_prefix_has_no_negatives_and_says_so(term):
    x = torch.ones(1, 4, requires_grad=True)
    with pytest.warns(ContrastWarning, match="no negatives"):
        loss = term(x, x)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_half_precision_vectors_are_contrasted_in_full():
    x1, x2 = (8 * x for x in vectors(6, 4, 64))
    exact = info_nce(x1.bfloat16().double(), x2.bfloat16().double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(x1.bfloat16(), x2.bfloat16()).item() == pytest.approx(exact, rel=1e-5)


def looped_cross_entropy(h, weight, target, first) -> float:
    scores = [float(h @ weight[item]) for item in range(first, len(weight))]
    return math.log(sum(math.exp(s) for s in scores)) - scores[target - first]


@pytest.mark.parametrize("pad", [False, True])
def test_the_next_item_competes_with_all_real_items(pad):
    h, weight = vectors(4)[0], vectors(7, 1)[0]
    targets = torch.tensor([1, 6, 0, 3])
    expected = [
        looped_cross_entropy(h[r], weight, int(targets[r]), 0 if pad else 1) for r in (0, 1, 3)
    ]
    found = next_item_loss(h, weight, targets, pad_in_softmax=pad)
    assert found.item() == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_basket_counts_by_the_mean_over_its_items():
    h, weight = vectors(2)[0], vectors(7, 1)[0]
    one = np.mean([looped_cross_entropy(h[0], weight, t, 1) for t in (2, 5, 6)])
    two = looped_cross_entropy(h[1], weight, 4, 1)
    found = next_item_loss(h, weight, torch.tensor([[2, 5, 6], [4, 0, 0]]))
    assert found.item() == pytest.approx((one + two) / 2, abs=1e-12)
    assert next_item_loss(h, weight, torch.tensor([[0, 0], [0, 0]])).item() == 0


def test_sampling_every_item_once_is_the_full_softmax():
    h, weight, targets = vectors(4)[0], vectors(7, 1)[0], torch.tensor([1, 6, 2, 3])
    full = next_item_loss(h, weight, targets).item()
    sampled = sampled_softmax_loss(h, weight, targets, torch.arange(1, 7), torch.zeros(7).double())
    assert sampled.item() == pytest.approx(full, abs=1e-12)


def test_sampled_logits_are_corrected_and_accidental_hits_left_out():
    h, weight = vectors(2)[0], vectors(6, 1)[0]
    targets, negatives = torch.tensor([2, 5]), torch.tensor([[2, 3, 3], [1, 4, 2]])
    log_q = torch.tensor([0.0, 0.5, -1.0, 0.3, -0.2, 1.0]).double()
    for corrected in (False, True):
        losses = []
        for row in range(2):
            own = float(h[row] @ weight[targets[row]])
            own -= float(log_q[targets[row]]) if corrected else 0.0
            others = [
                float(h[row] @ weight[j] - log_q[j]) for j in negatives[row] if j != targets[row]
            ]
            losses.append(math.log(sum(map(math.exp, [own, *others]))) - own)
        found = sampled_softmax_loss(h, weight, targets, negatives, log_q, correct_target=corrected)
        assert found.item() == pytest.approx(np.mean(losses), abs=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_generalised_cross_entropy_follows_its_formula(t):
    h, weight = vectors(2)[0], vectors(8, 1)[0]
    targets, negatives = torch.tensor([2, 5]), torch.tensor([[1, 3, 4], [7, 6, 1]])
    share = 3 / 6
    power = share * (t * (1 - 1 / share) + 1 / share)
    losses = []
    for row in range(2):
        own = 1 / (1 + math.exp(-float(h[row] @ weight[targets[row]])))
        others = [1 / (1 + math.exp(-float(h[row] @ weight[j]))) for j in negatives[row]]
        losses.append(-(math.log(own**power) + sum(math.log(1 - s) for s in others)) / 4)
    found = gbce_loss(h, weight, targets, negatives, t=t).item()
    assert found == pytest.approx(np.mean(losses), abs=1e-12)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="choose 'paper' or 'official'"):
        contrastive_regulariser(A, C, form="other")
