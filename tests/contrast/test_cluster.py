"""Prototypes, Sinkhorn, SwAV, its queue, ProtoNCE and k-means."""

from functools import partial

import pytest
import torch
from tests.contrast import loops_cluster as loops
from tests.contrast.equal import (
    assert_equals_loop,
    assert_finite_at_any_length,
    assert_same_under_autocast,
    every_size,
)
from torch import Tensor

import diptych_contrast as dc

pytestmark = pytest.mark.filterwarnings("ignore:.*more prototypes")


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosines(seed: int, *shape: int) -> Tensor:
    return draw(seed, *shape).tanh()


# Sinkhorn.


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (64, 60), (1, 4)])
@pytest.mark.parametrize("n_iter", [1, 3, 20])
def test_sinkhorn_equals_the_scaling_of_exponentials(shape, n_iter):
    scores = cosines(0, *shape)
    expected = loops.sinkhorn(scores, 0.05, n_iter)
    torch.testing.assert_close(dc.sinkhorn(scores, 0.05, n_iter), expected, rtol=1e-9, atol=1e-12)
    official = dc.sinkhorn(scores, 0.05, n_iter, parity="official")
    torch.testing.assert_close(official, expected, rtol=1e-9, atol=1e-12)
    single = dc.sinkhorn(scores.float(), 0.05, n_iter)
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=1e-6)


def test_sinkhorn_on_logarithms_equals_the_scaling_of_exponentials():
    scores = cosines(0, 20, 6)  # up to 500 over epsilon: only float64 holds the exponentials
    expected = loops.sinkhorn(scores, 0.002, 3)
    torch.testing.assert_close(dc.sinkhorn(scores, 0.002), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sinkhorn_stays_finite_where_exponentials_overflow(dtype):
    scores = cosines(1, 12, 5).to(dtype)
    shares = dc.sinkhorn(scores, 0.005)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(1), torch.ones(12))
    expected = loops.sinkhorn(scores, 0.005, 3)
    torch.testing.assert_close(shares.double(), expected, rtol=1e-3, atol=1e-4)
    assert not dc.sinkhorn(scores, 0.005, parity="official").isfinite().all()
    assert dc.sinkhorn(1e4 * scores.float()).isfinite().all()


def test_sinkhorn_uses_all_prototypes_alike_and_does_not_depend_on_order():
    scores = cosines(2, 40, 8)
    shares = dc.sinkhorn(scores, 0.2, n_iter=100)
    torch.testing.assert_close(shares.sum(0), torch.full((8,), 5.0, dtype=torch.float64))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dc.sinkhorn(scores[order], 0.2, n_iter=100), shares[order])
    torch.testing.assert_close(dc.sinkhorn(scores + 3.0, 0.2, n_iter=100), shares)
    assert not dc.sinkhorn(scores.requires_grad_()).requires_grad


@pytest.mark.filterwarnings("default:.*more prototypes")
def test_more_prototypes_than_samples_are_named_with_the_way_out():
    with pytest.warns(dc.ContrastWarning, match="more prototypes than samples: add a Prototype"):
        dc.sinkhorn(torch.zeros(2, 3))


# SwAV.


def swav_plain(v, n, k, seed):
    z = [*cosines(seed, v, n, k)]
    return z, dc.swav_loss, partial(loops.swav, assign=(0, 1), t=0.1, epsilon=0.05)


def swav_queue(v, n, k, seed):
    queue = [*cosines(seed + 1, 1, 2 * n, k)]
    return (
        [*cosines(seed + 2, v, n, k)],
        partial(dc.swav_loss, assign=(1,), temperature=0.2, queue_scores=queue, n_iter=2),
        partial(loops.swav, assign=(1,), t=0.2, epsilon=0.05, queue=queue, n_iter=2),
    )


def swav_given(v, n, k, seed):
    hard = torch.nn.functional.one_hot(torch.arange(n) % k, k).double()
    return (
        [*cosines(seed + 3, v, n, k)],
        partial(dc.swav_loss, assignments=hard),
        partial(loops.swav, assign=(0, 1), t=0.1, epsilon=0.05, assignments=[hard, hard]),
    )


def proto_case(queue):
    def case(v, n, d, seed):
        z, sizes = [draw(seed + 4, n, d), draw(seed + 5, n, d)], (3, 5)
        centroids = [draw(size, size, d) for size in sizes]
        own = [torch.arange(n) % size for size in sizes]
        phi = [draw(size + 1, size).abs() + 0.1 for size in sizes]
        keys = draw(seed + 6, 9, d) if queue else None
        given = {"centroids": centroids, "assignments": own, "densities": phi, "queue": keys}
        return (
            z,
            lambda z, **o: dc.proto_nce(*z, **given, **o),
            lambda z: loops.proto_nce(*z, **given, t=0.2),
        )

    return case


CASES = {
    "swav": swav_plain,
    "swav-queue": swav_queue,
    "swav-given": swav_given,
    "proto_nce": proto_case(False),
    "proto_nce-queue": proto_case(True),
}


@pytest.mark.parametrize("name", CASES)
@every_size
def test_every_loss_equals_a_loop(name, n, d, seed):
    z, ours, loop = CASES[name](2 if n == 64 else 2 + seed % 3, n, d, seed)
    single = (1e-5, 5e-5)  # prototypes divide the scores by densities of 0.1
    assert_equals_loop(z, lambda *x, **o: ours(x, **o), lambda *x: loop(x), single)


@pytest.mark.parametrize("name", CASES)
def test_reductions_and_half_precision_agree_with_the_mean(name):
    z, ours, loop = CASES[name](3, 5, 7, 0)
    rows = ours(z, reduction="none")
    torch.testing.assert_close(rows, torch.stack(loop(z)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(z, reduction="sum"), rows.sum())
    single = [value.float() for value in z]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(single)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ours(single), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_autocast_keeps_single_precision(name):
    z, ours, _ = CASES[name](3, 5, 7, 0)
    assert_same_under_autocast(z, lambda *x: ours(x))


@pytest.mark.parametrize("name", ["proto_nce", "proto_nce-queue"])
def test_rows_of_any_length_give_finite_loss_and_gradient(name):
    z, ours, _ = CASES[name](3, 9, 7, 0)
    assert_finite_at_any_length(z, lambda *x: ours(x))


@pytest.mark.parametrize("name", ["swav_loss", "proto_nce"])
def test_the_registered_reference_is_the_loss(name):
    spec = dc.losses()[name]
    scores, queue = [*cosines(0, 4, 9, 5)], [*cosines(1, 2, 6, 5)]
    own, phi = [torch.arange(9) % 5] * 2, [cosines(2, 5).abs() + 0.2] * 2
    cases = {
        "swav_loss": [(scores,), (scores, (0, 2), 0.2, 0.1, queue)],
        "proto_nce": [(*scores[:2], queue, [own[0] % 6] * 2, [phi[0][[0, 1, 2, 3, 4, 0]]] * 2)],
    }
    for given in cases[name]:
        named = dict(zip(("queue_scores",), given[4:], strict=False)) if name == "swav_loss" else {}
        found = spec.function(*given[: 4 if named else None], **named)
        torch.testing.assert_close(found, spec.reference(*given), rtol=1e-9, atol=1e-9)


def test_swav_official_is_the_same_where_exponentials_are_finite():
    scores = cosines(4, 3, 10, 6)
    official = dc.swav_loss(scores, parity="official")
    torch.testing.assert_close(official, dc.swav_loss(scores), rtol=1e-9, atol=1e-9)


def test_a_frozen_value_of_swav_holds():
    """Computed once with a straight port of the authors' training step in numpy."""
    scores = torch.sin(torch.arange(72.0, dtype=torch.float64)).view(3, 4, 6)
    assert dc.swav_loss(scores).item() == pytest.approx(9.216252065889, abs=1e-9)


def test_swav_gives_no_gradient_to_assignments_and_follows_a_learned_temperature():
    scores = cosines(5, 3, 6, 4).requires_grad_()
    dc.swav_loss(scores, assign=(0,)).backward()
    assert scores.grad is not None
    assert scores.grad[0].abs().max() == 0
    assert scores.grad[1:].abs().min() > 0
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: dc.swav_loss(scores.detach(), temperature=t), t)


# Prototypes and their queue.


def test_prototypes_have_the_published_size_and_unit_rows_after_every_step():
    prototypes = dc.Prototypes(128, 3000)
    assert sum(p.numel() for p in prototypes.parameters()) == 384_000
    with torch.no_grad():
        prototypes.weight.mul_(3.0)
    prototypes.start_step(0)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(3000))
    z = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.normalize(z) @ prototypes.weight.t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(prototypes(7 * z), expected)


def test_frozen_prototypes_have_no_gradient_until_their_step():
    prototypes, z = dc.Prototypes(4, 3, freeze_steps=2), draw(0, 5, 4).float().requires_grad_()
    for step in range(4):
        prototypes.start_step(step)
        prototypes(z).square().sum().backward()
        assert (prototypes.weight.grad is None) == (step < 2)
    assert z.grad is not None


def test_normalisation_can_be_differentiated_through():
    prototypes = dc.Prototypes(4, 3, through=True).double()
    with torch.no_grad():
        prototypes.weight.mul_(2.0)
    before = prototypes.weight.detach().clone()
    prototypes.start_step(0)
    assert torch.equal(prototypes.weight, before)
    (slope,) = torch.autograd.grad(prototypes(draw(0, 5, 4)).exp().sum(), prototypes.weight)
    torch.testing.assert_close((slope * before).sum(1), torch.zeros(3, dtype=torch.float64))


def test_the_queue_wraps_resumes_and_serves_from_its_epoch_on():
    queue, prototypes = dc.PrototypeQueue(2, 6, 4, start_epoch=3), dc.Prototypes(4, 5)
    batches = draw(0, 5, 2, 2, 4).float()
    for number, batch in enumerate(batches):
        assert (queue.scores(prototypes, epoch=3) is None) == (number < 3)
        queue.enqueue(tuple(batch.requires_grad_()))
    assert queue.scores(prototypes, epoch=2) is None
    found = queue.scores(prototypes, epoch=3)
    kept = torch.cat([batches[3], batches[4], batches[2]], 1)
    torch.testing.assert_close(found, [prototypes(rows).detach() for rows in kept])
    resumed = dc.PrototypeQueue(2, 6, 4)
    resumed.load_state_dict(queue.state_dict())
    for memory in (queue, resumed):
        memory.enqueue(batches[0])
    pairs = zip(queue.queues, resumed.queues, strict=True)
    assert all(torch.equal(one.keys, other.keys) for one, other in pairs)


# Density and k-means.


def test_density_is_equation_12_clipped_and_scaled():
    x, centres = draw(0, 60, 4), draw(1, 7, 4)
    own = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(0))
    own[0] = 5  # one cluster of one point, and one of none
    expected = loops.density(x, centres, own, 0.2)
    torch.testing.assert_close(dc.cluster_density(x, centres, own), expected)
    assert expected.mean().item() == pytest.approx(0.2)


def test_density_of_equal_points_stays_above_zero():
    x = torch.ones(6, 3)
    even = dc.cluster_density(x, torch.ones(2, 3), torch.arange(6) % 2, 0.5)
    torch.testing.assert_close(even, torch.full((2,), 0.5))
    x = torch.cat([torch.ones(90, 3), draw(0, 10, 3).float()])
    own = torch.arange(100) // 10
    centres = torch.cat([torch.ones(9, 3), x[90:].mean(0)[None]])
    assert dc.cluster_density(x, centres, own).min() >= 0.002


def blobs(seed: int) -> tuple[Tensor, Tensor]:
    centres = torch.linalg.qr(draw(seed, 8, 8))[0][:5]
    labels = torch.arange(200) % 5
    return 3.0 * centres[labels] + 0.2 * draw(seed + 1, 200, 8), labels


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_separated_blobs(seed):
    x, labels = blobs(seed)
    found = dc.spherical_kmeans(x, 5, seed=seed)
    table = torch.zeros(5, 5).index_put_((labels, found.assignments), torch.tensor(1.0), True)
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    assert table.amax(1).sum() == 200
    unit = torch.nn.functional.normalize(x)
    means = torch.stack([unit[found.assignments == c].mean(0) for c in range(5)])
    torch.testing.assert_close(found.centroids, torch.nn.functional.normalize(means))


def test_k_means_is_repeatable_and_goes_on_from_given_centres(monkeypatch):
    x, labels = blobs(3)
    first, again = (dc.spherical_kmeans(x, 7, seed=1) for _ in range(2))
    assert torch.equal(first.assignments, again.assignments)
    assert not torch.equal(first.assignments, dc.spherical_kmeans(x, 7, seed=2).assignments)
    start = torch.stack([x[labels == c][0] for c in range(5)])
    warm = dc.spherical_kmeans(x, 5, n_iter=1, start=start)
    assert torch.equal(warm.assignments, labels)
    monkeypatch.setattr("diptych_contrast.cluster._SCORES_AT_ONCE", 30)
    assert torch.equal(dc.spherical_kmeans(x, 7, seed=1).assignments, first.assignments)


def test_an_empty_cluster_goes_on_from_the_farthest_point():
    x, _ = blobs(4)
    alike = x[:1].expand(5, -1)
    found = dc.spherical_kmeans(x, 5, start=alike)
    assert found.assignments.unique().tolist() == [0, 1, 2, 3, 4]


def test_k_means_of_few_distinct_points_ends():
    found = dc.spherical_kmeans(torch.ones(6, 3), 4)
    assert found.centroids.isfinite().all()
    assert dc.spherical_kmeans(draw(0, 1, 3), 1).assignments.tolist() == [0]


# Errors.


def with_clusters(**changes):
    given = {
        "q": draw(0, 4, 3),
        "k": draw(1, 4, 3),
        "centroids": [draw(2, 2, 3)],
        "assignments": [torch.tensor([0, 1, 0, 1])],
        "densities": [torch.ones(2)],
    }
    return dc.proto_nce(**{**given, **changes})


S = torch.zeros(2, 4, 3)
QUEUE = dc.PrototypeQueue(2, 10, 3)


@pytest.mark.parametrize(
    ("call", "argument", "found"),
    [
        (lambda: dc.sinkhorn(torch.zeros(3)), "scores", "has shape (3,)"),
        (lambda: dc.sinkhorn(torch.zeros(3, 2, dtype=torch.int64)), "scores", "int64"),
        (lambda: dc.sinkhorn(torch.zeros(0, 2)), "scores", "has shape (0, 2)"),
        (lambda: dc.sinkhorn(S[0], 0.0), "epsilon", "is 0.0"),
        (lambda: dc.sinkhorn(S[0], n_iter=0), "n_iter", "is 0"),
        (lambda: dc.sinkhorn(S[0], parity="linear"), "parity", "is 'linear'"),
        (lambda: dc.swav_loss(S[:1]), "assign", "for 1 views"),
        (lambda: dc.swav_loss(S, assign=(0, 2)), "assign", "is (0, 2)"),
        (lambda: dc.swav_loss(S, assign=()), "assign", "is ()"),
        (lambda: dc.swav_loss([S[0], S[0, :2]]), "scores[1]", "has shape (2, 3)"),
        (lambda: dc.swav_loss(S, ring=True, group=0), "ring", "is given"),
        (lambda: dc.swav_loss(S, return_info=True), "return_info", "is given"),
        (lambda: dc.swav_loss(S, queue_scores=[S[0]]), "queue_scores", "has 1 entries"),
        (lambda: dc.swav_loss(S, queue_scores=[S[0, :, :2]] * 2), "queue_scores", "(4, 2)"),
        (lambda: dc.swav_loss(S, assignments=S[0, :2]), "assignments", "has shape (2, 3)"),
        (lambda: dc.Prototypes(3, 0), "k", "is 0"),
        (lambda: dc.PrototypeQueue(2, 0, 3), "length", "is 0"),
        (lambda: QUEUE.enqueue(torch.zeros(2, 4, 3)), "features", "has 4 samples in all"),
        (lambda: QUEUE.enqueue(torch.zeros(1, 5, 3)), "features", "has 1 entries"),
        (lambda: QUEUE.enqueue(torch.zeros(2, 5, 4)), "features", "has shape (5, 4)"),
        (lambda: QUEUE.enqueue([]), "features", "has 0 entries"),
        (lambda: with_clusters(centroids=[]), "centroids", "have lengths [0, 1]"),
        (lambda: with_clusters(centroids=[draw(2, 2, 4)]), "centroids", "has shape (2, 4)"),
        (lambda: with_clusters(densities=[torch.zeros(2)]), "densities", "holds 0.0"),
        (lambda: with_clusters(densities=[torch.ones(3)]), "densities", "has shape (3,)"),
        (lambda: with_clusters(assignments=[torch.tensor([0, 1, 2, 1])]), "assignments", "holds 2"),
        (
            lambda: with_clusters(assignments=[torch.tensor([0, 1])]),
            "assignments",
            "has shape (2,)",
        ),
        (lambda: with_clusters(return_info=True), "return_info", "is given"),
        (lambda: dc.spherical_kmeans(S[0], 5), "k", "is 5 for 4 points"),
        (lambda: dc.spherical_kmeans(S[0] / 0, 2), "x", "are not finite"),
        (lambda: dc.spherical_kmeans(S[0], 2, start=S[0]), "start", "has shape (4, 3)"),
        (lambda: dc.cluster_density(S[0], S[0], torch.arange(4), 0.0), "temperature", "is 0.0"),
    ],
)
def test_a_wrong_input_is_named(call, argument, found):
    with pytest.raises(dc.ContrastInputError) as caught:
        call()
    assert caught.value.argument == argument
    assert found in caught.value.found
    assert caught.value.fix


def test_the_queue_names_the_nearest_fitting_length():
    with pytest.raises(dc.ContrastInputError, match="take length 8"):
        QUEUE.enqueue(torch.zeros(2, 4, 3))
    assert len(QUEUE.queues[0].stored()) == 0
    with pytest.raises(dc.ContrastInputError, match="take length 30"):
        QUEUE.enqueue(torch.zeros(2, 30, 3))


# Process groups; several processes are compared with one in test_distributed_losses.


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_group_of_one_process_changes_nothing(alone):
    scores, views = cosines(0, 3, 6, 4), draw(0, 3, 6, 4)
    for parity in (None, "official"):
        expected = dc.swav_loss(scores, parity=parity)
        torch.testing.assert_close(dc.swav_loss(scores, parity=parity, group=alone), expected)
    queue, prototypes = (
        dc.PrototypeQueue(2, 6, 4, start_epoch=0).double(),
        dc.Prototypes(4, 5).double(),
    )
    queue.enqueue(views[:2], alone)
    together, own = queue.scores(prototypes, 0, alone), queue.scores(prototypes, 0)
    torch.testing.assert_close(together, own)
    for loss in (dc.mv_info_nce, dc.mv_dhel, dc.poly_view, dc.nt_xent_multi):
        torch.testing.assert_close(loss(views, group=alone), loss(views))
    target = torch.arange(6) % 2
    found, expected = (dc.sep_clr(views[:2], scores[:2], target, group=g)[0] for g in (alone, None))
    torch.testing.assert_close(found, expected)
    with pytest.warns(dc.ContrastWarning, match="no row with a positive"):
        assert dc.mv_dhel(views[:, :1], group=alone).item() == 0
