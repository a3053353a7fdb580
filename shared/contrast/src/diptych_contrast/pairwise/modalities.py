"""Queries against keys: InfoNCE with all its sources of negatives, CLIP, SigLIP."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Unpack, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diptych_contrast.common import Common, LossResult, Options, TemperatureLike, read_options
from diptych_contrast.dist import gather_with_grad
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice, check_device, check_shape, readable
from diptych_contrast.kernel import PairMask, log_sums, pair_sum, products, unit_rows
from diptych_contrast.kernel.ring import ring_sum
from diptych_contrast.state import KeyQueue
from diptych_contrast.statistics import (
    Moments,
    PairInfo,
    moments_between,
    moments_of,
    pair_info,
    reaches,
    subtract_exp,
)

LOG_10 = math.log(10.0)
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

    ``log(exp(s_ii / t) + sum_neg exp(s / t)) - s_ii / t`` for a query i and its key; the negatives
    of all sources named stand in one denominator. Keys without gradient (momentum keys) make the
    sweep one-sided.

    Args:
        negatives: ``in_batch`` (the other keys), ``queue``, ``rows``, or a tuple of these.
        queue: `KeyQueue` or keys; they get no gradient, empty slots are no negatives.
        row_negatives: Negatives of each query.
        symmetric: Average with the direction from keys to queries (``in_batch`` alone).

    Example:
        >>> q = torch.ones(4, 8)
        >>> round(info_nce(q, q, negatives="queue", queue=torch.ones(6, 8)).exp().item())
        7
    """
    options = read_options("info_nce", common)
    sources = (negatives,) if isinstance(negatives, str) else tuple(negatives)
    _check_sources(sources, queue, row_negatives, symmetric)
    first, second = options.embeddings(1 + ("in_batch" in sources), q=q, k=k).unbind(0)
    scale = options.scale(temperature, first)
    positive = (first * second).sum(1) * scale
    parts: list[_Part] = []
    if "in_batch" in sources:
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
        valid = None if "in_batch" in sources else (total[1:] != -torch.inf).any(0)
    loss = options.reduce(losses, valid)
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
            found = "is None" if value is None else f"is given, 'negatives' is {sources!r}"
            fix = f"pass it together with negatives='{name}'"
            raise ContrastInputError("info_nce", argument, found, fix)
    if symmetric and sources != ("in_batch",):
        found = f"is True with negatives {sources!r}"
        fix = "pass negatives='in_batch': other negatives have no second direction"
        raise ContrastInputError("info_nce", "symmetric", found, fix)


def _in_batch(options: Options, q: Tensor, k: Tensor, scale: Tensor, symmetric: bool) -> _Part:
    info = options.return_info
    if symmetric:
        lse, peak = _both_sums(options, q, k, scale)
        return _Part(lse, peak, _cross_moments(options, q, k) if info else None)
    gather = options.group is not None and not options.ring
    columns = gather_with_grad(k, options.group) if gather else k
    sums, top = log_sums(q, columns, scale, ("any",), peak=info, engine=options.engine)
    moments = moments_between(q, options.of_all(k)) - moments_of((q * k).sum(1)) if info else None
    return _Part(sums[0], top.flatten(), moments)


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
    if len(columns):
        check_shape("info_nce", "queue", columns, (-1, q.shape[1]))
    check_device("info_nce", "queue", columns, "q", q)
    columns = columns.detach().to(q.dtype)
    if options.normalize and not _are_unit(columns):
        columns = unit_rows(columns)
    if not len(columns):
        nothing = q.new_full((len(q),), -torch.inf)
        return _Part(nothing, nothing, moments_of(q[:0]))
    lse, peak = log_sums(
        q, columns, scale, (mask,), keys=keys, peak=info, engine=options.local_engine
    )
    return _Part(lse[0], peak.flatten(), moments_between(q, columns) if info else None)


def _are_unit(columns: Tensor) -> bool:
    """Spare a large queue the copy where it holds unit rows already."""
    if not readable(columns) or not len(columns):
        return False
    lengths = torch.linalg.vector_norm(columns, dim=1)
    return float((lengths - 1.0).abs_().amax()) <= 4 * torch.finfo(columns.dtype).eps


def _rows(options: Options, q: Tensor, row_negatives: Tensor, scale: Tensor) -> _Part:
    check_shape("info_nce", "row_negatives", row_negatives, (len(q), -1, q.shape[1]))
    check_device("info_nce", "row_negatives", row_negatives, "q", q)
    others = row_negatives.to(q.dtype)
    if options.normalize:
        others = unit_rows(others.flatten(0, 1)).view(others.shape)
    scores = products(others, q[:, :, None]).squeeze(2)
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
        sums[0] = subtract_exp(sums[0], positive)
    peaks = torch.cat([positive[None], *(part.peak.view(-1, count) for part in parts)]).amax(0)
    return pair_info(
        embeddings=embeddings,
        valid=valid,
        positives=moments_of(positive / scale),
        negatives=negatives,
        negative_lse=torch.cat(sums).logsumexp(0),
        hits=reaches(positive, peaks),
        peak=peaks,
        scale=scale,
    )


def clip_loss(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    temperature: TemperatureLike = 0.07,
    **common: Unpack[Common],
) -> LossResult:
    """Symmetric cross-entropy between two modalities (Radford et al., 2021, CLIP).

    ``(log sum_j exp(s_ij / t) + log sum_j exp(s_ji / t)) / 2 - s_ii / t`` for a pair i, by one
    sweep. The paper learns the temperature: `Temperature(0.07, learnable=True)`.

    Example:
        >>> round(clip_loss(torch.ones(4, 8), torch.ones(4, 8)).exp().item())
        4
    """
    options = read_options("clip_loss", common)
    first, second = options.embeddings(2, x=x, y=y).unbind(0)
    scale = options.scale(temperature, first)
    score = (first * second).sum(1)
    positive = score * scale
    lse, peak = _both_sums(options, first, second, scale)
    loss = options.reduce(lse.view(2, -1).mean(0) - positive, None)
    if not options.return_info:
        return loss
    doubled = positive.detach().repeat(2)
    info = pair_info(
        embeddings=(x, y),
        valid=None,
        positives=moments_of(score),
        negatives=_cross_moments(options, first, second),
        negative_lse=subtract_exp(lse, doubled),
        hits=reaches(doubled, peak).view(2, -1).all(0),
        peak=peak,
        scale=scale,
    )
    return loss, info


def _both_sums(options: Options, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of rows, then of columns, shape (2n,), and the largest scores alike."""
    peak = options.return_info
    if options.group is None:
        lse, top = log_sums(x, y, scale, ("any",), both=True, peak=peak, engine=options.engine)
        return lse.flatten(), top.flatten()
    sides = []
    for rows, others in ((x, y), (y, x)):
        columns = others if options.ring else gather_with_grad(others, options.group)
        sides.append(log_sums(rows, columns, scale, ("any",), peak=peak, engine=options.engine))
    (lse, top), (other, other_top) = sides
    return torch.cat([lse[0], other[0]]), torch.cat([top.flatten(), other_top.flatten()])


@torch.no_grad()
def _cross_moments(options: Options, x: Tensor, y: Tensor) -> Moments:
    """Moments of the negatives of rows and of columns, each against those of all processes."""
    rows, columns = moments_between(x, options.of_all(y)), moments_between(y, options.of_all(x))
    return rows + columns - 2 * moments_of((x * y).sum(1))


def siglip(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    log_scale: float | Tensor = LOG_10,
    bias: float | Tensor = -10.0,
    *,
    positives: Shaped[Tensor, "n m"] | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Pairwise sigmoid loss (Zhai et al., 2023, SigLIP).

    ``-sum_j log sigmoid(y_ij (exp(log_scale) s_ij + bias))`` for a row i, y = 1 on positives and
    -1 elsewhere: the sum over all pairs is divided by n, not by n^2.

    Args:
        log_scale: Natural logarithm of the scale, a number or a 0-dim parameter; ``bias`` too.
        positives: Probability that a pair is a positive, in [0, 1] or bool, over the columns of all
            processes; None: pairs of equal position.

    Example:
        >>> x = torch.eye(2)
        >>> round(siglip(x, x, 0.0, 0.0).item(), 4)
        1.0064
    """
    options = read_options("siglip", common)
    first, second = options.embeddings(x=x, y=y).unbind(0)
    scale = torch.as_tensor(log_scale, dtype=first.dtype, device=first.device).exp()
    offset = torch.as_tensor(bias, dtype=first.dtype, device=first.device)
    # log sigmoid(-S) = -softplus(S) and log sigmoid(S) = S - softplus(S): positives are linear.
    rows = torch.cat([first * scale, offset.expand(len(first), 1)], 1)
    columns = torch.cat([second, torch.ones_like(second[:, :1])], 1)
    losses = _softplus_sums(options, rows, columns)
    losses = losses - _positive_scores(options, rows, columns, positives)
    loss = options.reduce(losses, None)
    if not options.return_info:
        return loss
    with torch.no_grad():
        diagonal, every = (first * second).sum(1), options.of_all(second)
        engine = options.local_engine
        lse, peak = log_sums(first, every, scale, ("any",), peak=True, engine=engine)
    own = moments_of(diagonal)
    info = pair_info(
        embeddings=(x, y),
        valid=None,
        positives=own,
        negatives=moments_between(first, every) - own,
        negative_lse=subtract_exp(lse[0], diagonal * scale),
        hits=reaches(diagonal * scale, peak[0]),
        peak=peak[0],
        scale=scale,
    )
    return loss, info


def _softplus_sums(options: Options, rows: Tensor, columns: Tensor) -> Tensor:
    if options.backend == "dense" and options.group is None:
        return torch.nn.functional.softplus(products(rows, columns.t()), threshold=40).sum(1)
    if options.ring:
        return ring_sum(rows, columns, "softplus", options.tile, options.group)
    if options.group is not None:
        columns = gather_with_grad(columns, options.group)
    return pair_sum(rows, columns, "softplus", PairMask(expr="any"), tile=options.tile)


def _positive_scores(
    options: Options, rows: Tensor, columns: Tensor, positives: Tensor | None
) -> Tensor:
    if positives is None:
        return (rows * columns).sum(1)
    if options.group is not None:
        columns = gather_with_grad(columns, options.group)
    if positives.shape != (len(rows), len(columns)):
        found = f"has shape {tuple(positives.shape)}"
        fix = f"pass one value for each pair, shape ({len(rows)}, {len(columns)})"
        raise ContrastInputError("siglip", "positives", found, fix)
    return (rows * products(positives.to(rows.dtype), columns)).sum(1)
