"""What all losses share: their common arguments, the reading of input, columns, the reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    check_squares,
    readable,
)
from diptych_contrast.kernel import Backend, Engine, PairMask, check_engine, unit_rows
from diptych_contrast.kernel.call import call

LossResult = Any  # a tensor; with ``return_info=True`` a tensor and a `PairInfo`
TemperatureLike = float | Tensor | Callable[[], Tensor]
Views = Float[Tensor, "n d"] | Float[Tensor, "v n d"] | Sequence[Tensor]
Parity = Literal["official"] | None


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
    """The common arguments of one call, and what every loss does by them.

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

    @property
    def local_engine(self) -> Engine:
        """How sweeps over columns that every process holds by itself are run."""
        return Engine(self.backend, self.tile, unit=self.normalize)

    def embeddings(self, at_least: int = 1, /, **embeddings: Tensor) -> Tensor:
        """Check matrices (n, d) that belong together; stack them in float32 or float64, unit rows.

        ``at_least`` rows are needed, over all processes; names are those of the arguments.
        """
        self.check(at_least, **embeddings)
        prepared = [_wide(value, next(iter(embeddings.values()))) for value in embeddings.values()]
        if self.normalize:
            rows = unit_rows(torch.cat(prepared) if len(prepared) > 1 else prepared[0])
            return rows.view(len(prepared), -1, rows.shape[1])
        for name, value in zip(embeddings, prepared, strict=True):
            check_squares(self.function, name, value)
            if readable(value) and float(value.detach().norm(dim=1).amax()) > 100:
                found = "has rows longer than 100 and normalize is False"
                warn(self.function, name, found, "pass normalize=True, or scale the embeddings")
        return torch.stack(prepared)

    def check(self, at_least: int, /, **embeddings: Tensor) -> None:
        """Refuse matrices that are no embeddings of so many samples, the same ones."""
        check_pair(self.function, **embeddings)
        (first, reference), *_ = embeddings.items()
        if len(reference) < at_least and self.group is None:
            raise self.error(first, "has a single row", f"pass at least {at_least} samples")
        if self.check_finite:
            for name, value in embeddings.items():
                check_finite(self.function, name, value)

    def error(self, argument: str, found: str, fix: str) -> ContrastInputError:
        """The refusal of an argument of this call."""
        return ContrastInputError(self.function, argument, found, fix)

    def views(self, argument: str, views: Views) -> Tensor:
        """Stack views of the same samples, (n, d), (v, n, d) or v times (n, d), to (v, n, d)."""
        return self.embeddings(**self._named(argument, views))

    def scores(self, argument: str, views: Views) -> list[Tensor]:
        """Check views that hold scores, no embeddings, and bring them to float32 or float64."""
        named = self._named(argument, views)
        self.check(1, **named)
        return [_wide(value, next(iter(named.values()))) for value in named.values()]

    def _named(self, argument: str, views: Views) -> dict[str, Tensor]:
        if isinstance(views, Tensor) and views.dim() != 3:
            return {argument: views}
        if len(views) == 0:
            raise self.error(argument, "has no views", "pass at least one")
        return {f"{argument}[{index}]": view for index, view in enumerate(views)}

    def labels(
        self, argument: str, labels: Tensor, reference: Tensor, *, lowest: int | None
    ) -> Tensor:
        """Check one integer a sample, none below the lowest allowed, and give them as int64."""
        check_integers(self.function, argument, labels, len(reference))
        check_device(self.function, argument, labels, "embeddings", reference)
        if lowest is not None and readable(labels) and int(labels.min()) < lowest:
            fix = "number the classes from 0" + (" (-1: unlabelled)" if lowest == -1 else "")
            raise self.error(argument, f"holds {int(labels.min())}", fix)
        return labels.to(torch.int64)

    def scale(self, temperature: TemperatureLike, like: Tensor) -> Tensor:
        """Return ``1/temperature`` as a 0-dim tensor of the dtype and device of another."""
        value = temperature() if callable(temperature) else temperature
        if isinstance(value, Tensor) and value.dim() != 0:
            raise self.error("temperature", f"has shape {tuple(value.shape)}", "pass one number")
        if not isinstance(value, Tensor) or readable(value):
            number = float(value.detach() if isinstance(value, Tensor) else value)
            check_positive(self.function, temperature=number)
            if not 1e-3 <= number <= 10:
                found, fix = "lies outside 0.001 to 10", "check its unit: scores are divided by it"
                warn(self.function, "temperature", found, fix)
        if isinstance(value, Tensor):
            return value.to(like.device, like.dtype).reciprocal()
        return like.new_full((), 1.0 / value)

    def columns(
        self, z: Tensor, sample: Tensor, view: Tensor | None = None, label: Tensor | None = None
    ) -> tuple[Tensor | None, PairMask]:
        """Say which columns the rows meet: themselves (None), those of all processes, or a ring.

        Keys of the rows, unique over all processes, become those of rows and columns.
        """
        if self.group is None:
            return None, PairMask(row_id=sample, row_view=view, row_label=label)
        if self.ring:
            return z, PairMask(sample, sample, view, view, label, label)
        others = (None if key is None else self.of_all(key) for key in (sample, view, label))
        col_id, col_view, col_label = others
        keys = PairMask(sample, col_id, view, col_view, label, col_label)
        return gather_with_grad(z, self.group), keys

    def of_all(self, x: Tensor) -> Tensor:
        """Rows of all processes of a call, detached."""
        return x.detach() if self.group is None else gather_no_grad(x, self.group)

    def sample_ids(self, z: Tensor) -> Tensor:
        """Number the samples of all processes; those of this process are consecutive."""
        start = 0
        if self.group is not None:
            start = sum(gather_sizes(z, self.group)[: world(self.group)[0]])
        return torch.arange(start, start + len(z), device=z.device)

    def reduce(self, rows: Tensor, valid: Tensor | None) -> Tensor:
        """Reduce one loss a row, of any shape; where not valid, rows may hold anything."""
        rows = rows.flatten()
        if valid is not None:
            valid = valid.flatten()
            rows = rows.masked_fill(~valid, 0.0)
            if self.empty == "error" and readable(valid) and not bool(valid.all()):
                none = f"{int((~valid).sum())} of {len(valid)} rows have no positive or no negative"
                fix = "pass other samples together, or empty='skip'"
                raise self.error("empty", f"is 'error' and {none}", fix)
        if self.reduction == "none":
            return rows
        _, size = world(self.group) if self.group is not None else (0, 1)
        if self.reduction == "sum":
            return rows.sum() * size
        if self.group is None and valid is None:
            return rows.mean()
        counts = torch.ones_like(rows) if valid is None or self.empty == "zero" else valid
        count = self.total(counts.sum(dtype=rows.dtype))
        if readable(count) and float(count) == 0:
            found = "have no row with a positive and a negative"
            fix = "the loss is 0: pass samples that share a class or a second view"
            warn(self.function, "embeddings", found, fix)
        return rows.sum() * (size / count.clamp_min(1.0))

    def total(self, x: Tensor) -> Tensor:
        """Sum a tensor over the processes of a call, with gradient."""
        if self.group is None:
            return x
        total: Tensor = call(_AllReduce, x, self.group)
        return total


def read_options(function: str, given: Common, *declined: str, parity: Parity = None) -> Options:
    """Check the common arguments of a loss and refuse those that it cannot honour."""
    if parity is not None:
        check_choice(function, "parity", parity, None, "official")
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
            raise options.error(word, "is given", "leave it out, this loss cannot honour it")
    if options.ring and options.group is None:
        raise options.error("ring", "is True without 'group'", "pass a process group")
    check_engine(function, options.engine)
    return options


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


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
