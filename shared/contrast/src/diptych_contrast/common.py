"""What all losses share: their common arguments, the reading of input, columns, the reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as torch_dist
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.dist import gather_no_grad, gather_sizes, gather_with_grad, world
from diptych_contrast.errors import ContrastInputError, warn
from diptych_contrast.inputs import (
    check_choice,
    check_device,
    check_finite,
    check_integers,
    check_pair,
    check_positive,
    readable,
)
from diptych_contrast.kernel import Backend, Engine, PairMask, check_engine, unit_rows
from diptych_contrast.kernel.call import call

LossResult = Any  # a tensor; with ``return_info=True`` a tensor and a `PairInfo`
TemperatureLike = float | Tensor | Callable[[], Tensor]
Views = Float[Tensor, "n d"] | Float[Tensor, "v n d"] | tuple[Tensor, ...]


class Common(TypedDict, total=False):
    """Keyword arguments that every loss takes; the defaults are those of `Options`."""

    reduction: Literal["mean", "sum", "none"]
    empty: Literal["skip", "zero", "error"]
    normalize: bool
    group: torch_dist.ProcessGroup | None
    ring: bool
    backend: Backend
    tile: int | Literal["auto"]
    check_finite: bool
    return_info: bool


@dataclass(frozen=True)
class Options:
    """The common arguments of one call.

    Attributes:
        function: Public name of the loss, for messages.
        reduction: ``mean`` over valid rows, ``sum``, or ``none``: one value a row.
        empty: Rows without a positive or without a negative are left out of the mean (``skip``),
            count as zero (``zero``) or are refused (``error``).
        normalize: Divide embeddings by their length.
        group: Processes that share the batch; each gives the mean over its own rows against the
            columns of all, weighted so that averaging gradients gives that of one process. None:
            this process alone.
        ring: Let column shards travel instead of gathering them.
        backend: ``auto``, ``tiled`` or ``dense``.
        tile: Rows and columns of a tile, or ``auto``.
        check_finite: Refuse values that are not finite; reads the data.
        return_info: Give a pair: the loss and the `PairInfo` of its pairs.
    """

    function: str
    reduction: Literal["mean", "sum", "none"] = "mean"
    empty: Literal["skip", "zero", "error"] = "skip"
    normalize: bool = True
    group: torch_dist.ProcessGroup | None = None
    ring: bool = False
    backend: Backend = "auto"
    tile: int | Literal["auto"] = "auto"
    check_finite: bool = False
    return_info: bool = False

    @property
    def engine(self) -> Engine:
        """How sweeps are run."""
        return Engine(self.backend, self.tile, self.group, self.ring, self.normalize)


def local_engine(options: Options) -> Engine:
    """How sweeps over columns that every process holds by itself are run."""
    return Engine(options.backend, options.tile, unit=options.normalize)


def read_options(function: str, given: Common, *declined: str) -> Options:
    """Check the common arguments of a loss and refuse those that it cannot honour."""
    if not given:
        return Options(function)
    unknown = set(given) - set(Common.__annotations__)
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
    options = Options(function, **given)
    check_choice(function, "reduction", options.reduction, "mean", "sum", "none")
    check_choice(function, "empty", options.empty, "skip", "zero", "error")
    for word in declined:
        if getattr(options, word):
            fix = "leave it out, this loss cannot honour it"
            raise ContrastInputError(function, word, "is given", fix)
    if options.ring and options.group is None:
        fix = "pass a process group"
        raise ContrastInputError(function, "ring", "is True without 'group'", fix)
    check_engine(function, options.engine)
    return options


def read_embeddings(options: Options, at_least: int = 1, /, **embeddings: Tensor) -> Tensor:
    """Check matrices that belong together and bring them to float32 or float64, unit rows.

    Args:
        options: The common arguments.
        at_least: Rows that are needed, over all processes.
        **embeddings: Matrices of shape (n, d) by argument name.
    """
    check_embeddings(options, at_least, **embeddings)
    reference = next(iter(embeddings.values()))
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    prepared = [value.to(dtype) for value in embeddings.values()]
    if options.normalize:
        rows = unit_rows(torch.cat(prepared) if len(prepared) > 1 else prepared[0])
        return rows.view(len(prepared), *reference.shape)
    for name, value in zip(embeddings, prepared, strict=True):
        if readable(value) and float(value.detach().norm(dim=1).amax()) > 100:
            found = "has rows longer than 100 and normalize is False"
            fix = "pass normalize=True, or scale the embeddings"
            warn(options.function, name, found, fix)
    return torch.stack(prepared)


def check_embeddings(options: Options, at_least: int, **embeddings: Tensor) -> None:
    """Refuse matrices that are no embeddings of the same samples, so many over all processes."""
    check_pair(options.function, **embeddings)
    (first, reference), *_ = embeddings.items()
    if len(reference) < at_least and options.group is None:
        found, fix = "has a single row", f"pass at least {at_least} samples"
        raise ContrastInputError(options.function, first, found, fix)
    if options.check_finite:
        for name, value in embeddings.items():
            check_finite(options.function, name, value)


def read_views(options: Options, argument: str, views: Views) -> Tensor:
    """Stack views of the same samples, (n, d), (v, n, d) or v times (n, d), to (v, n, d)."""
    if isinstance(views, Tensor) and views.dim() != 3:
        return read_embeddings(options, **{argument: views})
    if len(views) == 0:
        raise ContrastInputError(options.function, argument, "has no views", "pass at least one")
    named = {f"{argument}[{index}]": view for index, view in enumerate(views)}
    return read_embeddings(options, **named)


def read_labels(
    options: Options, argument: str, labels: Tensor, reference: Tensor, *, lowest: int | None
) -> Tensor:
    """Check one integer a sample, none below the lowest allowed, and give them as int64."""
    name = options.function
    check_integers(name, argument, labels, len(reference))
    check_device(name, argument, labels, "embeddings", reference)
    if lowest is not None and readable(labels) and int(labels.min()) < lowest:
        found = f"holds {int(labels.min())}"
        fix = "number the classes from 0" + (" (-1: unlabelled)" if lowest == -1 else "")
        raise ContrastInputError(name, argument, found, fix)
    return labels.to(torch.int64)


def read_scale(options: Options, temperature: TemperatureLike, like: Tensor) -> Tensor:
    """Return ``1/temperature`` as a 0-dim tensor of the dtype and device of another."""
    value = temperature() if callable(temperature) else temperature
    if isinstance(value, Tensor) and value.dim() != 0:
        found = f"has shape {tuple(value.shape)}"
        raise ContrastInputError(options.function, "temperature", found, "pass one number")
    if not isinstance(value, Tensor) or readable(value):
        number = float(value.detach() if isinstance(value, Tensor) else value)
        check_positive(options.function, temperature=number)
        if not 1e-3 <= number <= 10:
            found, fix = "lies outside 0.001 to 10", "check its unit: scores are divided by it"
            warn(options.function, "temperature", found, fix)
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype).reciprocal()
    return like.new_full((), 1.0 / value)


def meet_columns(
    options: Options,
    z: Float[Tensor, "n d"],
    sample: Tensor,
    view: Tensor | None = None,
    label: Tensor | None = None,
) -> tuple[Tensor | None, PairMask]:
    """Say which columns the rows meet: themselves (None), those of all processes, or a ring.

    Keys of the rows, unique over all processes, become those of rows and columns.
    """
    if options.group is None:
        return None, PairMask(row_id=sample, row_view=view, row_label=label)
    if options.ring:
        return z, PairMask(sample, sample, view, view, label, label)
    others = (None if key is None else of_all(options, key) for key in (sample, view, label))
    col_id, col_view, col_label = others
    keys = PairMask(sample, col_id, view, col_view, label, col_label)
    return gather_with_grad(z, options.group), keys


def of_all(options: Options, x: Tensor) -> Tensor:
    """Rows of all processes of a call, detached."""
    return x.detach() if options.group is None else gather_no_grad(x, options.group)


def sample_ids(options: Options, z: Tensor) -> Tensor:
    """Number the samples of all processes; those of this process are consecutive."""
    start = 0
    if options.group is not None:
        start = sum(gather_sizes(z, options.group)[: world(options.group)[0]])
    return torch.arange(start, start + len(z), device=z.device)


def reduce_rows(options: Options, rows: Float[Tensor, " n"], valid: Tensor | None) -> Tensor:
    """Reduce one loss a row as the options say; where not valid, rows may hold anything."""
    if valid is not None:
        rows = rows.masked_fill(~valid, 0.0)
        if options.empty == "error" and readable(valid) and not bool(valid.all()):
            none = f"{int((~valid).sum())} of {len(valid)} rows have no positive or no negative"
            fix = "pass other samples together, or empty='skip'"
            raise ContrastInputError(options.function, "empty", f"is 'error' and {none}", fix)
    if options.reduction == "none":
        return rows
    _, size = world(options.group) if options.group is not None else (0, 1)
    if options.reduction == "sum":
        return rows.sum() * size
    if options.group is None and valid is None:
        return rows.mean()
    counts = torch.ones_like(rows) if valid is None or options.empty == "zero" else valid
    count = sum_over(options, counts.sum(dtype=rows.dtype))
    if readable(count) and float(count) == 0:
        found = "have no row with a positive and a negative"
        fix = "the loss is 0: pass samples that share a class or a second view"
        warn(options.function, "embeddings", found, fix)
    return rows.sum() * (size / count.clamp_min(1.0))


def sum_over(options: Options, x: Tensor) -> Tensor:
    """Sum a tensor over the processes of a call, with gradient."""
    if options.group is None:
        return x
    total: Tensor = call(_AllReduce, x, options.group)
    return total


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        torch_dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return call(_AllReduce, upstream, ctx.group), None
