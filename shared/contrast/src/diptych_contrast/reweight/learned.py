"""Weights that are learned: a temperature for every pair (AMCL), gates of classes (SimLAP)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    Parity,
    TemperatureLike,
    Views,
    read_options,
)
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.inputs import check_choice
from diptych_contrast.kernel import products, unit_rows
from diptych_contrast.rowwise import LOCAL, by_rows


class PairTemperature(nn.Module):
    """Temperature of every pair, one function a head: ``low + (high - low) sigmoid(phi(x, y))``.

    Kind ``bilinear`` is ``phi = p(x).p(y) + bias`` with p linear into ``rank`` dimensions; ``mlp``
    the two-layer network on the concatenation, whose first layer splits into a part for each
    side, so that a pair costs one addition, one ReLU and one product.

    Args:
        dim: Dimension of a head's output.
        low: Lowest temperature, > 0; the authors' 1e-5 overflows.

    Example:
        >>> net = PairTemperature(8, heads=1)
        >>> net(0, torch.zeros(2, 8), torch.zeros(3, 8))[0, 0].isclose(torch.tensor(1.005))
        tensor(True)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 3,
        kind: Literal["bilinear", "mlp"] = "bilinear",
        low: float = 0.01,
        high: float = 2.0,
        *,
        rank: int = 16,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        check_choice("PairTemperature", "kind", kind, "bilinear", "mlp")
        if not 0 < low < high:
            found, fix = f"is {low}, 'high' is {high}", "pass 0 < low < high"
            raise ContrastInputError("PairTemperature", "low", found, fix)
        self.dim, self.heads, self.kind, self.low, self.high = dim, heads, kind, low, high
        width = rank if kind == "bilinear" else hidden
        self.width = 1 if kind == "bilinear" else hidden
        self.left = nn.Parameter(torch.randn(heads, width, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(heads))
        if kind == "mlp":
            self.right = nn.Parameter(torch.randn(heads, width, dim) / math.sqrt(dim))
            self.offset = nn.Parameter(torch.zeros(heads, width))
            self.out = nn.Parameter(torch.randn(heads, width) / math.sqrt(width))

    def forward(
        self, head: int, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]
    ) -> Float[Tensor, "n m"]:
        """Temperatures of all pairs of rows of ``x`` and ``y`` for one head."""
        return self.of_pairs(x, y, *self.weights(head, x))

    def weights(self, head: int, like: Tensor) -> tuple[Tensor, ...]:
        """Parameters of one head, in the dtype of the embeddings."""
        return tuple(parameter[head].to(like.dtype) for parameter in self.parameters())

    def of_pairs(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        """Temperatures of all pairs for the parameters of one head."""
        first, bias, *more = weights
        if self.kind == "bilinear":
            logits = products(products(x, first.t()), products(first, y.t()))
        else:
            other, offset, out = more
            units = (products(x, first.t()) + offset)[:, None] + products(y, other.t())
            logits = products(units.relu().flatten(0, 1), out[:, None]).view(len(x), len(y))
        temperature: Tensor = self.low + (self.high - self.low) * (logits + bias).sigmoid()
        return temperature


def amcl(
    heads_a: Views,
    heads_b: Views,
    temperature_net: PairTemperature,
    reg: float = 0.1,
    **common: Unpack[Common],
) -> LossResult:
    """Adaptive multi-head contrastive loss, a temperature for every pair (Wang et al., 2023, AMCL).

    ``log sum_{j != i} exp(s_ij / t_ij) - s_ii' / t_ii'``, summed over heads, plus ``reg`` times the
    mean over heads and pairs of ``(d/2) log t + 1/t``, whose minimum is at ``t = 2/d``. The
    authors' code does not run, so there is no parity. The inputs are both views through every
    head, shape (heads, n, d).
    """
    options = read_options("amcl", common, *LOCAL)
    first = options.views("heads_a", heads_a)
    second = options.views("heads_b", heads_b)
    expected = (temperature_net.heads, *first.shape[1:-1], temperature_net.dim)
    fix = f"pass shape ({expected[0]}, at least 2 samples as in 'heads_a', {expected[2]})"
    for name, value in (("heads_a", first), ("heads_b", second)):
        if value.shape != expected or value.shape[1] < 2:
            raise ContrastInputError("amcl", name, f"has shape {tuple(value.shape)}", fix)
    rows = [
        _amcl_rows(options, temperature_net, head, torch.cat([a, b]), reg)
        for head, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    return options.reduce(torch.stack(rows).sum(0), None)


def _amcl_rows(options: Options, net: PairTemperature, head: int, z: Tensor, reg: float) -> Tensor:
    index = torch.arange(len(z), device=z.device)

    def block(x: Tensor, row: Tensor, partner: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        temperature = net.of_pairs(x, y, *weights)
        scores = products(x, y.t()) / temperature
        own = row[:, None] == index
        loss = scores.masked_fill(own, -math.inf).logsumexp(1)
        loss = loss - scores.gather(1, partner[:, None])[:, 0]
        prior = z.shape[1] / 2 * temperature.log() + temperature.reciprocal()
        prior = prior.masked_fill(own, 0.0).sum(1) / (len(z) - 1)
        rows: Tensor = loss + reg / net.heads * prior
        return rows

    rows = (z, index, index.roll(len(z) // 2))
    columns = (z, *net.weights(head, z))
    return by_rows(block, rows, columns, len(z) * net.width, options)


class PairGate(nn.Module):
    """Which dimensions two classes share, in (0, 1) (Wu et al., 2024, SimLAP).

    The mean of both class embeddings -> ReLU, batch norm, linear, ReLU, batch norm, linear ->
    sigmoid; embeddings of ``dim_in`` give gates for ``dim_out`` dimensions. 1,302,784 parameters
    for 1,000 classes and the default sizes.
    """

    def __init__(
        self, num_classes: int, dim_out: int = 256, dim_in: int = 512, hidden: int = 1024
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, dim_in)
        self.network = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(dim_in),
            nn.Linear(dim_in, hidden),
            nn.ReLU(),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, dim_out),
        )

    def forward(self, first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Gates of pairs of classes."""
        gate: Tensor = self.network((self.embedding(first) + self.embedding(second)) / 2)
        return gate.sigmoid()


def sample_partners(
    labels: Int[Tensor, " n"],
    how: Literal["arbitrary", "identical", "distinct"],
    num_classes: int,
    generator: torch.Generator,
) -> Int[Tensor, " n"]:
    """Partner class of every row for `arbitrary_pairs`.

    Args:
        how: ``arbitrary`` permutes the labels of the batch, ``identical`` keeps them,
            ``distinct`` draws another class uniformly.
        generator: Source of the draw, on the device of ``labels``.

    Example:
        >>> y = torch.tensor([0, 1])
        >>> sample_partners(y, "distinct", 2, torch.Generator()).tolist()
        [1, 0]
    """
    check_choice("sample_partners", "how", how, "arbitrary", "identical", "distinct")
    if how == "identical":
        return labels
    if how == "arbitrary":
        order = torch.randperm(len(labels), generator=generator, device=labels.device)
        return labels[order]
    shift = torch.randint(1, num_classes, labels.shape, generator=generator, device=labels.device)
    return (labels + shift) % num_classes


def arbitrary_pairs(
    z: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    partner_labels: Int[Tensor, " n"],
    gate: Callable[[Tensor, Tensor], Tensor],
    temperature: TemperatureLike = 0.1,
    *,
    pool: Literal["rows", "pairs"] = "rows",
    subspace_cosine: bool = False,
    penalty: float = 0.0,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Contrast any two classes in the subspace a gate opens for them (Wu et al., 2024, SimLAP).

    ``mean_p log(exp S_ip + sum_n exp S_in) - S_ip``, ``S_ij = (g_i^2 z_i).k_j / t``, g the gate of
    a row's class and partner class, p over columns of the partner class other than the row's own,
    n over columns of neither class.

    The authors' code subtracts the mean before the exponential (which overflows), counts a row's
    own column, and lets rows without positives enter the mean as 0; ``parity="official"`` does
    the latter two.

    Args:
        partner_labels: Class that each row is paired with: `sample_partners`.
        gate: Gives gates in [0, 1] of pairs of classes, shape (n, d): a `PairGate`.
        pool: Mean over ``rows`` of the mean over pairs, or over all ``pairs``.
        subspace_cosine: Divide by the lengths within the gate, so that S is a cosine over t.
        penalty: Weight of ``mean g (1 - g)``, which closes half-open gates.

    Example:
        >>> y = torch.arange(4)
        >>> open_gate = lambda a, b: torch.ones(4, 4)
        >>> arbitrary_pairs(torch.eye(4), torch.eye(4), y, y.roll(1), open_gate).exp().item()
        3.0
    """
    options = read_options("arbitrary_pairs", common, *LOCAL, parity=parity)
    rows, columns = options.embeddings(z=z, k=k).unbind(0)
    labels = options.labels("labels", labels, rows, lowest=0)
    partners = options.labels("partner_labels", partner_labels, rows, lowest=0)
    scale = options.scale(temperature, rows)
    gates = _read_gates(gate(labels, partners), rows)
    check_choice("arbitrary_pairs", "pool", pool, "rows", "pairs")
    index = torch.arange(len(rows), device=rows.device)

    def block(
        x: Tensor, g: Tensor, own: Tensor, partner: Tensor, row: Tensor, y: Tensor, beta: Tensor
    ) -> Tensor:
        if subspace_cosine:
            lengths = products(g.square(), y.square().t()).clamp_min(1e-24).sqrt()
            scores = products(unit_rows(x * g) * g, y.t()) / lengths * beta
        else:
            scores = products(x * g.square(), y.t()) * beta
        positive = partner[:, None] == labels
        negative = ~(positive | (own[:, None] == labels))
        if parity is None:
            positive = positive & (row[:, None] != index)
        lone = ~negative.any(1)
        # A row of minus infinities has no finite derivative, so lone rows go around the sum.
        sums = scores.masked_fill(~negative & ~lone[:, None], -math.inf).logsumexp(1)
        terms = F.softplus(sums[:, None] - scores, threshold=40)
        counts = positive.sum(1)
        total = terms.masked_fill(~positive | lone[:, None], 0.0).sum(1)
        return torch.stack([total, counts, counts * ~lone], 1)

    keyed = (rows, gates, labels, partners, index)
    table = by_rows(block, keyed, (columns, scale), len(rows), options)
    loss = _pooled(options, table[:, 0], table[:, 1 if parity else 2].detach(), pool, parity)
    return loss + penalty * (gates * (1 - gates)).mean()


def _read_gates(gates: Tensor, rows: Tensor) -> Tensor:
    if gates.shape != rows.shape:
        found = f"gives shape {tuple(gates.shape)} for {tuple(rows.shape)}"
        fix = "make the gate for the same number of dimensions"
        raise ContrastInputError("arbitrary_pairs", "gate", found, fix)
    return gates.to(rows.dtype)


def _pooled(
    options: Options, total: Tensor, counts: Tensor, pool: str, parity: str | None
) -> Tensor:
    """Mean over rows of the mean over their pairs, or over all pairs."""
    if pool == "rows":
        losses = total / counts.clamp_min(1)
    else:
        every = parity is not None or options.empty == "zero"
        mean = counts.mean() if every else counts.sum() / (counts > 0).sum().clamp_min(1)
        losses = total / mean.clamp_min(torch.finfo(total.dtype).tiny)
    return options.reduce(losses, None if parity else counts > 0)
