"""One fit: a network, its objective, its optimizer, and crops of prepared studies.

Stage 1 learns from studies with four zones; after a part of it, studies whose labels leave
several zones possible are added to each batch. Stage 2 starts from the best weights of stage 1
and adds co-training of the two paths, on studies without four zones too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.contract import Artifact, Earlier, Facts, Fit, Modules
from diptych.errors import DataError
from diptych.randomness import Draw
from diptych_pirads import scale
from diptych_pirads.augment import (
    draw_warps,
    drop_channels,
    hidden_blocks,
    vary_intensities,
    warp_crop,
)
from diptych_pirads.config import PiradsConfig
from diptych_pirads.infer import locate_gland
from diptych_pirads.labels import SCHEMES, UNSEEN, ZONES, LabelScheme
from diptych_pirads.metrics import compared_masks, dice
from diptych_pirads.model import (
    DualOut,
    DualPathNet,
    Head,
    network,
    network_input,
    probabilities,
)
from diptych_pirads.novelty import ARTIFACT, fit_novelty
from diptych_pirads.objective import (
    SECOND_STAGE,
    Hidden,
    Target,
    joined,
    labelled_loss,
    other_loss,
    single_loss,
    weighing,
)
from diptych_pirads.optimization import MAIN, follow, optimizer, schedules
from diptych_pirads.prepare import PreparedStudy, crop_image, crop_label
from diptych_pirads.store import study
from diptych_pirads.supervision import allowed_classes, supervised

if TYPE_CHECKING:
    from diptych.loop import EpochContext, StepContext
    from diptych.prepared import Prepared

MODEL, AVERAGE = "model", "average"  # names of modules
FOUR_ZONES = SCHEMES["zones4"].name
_SMALLEST = 1e-7
_LARGE = 1 << 17  # voxels of a crop whose memory counts
_TOGETHER = 4  # crops of a prediction: PyTorch takes slow convolutions for a single small one


class Rows(NamedTuple):
    """Training studies by what is known about them.

    Args:
        labelled: With four zones; where there is none, those with any label.
        partial: With labels that leave several zones possible.
        unlabelled: Without label.
    """

    labelled: tuple[int, ...]
    partial: tuple[int, ...]
    unlabelled: tuple[int, ...]


class Batch(NamedTuple):
    """Crops: labelled ones first, then partly labelled, then unlabelled ones.

    Args:
        image: As path a sees them.
        other: As path b sees them; None: as path a.
        sets: Classes that each voxel may have, as bits.
        sdf: Signed distances in mm of the labelled crops; None where they are not learned.
        hidden: Blocks that the network does not see; None: sees all.
        counts: Crops of each kind.
        kinds: Whether there are crops of each kind, on any process.
    """

    image: Float[Tensor, "n c z y x"]
    other: Float[Tensor, "n c z y x"] | None
    sets: UInt8[Tensor, "n z y x"]
    sdf: Float[Tensor, "k 4 z y x"] | None
    hidden: Bool[Tensor, "n 1 z y x"] | None
    counts: tuple[int, int, int]
    kinds: tuple[bool, bool, bool]


def modules(config: PiradsConfig, facts: Facts, fit: Fit) -> dict[str, nn.Module]:
    """The fresh network of a fit, from facts alone.

    Args:
        config: The configuration of this fit.
        facts: Of the prepared data.
        fit: Not looked at.

    Returns:
        {"model": a network that `model.probabilities` knows}.
    """
    tasks = config.objective.tasks
    weights: dict[Head, float] = {
        "sdf": tasks.sdf,
        "presence": tasks.presence,
        "reconstruct": tasks.reconstruct,
    }
    heads = [name for name, weight in weights.items() if weight]
    return {MODEL: network(config.model, len(facts["channels"]), heads)}


def build(
    config: PiradsConfig, prepared: Prepared, fit: Fit, modules: Modules, earlier: Earlier
) -> PiradsTask:
    """The task of a fit.

    Args:
        config: The configuration of this fit.
        prepared: Prepared studies.
        fit: What to train on.
        modules: From :func:`modules`.
        earlier: Finished fits; not looked at.

    Returns:
        A task of the runtime.

    Raises:
        DataError: No study of the training part has a label.
    """
    return PiradsTask(config, prepared, fit, modules)


def rows_of(prepared: Prepared, chosen: Sequence[int]) -> Rows:
    """Sort studies by what is known about them.

    Args:
        prepared: Prepared studies.
        chosen: Rows of the index.

    Raises:
        DataError: None has a label.
    """
    schemes = prepared.index["scheme"].to_list()
    labelled = tuple(row for row in chosen if schemes[row] == FOUR_ZONES)
    partial = tuple(row for row in chosen if schemes[row] not in (FOUR_ZONES, None))
    unlabelled = tuple(row for row in chosen if schemes[row] is None)
    if not labelled and not partial:
        raise DataError(
            f"none of the {len(chosen)} training studies has a label: fill the column 'label' of "
            "the manifest, or change the split"
        )
    if not labelled:
        labelled, partial = partial, ()
    return Rows(labelled, partial, unlabelled)


class PiradsTask:
    """The task of one fit, see :class:`diptych.contract.Task`."""

    def __init__(
        self, config: PiradsConfig, prepared: Prepared, fit: Fit, modules: Modules
    ) -> None:
        self.config, self.prepared, self.stage = config, prepared, fit.stage
        self.network = modules[MODEL]
        self.modules: dict[str, nn.Module] = dict(modules)
        if config.train.ema is not None:
            self.modules[AVERAGE] = copy.deepcopy(self.network).requires_grad_(False)
        self.rows = rows_of(prepared, fit.split.train)
        self._size = [int(n) for n in prepared.facts["size"]]
        schemes = prepared.index["scheme"]
        self._validation = [row for row in fit.split.validation if schemes[row] is not None]
        self.optimizers: dict[str, Optimizer] = {MAIN: optimizer(self.network, config)}
        steps = config.train.epochs * math.ceil(len(self.rows.labelled) / config.train.batch)
        self.schedules = schedules(self.optimizers[MAIN], config, steps)
        self.accumulates = False  # Dice couples the crops of a batch
        self._train = fit.split.train
        self._predicts = not fit.method and fit.stage == config.train.stages[-1]
        self._novelty: dict[str, ndarray] = {}
        self._scale = scale.training_scale(config, prepared, self._train)
        self._dual = isinstance(self.network, DualPathNet)
        self._kind = {row: kind for kind, rows in enumerate(self.rows) for row in rows}
        self._four_zones = schemes[self.rows.labelled[0]] == FOUR_ZONES

    def epochs(self) -> int:
        """Number of epochs."""
        return self.config.train.epochs

    def batches(self, epoch: int, draw: Draw) -> list[list[int]]:
        """Labelled studies in a keyed order, each followed by its share of the others.

        A study that occurs again in an epoch, as those do of which there are few, gets another
        item number and hence another crop: row + k times the number of rows.
        """
        order = draw.of("shuffle").permutation(self.rows.labelled).tolist()
        size = self.config.train.batch
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        with_partial, with_unlabelled = self._kinds(epoch)
        settings = self.config.objective
        partial = self._in_turn(
            self.rows.partial,
            draw.of("partial"),
            len(parts),
            settings.partial.per_step if with_partial else 0,
        )
        unlabelled = self._in_turn(
            self.rows.unlabelled,
            draw.of("unlabelled"),
            len(parts),
            settings.co.per_step if with_unlabelled else 0,
        )
        return [_interleaved(*kinds) for kinds in zip(parts, partial, unlabelled, strict=True)]

    def load(self, items: Sequence[int], epoch: int, draw: Draw) -> Batch:
        """Crops of studies, warped and varied."""
        kind = {item: self._kind[item % self.prepared.index.height] for item in items}
        ids = sorted(items, key=lambda item: kind[item])
        counts = [sum(kind[item] == k for item in ids) for k in range(len(Rows._fields))]
        views, tasks = self.config.views, self.config.objective.tasks
        distances = self._dual and bool(tasks.sdf) and self._four_zones
        warps = draw_warps(draw.of("warp"), ids, views, self.config.data.crop.jitter_mm)
        crops = [
            warp_crop(self._study(item), warp, self._size, distances=distances)
            for item, warp in zip(ids, warps, strict=True)
        ]
        x = torch.stack([crop.image for crop in crops])
        inside = torch.stack(
            [x.new_ones(x.shape[2:]).bool() if c.inside is None else c.inside for c in crops]
        )
        x = drop_channels(x, draw, ids, views.drop_channel)
        rician = self.config.data.normalize.mode == "percentile"
        seen = [
            vary_intensities(x, draw.of(view), ids, views, inside=inside, rician=rician)
            for view in (("view-a", "view-b") if self._two_views() else ("view-a",))
        ]
        # a process without labelled crops still has a part in the sums
        sdf = [crop.sdf[None] for crop in crops[: counts[0]] if crop.sdf is not None]
        sdf.append(x.new_zeros(0, len(ZONES) - 1, *self._size))
        return Batch(
            seen[0],
            seen[1] if len(seen) > 1 else None,
            torch.stack([crop.sets for crop in crops]),
            torch.cat(sdf) if distances else None,
            hidden_blocks(draw, ids, self._size) if self._dual and tasks.reconstruct else None,
            (counts[0], counts[1], counts[2]),
            (True, *self._kinds(epoch)),
        )

    def train_step(self, batch: Batch, ctx: StepContext) -> Mapping[str, Tensor]:
        """One step of the optimizer."""
        ctx.zero(MAIN)
        found = []
        for part in self._passes(batch, ctx):
            losses = self._losses(part, ctx)
            ctx.backward(losses["total"], weighted=True)
            found.append({name: loss.detach() for name, loss in losses.items()})
        ctx.step(MAIN)
        if self.config.train.ema is not None:
            decay = min(self.config.train.ema, (1 + ctx.step_index) / (10 + ctx.step_index))
            follow(self.modules[AVERAGE], self.network, decay)
        return joined(*found)

    def validate(self, ctx: EpochContext) -> dict[str, float]:
        """Mean Dice over studies and zones, and the loss, of crops as prediction has them."""
        net = self.modules.get(AVERAGE, self.network)
        scores: list[float] = []
        losses = []
        for case, center, fused, _ in self._predicted(net, self._validation, ctx.device):
            assert case.label is not None
            values, scheme = crop_label(case, center, self._size), case.label.scheme
            scores += zone_scores(fused.argmax(0).cpu().numpy(), values, scheme)
            allowed = allowed_classes(torch.from_numpy(scheme.to_sets(values))[None])
            logp = fused[None].clamp(min=_SMALLEST).log()
            how = weighing(self.config.objective)
            losses.append(float(supervised(logp, allowed.to(logp.device), how)))
        if not losses:
            return {}
        known = [score for score in scores if not math.isnan(score)]
        return {
            "dice": sum(known) / len(known) if known else math.nan,
            "loss": sum(losses) / len(losses),
        }

    def finish(self, ctx: EpochContext) -> None:
        """The averaged weights are those that predict; where the training studies lie for them."""
        if AVERAGE in self.modules:
            self.network.load_state_dict(self.modules[AVERAGE].state_dict())
        if self._predicts:
            seen = self._predicted(self.network, self._train, ctx.device)
            self._novelty = fit_novelty([features.cpu().numpy() for *_, features in seen])

    def artifacts(self) -> dict[str, Artifact]:
        """What was trained on."""
        notes = []
        if not self._four_zones:
            notes.append("no training study has four zones: DPU and AFS cannot be learned")
        counts = dict(zip(Rows._fields, map(len, self.rows), strict=True))
        training = {**counts, "epochs": self.epochs(), "notes": notes}
        fitted = {ARTIFACT: self._novelty, scale.ARTIFACT: self._scale}
        return {"training": training, **{name: part for name, part in fitted.items() if part}}

    def _passes(self, batch: Batch, ctx: StepContext) -> list[Batch]:
        """Crops that go through the network together.

        The objective is a sum over labelled crops and the others, so that one kind after the other
        has the same gradient, and the memory of the larger. Batch statistics know no such sum, and
        of several processes one may lack a kind: then all go together, as small crops do.
        """
        small = math.prod(self._size) < _LARGE
        together = small or self.config.model.norm == "batch" or ctx.group is not None
        return [batch] if together or not any(batch.kinds[1:]) else _apart(batch)

    def _losses(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        image, other = batch.image, batch.other
        if batch.hidden is not None:
            image = image.masked_fill(batch.hidden, 0)
            other = None if other is None else other.masked_fill(batch.hidden, 0)
        x = network_input(image)
        ends = list(accumulate(batch.counts))
        known = Target(batch.sets[: ends[0]], batch.sdf)
        partly = Target(batch.sets[ends[0] : ends[1]])
        with_labelled, with_partial, with_unlabelled = batch.kinds
        if not self._dual:
            logits = self.network(x)
            return single_loss(
                logits[: ends[0]] if with_labelled else None,
                known,
                self.config,
                partial=(logits[ends[0] : ends[1]], partly) if with_partial else None,
                group=ctx.group,
            )
        out = self.network(x, None if other is None else network_input(other))
        found = []
        if with_labelled:
            hidden = None
            if batch.hidden is not None:
                hidden = Hidden(batch.image[: ends[0]], batch.hidden[: ends[0]])
            found.append(
                labelled_loss(
                    _crops(out, 0, ends[0]),
                    known,
                    self.config,
                    self.stage,
                    hidden=hidden,
                    progress=ctx.progress,
                    group=ctx.group,
                )
            )
        if with_partial or with_unlabelled:
            found.append(
                other_loss(
                    _crops(out, ends[0], ends[2]),
                    self.config,
                    self.stage,
                    partial=(_crops(out, ends[0], ends[1]), partly) if with_partial else None,
                    progress=ctx.progress,
                    group=ctx.group,
                )
            )
        return joined(*found)

    @torch.no_grad()
    def _predicted(
        self, net: nn.Module, rows: Sequence[int], device: torch.device
    ) -> Iterator[tuple[PreparedStudy, ndarray, Tensor, Tensor]]:
        """Studies, where prediction crops them, probabilities and features; a few at a time."""
        for start in range(0, len(rows), _TOGETHER):
            cases = [self._study(row) for row in rows[start : start + _TOGETHER]]
            centers = [locate_gland(net, case, self.config, self._size) for case in cases]
            crops = [
                crop_image(case, center, self._size).array.astype(np.float32)
                for case, center in zip(cases, centers, strict=True)
            ]
            seen = probabilities(net, torch.from_numpy(np.stack(crops)).to(device))
            assert seen.features is not None
            yield from zip(cases, centers, seen.fused, seen.features, strict=True)

    def _study(self, item: int) -> PreparedStudy:
        one = study(self.prepared, item % self.prepared.index.height)
        return scale.standardized(one, self._scale, self._size)

    def _kinds(self, epoch: int) -> tuple[bool, bool]:
        """Whether an epoch's batches hold partly labelled and unlabelled crops."""
        settings, second = self.config.objective, self.stage == SECOND_STAGE
        late = second or epoch >= settings.partial.start * self.epochs()
        partial = late and bool(self.rows.partial) and settings.partial.weight > 0
        co = second and self._dual and settings.co.weight > 0 and settings.co.unlabelled
        return partial, co and bool(self.rows.unlabelled)

    def _two_views(self) -> bool:
        co = self.config.objective.co
        return (
            self.stage == SECOND_STAGE and self._dual and co.weight > 0 and co.views == "intensity"
        )

    def _in_turn(self, rows: Sequence[int], draw: Draw, steps: int, each: int) -> list[list[int]]:
        """So many items for each step: all rows in a keyed order, again and again."""
        order = draw.permutation(rows).tolist()
        n, height = len(rows), self.prepared.index.height
        places = [range(step * each, (step + 1) * each) for step in range(steps)]
        return [[order[k % n] + height * (k // n) for k in part] for part in places]


def zone_scores(
    label: Integer[ndarray, "z y x"], values: UInt8[ndarray, "z y x"], scheme: LabelScheme
) -> list[float]:
    """Dice of each zone that the scheme tells apart, where a label is known.

    Args:
        label: Class numbers 0 to 4.
        values: File values, `UNSEEN` where there is none.
        scheme: What these mean.

    Returns:
        One number a zone; the gland where the scheme tells no zones apart.
    """
    seen = values != UNSEEN
    masks = compared_masks(label[seen], SCHEMES[FOUR_ZONES], values[seen], scheme)
    zones = [name for name in masks if name in ZONES] or list(masks)
    return [dice(*masks[name]) for name in zones]


def _interleaved(labelled: Sequence[int], *others: Sequence[int]) -> list[int]:
    """Each labelled item followed by its share, so that every process gets some of each kind."""
    items = []
    for k, item in enumerate(labelled):
        items += [item, *(one for other in others for one in other[k :: len(labelled)])]
    return items


def _apart(batch: Batch) -> list[Batch]:
    """The labelled crops, and all others."""
    n = batch.counts[0]
    parts = []
    for chosen, labelled in ((slice(n), True), (slice(n, None), False)):
        parts.append(
            Batch(
                batch.image[chosen],
                None if batch.other is None else batch.other[chosen],
                batch.sets[chosen],
                batch.sdf if labelled else None,
                None if batch.hidden is None else batch.hidden[chosen],
                (n, 0, 0) if labelled else (0, *batch.counts[1:]),
                (True, False, False) if labelled else (False, *batch.kinds[1:]),
            )
        )
    return parts


def _crops(out: DualOut, start: int, stop: int) -> DualOut:
    heads = (None if part is None else part[start:stop] for part in out[2:])
    return DualOut(out.a[start:stop], out.b[start:stop], *heads)
