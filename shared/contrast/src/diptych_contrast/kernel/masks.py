"""Which pairs count: keys on rows and columns and an expression, never a stored matrix."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError

ATOMS = ("any", "not_self", "same_id", "same_label", "other_view")
KEYS = ("row_id", "row_view", "row_label", "col_id", "col_view", "col_label")
Tree = str | tuple["Tree", ...]


@dataclass(frozen=True)
class PairMask:
    """Factorised mask over the pairs of rows and columns.

    Keys are integers; two rows of equal id are the same sample, of equal id and view the same
    embedding. Missing ids are the positions; missing views are one view. In symmetric sweeps the
    columns take the keys of the rows. The expression joins the words ``any``, ``not_self``,
    ``same_id``, ``same_label``, ``other_view`` by ``&``, ``|``, ``~`` and brackets.
    """

    row_id: Int[Tensor, " n"] | None = None
    col_id: Int[Tensor, " m"] | None = None
    row_view: Int[Tensor, " n"] | None = None
    col_view: Int[Tensor, " m"] | None = None
    row_label: Int[Tensor, " n"] | None = None
    col_label: Int[Tensor, " m"] | None = None
    expr: str = "not_self"

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # pragma: no cover - the sweep itself reads it again
            return
        parse(self.expr)
        for name, key in zip(KEYS, self.keys(), strict=True):
            if key is not None and (key.dim() != 1 or key.dtype not in _INTEGERS):
                found = f"has shape {tuple(key.shape)} and dtype {key.dtype}"
                fix = "pass one integer for each row or column"
                raise ContrastInputError("PairMask", name, found, fix)

    def keys(self) -> tuple[Tensor | None, ...]:
        """Return the six keys in the order of `KEYS`."""
        return (
            *(self.row_id, self.row_view, self.row_label),
            *(self.col_id, self.col_view, self.col_label),
        )


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@cache
def parse(expression: str) -> Tree:
    """Read a mask expression into a word of `ATOMS` or ``("and" | "or" | "not", part, ...)``."""
    try:
        return _read(ast.parse(expression, mode="eval").body)
    except (SyntaxError, KeyError, TypeError):
        found = f"is {expression!r}"
        fix = f"join the words {', '.join(ATOMS)} by &, |, ~ and brackets"
        raise ContrastInputError("PairMask", "expr", found, fix) from None


def _read(node: ast.AST) -> Tree:
    if isinstance(node, ast.Name) and node.id in ATOMS:
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ("not", _read(node.operand))
    if isinstance(node, ast.BinOp):
        word = {ast.BitAnd: "and", ast.BitOr: "or"}[type(node.op)]
        return (word, _read(node.left), _read(node.right))
    raise TypeError


class _Key:
    """One key of rows and columns with its range in every tile, for tiles that need no mask."""

    def __init__(self, rows: Tensor, cols: Tensor, tile: int) -> None:
        self.rows, self.cols, self.tile = rows, cols, tile
        # A single tile gains nothing from ranges, and reading them would stop a GPU.
        ranged = rows.device.type == "cpu" and max(len(rows), len(cols)) > tile
        self.ranges = (_ranges(rows, tile), _ranges(cols, tile)) if ranged else None

    def equal(self, rows: slice, cols: slice) -> bool | Tensor:
        if self.ranges is not None:
            low, high = self.ranges[0][rows.start // self.tile]
            least, most = self.ranges[1][cols.start // self.tile]
            if low > most or least > high:
                return False
            if low == high == least == most:
                return True
        return self.rows[rows, None] == self.cols[None, cols]


def _ranges(key: Tensor, tile: int) -> list[tuple[int, int]]:
    return [(int(part.min()), int(part.max())) for part in torch.split(key, tile)]


class Masks:
    """Masks of one sweep, evaluated tile by tile.

    Args:
        keys: The six keys in the order of `KEYS`.
    """

    def __init__(
        self,
        expressions: str,
        keys: Sequence[Tensor | None],
        shape: tuple[int, int],
        tile: int,
        device: torch.device,
    ) -> None:
        self.trees = [parse(text) for text in expressions.split(",")]
        self._positions = all(key is None for key in (*keys[:2], *keys[3:5]))
        self._keys: dict[str, _Key] = {}
        for name, row, col in zip(("id", "view", "label"), keys[:3], keys[3:], strict=True):
            if row is not None and col is not None:
                self._keys[name] = _Key(row, col, tile)
        words = set() if self._simple() else set(re.findall(r"\w+", expressions))
        if keys[0] is None and keys[3] is None and words & {"same_id", "not_self"}:
            row, col = (torch.arange(length, device=device) for length in shape)
            self._keys["id"] = _Key(row, col, tile)
        if "same_label" in words and "label" not in self._keys:
            fix = "give every row a label"
            raise ContrastInputError("pair kernel", "keys", "has no labels", fix)

    def _simple(self) -> bool:
        return self._positions and all(tree in {"any", "not_self"} for tree in self.trees)

    def hide(self, tile: Tensor, index: int, rows: slice, cols: slice, value: float) -> Tensor:
        """Write ``value`` in place over the pairs of a tile that mask ``index`` leaves out."""
        if self._positions and self.trees[index] == "not_self":
            if rows.start < cols.stop and cols.start < rows.stop:
                tile.diagonal(rows.start - cols.start).fill_(value)
            return tile
        mask = self._evaluate(self.trees[index], rows, cols)
        if mask is True:
            return tile
        return tile.fill_(value) if mask is False else tile.masked_fill_(~mask, value)

    def _evaluate(self, tree: Tree, rows: slice, cols: slice) -> bool | Tensor:
        if isinstance(tree, str):
            return self._atom(tree, rows, cols)
        parts = [self._evaluate(part, rows, cols) for part in tree[1:]]
        if tree[0] == "not":
            return _invert(parts[0])
        decisive = tree[0] == "or"
        if any(part is decisive for part in parts):
            return decisive
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if len(tensors) == 2:
            return tensors[0] | tensors[1] if decisive else tensors[0] & tensors[1]
        return tensors[0] if tensors else not decisive

    def _atom(self, word: str, rows: slice, cols: slice) -> bool | Tensor:
        if word == "any":
            return True
        if word == "not_self":
            return _invert(self._evaluate(("and", "same_id", "same_view"), rows, cols))
        if word in {"same_view", "other_view"}:
            same = self._keys["view"].equal(rows, cols) if "view" in self._keys else True
            return same if word == "same_view" else _invert(same)
        return self._keys[word.removeprefix("same_")].equal(rows, cols)


def _invert(value: bool | Tensor) -> bool | Tensor:
    return ~value if isinstance(value, Tensor) else not value
