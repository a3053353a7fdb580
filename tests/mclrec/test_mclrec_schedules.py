"""The schedules against a straight port that pads, encodes apart and loops over its masks."""

import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.model import SequenceEncoder, build_augmenters
from diptych_mclrec.schedules import SCHEDULES, Batch, Networks, Views, recommend_only

torch.set_num_threads(1)
ITEMS, WIDTH, ROWS = 20, 8, 6


class Context:
    """What a schedule asks of the loop; gradients are averaged over the processes."""

    group = None
    device = torch.device("cpu")

    def __init__(self, **optimisers: torch.optim.Optimizer) -> None:
        self.optimisers = optimisers
        self.steps: list[str] = []

    def zero(self, name: str) -> None:
        self.optimisers[name].zero_grad()

    def backward(self, loss: torch.Tensor, *, weighted: bool) -> None:
        assert weighted
        loss.backward()

    def step(self, name: str) -> None:
        optimiser = self.optimisers[name]
        if self.group is not None:
            for parameter in optimiser.param_groups[0]["params"]:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimiser.step()
        self.steps.append(name)


def objective(**changes):
    given = {"beta": 0.3, "lambda_": 0.2, "tau": 0.8, "mask_same_subject": False} | changes
    return MCLRecConfig.model_validate({"objective": given}).objective


def learners(groups: int = 3, **changes) -> tuple[Networks, Context]:
    torch.manual_seed(1)
    net = SequenceEncoder(
        ITEMS, dim=WIDTH, inner=12, layers=1, max_len=9, dropout=0.0, attn_dropout=0.0
    ).double()
    torch.nn.init.normal_(net.item_embedding.weight, std=0.5)
    augmenters = tuple(one.double() for one in build_augmenters(WIDTH))
    networks = Networks(net, augmenters, objective(**changes), length_groups=groups)
    phi = [p for one in augmenters for p in one.parameters()]
    theta = list(net.parameters())
    return networks, Context(
        encoder=torch.optim.Adam(theta, 1e-2),
        augmenters=torch.optim.Adam(phi, 1e-2),
        joint=torch.optim.Adam(theta + phi, 1e-2),
    )


def batch(seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)

    def histories() -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.randint(1, 10, (ROWS,), generator=draw)
        items = torch.randint(1, ITEMS + 1, (ROWS, 9), generator=draw)
        return items.masked_fill(torch.arange(9) >= lengths[:, None], 0), lengths

    (items, lengths), (first, n1), (second, n2) = histories(), histories(), histories()
    first[n1 > 2, 0] = 0  # as a masked view has them
    targets = torch.randint(1, ITEMS + 1, (ROWS,), generator=draw)
    views = Views(first, n1, second, n2, torch.tensor([0, 1, 2, 3, 4, 1]))
    return Batch(items, lengths, targets, views=views)


def plain_nce(x1, x2, tau=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE, and the official regulariser of the pair, from the matrix of scores."""
    z = torch.cat([x1, x2])
    n, scores = len(z), z @ z.t() / tau
    mask = torch.ones(n, n, dtype=torch.bool)
    for row in range(n):
        mask[row, row] = mask[row, (row + n // 2) % n] = False
    positive = torch.cat([scores.diagonal(n // 2), scores.diagonal(-n // 2)])[:, None]
    negative = scores[mask].view(n, -1)
    logits = torch.cat([positive, negative], 1)
    loss = F.cross_entropy(logits, torch.zeros(n, dtype=torch.int64))
    hardest = negative.amax(1, keepdim=True)
    low, high = torch.minimum(positive, hardest), torch.maximum(positive, hardest)
    return loss, (positive - low).relu().mean() + (high - negative).relu().mean()


def port_step(networks: Networks, batch: Batch, ctx: Context) -> None:
    net, (w1, w2), given = networks.encoder, networks.augmenters, networks.objective

    def meta(h1, h2, gamma):
        z1, z2 = w1(h1), w2(h2)
        terms = [plain_nce(a, b) for a, b in ((h1, z2), (h2, z1), (z1, z2))]
        return sum(nce for nce, _ in terms) + gamma * sum(reg for _, reg in terms)

    for stage in "ABA":
        h = net(batch.items, batch.lengths)
        h1 = net(batch.views.first, batch.views.first_lengths)
        h2 = net(batch.views.second, batch.views.second_lengths)
        for optimiser in ctx.optimisers.values():
            optimiser.zero_grad()
        if stage == "A":
            logits = h @ net.item_embedding.weight.t()
            loss = F.cross_entropy(logits, batch.targets)
            loss = loss + given.lambda_ * plain_nce(h1, h2, given.tau)[0]
            (loss + given.beta * meta(h1, h2, given.gamma)).backward()
            ctx.step("encoder")
        else:
            meta(h1, h2, given.augmenter_gamma).backward()
            ctx.step("augmenters")


def parameters(networks: Networks) -> tuple[torch.Tensor, torch.Tensor]:
    theta = torch.cat([p.detach().flatten() for p in networks.encoder.parameters()])
    phi = [p.detach().flatten() for one in networks.augmenters for p in one.parameters()]
    return theta.clone(), torch.cat(phi)


def test_the_official_schedule_learns_what_a_straight_port_learns():
    given = {"regulariser": "official", "augmenter_gamma": 0.1, "pad_in_softmax": True}
    ours, ctx = learners(**given)
    port, port_ctx = learners(groups=1, **given)
    for number in range(5):
        SCHEDULES["official"](ours, batch(number), ctx)
        port_step(port, batch(number), port_ctx)
    for found, expected in zip(parameters(ours), parameters(port), strict=True):
        assert torch.allclose(found, expected, atol=1e-9, rtol=0)
    assert ctx.steps == ["encoder", "augmenters", "encoder"] * 5


def test_each_stage_leaves_the_others_parameters_alone():
    networks, ctx = learners()
    theta, phi = parameters(networks)
    recommend_only(networks, batch(), ctx)
    moved, same = parameters(networks)
    assert torch.equal(same, phi)
    assert not torch.equal(moved, theta)
    assert all(p.grad is None for one in networks.augmenters for p in one.parameters())
    frozen = Context(**ctx.optimisers)
    frozen.optimisers["encoder"] = torch.optim.SGD(networks.encoder.parameters(), 0.0)
    SCHEDULES["two_stage"](networks, batch(), frozen)
    after, learnt = parameters(networks)
    assert torch.equal(after, moved)
    assert not torch.equal(learnt, phi)


def test_the_paper_makes_two_steps_and_the_joint_form_one_of_everything():
    networks, ctx = learners()
    terms = SCHEDULES["two_stage"](networks, batch(), ctx)
    assert ctx.steps == ["encoder", "augmenters"]
    assert {"rec", "cl1", "cl2", "reg", "total", "augmenters/cl2"} <= terms.keys()
    before = parameters(networks)
    SCHEDULES["joint"](networks, batch(), ctx)
    assert ctx.steps[2:] == ["joint"]
    assert not any(map(torch.equal, before, parameters(networks)))


def test_the_encoders_loss_is_the_weighted_sum_of_its_terms():
    networks, ctx = learners(gamma=0.4)
    terms = recommend_only(networks, batch(), ctx)
    expected = terms["rec"] + 0.2 * terms["cl1"] + 0.3 * (terms["cl2"] + 0.4 * terms["reg"])
    assert torch.allclose(terms["total"], expected, atol=1e-12)


def test_prefixes_of_one_subject_are_told_apart_only_if_asked():
    found = [
        recommend_only(*_with_batch(learners(mask_same_subject=masked)))["cl1"]
        for masked in (False, True)
    ]
    assert found[1] < found[0]


def _with_batch(pair):
    networks, ctx = pair
    return networks, batch(), ctx


def test_the_augmenters_learn_through_the_encoders_trial_step():
    networks, ctx = learners(augmenter_gamma=0.2)
    networks = Networks(networks.encoder, networks.augmenters, networks.objective, 1, 0.05)
    parameter = networks.augmenters[0].layers[0].weight

    def outer(shift: float) -> float:
        """The augmenters' loss after a trial step of the encoder, by a copy of everything."""
        fresh, _ = learners(groups=1, augmenter_gamma=0.2)
        with torch.no_grad():
            fresh.augmenters[0].layers[0].weight[0, 0] += shift
        given, b, net = fresh.objective, batch(), fresh.encoder
        w1, w2 = fresh.augmenters

        def terms(weights):
            h = net(b.items, b.lengths)
            h1 = net(b.views.first, b.views.first_lengths)
            h2 = net(b.views.second, b.views.second_lengths)
            z1, z2 = w1(h1), w2(h2)
            rec = F.cross_entropy(h @ net.item_embedding.weight[1:].t(), b.targets - 1)
            cl2 = sum(plain_nce(a, c)[0] for a, c in ((h1, z2), (h2, z1), (z1, z2)))
            z = torch.cat([z1, z2])
            scores = z @ z.t()
            off = torch.eye(ROWS, dtype=torch.bool).repeat(2, 2)
            positive, negative = (z1 * z2).sum(1), scores[~off]
            low = torch.minimum(positive.min(), negative.max())
            high = torch.maximum(positive.min(), negative.max())
            reg = (positive - low).mean() + (high - negative).mean()
            cl1 = plain_nce(h1, h2, given.tau)[0]
            return sum(
                weight * term for weight, term in zip(weights, (rec, cl1, cl2, reg), strict=True)
            )

        weights = (1.0, given.lambda_, given.beta, given.beta * given.gamma)
        slopes = torch.autograd.grad(terms(weights), list(net.parameters()))
        with torch.no_grad():
            for own, slope in zip(net.parameters(), slopes, strict=True):
                own.sub_(0.05 * slope)
        return terms((1.0, 0.0, 1.0, 0.2)).item()

    theta, phi = parameters(networks)
    ctx.optimisers["augmenters"] = torch.optim.SGD([parameter], 1.0)
    SCHEDULES["bilevel"](networks, batch(), ctx)
    learnt = (phi[0] - parameter[0, 0]).item()
    assert learnt == pytest.approx((outer(1e-5) - outer(-1e-5)) / 2e-5, rel=1e-4)
    assert ctx.steps == ["augmenters", "encoder"]
    assert not torch.equal(theta, parameters(networks)[0])


def test_every_step_of_a_history_counts_once_where_the_loss_is_taken_everywhere():
    items = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0]])
    whole = Batch(items, torch.tensor([4, 2]), targets, every_step=True)
    rows, lengths, nexts = [], [], []
    for row, column in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        rows.append(F.pad(items[row, : column + 1], (0, 3 - column)))
        lengths.append(column + 1)
        nexts.append(targets[row, column])
    prefixes = Batch(torch.stack(rows), torch.tensor(lengths), torch.stack(nexts))
    one, other = learners(), learners()
    found = recommend_only(one[0], whole, one[1])["rec"]
    expected = recommend_only(other[0], prefixes, other[1])["rec"]
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(parameters(one[0])[0], parameters(other[0])[0], atol=1e-9)


@pytest.mark.parametrize("loss", ["sampled", "gbce"])
def test_sampling_losses_take_the_batchs_negatives(loss):
    networks, ctx = learners(loss=loss)
    plain = batch()
    negatives = torch.randint(1, ITEMS + 1, (ROWS, 4), generator=torch.Generator().manual_seed(2))
    sampled = Batch(plain.items, plain.lengths, plain.targets, negatives=negatives)
    terms = recommend_only(networks, sampled, ctx)
    assert terms.keys() == {"rec", "total"}
    assert terms["rec"].isfinite()
    assert terms["rec"] != recommend_only(*_with_batch(learners(loss=loss)))["rec"]


def part_of(whole: Batch, rows: slice) -> Batch:
    views = Views(*(getattr(whole.views, name)[rows] for name in Views.__dataclass_fields__))
    return Batch(whole.items[rows], whole.lengths[rows], whole.targets[rows], views=views)


def learn_in_part(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    rows, learnt = (slice(0, 4), slice(4, ROWS))[rank], {}
    for schedule in SCHEDULES:
        for form, masked in (("paper", True), ("official", False)):
            networks, ctx = learners(regulariser=form, mask_same_subject=masked)
            ctx.group = dist.group.WORLD
            SCHEDULES[schedule](networks, part_of(batch(), rows), ctx)
            learnt[schedule, form] = parameters(networks)
    torch.save(learnt, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distribution")
@pytest.mark.skipif(sys.platform == "win32", reason="run on Linux only so far")
def test_two_processes_with_uneven_parts_learn_what_one_learns(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(learn_in_part, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        for (schedule, form), found in torch.load(tmp_path / f"rank-{rank}.pt").items():
            networks, ctx = learners(regulariser=form, mask_same_subject=form == "paper")
            SCHEDULES[schedule](networks, batch(), ctx)
            for own, expected in zip(found, parameters(networks), strict=True):
                torch.testing.assert_close(own, expected, rtol=0, atol=1e-8, msg=schedule)
