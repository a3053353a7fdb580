"""Gradient cache: the loss of a large batch in the memory of a small one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_least


def grad_cache(
    encoder: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int,
    rng: torch.Generator | None = None,
    allow_batchnorm: bool = False,
) -> Tensor:
    """Backward pass of a loss over a batch whose graph does not fit into memory.

    Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
    The encoder runs twice over each chunk: first without graph, then, once the loss has said what
    it wants of every embedding, with graph and the random state of the first time, so that dropout
    falls on the same units. Gradients add up in ``.grad``, those of a learned temperature too.

    Args:
        encoder: From a chunk of inputs to embeddings (n, d).
        inputs: One batch, or one a view; the first dimension counts samples.
        loss_fn: From the embeddings of all views to a loss; multiply by an AMP scale in here.
        chunk_size: Samples that the encoder sees at a time.
        rng: A generator that the encoder draws from beside the global ones.
        allow_batchnorm: Go on although batch statistics are then those of chunks.

    Example:
        >>> net, x = nn.Linear(4, 2), torch.randn(6, 4)
        >>> grad_cache(net, (x, x + 0.1), lambda a, b: (a - b).square().mean(), chunk_size=2).ndim
        0
    """
    views = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    _check(encoder, views, chunk_size, allow_batchnorm)
    chunks = [chunk for view in views for chunk in torch.split(view, chunk_size)]
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(chunk.device, rng))
            parts.append(encoder(chunk))
    per_view = len(chunks) // len(views)
    embeddings = [
        torch.cat(parts[start : start + per_view]).requires_grad_()
        for start in range(0, len(parts), per_view)
    ]
    del parts
    loss = loss_fn(*embeddings)
    loss.backward()  # type: ignore[no-untyped-call]
    wanted = [z.new_zeros(z.shape) if z.grad is None else z.grad for z in embeddings]
    after = _random_state(chunks[0].device, rng)
    upstream = [part for gradient in wanted for part in torch.split(gradient, chunk_size)]
    for number, (chunk, state, gradient) in enumerate(zip(chunks, states, upstream, strict=True)):
        _set_random_state(state, chunk.device, rng)
        last = number == len(chunks) - 1
        # data-parallel gradients travel once, with the last chunk
        with nullcontext() if last else getattr(encoder, "no_sync", nullcontext)():
            encoder(chunk).backward(gradient)
    _set_random_state(after, chunks[0].device, rng)
    return loss.detach()


RandomState = tuple[Tensor, Tensor | None, Tensor | None]


def _random_state(device: torch.device, rng: torch.Generator | None) -> RandomState:
    on_device = None
    if device.type == "cuda":  # pragma: no cover - CUDA only
        on_device = torch.cuda.get_rng_state(device)
    return torch.get_rng_state(), on_device, None if rng is None else rng.get_state()


def _set_random_state(
    state: RandomState, device: torch.device, rng: torch.Generator | None
) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:  # pragma: no cover - CUDA only
        torch.cuda.set_rng_state(state[1], device)
    if rng is not None and state[2] is not None:
        rng.set_state(state[2])


def _check(
    encoder: nn.Module, views: Sequence[Tensor], chunk_size: int, allow_batchnorm: bool
) -> None:
    name = "grad_cache"
    check_least(name, 1, chunk_size=chunk_size)
    sizes = {len(view) for view in views}
    if len(sizes) != 1 or 0 in sizes:
        found = f"has views of {sorted(sizes)} samples"
        raise ContrastInputError(name, "inputs", found, "pass views of the same samples")
    coupled = any(isinstance(m, _BatchNorm) and m.training for m in encoder.modules())
    if coupled and not allow_batchnorm:
        found = "has batch norm in training mode, whose statistics would be those of chunks"
        fix = "use layer or group norm, or pass allow_batchnorm=True"
        raise ContrastInputError(name, "encoder", found, fix)
