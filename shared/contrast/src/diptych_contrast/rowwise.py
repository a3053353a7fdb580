"""Losses that need whole rows of pairs at once: block by block, in the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych_contrast.common import Common, Options, read_options
from diptych_contrast.errors import ContrastInputError

BLOCK_PAIRS = 2**19


def read_local_options(function: str, given: Common) -> Options:
    """Check the common arguments of a loss of one process that tells no `PairInfo`.

    Args:
        function: Public name of the loss.
        given: Its common keyword arguments.

    Returns:
        The arguments with their defaults.

    Raises:
        ContrastInputError: A value that does not exist, or that this loss cannot honour.
    """
    options = read_options(function, given)
    refuse(
        function,
        (
            "group",
            options.group is not None,
            "is a process group, and this loss sees one process alone",
            "gather the embeddings with gather_with_grad and leave group out",
        ),
        ("return_info", options.return_info, "is True, and this loss tells none", "leave it out"),
    )
    return options


def refuse(function: str, *findings: tuple[str, bool, str, str]) -> None:
    """Raise for the first finding ``(argument, whether it holds, found, fix)`` that holds."""
    for argument, holds, found, fix in findings:
        if holds:
            raise ContrastInputError(function, argument, found, fix)


def by_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], pairs: int, options: Options
) -> Tensor:
    """Apply a function of rows to blocks of them; its pairs are never stored beyond a block.

    The backward pass computes every block again; differentiable as often as the function is.

    Args:
        function: Gives one result a row; columns and parameters come in by closure.
        rows: Tensors of n rows each, its arguments.
        pairs: Values that the function holds for one row.
        options: ``tile`` sets the rows of a block; ``backend="dense"`` takes one block.

    Returns:
        The results of all rows, shape (n, ...).
    """
    count = len(rows[0])
    size = max(1, BLOCK_PAIRS // pairs) if options.tile == "auto" else options.tile
    with torch.autocast(rows[0].device.type, enabled=False):
        if size >= count or options.backend == "dense":
            return function(*rows)
        blocks = zip(*(torch.split(part, size) for part in rows), strict=True)
        return torch.cat(
            [
                checkpoint(
                    function,
                    *block,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    determinism_check="none",
                )
                for block in blocks
            ]
        )
