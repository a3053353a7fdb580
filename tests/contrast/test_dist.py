"""Gathering over processes; run as a script, this file is one of the processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from torch.nn import functional as F

from diptych_contrast.dist import gather_no_grad, gather_sizes, gather_with_grad, world
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.state import KeyQueue

UNEVEN = {2: [3, 6], 3: [4, 1, 5]}
EVEN = {2: [4, 4], 3: [2, 2, 2]}


def problem(rows):
    generator = torch.Generator().manual_seed(rows)
    draw = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, 5), (rows, 5), (5, 3), (5, 3))
    ]
    return draw[0], draw[1], draw[2].requires_grad_(), draw[3]


def info_nce_rows(q, k, first):
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2
    return F.cross_entropy(logits, torch.arange(first, first + len(q)))


def gradients(loss, weight, direction, embeddings):
    """Parameter and embedding gradient, and the Hessian times a direction."""
    first, embedded = torch.autograd.grad(loss, [weight, embeddings], create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), weight)
    return first.detach(), second, embedded.detach()


def check_gradients_equal_one_process(sizes, group):
    rank, processes = world(group)
    total, first = sum(sizes), sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    x, y, weight, direction = problem(total)
    q, k = x @ weight, y @ weight
    whole = gradients(info_nce_rows(q, k, 0), weight, direction, k)

    k_own = y[own] @ weight
    columns = gather_with_grad(k_own, group)
    torch.testing.assert_close(columns, k)
    loss = info_nce_rows(x[own] @ weight, columns, first) * sizes[rank] * processes / total
    shared = gradients(loss, weight, direction, k_own)
    for mine, theirs in zip(shared[:2], whole[:2], strict=True):
        averaged = mine.clone()
        torch_dist.all_reduce(averaged, group=group)
        torch.testing.assert_close(averaged / processes, theirs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(shared[2] / processes, whole[2][own], rtol=1e-11, atol=1e-12)


def check_every_dtype_arrives_in_rank_order(sizes, group):
    rank, _ = world(group)
    total, first = sum(sizes), sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    assert gather_sizes(torch.zeros(sizes[rank], 2, 3), group) == sizes
    for whole in (
        torch.arange(total),
        torch.arange(total) % 2 == 0,
        torch.rand(total, 2, 2).half(),
    ):
        torch_dist.broadcast(whole, torch_dist.get_global_rank(group, 0), group=group)
        gathered = gather_no_grad(whole[own], group)
        assert gathered.dtype == whole.dtype
        assert torch.equal(gathered, whole)


def check_a_queue_gathers_in_rank_order(sizes, group):
    rank, _ = world(group)
    total, first = sum(sizes), sum(sizes[:rank])
    keys = torch.arange(total * 2.0).view(total, 2)
    own = slice(first, first + sizes[rank])
    queue = KeyQueue(total + 1, 2, labels=True, steps=True)
    queue.enqueue(keys[own], labels=torch.arange(total)[own], step=7, gather=True, group=group)
    assert torch.equal(queue.stored(), keys)
    assert queue.labels.tolist() == [*range(total), -1]
    assert queue.steps.tolist() == [7] * total + [-1]
    with pytest.raises(ContrastInputError, match=f"has {total} rows, the queue has {total - 1}"):
        KeyQueue(total - 1, 2).enqueue(keys[own], gather=True, group=group)


def check_unlike_dimensions_are_refused_on_all_processes(group):
    rank, _ = world(group)
    with pytest.raises(ContrastInputError, match="on different processes"):
        gather_with_grad(torch.zeros(2, 3 + (rank == 0)), group)


def process(rank, store):
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", store=torch_dist.FileStore(store, 3), rank=rank, world_size=3
    )
    assert world() == (rank, 3)
    pair = torch_dist.new_group([0, 1])
    groups = {3: torch_dist.group.WORLD}
    if rank < 2:
        groups = {2: pair} | groups
    for processes, group in groups.items():
        for sizes in (EVEN[processes], UNEVEN[processes]):
            check_gradients_equal_one_process(sizes, group)
            check_every_dtype_arrives_in_rank_order(sizes, group)
            check_a_queue_gathers_in_rank_order(sizes, group)
        check_unlike_dimensions_are_refused_on_all_processes(group)
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def test_two_and_three_processes_with_uneven_batches_equal_one_process(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        errors = [each.communicate(timeout=300)[1] for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert [each.returncode for each in processes] == [0, 0, 0], "\n".join(errors)


def test_without_distribution_gathering_gives_the_rows_themselves():
    x = torch.randn(3, 2, requires_grad=True)
    assert world() == (0, 1)
    assert gather_sizes(x) == [3]
    assert gather_with_grad(x) is x
    assert not gather_no_grad(x).requires_grad
    assert torch.equal(gather_no_grad(x), x)


def test_a_scalar_cannot_be_gathered():
    with pytest.raises(ContrastInputError, match="'x' has no dimension"):
        gather_sizes(torch.tensor(1.0))


if __name__ == "__main__":
    process(int(sys.argv[1]), str(Path(sys.argv[2])))
