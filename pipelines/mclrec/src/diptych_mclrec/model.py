"""The sequence encoder (SASRec as in RecBole) and the model augmenters of MCLRec.

Kang & McAuley, "Self-attentive sequential recommendation", ICDM 2018; Qin et al., "Meta-optimized
contrastive learning for sequential recommendation", SIGIR 2023. A step holds one item or a basket
of items; id 0 means "no item". Histories stand on the left of their row, oldest first, so that a
step's position does not depend on what follows.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Norm = Literal["post", "pre"]
Positions = Literal["last", "all"]
INITIAL_STD = 0.02
NORM_EPS = 1e-12


class Attention(nn.Module):
    """Multi-head self-attention of every step to itself and to what came before.

    Args:
        dim: Width H.
        heads: Number of heads; divides H.
        dropout: Probability of dropping an output feature.
        attn_dropout: Probability of dropping an attention weight.
    """

    def __init__(self, dim: int, heads: int, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.heads, self.attn_dropout = heads, attn_dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B L H"], allowed: Bool[Tensor, "B 1 L L"] | None
    ) -> Float[Tensor, "B L H"]:
        """Attend; ``allowed`` None stands for the plain causal mask."""
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=allowed is None,
        )
        attended: Tensor = self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return attended


class Block(nn.Module):
    """One Transformer layer, normalised after (original) or before its two parts.

    Args:
        dim: Width H.
        heads: Attention heads.
        inner: Width of the feed-forward part.
        dropout: Probability of dropping a feature.
        attn_dropout: Probability of dropping an attention weight.
        norm: "post" | "pre".
    """

    def __init__(
        self, dim: int, heads: int, inner: int, dropout: float, attn_dropout: float, norm: Norm
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = Attention(dim, heads, dropout, attn_dropout)
        self.attention_norm = nn.LayerNorm(dim, NORM_EPS)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim), nn.Dropout(dropout)
        )
        self.feed_forward_norm = nn.LayerNorm(dim, NORM_EPS)

    def forward(
        self, x: Float[Tensor, "B L H"], allowed: Bool[Tensor, "B 1 L L"] | None
    ) -> Float[Tensor, "B L H"]:
        """The layer's output."""
        if self.pre:
            x = x + self.attention(self.attention_norm(x), allowed)
            x = x + self.feed_forward(self.feed_forward_norm(x))
        else:
            x = self.attention_norm(x + self.attention(x, allowed))
            x = self.feed_forward_norm(x + self.feed_forward(x))
        return x


class SequenceEncoder(nn.Module):
    """Histories to vectors whose products with the item vectors rank the next item.

    Args:
        n_items: Items I, ids 1..I.
        dim: Width H.
        layers: Transformer layers.
        heads: Attention heads; divides H.
        inner: Width of the feed-forward part.
        max_len: Most steps of a history.
        dropout: Probability of dropping a feature, in [0, 1).
        attn_dropout: Probability of dropping an attention weight, in [0, 1).
        norm: "post" as in the original; "pre" normalises before each part and once at the end.
        tied: Whether the items are scored by the vectors they are read with; False gives them a
            second table.
        mask_row: Keep the unused last row of the official item table.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.

    Example:
        >>> net = SequenceEncoder(9)
        >>> h = net(torch.tensor([[3, 1, 0], [2, 5, 4]]), torch.tensor([2, 3]))
        >>> net.scores(h).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        n_items: int,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        inner: int = 256,
        max_len: int = 50,
        dropout: float = 0.5,
        attn_dropout: float = 0.5,
        norm: Norm = "post",
        tied: bool = True,
        mask_row: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"model.heads is {heads}: choose a divisor of model.dim {dim}")
        self.n_items, self.max_len = n_items, max_len
        self.item_embedding = nn.Embedding(n_items + 1 + mask_row, dim)
        self.position_embedding = nn.Embedding(max_len, dim)
        self.output_embedding = None if tied else nn.Embedding(n_items + 1, dim)
        post = norm == "post"
        self.input_norm = nn.LayerNorm(dim, NORM_EPS) if post else nn.Identity()
        self.output_norm = nn.Identity() if post else nn.LayerNorm(dim, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, inner, dropout, attn_dropout, norm) for _ in range(layers)
        )
        self.apply(_initialise)

    def forward(
        self,
        items: Int[Tensor, "B L"] | Int[Tensor, "B L M"],
        lengths: Int[Tensor, " B"],
        *,
        positions: Positions = "last",
        hidden: bool | None = None,
    ) -> Float[Tensor, "B H"] | Float[Tensor, "B L H"]:
        """Encode histories.

        Args:
            items: Ids 0..I, one item a step, or baskets of at most M items a step; 0 is no item.
            lengths: Steps of each history, 1..L; what stands behind them is not read.
            positions: "last": the vector of each history's last step; "all": of every step (those
                behind a history's end mean nothing).
            hidden: Whether steps inside a history may be 0, as masked views have them; None looks.

        Returns:
            Vectors, not normalised; see :meth:`scores`.

        Raises:
            ValueError: A row is longer than ``max_len``.
        """
        n_steps = items.shape[1]
        if n_steps > self.max_len:
            raise ValueError(
                f"histories have {n_steps} steps, the encoder takes {self.max_len}: pass the last "
                f"{self.max_len} steps, or raise model.max_len"
            )
        steps = torch.arange(n_steps, device=items.device)
        x = self._embed(items) + self.position_embedding(steps)
        x = self.dropout(self.input_norm(x))
        present = items.ne(0) if items.dim() == 2 else items.ne(0).any(2)
        if hidden is None:
            hidden = bool((~present & (steps < lengths[:, None])).any())
        allowed = visible(present) if hidden else None
        for block in self.blocks:
            x = block(x, allowed)
        if positions == "last":
            x = x[torch.arange(x.shape[0], device=x.device), lengths - 1]
        encoded: Tensor = self.output_norm(x)
        return encoded

    def item_weight(self) -> Float[Tensor, "items H"]:
        """The vectors the items are scored with, I + 1 rows; row 0 belongs to no item."""
        table = self.item_embedding if self.output_embedding is None else self.output_embedding
        return table.weight[: self.n_items + 1]

    def scores(self, h: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch items"]:
        """Logits of all items, column = id; column 0 is minus infinity.

        Args:
            h: Vectors of :meth:`forward`.
        """
        logits = h @ self.item_weight().t()
        nothing = torch.arange(self.n_items + 1, device=h.device) == 0
        return logits.masked_fill(nothing, -math.inf)

    def _embed(self, items: Tensor) -> Float[Tensor, "B L H"]:
        """Item vectors; of a basket their sum by the root of their number, of none row 0."""
        embedded: Tensor = self.item_embedding(items)
        if items.dim() == 2:
            return embedded
        member = items.ne(0)
        first = torch.arange(items.shape[2], device=items.device) == 0
        counts = member.sum(2, keepdim=True)
        member = member | ((counts == 0) & first)
        weights = member.to(embedded.dtype) * counts.clamp_min(1).to(embedded.dtype).rsqrt()
        return torch.einsum("blm,blmh->blh", weights, embedded)


def visible(present: Bool[Tensor, "B L"]) -> Bool[Tensor, "B 1 L L"]:
    """Which steps (last axis) each step may attend to: earlier or equal, and not hidden.

    A step that would see nothing sees itself, since attention over nothing is not a number. Its
    output is read by no other step. A hidden step with something before it does not see itself,
    as in the official code.

    Args:
        present: Whether a step holds an item.

    Returns:
        One mask for all heads.
    """
    n_steps = present.shape[1]
    causal = torch.ones(n_steps, n_steps, dtype=torch.bool, device=present.device).tril()
    allowed = causal & present[:, None, :]
    itself = torch.eye(n_steps, dtype=torch.bool, device=present.device)
    return (allowed | (~allowed.any(2, keepdim=True) & itself))[:, None]


def encode_in_groups(
    encoder: SequenceEncoder,
    items: Int[Tensor, "B L"] | Int[Tensor, "B L M"],
    lengths: Int[Tensor, " B"],
    groups: int,
    *,
    hidden: bool | None = None,
) -> Float[Tensor, "B H"]:
    """The encoder's last vectors, with rows of like length encoded together and cut to it.

    Equal to encoding the whole batch; most prefixes are far shorter than the longest.

    Args:
        encoder: The encoder.
        items: As the encoder takes them.
        lengths: Steps of each history, at least 1.
        groups: Most passes; 1 is the plain pass.
        hidden: As the encoder takes it.

    Returns:
        One vector a row, in the order of the rows.
    """
    order = torch.argsort(lengths)
    parts = order.chunk(groups)
    longest = lengths[torch.stack([part[-1] for part in parts])].tolist()
    encoded = [
        encoder(items[part, :steps], lengths[part], hidden=hidden)
        for part, steps in zip(parts, longest, strict=True)
    ]
    return torch.cat(encoded)[torch.argsort(order)]


class ModelAugmenter(nn.Module):
    """A small network that turns a history's vector into another view of it, of length 1.

    Args:
        dim: Width H of the vectors.
        hidden: Widths of the two hidden layers; None takes H // 2 and H // 4, which for H = 64
            are the official ones.

    Example:
        >>> ModelAugmenter(8)(torch.ones(2, 8)).norm(dim=1).round().tolist()
        [1.0, 1.0]
    """

    def __init__(self, dim: int = 64, hidden: tuple[int, int] | None = None) -> None:
        super().__init__()
        first, second = hidden or (max(dim // 2, 1), max(dim // 4, 1))
        self.layers = nn.Sequential(
            nn.Linear(dim, first),
            nn.GELU(),
            nn.Linear(first, second),
            nn.GELU(),
            nn.Linear(second, dim),
        )

    def forward(self, h: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
        """The view, a unit vector a row."""
        return F.normalize(self.layers(h), dim=1, eps=1e-12)


def build_augmenters(
    dim: int = 64, hidden: tuple[int, int] | None = None
) -> tuple[ModelAugmenter, ModelAugmenter]:
    """The two augmenters, which share nothing.

    Args:
        dim: Width H of the encoder.
        hidden: As :class:`ModelAugmenter` takes it.
    """
    return ModelAugmenter(dim, hidden), ModelAugmenter(dim, hidden)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
