"""Losses are what their formulas say, and say nothing where nothing is known."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.config import merge
from diptych_pirads.config import CoTrainingSection, PiradsConfig
from diptych_pirads.fusion import PATHS
from diptych_pirads.model import DualOut, DualPathNet
from diptych_pirads.objective import (
    Hidden,
    Target,
    anatomy_loss,
    co_disagreement,
    co_loss,
    co_weight,
    dual_loss,
    forbidden_contact,
    presence_loss,
    restored_loss,
    sdf_loss,
    single_loss,
)
from diptych_pirads.supervision import (
    Weighing,
    allowed_channels,
    allowed_classes,
    marginal_ce,
    meyer_loss,
    responsibility_dice,
    soft_dice,
    supervised,
)

torch.set_num_threads(1)
SIZE = (3, 4, 5)
ANY = 0b11111


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(classes: int = 5, n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, classes, *SIZE, generator=generator(seed), dtype=torch.float64)


def labels(n: int = 2, seed: int = 1, classes: int = 5) -> Tensor:
    return torch.randint(classes, (n, *SIZE), generator=generator(seed))


def sets_of(label: Tensor) -> Tensor:
    return (1 << label).to(torch.uint8)


def dice_by_hand(p: Tensor, g: Tensor) -> Tensor:
    """Squared denominators, one value a channel."""
    overlap = torch.einsum("nkzyx,nkzyx->k", p, g)
    size = torch.einsum("nkzyx,nkzyx->k", p, p) + torch.einsum("nkzyx,nkzyx->k", g, g)
    return (2 * overlap + 1e-5) / (size + 1e-5)


def test_dice_has_squares_below() -> None:
    p, g = logits().softmax(1), F.one_hot(labels(), 5).movedim(-1, 1).double()
    assert soft_dice(p, g).item() == pytest.approx(1 - dice_by_hand(p, g).mean().item(), abs=1e-12)
    each = torch.stack([dice_by_hand(p[[i]], g[[i]]) for i in range(2)])
    assert soft_dice(p, g, batch=False).item() == pytest.approx(1 - each.mean().item(), abs=1e-12)
    assert soft_dice(g, g).item() == pytest.approx(0, abs=1e-12)


def test_zones_that_a_batch_does_not_hold_are_left_out_or_counted() -> None:
    p = logits().softmax(1)
    g = F.one_hot(labels(classes=4), 5).movedim(-1, 1).double()
    four = 1 - dice_by_hand(p, g)[:4].mean().item()
    assert soft_dice(p, g).item() == pytest.approx(four, abs=1e-12)
    all_five = 1 - dice_by_hand(p, g).mean().item()
    assert soft_dice(p, g, present_only=False).item() == pytest.approx(all_five, abs=1e-12)
    assert soft_dice(p, torch.zeros_like(p)).item() == 0


def test_the_loss_of_meyer_has_plain_sums_below() -> None:
    p, g = logits().softmax(1), F.one_hot(labels(), 5).movedim(-1, 1).double()
    expected = sum(
        -(2 * (p[:, c] * g[:, c]).sum() + 1) / (p[:, c].sum() + g[:, c].sum() + 1) for c in range(5)
    )
    assert meyer_loss(p, g).item() == pytest.approx(float(expected), abs=1e-12)


def test_disagreement_is_one_minus_the_dice_of_the_paths() -> None:
    a, b = torch.rand(2, 2, 2, *SIZE, generator=generator(3), dtype=torch.float64)
    sums = [torch.einsum("nkzyx,nkzyx->k", *pair) for pair in ((a, b), (a, a), (b, b))]
    expected = (1 - 2 * sums[0] / (sums[1] + sums[2])).mean()
    assert co_disagreement(a, b).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("form", ["normalized", "mse", "js"])
def test_disagreement_is_zero_where_paths_agree_and_only_there(form: Any) -> None:
    a, b = 0.1 + 0.8 * torch.rand(2, 1, 2, 1, 2, 2, generator=generator(4), dtype=torch.float64)
    assert co_disagreement(a, a, form).item() == pytest.approx(0, abs=1e-12)
    other = a.clone()
    other[0, 1, 0, 1, 1] += 0.05
    assert co_disagreement(a, other, form).item() > 1e-5
    assert co_disagreement(a, b, form).item() == pytest.approx(co_disagreement(b, a, form).item())
    values = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: co_disagreement(x, y, form), values)


def test_disagreement_by_squares_and_by_divergence_are_means() -> None:
    a = torch.tensor([0.9, 0.2], dtype=torch.float64).reshape(1, 1, 1, 1, 2)
    b = torch.tensor([0.5, 0.2], dtype=torch.float64).reshape(1, 1, 1, 1, 2)
    assert co_disagreement(a, b, "mse").item() == pytest.approx(0.16 / 2)

    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    expected = (kl(0.9, 0.7) + kl(0.5, 0.7)) / 2 / 2
    assert co_disagreement(a, b, "js").item() == pytest.approx(expected)


def test_paths_that_find_nothing_do_not_agree_by_it() -> None:
    a, b = (torch.full((1, 4, 4, 8, 8), -20.0) for _ in range(2))
    a[:, 0] = b[:, 0] = 20
    noise = torch.randn(2, 1, 4, 4, 8, 8, generator=generator(0))
    a, b = (a + noise[0]).requires_grad_(), b + noise[1]
    lost = co_loss(DualOut(a, b), PATHS)
    assert lost.item() == 0
    lost.backward()
    assert a.grad is not None
    assert a.grad.abs().max() == 0


def test_disagreement_counts_zones_of_fifty_voxels() -> None:
    def paths(voxels: int) -> DualOut:
        a, b = (torch.full((1, 4, 1, 10, 10), -9.0) for _ in range(2))
        a[:, 0] = b[:, 0] = 9
        a.flatten(2)[:, 1, :voxels] = b.flatten(2)[:, 1, :voxels] = 18
        a.flatten(2)[:, 2, 99] = 18  # one voxel that path b does not have
        return DualOut(a, b)

    assert co_loss(paths(60), PATHS).item() == pytest.approx(0, abs=1e-4)
    assert co_loss(paths(40), PATHS).item() == 0


@pytest.mark.parametrize("n", [1, 2])
def test_sets_of_one_class_give_cross_entropy_and_dice(n: int) -> None:
    x, label = logits(n=n), labels(n=n)
    allowed = allowed_classes(sets_of(label))
    expected = F.cross_entropy(x, label)
    assert marginal_ce(x.log_softmax(1), allowed).item() == pytest.approx(expected.item(), abs=1e-6)
    hot = F.one_hot(label, 5).movedim(-1, 1).double()
    dice = 1 - dice_by_hand(x.softmax(1), hot)[1:].mean()
    assert responsibility_dice(x.softmax(1), allowed).item() == pytest.approx(dice.item(), abs=1e-6)
    both = supervised(x.log_softmax(1), allowed, Weighing())
    assert both.item() == pytest.approx((expected + dice).item(), abs=1e-6)
    weights = (1.0, 1.0, 1.0, 2.0, 2.0)
    weighted = F.cross_entropy(x, label, torch.tensor(weights, dtype=torch.float64))
    found = marginal_ce(x.log_softmax(1), allowed, weights)
    assert found.item() == pytest.approx(weighted.item(), abs=1e-6)


@pytest.mark.parametrize("meyer", [False, True])
def test_voxels_about_which_nothing_is_known_teach_nothing(meyer: bool) -> None:
    x = logits().requires_grad_()
    allowed = allowed_classes(torch.full((2, *SIZE), ANY, dtype=torch.uint8))
    lost = supervised(x.log_softmax(1), allowed, Weighing(meyer=meyer))
    lost.backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    assert lost.item() == (-5 if meyer else 0)
    partly = sets_of(labels())
    partly[:, 0] = ANY
    y = logits().requires_grad_()
    supervised(y.log_softmax(1), allowed_classes(partly), Weighing(meyer=meyer)).backward()
    assert y.grad is not None
    assert y.grad[:, :, 0].abs().max() == 0
    assert y.grad[:, :, 1:].abs().max() > 0


def test_a_set_asks_for_the_sum_of_its_classes() -> None:
    x = logits(n=1)
    sets = torch.full((1, *SIZE), 0b11100, dtype=torch.uint8)  # TZ, DPU or AFS
    expected = -x.softmax(1)[:, 2:].sum(1).log().mean()
    found = marginal_ce(x.log_softmax(1), allowed_classes(sets))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    p = x.softmax(1)
    share = torch.cat([torch.zeros_like(p[:, :2]), p[:, 2:] / p[:, 2:].sum(1, keepdim=True)], 1)
    dice = 1 - dice_by_hand(p, share)[2:].mean()
    found = responsibility_dice(p, allowed_classes(sets))
    assert found.item() == pytest.approx(dice.item(), abs=1e-12)


def test_a_confident_error_has_a_finite_loss_and_a_gradient() -> None:
    x = torch.zeros(1, 5, 1, 1, 2)
    x[:, 0] = 200
    x.requires_grad_()
    allowed = allowed_classes(
        torch.tensor([0b00010, 0b11100], dtype=torch.uint8).reshape(1, 1, 1, 2)
    )
    lost = supervised(x.log_softmax(1), allowed, Weighing())
    lost.backward()
    assert lost.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0.1


def test_the_rest_of_a_path_stands_for_the_zones_that_it_does_not_know() -> None:
    sets = torch.tensor([0b00001, 0b00010, 0b10000, 0b11100, 0b01010], dtype=torch.uint8)
    channels = allowed_channels(allowed_classes(sets.reshape(1, 1, 1, 5)), PATHS["a"])
    table = channels[0, :, 0, 0].T.int().tolist()  # rest, PZ, TZ, DPU
    assert table == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1]]


def test_distances_count_near_the_border_of_zones_that_are_there() -> None:
    sdf = torch.full((1, 4, *SIZE), -12.7)
    sdf[0, 0, 0] = 5  # PZ
    sdf[0, 0, 1] = -3
    said = torch.zeros(1, 3, *SIZE)
    said[:, 0, 0] = 0.1
    assert sdf_loss(said, sdf, PATHS["a"]).item() == pytest.approx((0.4 + 0.3) / 2)
    assert sdf_loss(said, torch.full_like(sdf, -12.7), PATHS["a"]).item() == 0


def test_presence_is_asked_slice_by_slice() -> None:
    sets = torch.ones(1, 3, 2, 2, dtype=torch.uint8)
    sets[0, 1, 0, 0] = 0b01000  # one voxel of DPU
    sets[0, 2] = ANY  # not seen
    said = torch.zeros(1, 3, 3)
    said[0, 2] = torch.tensor([-30.0, 30.0, 30.0])
    assert presence_loss(said, sets, PATHS["a"]).item() == pytest.approx(math.log(2) * 2 / 3)
    assert presence_loss(-said, sets, PATHS["a"]).item() > 5


def test_contacts_are_pairs_of_neighbours() -> None:
    u, v = torch.zeros(2, 1, 2, 2, 2)
    u[0, 0, 0, 0] = 1
    v[0, 1, 0, 0] = v[0, 1, 1, 1] = 1  # one of them shares a face
    assert forbidden_contact(u, v).item() == pytest.approx(1 / 24)
    assert forbidden_contact(v, u).item() == pytest.approx(1 / 24)


def test_the_urethra_may_leave_the_gland_at_its_lowest_slices_alone() -> None:
    label = torch.ones(1, 6, 3, 3, dtype=torch.long)
    label[:, 0] = 0
    hot = torch.zeros(1, 5, 6, 3, 3)
    hot[:, 0] = 1
    for z in range(1, 6):
        one = hot.clone()
        one[0, 0, z, 1, 1], one[0, 3, z, 1, 1] = 0, 1
        assert (anatomy_loss(one, sets_of(label)).item() > 0) == (z > 2)


def test_hidden_blocks_alone_are_restored() -> None:
    image, blocks = torch.rand(1, 1, *SIZE), torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    blocks[..., 0] = True
    said = image.clone()
    said[..., 0] += 0.25
    said[..., 1] += 9
    assert restored_loss(said, Hidden(image, blocks)).item() == pytest.approx(0.25, abs=1e-6)


def test_co_training_rises_over_the_first_part_of_the_stage() -> None:
    section = CoTrainingSection(weight=0.5, ramp=0.4)
    expected = [0.5 * math.exp(-5), 0.5 * math.exp(-5 / 4), 0.5, 0.5]
    found = [co_weight(t, section) for t in (0, 0.2, 0.4, 1)]
    assert found == pytest.approx(expected)


CONFIG = merge(PiradsConfig(), {"objective.tasks.reconstruct": 0.1})


def batch(seed: int = 0) -> tuple[DualOut, Target, Hidden]:
    torch.manual_seed(seed)
    net = DualPathNet(base=2, heads=("sdf", "presence", "reconstruct"))
    image = torch.rand(2, 1, 4, 16, 16)
    label = torch.zeros(2, 4, 16, 16, dtype=torch.long)
    for zone in range(1, 5):
        label[:, :, 3 * zone : 3 * zone + 3, 4:12] = zone
    target = Target(sets_of(label), 6 * torch.randn(2, 4, 4, 16, 16))
    blocks = torch.rand(2, 1, 4, 16, 16) < 0.2
    return net(image), target, Hidden(image, blocks)


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    out, target, hidden = batch()
    losses = dual_loss(
        out, target, CONFIG, "stage-2", out, partial=(out, target), hidden=hidden, progress=0.15
    )
    o = CONFIG.objective
    weights = {
        "path_a": 1,
        "path_b": 1,
        "fused": o.fused,
        "sdf": 0.2,
        "presence": 0.1,
        "reconstruct": 0.1,
        "anatomy": 0.05,
        "partial": 0.3,
        "co": 0.5 * math.exp(-5 * 0.25),
    }
    assert set(losses) == {*weights, "total"}
    total = sum(weight * losses[name].item() for name, weight in weights.items())
    assert losses["total"].item() == pytest.approx(total, rel=1e-5)
    supervision = losses["path_a"] + losses["path_b"] + o.fused * losses["fused"]
    assert losses["partial"].item() == pytest.approx(supervision.item(), rel=1e-5)


def test_the_first_stage_knows_no_co_training_and_weights_of_zero_switch_off() -> None:
    out, target, _ = batch()
    assert "co" not in dual_loss(out, target, CONFIG, "stage-1", out)
    bare = {"fused": 0, "tasks.sdf": 0, "tasks.presence": 0, "anatomy.weight": 0, "co.weight": 0}
    config = merge(CONFIG, {f"objective.{key}": value for key, value in bare.items()})
    losses = dual_loss(out, target, config, "stage-2", out)
    assert set(losses) == {"path_a", "path_b", "total"}


@pytest.mark.parametrize("mode", ["product", "mean", "a_then_b"])
@pytest.mark.parametrize("kind", ["dice_ce", "meyer"])
def test_every_loss_reaches_both_paths(mode: str, kind: str) -> None:
    config = merge(CONFIG, {"model.fuse": mode, "objective.kind": kind})
    out, target, hidden = batch()
    found = torch.autograd.grad(
        dual_loss(out, target, config, "stage-2", out, hidden=hidden)["total"], [out.a, out.b]
    )
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found)


def test_one_path_is_supervised_in_all_classes() -> None:
    x, label = logits().float(), labels()
    target = Target(sets_of(label))
    losses = single_loss(x, target, CONFIG, partial=(x, target))
    assert losses["total"].item() == pytest.approx(1.3 * losses["zones"].item(), rel=1e-6)
    weights = torch.tensor([1.0, 1, 1, 2, 2])
    hot = F.one_hot(label, 5).movedim(-1, 1).float()
    expected = F.cross_entropy(x, label, weights) + 1 - dice_by_hand(x.softmax(1), hot)[1:].mean()
    assert losses["zones"].item() == pytest.approx(expected.item(), abs=1e-5)
