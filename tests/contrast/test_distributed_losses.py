"""Several processes give the loss and the gradients of one, by gathering and round the ring."""

import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import diptych_contrast as dc

SIZES = {2: (7, 5), 3: (5, 3, 4)}
MODES = ((False, "mean"), (True, "mean"), (False, "sum"))
LABELS = torch.tensor([0, 1, 0, -1, 2, 1, 0, 2, -1, 1, 0, 2])
QUEUE = torch.randn(7, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
MIX = torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SHARE = torch.rand(12, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def losses(x: Tensor, y: Tensor, rows: slice, **common) -> dict[str, Tensor]:
    labels = LABELS[rows]
    soft = torch.nn.functional.one_hot(labels.clamp_min(0), 3).double() + 0.1
    tau = torch.tensor(0.3, dtype=torch.float64)
    ids = torch.arange(12)[rows] // 2
    return {
        "nt_xent": dc.nt_xent(x, y, tau, **common),
        "nt_xent-ids": dc.nt_xent(x, y, tau, ids=ids, labels=labels + 1, **common),
        "sup_con": dc.sup_con((x, y), labels, tau, **common),
        "sup_con-single": dc.sup_con(x, labels, tau, **common),
        "sup_con-in": dc.sup_con((x, y), labels, tau, mode="in", **common),
        "soft_sup_con": dc.soft_sup_con((x, y), soft, tau, **common),
        "info_nce": dc.info_nce(x, y, tau, **common),
        "info_nce-symmetric": dc.info_nce(x, y, tau, symmetric=True, **common),
        "info_nce-queue": dc.info_nce(
            x, y, tau, negatives=("in_batch", "queue"), queue=QUEUE, **common
        ),
        "clip_loss": dc.clip_loss(x, y, tau, **common),
        "siglip": dc.siglip(x, y, 1.0, -2.0, **common),
        "siglip-soft": dc.siglip(x, y, 1.0, -2.0, positives=SHARE[rows], **common),
        "dcl": dc.dcl(x, y, tau, **common),
        "dclw": dc.dclw(x, y, tau, detach_weights=False, **common),
        "hcl": dc.hcl(x, y, tau, **common),
        "debiased": dc.debiased(x, y, tau, **common),
        "n_pairs": dc.n_pairs(x, y, tau, labels=labels + 1, **common),
        "nt_xent_multi": dc.nt_xent_multi((x, y), tau, **common),
        "mv_info_nce": dc.mv_info_nce((x, y, x + 2 * y), tau, **common),
        "mv_dhel": dc.mv_dhel((x, y, x + 2 * y), tau, **common),
        "poly_view": dc.poly_view((x, y, x + 2 * y), tau, **common),
        "average_views": dc.average_views(dc.nt_xent, (x, y), temperature=tau, **common),
    }


def gathered(x: Tensor, y: Tensor, rows: slice, **common) -> dict[str, Tensor]:
    """Losses that have no ring."""
    prototypes = dc.Prototypes(4, 5).double()
    prototypes.weight = torch.nn.Parameter(QUEUE[:5])
    queue = dc.PrototypeQueue(2, 11 * 12, 4, start_epoch=0).double()
    group, kept = common.get("group"), torch.sin(torch.arange(48.0).double()).view(12, 4)[rows]
    while (older := queue.scores(prototypes, 0, group)) is None:
        queue.enqueue((kept, (kept + queue.queues[0].index).cos()), group)
    scores = [prototypes(x), prototypes(y)]
    own, phi = torch.arange(12)[rows] % 5, torch.linspace(0.3, 0.7, 5)
    losses = {
        "swav": dc.swav_loss(scores, **common),
        "swav-queue": dc.swav_loss(scores, queue_scores=older, **common),
        "swav-official": dc.swav_loss(scores, parity="official", **common),
        "proto_nce": dc.proto_nce(x, y, [QUEUE[:5]], [own], [phi], **common),
    }
    if common.get("reduction", "mean") == "mean":
        pair = {"common": (x, y), "salient": (x[:, :2], y[:, :2]), "target": own % 2}
        losses["sep_clr"] = dc.sep_clr(**pair, group=group)[0]
    return losses


def told(x: Tensor, y: Tensor, rows: slice, **common) -> dict[str, dc.PairInfo]:
    """What losses tell of their pairs; every row has as many negatives as any other."""
    labels, ids = torch.arange(12)[rows] % 3, torch.arange(12)[rows] // 2
    common["return_info"] = True
    return {
        "nt_xent": dc.nt_xent(x, y, **common)[1],
        "nt_xent-ids": dc.nt_xent(x, y, ids=ids, **common)[1],
        "nt_xent-both": dc.nt_xent(x, y, ids=ids, labels=ids // 2, **common)[1],
        "dcl": dc.dcl(x, y, **common)[1],
        "sup_con": dc.sup_con((x, y), labels, **common)[1],
        "soft_sup_con": dc.soft_sup_con((x, y), torch.ones(len(x), 2), **common)[1],
        "info_nce": dc.info_nce(x, y, **common)[1],
        "info_nce-symmetric": dc.info_nce(x, y, symmetric=True, **common)[1],
        "clip_loss": dc.clip_loss(x, y, **common)[1],
        "siglip": dc.siglip(x, y, **common)[1],
    }


def network() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(3, 4).double()


def batch(total: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    both = torch.randn(2, total, 3, generator=g, dtype=torch.float64)
    return both[0], both[1]


def work(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    sizes = SIZES[world]
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    x, y = (view[rows] for view in batch(sum(sizes)))
    results = {}
    for ring, reduction in MODES:
        common = {"group": dist.group.WORLD, "ring": ring, "reduction": reduction, "tile": 3}
        encoder = network()
        zx, zy = encoder(x), encoder(y)
        values = losses(zx, zy, rows, **common)
        if not ring:
            values |= gathered(zx, zy, rows, **common)
        for name, value in values.items():
            slopes = torch.autograd.grad(
                value, [zx, zy, *encoder.parameters()], retain_graph=True, materialize_grads=True
            )
            parameters = [slope.clone() for slope in slopes[2:]]
            for slope in (average := value.detach().clone(), *parameters):
                dist.all_reduce(slope)
            results[name, ring, reduction] = (
                average / world,
                [slope / world for slope in slopes[:2]],
                [slope / world for slope in parameters],
            )
    results["told"] = {}
    for ring in (False, True):
        common = {"group": dist.group.WORLD, "ring": ring, "tile": 3}
        every = told(x @ MIX, y @ MIX, rows, **common)
        results["told"] |= {(name, ring): vars(info) for name, info in every.items()}
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distribution")
@pytest.mark.skipif(sys.platform == "win32", reason="run on Linux only so far")
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_equal_one(world, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (world, port, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(world)]
    total = sum(SIZES[world])
    encoder = network()
    zx, zy = (encoder(view) for view in batch(total))
    for ring, reduction in MODES:
        values = losses(zx, zy, slice(0, total), reduction=reduction)
        if not ring:
            values |= gathered(zx, zy, slice(0, total), reduction=reduction)
        for name, value in values.items():
            slopes = torch.autograd.grad(
                value, [zx, zy, *encoder.parameters()], retain_graph=True, materialize_grads=True
            )
            where = f"{name}, ring={ring}, {reduction}"
            parts = [rank[name, ring, reduction] for rank in ranks]
            embedding = [torch.cat([part[1][view] for part in parts]) for view in range(2)]
            for got, want in zip(
                [parts[0][0], *embedding, *parts[0][2]], [value.detach(), *slopes], strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=where)

    check_told([rank["told"] for rank in ranks], [view @ MIX for view in batch(total)])


def check_told(parts: list[dict], views: list[Tensor]) -> None:
    """The rows of all processes together have the statistics of one process."""
    for name, whole in told(*views, slice(0, 12)).items():
        for ring in (False, True):
            infos = [part[name, ring] for part in parts]
            rows = torch.tensor([info["n_rows"] for info in infos])
            assert rows.sum() == whole.n_rows
            for field in ("pos_mean", "neg_mean", "exp_neg_mean", "top1"):
                each = torch.stack([info[field] for info in infos]).double()
                mean = (each * rows).sum() / rows.sum()
                expected = getattr(whole, field).double()
                torch.testing.assert_close(mean, expected, msg=f"{name} {field}")
            assert sum(info["n_positive_pairs"] for info in infos) == whole.n_positive_pairs
            assert max(info["logit_max"] for info in infos) == pytest.approx(float(whole.logit_max))


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distribution")
@pytest.mark.parametrize("ring", [False, True])
def test_a_group_of_one_process_changes_nothing(ring):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        views = [view.requires_grad_() for view in torch.randn(2, 12, 4, dtype=torch.float64)]
        every = slice(0, 12)
        alone = losses(*views, every)
        grouped = losses(*views, every, group=dist.group.WORLD, ring=ring, tile=5)
        for name, value in grouped.items():
            torch.testing.assert_close(value, alone[name], msg=name)
            slopes = torch.autograd.grad(value, views, materialize_grads=True)
            expected = torch.autograd.grad(alone[name], views, materialize_grads=True)
            for got, want in zip(slopes, expected, strict=True):
                torch.testing.assert_close(got, want, msg=name)
    finally:
        dist.destroy_process_group()
