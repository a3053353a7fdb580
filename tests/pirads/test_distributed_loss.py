"""Two processes have the loss and the gradients of one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diptych.config import merge
from diptych_pirads.config import PiradsConfig
from diptych_pirads.model import DualOut, DualPathNet
from diptych_pirads.objective import Target, dual_loss

SHARES = ([0, 1, 3, 5], [2, 4])  # labelled 0 to 2, partly labelled 3, unlabelled 4 and 5
SMALL = (2, 16, 16)


def crops(out: DualOut, rows: list[int]) -> DualOut:
    return DualOut(*(None if part is None else part[rows] for part in out))


def gradients(items: list[int], config: PiradsConfig, group: object = None) -> dict[str, object]:
    """The loss of some items of one fixed batch, and the gradient of every parameter."""
    torch.manual_seed(0)
    net = DualPathNet(base=1, dropout=0).double()
    x = torch.randn(6, 1, *SMALL, dtype=torch.float64)
    sets = (1 << torch.randint(5, (6, *SMALL))).to(torch.uint8)
    sets[3] = torch.where(sets[3] > 2, 0b11100, sets[3])
    sdf = 8 * torch.randn(6, 4, *SMALL, dtype=torch.float64)
    out = net(x[items])
    places = [[k for k, item in enumerate(items) if low <= item < high] for low, high in
              ((0, 3), (3, 4), (3, 6))]  # fmt: skip
    known, partly, others = places
    labels = sets[items]
    losses = dual_loss(
        crops(out, known),
        Target(labels[known], sdf[items][known]),
        config,
        "stage-2",
        crops(out, others),
        partial=(crops(out, partly), Target(labels[partly])),
        group=group,  # type: ignore[arg-type]
    )
    losses["total"].backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": [p.grad for p in net.parameters()],
    }


CONFIGS = [
    PiradsConfig(),
    merge(PiradsConfig(), {"objective.dice.batch": False, "objective.co.form": "js"}),
    merge(PiradsConfig(), {"objective.kind": "meyer", "objective.co.form": "mse"}),
]


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = [gradients(SHARES[rank], config, dist.group.WORLD) for config in CONFIGS]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for k, config in enumerate(CONFIGS):
        expected = gradients([0, 1, 2, 3, 4, 5], config)
        for found in both:
            for name, loss in expected["losses"].items():
                assert torch.allclose(found[k]["losses"][name], loss, atol=1e-6), name
        for one, a, b in zip(
            expected["gradients"], both[0][k]["gradients"], both[1][k]["gradients"], strict=True
        ):
            assert torch.allclose((a + b) / 2, one, atol=1e-5)
