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
from diptych_contrast.inputs import check_finite, check_positive, check_rows
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


def read_options(function: str, given: Common) -> Options:
    """Check the common arguments of a call.

    Args:
        function: Public name of the loss.
        given: Its common keyword arguments.

    Returns:
        The arguments with their defaults.

    Raises:
        ContrastInputError: A value that does not exist, or ``ring`` without ``group``.
        TypeError: A name that does not exist, as for any function.
    """
    if not given:
        return Options(function)
    unknown = set(given) - set(Common.__annotations__)
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
    options = Options(function, **given)
    check_choice(function, "reduction", options.reduction, "mean", "sum", "none")
    check_choice(function, "empty", options.empty, "skip", "zero", "error")
    if options.ring and options.group is None:
        raise ContrastInputError(
            function, "ring", "is True without 'group'", "pass a process group"
        )
    check_engine(function, options.engine)
    return options


def check_choice(function: str, argument: str, value: object, *choices: object) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        words = ", ".join(repr(choice) for choice in choices)
        raise ContrastInputError(function, argument, f"is {value!r}", f"pass one of {words}")


def decline(options: Options, *words: str) -> None:
    """Refuse common arguments that a loss cannot honour."""
    for word in words:
        if getattr(options, word):
            fix = "leave it out, this loss cannot honour it"
            raise ContrastInputError(options.function, word, "is given", fix)


def readable(x: Tensor) -> bool:
    """Tell whether looking at values is free: on the CPU, neither compiling nor transformed."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def read_embeddings(options: Options, **embeddings: Tensor) -> Tensor:
    """Check matrices that belong together and bring them to float32 or float64, unit rows.

    Args:
        options: The common arguments.
        **embeddings: Matrices of shape (n, d) by argument name.

    Returns:
        The matrices in the same order, stacked.

    Raises:
        ContrastInputError: Not matrices, integer, unlike shape, dtype or device, not finite.
    """
    (first, reference), *_ = embeddings.items()
    for name, value in embeddings.items():
        check_rows(options.function, name, value)
        if value.shape != reference.shape:
            raise ContrastInputError(
                options.function,
                name,
                f"has shape {tuple(value.shape)}, {first!r} has {tuple(reference.shape)}",
                "pass the same number of rows"
                if value.shape[0] != reference.shape[0]
                else "pass the same number of dimensions",
            )
        check_device(options.function, name, value, first, reference)
        if options.check_finite:
            check_finite(options.function, name, value)
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    prepared = [value.to(dtype) for value in embeddings.values()]
    if options.normalize:
        rows = unit_rows(torch.cat(prepared) if len(prepared) > 1 else prepared[0])
        return rows.view(len(prepared), *reference.shape)
    for name, value in zip(embeddings, prepared, strict=True):
        if readable(value) and float(value.detach().norm(dim=1).amax()) > 100:
            warn(
                options.function,
                name,
                "has rows longer than 100 and normalize is False",
                "pass normalize=True, or scale the embeddings",
            )
    return torch.stack(prepared)


def read_views(options: Options, argument: str, views: Views) -> Tensor:
    """Check views of the same samples and stack them view-major.

    Args:
        options: The common arguments.
        argument: Name of the argument.
        views: One matrix (n, d), a stack (v, n, d), or a tuple of v matrices.

    Returns:
        Shape (v, n, d), float32 or float64.
    """
    if isinstance(views, Tensor) and views.dim() != 3:
        return read_embeddings(options, **{argument: views})
    if len(views) == 0:
        raise ContrastInputError(options.function, argument, "has no views", "pass at least one")
    named = {f"{argument}[{index}]": view for index, view in enumerate(views)}
    return read_embeddings(options, **named)


def check_device(function: str, name: str, value: Tensor, first: str, reference: Tensor) -> None:
    """Refuse tensors on unlike devices."""
    if value.device != reference.device:
        raise ContrastInputError(
            function,
            name,
            f"is on {value.device}, {first!r} on {reference.device}",
            "move both to one device",
        )


def check_several(options: Options, argument: str, rows: Tensor) -> None:
    """Refuse a single row where the negatives are the other rows."""
    if len(rows) < 2 and options.group is None:
        raise ContrastInputError(
            options.function, argument, "has a single row", "pass at least two samples"
        )


def read_labels(
    options: Options, argument: str, labels: Tensor, reference: Tensor, *, lowest: int | None
) -> Tensor:
    """Check one integer a sample.

    Args:
        options: The common arguments.
        argument: Name of the argument.
        labels: Shape (n,).
        reference: Embeddings of the samples, shape (n, d).
        lowest: Smallest value allowed, None for any.

    Returns:
        The labels as int64.
    """
    name = options.function
    if labels.is_floating_point() or labels.dtype in {torch.bool, torch.complex64}:
        raise ContrastInputError(name, argument, f"has dtype {labels.dtype}", "pass integers")
    if labels.shape != reference.shape[:1]:
        raise ContrastInputError(
            name,
            argument,
            f"has shape {tuple(labels.shape)} for {len(reference)} samples",
            "pass one integer for each sample",
        )
    check_device(name, argument, labels, "embeddings", reference)
    if lowest is not None and readable(labels) and int(labels.min()) < lowest:
        raise ContrastInputError(
            name,
            argument,
            f"holds {int(labels.min())}",
            "number the classes from 0" + (" (-1: unlabelled)" if lowest == -1 else ""),
        )
    return labels.to(torch.int64)


def read_scale(options: Options, temperature: TemperatureLike, like: Tensor) -> Tensor:
    """Return ``1/temperature`` as a 0-dim tensor of the dtype and device of another.

    Raises:
        ContrastInputError: Not one positive finite number.
    """
    value = temperature() if callable(temperature) else temperature
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ContrastInputError(
            options.function, "temperature", f"has shape {tuple(value.shape)}", "pass one number"
        )
    if not isinstance(value, Tensor) or readable(value):
        number = float(value.detach() if isinstance(value, Tensor) else value)
        check_positive(options.function, "temperature", number)
        if not 1e-3 <= number <= 10:
            warn(
                options.function,
                "temperature",
                "lies outside 0.001 to 10",
                "check its unit: scores are divided by it",
            )
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype).reciprocal()
    return like.new_full((), 1.0 / value)


@dataclass(frozen=True)
class Keys:
    """Keys of the rows of this process: sample, view, class; None where not used."""

    sample: Tensor
    view: Tensor | None = None
    label: Tensor | None = None


def meet_columns(
    options: Options, z: Float[Tensor, "n d"], keys: Keys
) -> tuple[Tensor | None, PairMask]:
    """Say which columns the rows meet: themselves, those of all processes, or a ring of shards.

    Args:
        options: The common arguments.
        z: Rows of this process, shape (n, d).
        keys: Their keys, unique over all processes.

    Returns:
        Columns, None for a symmetric sweep, and the keys of rows and columns.
    """
    own = (keys.sample, keys.view, keys.label)
    if options.group is None:
        return None, PairMask(row_id=own[0], row_view=own[1], row_label=own[2])
    columns, other = z, own
    if not options.ring:
        columns = gather_with_grad(z, options.group)
        first, *rest = (None if x is None else gather_no_grad(x, options.group) for x in own)
        other = (own[0] if first is None else first, *rest)  # type: ignore[assignment]
    pairs = zip(own, other, strict=True)
    (row_id, col_id), (row_view, col_view), (row_label, col_label) = pairs
    return columns, PairMask(row_id, col_id, row_view, col_view, row_label, col_label)


def sample_ids(options: Options, z: Tensor) -> Tensor:
    """Number the samples of all processes; those of this process are consecutive."""
    start = 0
    if options.group is not None:
        start = sum(gather_sizes(z, options.group)[: world(options.group)[0]])
    return torch.arange(start, start + len(z), device=z.device)


def total_over(options: Options, x: Tensor) -> Tensor:
    """Sum a detached tensor over the processes of a call."""
    if options.group is None:
        return x
    x = x.detach().clone()
    torch_dist.all_reduce(x, group=options.group)
    return x


def reduce_rows(options: Options, rows: Float[Tensor, " n"], valid: Tensor | None) -> Tensor:
    """Reduce one loss a row as the options say.

    Args:
        options: The common arguments.
        rows: Losses, shape (n,); invalid rows may hold anything.
        valid: Rows that count, shape (n,); None where all do.

    Returns:
        Shape (), or (n,) without reduction.
    """
    if valid is not None:
        rows = rows.masked_fill(~valid, 0.0)
        if options.empty == "error" and readable(valid) and not bool(valid.all()):
            raise ContrastInputError(
                options.function,
                "empty",
                f"is 'error' and {int((~valid).sum())} of {len(valid)} rows have no positive "
                f"or no negative",
                "pass other samples together, or empty='skip'",
            )
    if options.reduction == "none":
        return rows
    _, size = world(options.group) if options.group is not None else (0, 1)
    if options.reduction == "sum":
        return rows.sum() * size
    if options.group is None and valid is None:
        return rows.mean()
    counts = torch.ones_like(rows) if valid is None or options.empty == "zero" else valid
    count = total_over(options, counts.sum(dtype=rows.dtype))
    if readable(count) and float(count) == 0:
        warn(
            options.function,
            "embeddings",
            "have no row with a positive and a negative",
            "the loss is 0: pass samples that share a class or a second view",
        )
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
