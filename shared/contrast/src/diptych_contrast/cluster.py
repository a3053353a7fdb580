"""Clustering losses: learned prototypes with balanced assignments, prototypes by k-means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, NamedTuple, Unpack, cast

import torch
import torch.distributed as torch_dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych_contrast.common import (
    Common,
    LossResult,
    Options,
    Parity,
    TemperatureLike,
    read_options,
)
from diptych_contrast.dist import gather_sizes, world
from diptych_contrast.errors import ContrastInputError, warn
from diptych_contrast.inputs import check_choice, check_least, check_positive, check_shape, readable
from diptych_contrast.kernel import log_sums, products, unit_rows
from diptych_contrast.kernel.call import full_precision
from diptych_contrast.kernel.tiles import LOG2_E
from diptych_contrast.pairwise import info_nce
from diptych_contrast.state import KeyQueue, keep_version

_SCORES_AT_ONCE = 2**22  # of points with centres
# Logarithms of shares that far apart can be scaled as exponentials, also over many samples.
_RANGE = {torch.float32: 60.0, torch.float64: 600.0}


class Prototypes(nn.Module):
    """Learned unit vectors that embeddings are assigned to (Caron et al., 2020, SwAV).

    Call `start_step` before every step of the optimizer: as in the authors' code it brings the
    rows to length 1 in place, outside the gradient. SwAV has 3,000 prototypes of length 128
    (384,000 parameters), frozen for 313 steps (5,005 at batch 256).

    ``through`` differentiates through the normalisation instead.
    """

    def __init__(self, dim: int, k: int, *, freeze_steps: int = 0, through: bool = False) -> None:
        super().__init__()
        check_least("Prototypes", 1, dim=dim, k=k)
        self.weight = nn.Parameter(unit_rows(torch.randn(k, dim)))
        self.freeze_steps = freeze_steps
        self.through = through
        keep_version(self)

    @torch.no_grad()
    def start_step(self, step: int) -> None:
        """Bring the rows to length 1, and let gradient in from step ``freeze_steps`` on."""
        if not self.through:
            self.weight.copy_(unit_rows(self.weight))
        self.weight.requires_grad_(step >= self.freeze_steps)

    def forward(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Cosine similarity of embeddings and prototypes, float32 or float64."""
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        weight = self.weight.to(wide.dtype)
        return products(unit_rows(wide), (unit_rows(weight) if self.through else weight).t())


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "n k"],
    epsilon: float = 0.05,
    n_iter: int = 3,
    group: torch_dist.ProcessGroup | None = None,
    *,
    parity: Parity = None,
) -> Float[Tensor, "n k"]:
    """Assign samples to prototypes so that all prototypes are used alike (Cuturi, 2013; SwAV).

    ``exp(scores / epsilon)`` scaled in turn to equal sums of the columns and to rows of sum 1, on
    logarithms where exponentials might not be safe. The authors' code overflows in float32 from
    ``scores / epsilon`` = 88.7 on. No gradient.

    Args:
        epsilon: Weight of the entropy, above 0; the smaller, the harder the assignments.
        group: Processes that share the samples, each with its own rows.

    Example:
        >>> sinkhorn(torch.eye(3)).argmax(1).tolist()
        [0, 1, 2]
    """
    check_choice("sinkhorn", "parity", parity, None, "official")
    check_positive("sinkhorn", epsilon=epsilon, n_iter=n_iter)
    check_shape("sinkhorn", "scores", scores, (-1, -1))
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    count: Tensor | int = len(scores)
    if group is not None:
        count = _total(logits.new_tensor(count), group)
    k = scores.shape[1]
    if (not isinstance(count, Tensor) or readable(count)) and k > count:
        fix = "add a PrototypeQueue, or take fewer"
        warn("sinkhorn", "scores", "has more prototypes than samples", fix)
    if parity == "official":
        shares = logits.exp()
        shares = shares / _total(shares.sum(), group)
        for _ in range(n_iter):
            shares = shares / _total(shares.sum(0), group) / k
            shares = shares / shares.sum(1, keepdim=True) / count
        return shares * count
    low, high = logits.aminmax()
    if group is None and readable(logits) and float(high - low) <= _RANGE[logits.dtype]:
        kernel = (logits - high).mul_(LOG2_E).exp2_()
        assigned: Tensor = full_precision(_scale, kernel, n_iter)
        return assigned
    for _ in range(n_iter):
        top = logits.amax(0)
        if group is not None:
            torch_dist.all_reduce(top, torch_dist.ReduceOp.MAX, group=group)
        logits = logits - top - _total((logits - top).exp().sum(0), group).log()
        logits = torch.log_softmax(logits, 1)
    return logits.exp()


def swav_loss(
    scores: Sequence[Float[Tensor, "n k"]] | Float[Tensor, "v n k"],
    assign: Sequence[int] = (0, 1),
    temperature: TemperatureLike = 0.1,
    epsilon: float = 0.05,
    *,
    queue_scores: Sequence[Float[Tensor, "m k"]] | None = None,
    assignments: Sequence[Float[Tensor, "n k"]] | Float[Tensor, "n k"] | None = None,
    n_iter: int = 3,
    parity: Parity = None,
    **common: Unpack[Common],
) -> LossResult:
    """Predict the prototypes of one view from the other views (Caron et al., 2020, SwAV).

    ``-sum_k q_ak log softmax_k(s_v / t)`` for a sample, averaged over assigned views a and other
    views v, q_a the `sinkhorn` assignments of view a, without gradient. With one-hot assignments
    that are given this is DeepCluster-v2.

    Args:
        scores: Scores of each view (small crops too) with the prototypes, v of shape (n, k).
        assign: Views that are assigned: the large crops.
        queue_scores: `PrototypeQueue.scores`: older samples that take part in `sinkhorn`, one
            (m, k) an assigned view.
        assignments: To be used instead of `sinkhorn`: one (n, k) for all or each assigned view.
    """
    options = read_options("swav_loss", common, "return_info", "ring")
    every = options.scores("scores", scores)
    count, (n, k) = len(every), every[0].shape
    if count < 2 or not assign or not all(0 <= view < count for view in assign):
        found, fix = f"is {tuple(assign)} for {count} views", "name views of two or more"
        raise ContrastInputError("swav_loss", "assign", found, fix)
    scale = options.scale(temperature, every[0])
    if isinstance(assignments, Tensor) and assignments.dim() == 2:
        assignments = [assignments] * len(assign)
    if assignments is not None:
        _check_each("swav_loss", "assignments", assignments, len(assign), (n, k))
        shares = [share.detach().to(every[0]) for share in assignments]
    else:
        whole = [every[view].detach() for view in assign]
        if queue_scores is not None:
            _check_each("swav_loss", "queue_scores", queue_scores, len(assign), (-1, k))
            both = zip(queue_scores, whole, strict=True)
            whole = [torch.cat([older.to(own), own]) for older, own in both]
        shares = [sinkhorn(x, epsilon, n_iter, options.group, parity=parity)[-n:] for x in whole]
    rows = torch.zeros_like(every[0][:, 0])
    for view, own in enumerate(every):
        others = [share for a, share in zip(assign, shares, strict=True) if a != view]
        if others:
            rows = rows - (reduce(torch.add, others) * torch.log_softmax(own * scale, 1)).sum(1)
    return options.reduce(rows / (len(assign) * (count - 1)), None)


def _scale(kernel: Tensor, n_iter: int) -> Tensor:
    """Sinkhorn on exponentials: only factors of rows and columns change, so these are followed."""
    rows = torch.ones_like(kernel[:, 0])
    for _ in range(n_iter):
        columns = torch.mv(kernel.t(), rows).reciprocal_()
        rows = torch.mv(kernel, columns).reciprocal_()
    return kernel.mul_(rows[:, None]).mul_(columns)


class PrototypeQueue(nn.Module):
    """Features of the newest samples, one ring buffer an assigned view (SwAV).

    They balance `sinkhorn` where a batch has fewer samples than there are prototypes. Every
    process holds the same queue and scores its share. The authors' code moves all features at
    each step, and takes a last row of zeros for a queue that is not full.

    Args:
        length: Samples to keep, a multiple of the batch of all processes (SwAV: 3,840).
        start_epoch: First epoch that uses the queue; it is filled from the beginning.

    Example:
        >>> queue = PrototypeQueue(2, 8, 4); queue.enqueue(torch.randn(2, 4, 4))
        >>> queue.scores(Prototypes(4, 3), epoch=15) is None
        True
    """

    def __init__(self, n_assign: int, length: int, dim: int, start_epoch: int = 15) -> None:
        super().__init__()
        check_least("PrototypeQueue", 1, n_assign=n_assign, length=length, dim=dim)
        self.start_epoch = start_epoch
        queues = nn.ModuleList(KeyQueue(length, dim) for _ in range(n_assign))
        self.queues = cast(Sequence[KeyQueue], queues)

    @torch.no_grad()
    def scores(
        self,
        prototypes: Callable[[Tensor], Tensor],
        epoch: int,
        group: torch_dist.ProcessGroup | None = None,
    ) -> list[Tensor] | None:
        """Score this process's share of the queue; None before ``start_epoch`` and until full."""
        length = self.queues[0].size
        if epoch < self.start_epoch or len(self.queues[0].stored()) < length:
            return None
        rank, size = world(group) if group is not None else (0, 1)
        share = slice(rank * length // size, (rank + 1) * length // size)
        return [prototypes(queue.keys[share]) for queue in self.queues]

    @torch.no_grad()
    def enqueue(
        self,
        features: Sequence[Float[Tensor, "n d"]] | Float[Tensor, "a n d"],
        group: torch_dist.ProcessGroup | None = None,
    ) -> None:
        """Store the features of a batch, one (n, d) an assigned view, over the oldest ones."""
        name, argument, length = "PrototypeQueue.enqueue", "features", self.queues[0].size
        shape = (len(features[0]) if len(features) else -1, self.queues[0].dim)
        _check_each(name, argument, features, len(self.queues), shape)
        batch = len(features[0]) if group is None else sum(gather_sizes(features[0], group))
        if length % batch:
            found = f"has {batch} samples in all, of which the length {length} is no multiple"
            fix = f"take length {max(1, round(length / batch)) * batch}, and no smaller last batch"
            raise ContrastInputError(name, argument, found, fix)
        for queue, x in zip(self.queues, features, strict=True):
            queue.enqueue(x, gather=group is not None, group=group)


def proto_nce(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    centroids: Sequence[Float[Tensor, "c d"]],
    assignments: Sequence[Int[Tensor, " n"]],
    densities: Sequence[Float[Tensor, " c"]],
    temperature: TemperatureLike = 0.2,
    *,
    queue: KeyQueue | Float[Tensor, "m d"] | None = None,
    **common: Unpack[Common],
) -> LossResult:
    """Contrast samples with each other and with cluster centres (Li et al., 2021, eq. 11, PCL).

    `info_nce` plus ``log sum_j exp(q.c_j / phi_j) - q.c_own / phi_own``, averaged over clusterings.
    The authors' code draws some of the other centres, ours takes all.

    Args:
        centroids: Centres of each clustering, constants: `spherical_kmeans`.
        assignments: Own centre of each query in each clustering.
        densities: phi of each clustering: `cluster_density`.
        queue: Negatives of InfoNCE; None: the other keys of the batch.
    """
    options = read_options("proto_nce", common, "return_info")
    sizes = {len(centroids), len(assignments), len(densities)}
    if len(sizes) > 1 or not centroids:
        found = f"and assignments and densities have lengths {sorted(sizes)}"
        raise ContrastInputError("proto_nce", "centroids", found, "pass one for each clustering")
    anchors = options.embeddings(q=q)[0]
    source: Literal["in_batch", "queue"] = "in_batch" if queue is None else "queue"
    rowwise = cast(Common, {**common, "reduction": "none"})
    rows = info_nce(q, k, temperature, negatives=source, queue=queue, **rowwise)
    one, engine = anchors.new_ones(()), replace(options.local_engine, unit=False)
    for centres, assigned, density in zip(centroids, assignments, densities, strict=True):
        own, columns = _read_centres(options, assigned, anchors, centres)
        check_shape("proto_nce", "densities", density, (len(centres),))
        if readable(density) and not bool((density > 0).all()):
            found, fix = f"holds {float(density.min())}", "pass positive values: cluster_density"
            raise ContrastInputError("proto_nce", "densities", found, fix)
        columns = columns / density.detach().to(columns)[:, None]
        lse, _ = log_sums(anchors, columns, one, ("any",), engine=engine)
        rows = rows + (lse[0] - (anchors * columns[own]).sum(1)) / len(centroids)
    return options.reduce(rows, None)


@torch.no_grad()
def cluster_density(
    x: Float[Tensor, "n d"],
    centroids: Float[Tensor, "c d"],
    assignments: Int[Tensor, " n"],
    temperature: float = 0.2,
) -> Float[Tensor, " c"]:
    """Spread of each cluster, its temperature in `proto_nce` (Li et al., 2021, eq. 12).

    ``sum ||x - c|| / (z log(z + 10))`` over the z unit vectors of a cluster; clusters of one point
    take the largest value; clipped to the 10th and 90th percentile, scaled to the mean
    ``temperature``, at least a hundredth of it, so that equal points do no harm.
    """
    check_positive("cluster_density", temperature=temperature)
    options = read_options("cluster_density", {})
    points = options.embeddings(x=x)[0]
    own, centres = _read_centres(options, assignments, points, centroids)
    count = torch.bincount(own, minlength=len(centres)).to(points)
    lengths = torch.linalg.vector_norm(points - centres[own], dim=1)
    density = torch.zeros_like(count).index_add(0, own, lengths)
    density = density / (count.clamp_min(1) * torch.log(count + 10))
    density = torch.where(count > 1, density, density.masked_fill(count <= 1, 0.0).amax())
    low, high = torch.quantile(density, density.new_tensor([0.1, 0.9])).unbind()
    density = density.clamp(low, high)
    density = torch.where(density.mean() > 0, density / density.mean(), 1.0)
    return temperature * density.clamp_min(0.01)


class Clustering(NamedTuple):
    """Centres of length 1, shape (k, d), and the nearest centre of each point, shape (n,)."""

    centroids: Tensor
    assignments: Tensor


@torch.no_grad()
def spherical_kmeans(
    x: Float[Tensor, "n d"],
    k: int,
    n_iter: int = 20,
    seed: int = 0,
    *,
    start: Float[Tensor, "k d"] | None = None,
) -> Clustering:
    """Cluster directions by cosine similarity (Dhillon and Modha, 2001).

    First centres by k-means++, the best of several candidates each. A cluster that runs empty
    goes on from the point farthest from its centre.

    Args:
        n_iter: Most iterations; it stops when no point changes its cluster.
        start: First centres, such as those of the last epoch, shape (k, d).

    Example:
        >>> len(spherical_kmeans(torch.randn(50, 8), 5).centroids)
        5
    """
    check_least("spherical_kmeans", 1, k=k, n_iter=n_iter)
    options = read_options("spherical_kmeans", {"check_finite": True})
    points = options.embeddings(x=x)[0]
    if len(points) < k:
        found, fix = f"is {k} for {len(points)} points", "pass at most the number of points"
        raise ContrastInputError("spherical_kmeans", "k", found, fix)
    if start is None:
        centres = _seeds(points, k, torch.Generator().manual_seed(seed))
    else:
        check_shape("spherical_kmeans", "start", start, (k, x.shape[1]))
        centres = unit_rows(start.to(points))
    similarity, own = _nearest(points, centres)
    for _ in range(n_iter):
        count, before = torch.bincount(own, minlength=k), own
        centres = unit_rows(torch.zeros_like(centres).index_add(0, own, points))
        empty = (count == 0).nonzero().flatten()
        centres[empty] = points[similarity.topk(len(empty), largest=False).indices]
        similarity, own = _nearest(points, centres)
        if torch.equal(own, before):
            break
    return Clustering(centres, own)


def _seeds(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    gaps = _gaps(x, chosen)[0]
    while len(chosen) < k:
        steps = gaps.double().cumsum(0)
        draws = torch.rand(2 + int(math.log(k)), dtype=torch.float64, generator=generator)
        # Where all points stand on seeds, every draw is the upper end.
        drawn = torch.searchsorted(steps, draws.to(steps) * steps[-1], right=True)
        drawn = drawn.clamp_max(len(x) - 1)
        left = torch.minimum(gaps, _gaps(x, drawn.tolist()))
        best = int(left.sum(1).argmin())
        gaps = left[best]
        chosen.append(int(drawn[best]))
    return x[chosen]


def _gaps(x: Tensor, rows: list[int]) -> Tensor:
    gaps = (1.0 - products(x[rows], x.t())).clamp_min(0.0)
    gaps[range(len(rows)), rows] = 0.0
    return gaps


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    chunks = torch.split(x, max(1, _SCORES_AT_ONCE // len(centres)))
    found = [products(chunk, centres.t()).max(1) for chunk in chunks]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _total(x: Tensor, group: torch_dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        torch_dist.all_reduce(x, group=group)
    return x


def _check_each(
    function: str, argument: str, given: Any, count: int, shape: tuple[int, ...]
) -> None:
    if len(given) != count:
        found, fix = f"has {len(given)} entries", f"pass one for each of {count} assigned views"
        raise ContrastInputError(function, argument, found, fix)
    for x in given:
        check_shape(function, argument, x, shape)


def _read_centres(
    options: Options, assigned: Tensor, points: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor]:
    """Own centre of every point, and the centres like the points."""
    check_shape(options.function, "centroids", centres, (-1, points.shape[1]))
    own = options.labels("assignments", assigned, points, lowest=0)
    if readable(own) and int(own.max()) >= len(centres):
        found, fix = f"holds {int(own.max())}", f"number the {len(centres)} centres from 0"
        raise ContrastInputError(options.function, "assignments", found, fix)
    columns = centres.detach().to(points)
    return own, unit_rows(columns) if options.normalize else columns
