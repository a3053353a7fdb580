"""InfoNCE: a query, its key, and negatives from the batch, a queue or rows of its own."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    TemperatureLike,
    check_choice,
    check_device,
    check_several,
    local_engine,
    read_embeddings,
    read_options,
    read_scale,
    readable,
    reduce_rows,
)
from diptych_contrast.dist import gather_with_grad
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel import PairInfo, PairMask, log_sums, unit_rows
from diptych_contrast.pairwise.clip_loss import both_sums
from diptych_contrast.state import KeyQueue
from diptych_contrast.statistics import (
    Moments,
    moments_between,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)

Source = Literal["in_batch", "queue", "rows"]


def info_nce(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.07,
    *,
    negatives: Source | tuple[Source, ...] = "in_batch",
    queue: KeyQueue | Float[Tensor, "m d"] | None = None,
    row_negatives: Float[Tensor, "n c d"] | None = None,
    symmetric: bool = False,
    **common: Unpack[Common],
) -> LossResult:
    """Noise-contrastive estimation (van den Oord et al., 2018; He et al., 2020, MoCo).

    The mean over queries i of ``log(exp(s_ii / t) + sum_neg exp(s / t)) - s_ii / t``, s the cosine
    similarity of query and key; the negatives of all sources named stand in one denominator.

    Args:
        q: Queries, shape (n, d).
        k: Their keys, shape (n, d); without gradient (momentum keys) the sweep is one-sided.
        temperature: t > 0; number, 0-dim tensor or `Temperature`.
        negatives: ``in_batch`` (the other keys), ``queue``, ``rows``, or a tuple of these.
        queue: `KeyQueue` or keys of shape (m, d); they get no gradient, empty slots are no
            negatives.
        row_negatives: Negatives of each query, shape (n, c, d).
        symmetric: Average with the direction from keys to queries (``in_batch`` alone).
        **common: See `Common`.

    Returns:
        Shape (), or (n,) with ``reduction="none"``; with ``return_info`` also `PairInfo`.

    Raises:
        ContrastInputError: Inputs that do not fit together, or a source without its argument.

    Example:
        >>> q = torch.ones(4, 8)
        >>> round(info_nce(q, q, negatives="queue", queue=torch.ones(6, 8)).exp().item())
        7
    """
    options = read_options("info_nce", common)
    sources = (negatives,) if isinstance(negatives, str) else tuple(negatives)
    _check_sources(sources, queue, row_negatives, symmetric)
    first, second = read_embeddings(options, q=q, k=k).unbind(0)
    scale = read_scale(options, temperature, first)
    positive = (first * second).sum(1) * scale
    parts: list[_Part] = []
    if "in_batch" in sources:
        check_several(options, "q", first)
        parts.append(_in_batch(options, first, second, scale, symmetric))
    if "queue" in sources and queue is not None:
        parts.append(_queue(options, first, queue, scale))
    if "rows" in sources and row_negatives is not None:
        parts.append(_rows(options, first, row_negatives, scale))
    if symmetric:
        losses = parts[0].lse.view(2, -1).mean(0) - positive
        valid = None
    else:
        pieces = [part.lse for part in parts]
        pieces = pieces if "in_batch" in sources else [positive, *pieces]
        total = torch.stack(pieces)
        losses = torch.logsumexp(total, 0) - positive
        valid = None if "in_batch" in sources else (total[1:] > -torch.inf).any(0)
    loss = reduce_rows(options, losses, valid)
    if not options.return_info:
        return loss
    return loss, _info((q, k), positive, parts, valid, scale, sources)


class _Part(NamedTuple):
    """One source of negatives: its sums, largest scores and moments."""

    lse: Tensor
    peak: Tensor
    moments: Moments | None


def _check_sources(
    sources: tuple[str, ...], queue: object, row_negatives: Tensor | None, symmetric: bool
) -> None:
    if not sources:
        raise ContrastInputError("info_nce", "negatives", "is empty", "pass 'in_batch'")
    for source in sources:
        check_choice("info_nce", "negatives", source, *get_args(Source))
    for name, argument, value in (
        ("queue", "queue", queue),
        ("rows", "row_negatives", row_negatives),
    ):
        if (name in sources) != (value is not None):
            raise ContrastInputError(
                "info_nce",
                argument,
                "is None" if value is None else f"is given, 'negatives' is {sources!r}",
                f"pass it together with negatives='{name}'",
            )
    if symmetric and sources != ("in_batch",):
        raise ContrastInputError(
            "info_nce",
            "symmetric",
            f"is True with negatives {sources!r}",
            "pass negatives='in_batch': other negatives have no second direction",
        )


def _in_batch(options: Options, q: Tensor, k: Tensor, scale: Tensor, symmetric: bool) -> _Part:
    info = options.return_info
    if symmetric:
        lse, peak = both_sums(options, q, k, scale)
    else:
        gather = options.group is not None and not options.ring
        columns = gather_with_grad(k, options.group) if gather else k
        sums, top = log_sums(q, columns, scale, ("any",), peak=info, engine=options.engine)
        lse, peak = sums[0], top.flatten()
    moments = moments_between(q, k) - moments_of((q * k).sum(1)) if info else None
    return _Part(lse, peak, moments)


def _queue(options: Options, q: Tensor, queue: KeyQueue | Tensor, scale: Tensor) -> _Part:
    info, keys, mask = options.return_info, None, "any"
    if isinstance(queue, Tensor):
        columns = queue
    elif readable(queue.keys):
        columns = queue.stored()
    else:  # pragma: no cover - traced, or on another device
        # Reading how many slots are filled would stop the device or the compiler.
        columns, mask = queue.keys, "same_label"
        keys = PairMask(
            row_label=torch.zeros(len(q), dtype=torch.int64, device=q.device),
            col_label=(~queue.valid()).long(),
        )
    if columns.dim() != 2 or columns.shape[1] != q.shape[1]:
        raise ContrastInputError(
            "info_nce",
            "queue",
            f"has shape {tuple(columns.shape)}, 'q' has {tuple(q.shape)}",
            "make the queue for the same number of dimensions",
        )
    check_device("info_nce", "queue", columns, "q", q)
    columns = columns.detach().to(q.dtype)
    if options.normalize and not _are_unit(columns):
        columns = unit_rows(columns)
    if not len(columns):
        nothing = q.new_full((len(q),), -torch.inf)
        return _Part(nothing, nothing, moments_of(q[:0]))
    lse, peak = log_sums(
        q, columns, scale, (mask,), keys=keys, peak=info, engine=local_engine(options)
    )
    return _Part(lse[0], peak.flatten(), moments_between(q, columns) if info else None)


def _are_unit(columns: Tensor) -> bool:
    """Spare a large queue the copy where it holds unit rows already."""
    if not readable(columns) or not len(columns):
        return False
    lengths = torch.linalg.vector_norm(columns, dim=1)
    return float((lengths - 1.0).abs_().amax()) <= 4 * torch.finfo(columns.dtype).eps


def _rows(options: Options, q: Tensor, row_negatives: Tensor, scale: Tensor) -> _Part:
    if row_negatives.dim() != 3 or row_negatives.shape[::2] != q.shape:
        raise ContrastInputError(
            "info_nce",
            "row_negatives",
            f"has shape {tuple(row_negatives.shape)}, 'q' has {tuple(q.shape)}",
            "pass shape (rows of q, negatives a row, dimensions of q)",
        )
    check_device("info_nce", "row_negatives", row_negatives, "q", q)
    others = row_negatives.to(q.dtype)
    if options.normalize:
        others = unit_rows(others.flatten(0, 1)).view(others.shape)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.bmm(others, q[:, :, None]).squeeze(2)
    lse = torch.logsumexp(scores * scale, 1)
    if not options.return_info:
        return _Part(lse, lse[:0], None)
    return _Part(lse, (scores.detach() * scale.detach()).amax(1), moments_of(scores))


@torch.no_grad()
def _info(
    embeddings: tuple[Tensor, Tensor],
    positive: Tensor,
    parts: list[_Part],
    valid: Tensor | None,
    scale: Tensor,
    sources: tuple[str, ...],
) -> PairInfo:
    count = len(positive)
    negatives = torch.stack([part.moments for part in parts if part.moments is not None]).sum(0)
    sums = [part.lse.view(-1, count) for part in parts]
    if "in_batch" in sources:
        # In two directions every negative pair stands twice.
        sums[0] = subtract_exp(sums[0], positive) - math.log(len(sums[0]))
    peaks = torch.cat([positive[None], *(part.peak.view(-1, count) for part in parts)]).amax(0)
    return pair_info(
        rows=count,
        valid=valid,
        zero_rows=sum(((x == 0).all(1).sum() for x in embeddings), start=torch.tensor(0)),
        positives=moments_of(positive / scale),
        negatives=negatives,
        negative_lse=torch.cat(sums).logsumexp(0),
        hits=reaches(positive, peaks),
        peak=peaks,
        scale=scale,
    )
