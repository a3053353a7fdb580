"""One process or many: launching by Lightning Fabric, and the few exchanges that the loop needs.

Modules are not wrapped, because several forwards, several backward passes, frozen modules and
inner gradients are ordinary here and a wrapper silently misses some of them.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Shaped
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch import distributed as torch_distributed

from diptych.config import RunSection
from diptych.errors import TrainingError, UsageError

_BUCKET_BYTES = 25 << 20  # the size that DistributedDataParallel found to be good
_PATIENCE = timedelta(days=1)  # the first process may prepare data while the others wait


def launch(run: RunSection) -> Fabric:
    """Start the processes of a run and set threads, device, precision and determinism.

    With one device on one machine no process group is started. Otherwise Fabric starts the
    other processes with this command line again, or joins those of ``torchrun`` and SLURM.

    Args:
        run: The config's ``run`` section.

    Returns:
        The launched Fabric.

    Raises:
        UsageError: The devices or the precision are not to be had here.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if run.precision == "16-mixed" and not (
        run.device in ("auto", "cuda") and torch.cuda.is_available()
    ):
        raise UsageError(
            "run.precision: '16-mixed' needs a CUDA device and there is none: use bf16-mixed or "
            "32-true"
        )
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    devices, nodes = _processes(run)
    try:
        fabric = Fabric(
            accelerator=run.device,
            devices=devices,
            num_nodes=nodes,
            strategy=DDPStrategy(timeout=_PATIENCE) if devices * nodes > 1 else "auto",
            precision=run.precision,
        )
        fabric.launch()
    except (ValueError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"run.device={run.device}, run.devices={devices}, run.nodes={nodes}, "
            f"run.precision={run.precision} cannot be used here: {error}"
        ) from error
    if devices * nodes > 1:
        atexit.register(_leave)
    if run.threads:
        torch.set_num_threads(run.threads)
    return fabric


def _leave() -> None:
    """End the threads of the process group, which abort a process that ends before them."""
    if torch_distributed.is_initialized():
        torch_distributed.destroy_process_group()


def _processes(run: RunSection) -> tuple[int, int]:
    """Devices a machine and machines; ``torchrun`` has decided already where it was used."""
    if not TorchElasticEnvironment.detect():
        return run.devices, run.nodes
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return local, world // local


def is_first_process() -> bool:
    """Whether this is the process that writes, also before anything is launched."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def group_of(fabric: Fabric) -> Any | None:
    """The process group that losses gather over; None for a single process."""
    return torch_distributed.group.WORLD if fabric.world_size > 1 else None


def any_process(flags: Sequence[bool], fabric: Fabric) -> list[bool]:
    """For each flag, whether it is up on any process."""
    if fabric.world_size == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32, device=fabric.device)
    torch_distributed.all_reduce(raised, op=torch_distributed.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def average_gradients(
    parameters: Sequence[nn.Parameter], present: Sequence[bool], fabric: Fabric
) -> None:
    """Replace gradients by their mean over the processes.

    Args:
        parameters: Parameters in the same order on all processes.
        present: Whether any process has a gradient for it; without one it stays None.
        fabric: The launched processes.

    Raises:
        TrainingError: A gradient is sparse.
    """
    gradients: list[Tensor] = []
    for parameter, somewhere in zip(parameters, present, strict=True):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.is_sparse:
            raise TrainingError(
                "sparse gradients cannot be averaged over processes: build the embedding with "
                "sparse=False, or set run.devices to 1"
            )
        gradients.append(parameter.grad)
    with torch.no_grad():
        pending = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            pending.append((bucket, flat, torch_distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            flat.div_(fabric.world_size)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def broadcast_tensors(tensors: Iterable[Tensor], fabric: Fabric) -> None:
    """Overwrite tensors by those of the first process, as one message of bytes."""
    if fabric.world_size == 1:
        return
    # large elements first: a view of bytes as numbers must start at a multiple of their size
    known = sorted((t for t in tensors if t.numel()), key=lambda t: -t.element_size())
    if not known:
        return
    with torch.no_grad():
        parts = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in known]
        flat = torch.cat(parts)
        torch_distributed.broadcast(flat, src=0)
        if fabric.global_rank == 0:
            return
        for tensor, part in zip(known, torch.split(flat, [p.numel() for p in parts]), strict=True):
            tensor.detach().copy_(part.view(tensor.dtype).view(tensor.shape))


def gather(tensor: Shaped[Tensor, "n ..."], fabric: Fabric) -> Shaped[Tensor, "total ..."]:
    """Rows of all processes in rank order, without gradient.

    Args:
        tensor: This process's rows; their number may differ between processes.
        fabric: The launched processes.

    Returns:
        The rows of all processes; the tensor itself, detached, with a single one.
    """
    own = tensor.detach()
    if fabric.world_size == 1:
        return own
    if own.dtype is torch.bool:  # not every backend can send it
        return gather(own.to(torch.uint8), fabric).to(torch.bool)
    counts = torch.zeros(fabric.world_size, dtype=torch.int64, device=own.device)
    counts[fabric.global_rank] = len(own)
    torch_distributed.all_reduce(counts)
    rows = counts.tolist()
    padded = own.new_zeros((max(rows), *own.shape[1:]))
    padded[: len(own)] = own
    table = [torch.empty_like(padded) for _ in rows]
    torch_distributed.all_gather(table, padded)
    return torch.cat([part[:count] for part, count in zip(table, rows, strict=True)])


def gather_objects(value: Any, fabric: Fabric) -> list[Any]:
    """A small value of every process, in rank order."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch_distributed.all_gather_object(values, value)
    return values


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type together, up to the bucket size."""
    buckets: list[list[Tensor]] = []
    sizes: dict[torch.dtype, int] = {}
    current: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kind = tensor.dtype
        if kind not in current or sizes[kind] >= _BUCKET_BYTES:
            current[kind], sizes[kind] = [], 0
            buckets.append(current[kind])
        current[kind].append(tensor)
        sizes[kind] += tensor.nbytes
    return buckets
