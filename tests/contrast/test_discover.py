"""Discovery of new classes: weighted contrast, priors, sampling, distillation, accuracy."""

import itertools
import math

import numpy as np
import pytest
import torch
from tests.contrast.equal import assert_equals_loop, every_size

import diptych_contrast as dc
from diptych_contrast.discover import match


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def soft_con_loop(views, probs, t):
    rows = [v / v.norm() for view in views for v in view]
    n, losses = len(views[0]), []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        weights = [1.0 if j % n == i % n else float(probs[i % n] @ probs[j % n]) for j in others]
        scores = torch.stack([rows[i] @ rows[j] / t for j in others])
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        losses.append(scores.logsumexp(0) - (share * scores).sum())
    return torch.stack(losses).mean()


@every_size
def test_soft_con_equals_a_double_loop(n, d, seed):
    probs = draw(seed + 9, n, 4).softmax(1).requires_grad_()

    def ours(z, **options):
        return dc.soft_con(z, probs, 0.3, **options)

    assert_equals_loop([draw(seed, 2, n, d)], ours, lambda z: soft_con_loop(z, probs.detach(), 0.3))
    assert probs.grad is None


def test_known_labels_replace_the_prediction_unless_the_official_form_is_asked_for():
    views, probs = draw(0, 2, 6, 4), draw(1, 6, 3).softmax(1)
    labels = torch.tensor([0, 2, -1, -1, 0, -1])
    hot = probs.clone()
    hot[labels >= 0] = torch.eye(3, dtype=torch.float64)[labels[labels >= 0]]
    ours = dc.soft_con(views, probs, 0.1, labels=labels)
    torch.testing.assert_close(ours, soft_con_loop(views, hot, 0.1))
    plain = soft_con_loop(views, probs, 0.1)
    same = dc.soft_con(views, probs, 0.1, labels=labels, labelled="predicted")
    torch.testing.assert_close(same, plain)
    official = dc.soft_con(views, probs, 0.1, labels=labels, parity="official")
    torch.testing.assert_close(official, plain * 0.1 / 0.07, rtol=1e-9, atol=1e-9)
    loss, info = dc.soft_con(views, probs, dc.Temperature(0.1), parity="official", return_info=True)
    torch.testing.assert_close(loss.double(), official, rtol=1e-6, atol=1e-6)
    assert info.n_rows == 12


# Priors.


def test_the_regulariser_is_zero_exactly_where_predictions_follow_the_sizes():
    counts = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    even = torch.log(counts**1.1)[None] * 0.1
    assert dc.balanced_regulariser(even, counts).item() == pytest.approx(0, abs=1e-12)
    one = torch.tensor([[0.0, 0.0, 1e3]])
    leaf = one.clone().requires_grad_()
    loss = dc.balanced_regulariser(leaf, counts)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()


def test_the_regulariser_equals_its_formula():
    logits, counts = draw(0, 5, 3), torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    p = (logits / 0.1).softmax(1).mean(0) / counts**1.1
    p = p / p.sum()
    expected = math.log(3) + sum(float(x) * math.log(float(x)) for x in p)
    assert dc.balanced_regulariser(logits, counts).item() == pytest.approx(expected, abs=1e-10)
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dc.balanced_regulariser(x, counts), leaf)


def test_adjusted_logits_lose_half_the_log_prior():
    adjusted = dc.logit_adjust(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([9.0, 1.0]))
    assert (adjusted[0, 1] - adjusted[0, 0]).item() == pytest.approx(0.5 * math.log(9), abs=1e-6)


def test_class_shares_come_from_cluster_sizes_by_rank():
    sizes = [40, 10, 25, 5]
    classes = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    features = torch.eye(4)[classes] + 0.01 * draw(0, len(classes), 4).float()
    labelled = torch.zeros(len(classes), dtype=torch.bool)
    # Classes 0 and 2 are known, and class 2 has more labels although it is smaller.
    labelled[:3] = True
    labelled[50:60] = True
    share = dc.estimate_class_distribution(features, classes, labelled, 4)
    expected = torch.tensor([25.0, 10.0, 40.0, 5.0]) / 80
    torch.testing.assert_close(share, expected)


# Sampling.


def test_rates_favour_rare_classes_and_spare_those_with_labels():
    counts = torch.tensor([16.0, 4.0, 1.0])
    rates = dc.sampling_rates(counts, torch.tensor([1, -1]), alpha=0.0)
    torch.testing.assert_close(rates, torch.tensor([0.25, 1.0, 1.0]))


def test_sampling_takes_the_most_confident_as_often_as_the_rate_says():
    g = torch.Generator().manual_seed(0)
    confidence = torch.rand(3000, generator=g)
    prediction = torch.randint(0, 3, (3000,), generator=g)
    rate = torch.tensor([0.0, 0.3, 1.0])
    chosen = dc.self_balanced_sampling(confidence, prediction, rate, generator=g)
    assert not chosen[prediction == 0].any()
    assert chosen[prediction == 2].all()
    middle = prediction == 1
    assert chosen[middle].float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert confidence[middle & chosen].min() >= confidence[middle & ~chosen].max()


# Distillation.


@every_size
def test_distillation_equals_the_cross_entropy_of_every_pair_of_views(n, d, seed):
    epoch = (0, 7, 29, 100, 15)[seed]
    t = 0.07 - 0.03 * min(epoch, 29) / 29

    def loop(z):
        terms = []
        for a, b in itertools.permutations(range(3), 2):
            teacher = (z[a].detach() / t).softmax(1)
            terms += [-(teacher[i] * (z[b, i] / 0.1).log_softmax(0)).sum() for i in range(n)]
        return terms

    def ours(z, **options):
        return dc.self_distillation(tuple(z), epoch, **options)

    student = draw(seed, 3, n, d)
    assert_equals_loop([student], ours, loop)
    assert ours(student, reduction="none").shape == (3 * n,)


def test_distillation_without_warm_up_starts_at_the_last_temperature():
    student = draw(0, 2, 5, 4)
    late = dc.self_distillation(student, 30)
    torch.testing.assert_close(dc.self_distillation(student, 0, warmup=1), late)


# Accuracy (check 18).


def best(table):
    size = len(table)
    return max(sum(table[i][p[i]] for i in range(size))
               for p in itertools.permutations(range(size)))  # fmt: skip


def test_the_assignment_equals_brute_force_with_ties():
    source = np.random.default_rng(0)
    for size in (1, 2, 5):
        for _ in range(40):
            for table in (source.integers(0, 3, (size, size)), source.normal(size=(size, size))):
                found = match(table.astype(float))
                assert sorted(found) == list(range(size))
                total = table[np.arange(size), found].sum()
                assert total == pytest.approx(best(table), abs=1e-12)


def test_cluster_accuracy_equals_brute_force_over_five_classes():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        y, pred = (torch.randint(0, 5, (30,), generator=g) for _ in range(2))
        table = np.zeros((5, 5), dtype=int)
        for p, t in zip(pred.tolist(), y.tolist(), strict=True):
            table[p, t] += 1
        result = dc.cluster_accuracy(y, pred, torch.tensor([0, 1]))
        assert result.all == pytest.approx(best(table) / 30)
        hit = torch.tensor([result.assignment[p] for p in pred.tolist()]) == y
        assert result.old == pytest.approx(hit[y < 2].double().mean().item())
        assert result.new == pytest.approx(hit[y >= 2].double().mean().item())
        per_class = [hit[y == c].double().mean().item() for c in range(5)]
        assert result.macro_all == pytest.approx(sum(per_class) / 5)
        assert result.macro_old == pytest.approx(sum(per_class[:2]) / 2)


def test_thirds_follow_the_training_counts():
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    pred = torch.tensor([0, 0, 1, 2, 2, 2])
    result = dc.cluster_accuracy(y, pred, counts=torch.tensor([1, 5, 9]))
    assert (result.many, result.medium, result.few) == (1.0, 0.5, 1.0)
    assert result.old is None
    assert result.new is None
    two = dc.cluster_accuracy(y[:4], pred[:4], torch.tensor([0, 1]))
    assert two.few is None
    assert two.macro_new is None


def test_k_means_on_separated_blobs_is_scored_one():
    centres = torch.eye(5)
    y = torch.arange(5).repeat(20)
    points = centres[y] + 0.05 * draw(0, 100, 5).float()
    assert dc.cluster_accuracy(y, dc.spherical_kmeans(points, 5).assignments).all == 1.0


# Refusals.

G = torch.Generator()
V, P, Y = torch.ones(2, 4, 3), torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])
REFUSED = {
    "labelled": lambda: dc.soft_con(V, P, labelled="none"),
    "parity": lambda: dc.soft_con(V, P, parity="paper"),
    "labels": lambda: dc.estimate_class_distribution(V[0], Y + 5, Y >= 0, 3),
    "mask_labelled": lambda: dc.estimate_class_distribution(V[0], Y, Y, 3),
    "counts": lambda: dc.balanced_regulariser(P, torch.zeros(2)),
    "logits": lambda: dc.logit_adjust(Y, torch.ones(2)),
    "temperature": lambda: dc.logit_adjust(P, torch.ones(2), 0.0),
    "generator": lambda: dc.self_balanced_sampling(torch.ones(4), Y, torch.ones(2)),
    "rate": lambda: dc.self_balanced_sampling(torch.ones(4), Y, torch.ones(1), generator=G),
    "student": lambda: dc.self_distillation(V[:1], 0),
    "epoch": lambda: dc.self_distillation(V, -1),
    "student_temperature": lambda: dc.self_distillation(V, 0, student_temperature=0.0),
    "group": lambda: dc.self_distillation(V, 0, group=object()),
    "y": lambda: dc.cluster_accuracy(-Y, Y),
    "pred": lambda: dc.cluster_accuracy(Y, Y[:2]),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_does_not_fit_is_refused_by_name(argument):
    with pytest.raises(dc.ContrastInputError) as refusal:
        REFUSED[argument]()
    assert refusal.value.argument == argument


def test_thirds_need_a_count_for_every_class():
    with pytest.raises(dc.ContrastInputError, match="too few"):
        dc.cluster_accuracy(Y, Y, counts=torch.ones(1))


def test_the_dense_references_give_the_same():
    table, views = dc.losses(), draw(0, 2, 4, 3)
    options = {"labels": torch.tensor([0, -1, 1, -1])}
    given = (views, P.double(), 0.2)
    expected = table["soft_con"].reference(*given, **options)
    torch.testing.assert_close(dc.soft_con(*given, **options), expected)
    expected = table["self_distillation"].reference(views, 3)
    torch.testing.assert_close(dc.self_distillation(views, 3), expected)
