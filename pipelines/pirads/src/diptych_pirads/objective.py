"""What is minimised: supervision of each path and of their fusion, auxiliary tasks, co-training.

    L1 = L_a + L_b + w_fused L_fused + w_sdf L_sdf + w_presence L_presence
    L2 = L1(labelled) + lambda(t) [L_co(labelled) + L_co(unlabelled)]

where L = Dice + cross-entropy. Studies whose labels leave several zones possible add their L with
a weight of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from diptych_pirads.config import CoTrainingSection, ObjectiveSection, PiradsConfig
from diptych_pirads.fusion import Fuse, Paths, common_maps, common_zones, log_fuse, path_classes
from diptych_pirads.labels import AFS, BG, DPU, ZONES
from diptych_pirads.model import DualOut
from diptych_pirads.supervision import (
    Group,
    Maps,
    Weighing,
    allowed_channels,
    allowed_classes,
    marginal_ce,
    meyer_loss,
    responsibility_dice,
    soft_dice,
    summed,
    supervised,
)

__all__ = [
    "Target",
    "co_disagreement",
    "co_weight",
    "dual_loss",
    "forbidden_contact",
    "joined",
    "labelled_loss",
    "marginal_ce",
    "meyer_loss",
    "other_loss",
    "responsibility_dice",
    "single_loss",
    "soft_dice",
]

Form = Literal["normalized", "mse", "js"]
Losses = dict[str, Float[Tensor, ""]]

SECOND_STAGE = "stage-2"
SDF_UNIT_MM = 10.0  # signed distances are learned up to here
FEWEST_VOXELS = 50.0  # of a class, for its disagreement to count
APEX_SLICES = 2  # where the urethra leaves the gland
_STEEPNESS = 5.0


class Target(NamedTuple):
    """What is known about the voxels of a batch.

    Args:
        sets: Classes that each voxel may have, as bits.
        sdf: Signed distance to each zone's border in mm, positive inside; None where they are
            not learned.
    """

    sets: UInt8[Tensor, "n z y x"]
    sdf: Float[Tensor, "n 4 z y x"] | None = None


class Hidden(NamedTuple):
    """Blocks of the image that the network did not see.

    Args:
        image: The whole image.
        blocks: Where it was hidden.
    """

    image: Float[Tensor, "n c z y x"]
    blocks: Bool[Tensor, "n 1 z y x"]


def dual_loss(
    out: DualOut,
    target: Target,
    cfg: PiradsConfig,
    stage: str,
    unlabelled: DualOut | None = None,
    *,
    partial: tuple[DualOut, Target] | None = None,
    hidden: Hidden | None = None,
    progress: float = 1.0,
    group: Group = None,
) -> Losses:
    """The whole objective of the dual-path network: `labelled_loss` plus `other_loss`.

    Args:
        out: What the paths say about studies with four zones.
        target: Their labels.
        cfg: Its section ``objective`` counts, and the zones of the paths and their fusion.
        stage: "stage-2" adds co-training.
        unlabelled: What the paths say about studies without four zones.
        partial: Studies whose labels leave several zones possible.
        hidden: What the studies of `out` look like where it was hidden from the network.
        progress: How much of the stage is done, in [0, 1].
        group: Processes that share the batch.

    Returns:
        "total" and its terms without their weights; a term of weight 0 is not computed.
    """
    losses = labelled_loss(out, target, cfg, stage, hidden=hidden, progress=progress, group=group)
    others = other_loss(unlabelled, cfg, stage, partial=partial, progress=progress, group=group)
    return joined(losses, others)


def labelled_loss(
    out: DualOut,
    target: Target,
    cfg: PiradsConfig,
    stage: str,
    *,
    hidden: Hidden | None = None,
    progress: float = 1.0,
    group: Group = None,
) -> Losses:
    """What studies with four zones add to the objective; arguments as of `dual_loss`."""
    settings, paths = cfg.objective, path_classes(cfg.model.paths)
    mode = cfg.model.fuse
    losses = _zone_losses(out, target, settings, paths, mode, group)
    weights = zone_weights(settings)
    if settings.tasks.sdf and target.sdf is not None:
        pairs = [(out.sdf_a, paths["a"]), (out.sdf_b, paths["b"])]
        losses["sdf"] = sum_of(sdf_loss(p, target.sdf, z, group) for p, z in pairs if p is not None)
        weights["sdf"] = settings.tasks.sdf
    if settings.tasks.presence:
        said = [(out.presence_a, paths["a"]), (out.presence_b, paths["b"])]
        losses["presence"] = sum_of(
            presence_loss(p, target.sets, z, group) for p, z in said if p is not None
        )
        weights["presence"] = settings.tasks.presence
    if settings.tasks.reconstruct and hidden is not None:
        images = [i for i in (out.reconstruct_a, out.reconstruct_b) if i is not None]
        losses["reconstruct"] = sum_of(restored_loss(image, hidden, group) for image in images)
        weights["reconstruct"] = settings.tasks.reconstruct
    if settings.anatomy.weight and mode != "a_then_b":
        p = log_fuse(out.a, out.b, paths, mode).exp()
        losses["anatomy"] = anatomy_loss(p, target.sets, group)
        weights["anatomy"] = settings.anatomy.weight
    if stage == SECOND_STAGE and settings.co.weight:
        losses["co"] = co_loss(out, paths, settings.co.form, group)
        weights["co"] = co_weight(progress, settings.co)
    return _with_total(losses, weights)


def other_loss(
    unlabelled: DualOut | None,
    cfg: PiradsConfig,
    stage: str,
    *,
    partial: tuple[DualOut, Target] | None = None,
    progress: float = 1.0,
    group: Group = None,
) -> Losses:
    """What studies without four zones add to the objective; arguments as of `dual_loss`.

    Returns:
        As `dual_loss`; empty where they add nothing.
    """
    settings, paths = cfg.objective, path_classes(cfg.model.paths)
    losses: Losses = {}
    weights: dict[str, float] = {}
    if partial is not None and settings.partial.weight:
        parts = _zone_losses(*partial, settings, paths, cfg.model.fuse, group)
        of_zones = zone_weights(settings)
        losses["partial"] = sum_of(of_zones[name] * part for name, part in parts.items())
        weights["partial"] = settings.partial.weight
    if unlabelled is not None and stage == SECOND_STAGE and settings.co.weight:
        losses["co"] = co_loss(unlabelled, paths, settings.co.form, group)
        weights["co"] = co_weight(progress, settings.co)
    return _with_total(losses, weights) if losses else {}


def zone_weights(settings: ObjectiveSection) -> dict[str, float]:
    """Weights of what the zones of each path and of the fused map lose."""
    return {"path_a": 1.0, "path_b": 1.0, "fused": settings.fused}


def joined(*parts: Losses) -> Losses:
    """The sums of equal terms."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum_of(part[name] for part in parts if name in part) for name in names}


def _with_total(losses: Losses, weights: Mapping[str, float]) -> Losses:
    return {"total": sum_of(weights[name] * part for name, part in losses.items()), **losses}


def single_loss(
    logits: Maps | None,
    target: Target | None,
    cfg: PiradsConfig,
    *,
    partial: tuple[Maps, Target] | None = None,
    group: Group = None,
) -> Losses:
    """The objective of a network with one path.

    Args:
        logits: Five classes of studies with four zones; None leaves these out.
        target: Their labels.
        cfg: Its section ``objective`` counts.
        partial: Studies whose labels leave several zones possible.
        group: Processes that share the batch.

    Returns:
        "total", "zones" and, with such studies, "partial".
    """
    how, losses = weighing(cfg.objective), {}
    if logits is not None and target is not None:
        losses["zones"] = _five_classes(logits, target, how, group)
    if partial is not None and cfg.objective.partial.weight:
        losses["partial"] = _five_classes(*partial, how, group)
    return _with_total(losses, {"zones": 1.0, "partial": cfg.objective.partial.weight})


def weighing(settings: ObjectiveSection) -> Weighing:
    """How the five classes are summed."""
    return Weighing(
        tuple(settings.class_weights),
        settings.kind == "meyer",
        settings.dice.batch,
        settings.dice.absent == "skip",
    )


def co_disagreement(
    pa: Maps,
    pb: Maps,
    form: Form = "normalized",
    eps: float = 1e-5,
    *,
    counted: Bool[Tensor, " k"] | None = None,
    group: Group = None,
) -> Float[Tensor, ""]:
    """How far two paths are apart about the zones that both know.

    Both move: the gradient that reaches a path is the one it would have with the other detached.

    Args:
        pa: Probabilities of the common zones by path a.
        pb: By path b.
        form: "normalized": squared difference over the sum of squares, which is 1 - 2 sum(ab) /
            (sum(a^2) + sum(b^2)) and does not shrink with the zone; "mse": mean of squares; "js":
            mean Jensen-Shannon divergence of each zone against the rest, in nats.
        eps: Added below.
        counted: Zones that count; None: all.
        group: Processes that share the batch.

    Returns:
        In [0, 1]; the mean over the zones, 0 where none counts.
    """
    voxels = (0, 2, 3, 4)
    if form == "normalized":
        apart, size = summed(
            torch.stack([(pa - pb).square().sum(voxels), (pa.square() + pb.square()).sum(voxels)]),
            group,
        )
        each: Tensor = apart / (size + eps)
    else:
        values = (pa - pb).square() if form == "mse" else _jensen_shannon(pa, pb)
        number = values.new_full((values.shape[1],), values.numel() / max(values.shape[1], 1))
        total, count = summed(torch.stack([values.sum(voxels), number]), group)
        each = total / count.clamp(min=1)
    if counted is None:
        return each.mean()
    mean: Tensor = (each * counted).sum() / counted.sum().clamp(min=1)
    return mean


def co_loss(
    out: DualOut, paths: Paths, form: Form = "normalized", group: Group = None
) -> Float[Tensor, ""]:
    """`co_disagreement` of two paths about the zones that they find.

    A zone of less than 50 voxels in all does not count, so that saying "rest" is no way to agree.

    Args:
        out: What the paths say.
        paths: Their zones.
        form: See `co_disagreement`.
        group: Processes that share the batch.

    Returns:
        In [0, 1].
    """
    common = common_zones(paths)
    a, b = common_maps(out.a, paths["a"], common), common_maps(out.b, paths["b"], common)
    with torch.no_grad():
        fused = log_fuse(out.a, out.b, paths)[:, list(common)].exp()
        found = summed(fused.sum((0, 2, 3, 4)), group) >= FEWEST_VOXELS
    return co_disagreement(a, b, form, counted=found, group=group)


def co_weight(progress: float, settings: CoTrainingSection) -> float:
    """Weight of co-training after a part of the stage: w exp(-5 (1 - t)^2), t rising to 1."""
    t = min(progress / settings.ramp, 1.0) if settings.ramp else 1.0
    return settings.weight * math.exp(-_STEEPNESS * (1 - t) ** 2)


def sdf_loss(
    said: Maps, sdf: Float[Tensor, "n 4 z y x"], path: Sequence[int], group: Group = None
) -> Float[Tensor, ""]:
    """Mean distance of the signed distances to the true ones, near the border of each zone.

    Args:
        said: In units of 10 mm, one channel a zone of the path.
        sdf: True ones in mm, for PZ, TZ, DPU and AFS.
        path: Zones of the path.
        group: Processes that share the batch.

    Returns:
        Mean over the zones with voxels within 10 mm of their border.
    """
    true = (sdf[:, [zone - 1 for zone in path]] / SDF_UNIT_MM).clamp(-1, 1)
    near = (true.abs() < 1).to(said.dtype)
    voxels = (0, 2, 3, 4)
    apart, count = summed(
        torch.stack([((said.float() - true).abs() * near).sum(voxels), near.sum(voxels)]), group
    )
    mean: Tensor = (apart / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
    return mean


def presence_loss(
    said: Float[Tensor, "n k z"],
    sets: UInt8[Tensor, "n z y x"],
    path: Sequence[int],
    group: Group = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of "this slice holds the zone", over slices about which something is known.

    Args:
        said: Logits, one channel a zone of the path.
        sets: Classes that each voxel may have, as bits.
        path: Zones of the path.
        group: Processes that share the batch.

    Returns:
        Mean over zones and slices.
    """
    holds = torch.stack([(sets == 1 << zone).flatten(2).any(2) for zone in path], 1)
    known = (sets != (1 << len(ZONES)) - 1).flatten(2).any(2)[:, None].expand_as(holds)
    each = F.binary_cross_entropy_with_logits(said.float(), holds.float(), reduction="none")
    total, count = summed(torch.stack([(each * known).sum(), known.sum()]), group)
    mean: Tensor = total / count.clamp(min=1)
    return mean


def restored_loss(said: Maps, hidden: Hidden, group: Group = None) -> Float[Tensor, ""]:
    """Mean distance of restored from true intensities in the hidden blocks."""
    where = hidden.blocks.expand_as(said)
    apart = ((said.float() - hidden.image).abs() * where).sum()
    total, count = summed(torch.stack([apart, where.sum()]), group)
    mean: Tensor = total / count.clamp(min=1)
    return mean


def anatomy_loss(
    p: Float[Tensor, "n 5 z y x"], sets: UInt8[Tensor, "n z y x"], group: Group = None
) -> Float[Tensor, ""]:
    """Contacts that anatomy forbids: DPU with AFS, and with the background above the apex.

    Args:
        p: Class probabilities.
        sets: Labels, which say where the gland ends below.
        group: Processes that share the batch.

    Returns:
        The sum of both means over neighbouring voxels, each in [0, 1].
    """
    gland = (sets & (1 << BG) == 0).flatten(2).any(2)
    above = gland.long().cumsum(1) > APEX_SLICES
    inner = p[:, DPU] * above[:, :, None, None]
    return forbidden_contact(p[:, DPU], p[:, AFS], group) + forbidden_contact(
        inner, p[:, BG], group
    )


def forbidden_contact(
    u: Float[Tensor, "n z y x"], v: Float[Tensor, "n z y x"], group: Group = None
) -> Float[Tensor, ""]:
    """Mean over neighbouring voxels (i, j), sharing a face, of u(i) v(j)."""
    total, count = u.new_zeros(()), 0
    for axis in (1, 2, 3):
        n = u.shape[axis] - 1
        low, high = (part.narrow(axis, 0, n) for part in (u, v))
        next_u, next_v = (part.narrow(axis, 1, n) for part in (u, v))
        total = total + (low * next_v).sum() + (next_u * high).sum()
        count += 2 * low.numel()
    met, pairs = summed(torch.stack([total, total.new_tensor(float(count))]), group)
    mean: Tensor = met / pairs.clamp(min=1)
    return mean


def sum_of(parts: Iterable[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The sum of at least one scalar."""
    return torch.stack(list(parts)).sum()


def _zone_losses(
    out: DualOut,
    target: Target,
    settings: ObjectiveSection,
    paths: Paths,
    mode: Fuse,
    group: Group,
) -> Losses:
    how, allowed = weighing(settings), allowed_classes(target.sets)
    losses = {}
    for name, logits in (("a", out.a), ("b", out.b)):
        of_path = how._replace(classes=tuple(how.classes[c] for c in (BG, *paths[name])))
        logp = logits.float().log_softmax(1)
        channels = allowed_channels(allowed, paths[name])
        losses[f"path_{name}"] = supervised(logp, channels, of_path, group=group)
    if settings.fused and mode != "a_then_b":  # which has no gradient
        fused = log_fuse(out.a, out.b, paths, mode)
        losses["fused"] = supervised(fused, allowed, how, group=group)
    return losses


def _five_classes(logits: Maps, target: Target, how: Weighing, group: Group) -> Tensor:
    allowed = allowed_classes(target.sets)
    return supervised(logits.float().log_softmax(1), allowed, how, group=group)


def _jensen_shannon(pa: Maps, pb: Maps) -> Maps:
    def entropy(p: Maps) -> Maps:
        both: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
        return both

    a, b = (p.clamp(1e-6, 1 - 1e-6) for p in (pa, pb))
    return entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2
