"""One fit: the encoder, its augmenters, their optimizers, and batches of prefixes or of sequences.

An instance is a prefix with the step that follows it, or (``objective.unit: sequence``) a window
of a subject's steps, where the loss is taken at every step at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from diptych.contract import Artifact, Earlier, Facts, Fit, Modules, Schedule
from diptych.errors import UsageError
from diptych.randomness import Draw
from diptych_mclrec.config import FULL_UP_TO, MCLRecConfig, MCLRecObjectiveSection
from diptych_mclrec.fitting import Fitted, divide
from diptych_mclrec.metrics import ranking_metrics
from diptych_mclrec.model import SequenceEncoder, build_augmenters
from diptych_mclrec.queries import Queries, queries_of
from diptych_mclrec.schedules import SCHEDULES, Batch, Networks, Views, recommend_only
from diptych_mclrec.scores import validation_ranks
from diptych_mclrec.sequences import Sequences
from diptych_mclrec.store import load
from diptych_mclrec.views import two_views
from diptych_mclrec.windows import StepTable

if TYPE_CHECKING:
    from diptych.loop import EpochContext, StepContext
    from diptych.prepared import Prepared

ENCODER, AUGMENTERS = "encoder", ("augmenter_1", "augmenter_2")  # names of modules


def learns_views(objective: MCLRecObjectiveSection) -> bool:
    """Whether there are augmenters."""
    return objective.kind == "mclrec" and objective.beta > 0


def modules(config: MCLRecConfig, facts: Facts, fit: Fit) -> dict[str, nn.Module]:
    """The fresh networks of a fit.

    The size of the item table is ``model.items``, which the plan counts for every split and gives
    to its fits: the table has exactly the rows of the catalogue, so that published tables fit and
    no row stands for a code that the filter left out; and a moved run rebuilds from its config.

    Args:
        config: The configuration of this fit.
        facts: Of the prepared data; not looked at.
        fit: Not looked at.

    Returns:
        "encoder", and where views are learnt "augmenter_1" and "augmenter_2".

    Raises:
        UsageError: The number of items is not known.
    """
    model = config.model
    if model.items is None:
        raise UsageError("model.items: the number of items is not known: set it, or train a run")
    encoder = SequenceEncoder(
        model.items,
        dim=model.dim,
        layers=model.layers,
        heads=model.heads,
        inner=model.inner,
        max_len=model.max_len,
        dropout=model.dropout,
        attn_dropout=model.attn_dropout,
        norm=model.norm,
        tied=model.tied,
        mask_row=model.mask_row,
    )
    found: dict[str, nn.Module] = {ENCODER: encoder}
    if learns_views(config.objective):
        augmenters = build_augmenters(model.dim, model.augmenter_hidden)
        found |= dict(zip(AUGMENTERS, augmenters, strict=True))
    return found


def build(
    config: MCLRecConfig, prepared: Prepared, fit: Fit, modules: Modules, earlier: Earlier
) -> MCLRecTask:
    """The task of a fit.

    Args:
        config: The configuration of this fit.
        prepared: Events.
        fit: Of the plan, whose rows say who is trained on.
        modules: From :func:`modules`.
        earlier: Finished fits; not looked at.

    Returns:
        A task of the runtime.
    """
    parts = divide(load(prepared), config)
    split = parts.split
    valid = None
    if len(split.valid):
        valid = queries_of(split.valid, split.valid_start, config.evaluate.steps)
    return MCLRecTask(config, parts.fitted, modules=modules, train=split.train, validation=valid)


class MCLRecTask:
    """The task of one fit, see :class:`diptych.contract.Task`.

    Args:
        config: The configuration of the fit.
        fitted: What was learnt from its training part beside weights.
        modules: From :func:`modules`; None builds them for the catalogue.
        train: Training sequences in ids of the catalogue; None has no batches.
        validation: Steps that choose the best epoch; None chooses the last.
    """

    accumulates = False  # several steps share a batch, and contrasts couple its instances

    def __init__(
        self,
        config: MCLRecConfig,
        fitted: Fitted,
        *,
        modules: Modules | None = None,
        train: Sequences | None = None,
        validation: Queries | None = None,
    ) -> None:
        self.config, self.fitted = config, fitted
        self.modules = dict(modules or _fresh(config, fitted))
        encoder = self.modules[ENCODER]
        assert isinstance(encoder, SequenceEncoder)
        objective = _settled(config.objective, fitted)
        augmenters = tuple(self.modules[name] for name in AUGMENTERS if name in self.modules)
        self.networks = Networks(
            encoder,
            augmenters or None,  # type: ignore[arg-type]  # two ModelAugmenters or none
            objective,
            config.train.length_groups,
            config.optim.lr,
        )
        self._step = SCHEDULES[objective.schedule] if augmenters else recommend_only
        self.optimizers = _optimizers(config, self.networks, joint=objective.schedule == "joint")
        self.schedules: dict[str, Schedule] = {}
        if config.optim.schedule == "cosine":
            for name, optimizer in self.optimizers.items():
                schedule = CosineAnnealingLR(optimizer, max(config.train.epochs, 1))
                self.schedules[name] = Schedule(schedule)
        self._validation = validation
        self._contrast = bool(augmenters) or bool(
            objective.kind == "mclrec" and objective.lambda_ > 0
        )
        self._table = StepTable.of(train if train is not None else Sequences.from_lists([]))
        self._first, self._last = _instances(self._table, objective.unit, config.model.max_len)
        self._owner = self._table.subjects[self._last - 1]

    def epochs(self) -> int:
        """Number of epochs."""
        return self.config.train.epochs

    def batches(self, epoch: int, draw: Draw) -> list[list[int]]:
        """Shuffled batches; with ``train.bucket`` instances of like length share one."""
        size = self.config.train.batch
        order = draw.of("shuffle").permutation(np.arange(len(self._first)))
        if self.config.train.bucket:
            order = order[np.argsort((self._last - self._first)[order], kind="stable")]
        batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
        if self.config.train.bucket:
            turn = draw.of("bucket").permutation(np.arange(len(batches)))
            batches = [batches[number] for number in turn]
        return batches

    def load(self, items: Sequence[int], epoch: int, draw: Draw) -> Batch:
        """Histories, what followed them, two views and sampled items."""
        ids = np.asarray(items, dtype=np.int64)
        first, last = self._first[ids], self._last[ids]
        steps = last - 1 - first  # the last step is a target only
        every = self.config.objective.unit == "sequence"
        histories = self._table.matrix(first, last - 1)
        if every:
            targets = self._table.matrix(first + 1, last)
        else:
            targets = self._table.sets(last - 1)
            targets = targets if self._table.baskets else targets[:, 0]
        negatives, log_q = self._negatives(ids, targets, draw)
        return Batch(
            torch.from_numpy(histories),
            torch.from_numpy(steps),
            torch.from_numpy(targets),
            every,
            self._views(ids, draw) if self._contrast else None,
            negatives,
            log_q,
        )

    def train_step(self, batch: Batch, ctx: StepContext) -> Mapping[str, Tensor]:
        """The steps of the schedule; without contrast where a batch holds no negatives."""
        alone = ctx.group is None and self._is_alone(batch)
        if alone or ctx.step_index % self.config.objective.contrast_every:
            batch = replace(batch, views=None)
        joint = "joint" in self.optimizers
        step = self._step if batch.views is not None or joint else recommend_only
        return {name: value.detach() for name, value in step(self.networks, batch, ctx).items()}

    def validate(self, ctx: EpochContext) -> dict[str, float]:
        """Ranking metrics of the validation part, under the policy of the fit."""
        if self._validation is None:
            return {}
        settings = self.config.evaluate
        ranks, subjects = validation_ranks(
            self.networks.encoder, self._validation, self.fitted, settings
        )
        if not len(ranks):
            return {}
        return ranking_metrics(ranks, tuple({*settings.k, 10}), subjects=subjects)

    def artifacts(self) -> dict[str, Artifact]:
        """What was learnt from the training part beside weights, and how it was used."""
        rest = len(self._first) % self.config.train.batch
        notes = ["the last batch of an epoch has a single instance, and no contrast"]
        training = {
            "instances": len(self._first),
            "loss": self.networks.objective.loss,
            "notes": notes if rest == 1 and self._contrast else [],
        }
        return {**self.fitted.artifacts(), "training": training}

    def _is_alone(self, batch: Batch) -> bool:
        if batch.views is None or len(batch.lengths) < 2:
            return True
        subjects = batch.views.subjects
        return self.config.objective.mask_same_subject and bool((subjects == subjects[0]).all())

    def _views(self, ids: NDArray[np.int64], draw: Draw) -> Views:
        """Two views of each prefix; of a sequence, of the prefix with a keyed random end."""
        first, end = self._first[ids], self._last[ids] - 1
        if self.config.objective.unit == "sequence":
            end = first + 1 + draw.of("prefix").integers(ids, 1, end - first)[:, 0]
        prefixes = self._table.matrix(first, end)
        views = self.config.views
        ratios = {"crop": views.crop, "mask": views.mask, "reorder": views.reorder}
        found = two_views(prefixes, end - first, draw, ratios, ids=ids)
        one, one_steps, other, other_steps = map(torch.from_numpy, found)
        owners = torch.from_numpy(self._owner[ids])
        return Views(one, one_steps, other, other_steps, owners)

    def _negatives(
        self, ids: NDArray[np.int64], targets: NDArray[np.int64], draw: Draw
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sampled ids that all rows share, and the log of each item's expected number."""
        objective, size = self.networks.objective, self.fitted.catalogue.size
        if objective.loss == "full":
            return None, None
        if objective.sampler == "in_batch":
            negatives = targets[targets > 0]
            share = self.fitted.counts / max(int(self.fitted.counts.sum()), 1)
        else:
            # keyed by one instance: a draw for each would cost more than it brings
            drawn = draw.of("negatives").integers(ids[:1], objective.negatives, size)
            negatives = drawn[0] + 1
            share = np.full(size + 1, 1 / size)
        log_q = None
        if objective.logq:
            log_q = torch.from_numpy(np.log(np.maximum(len(negatives) * share, 1e-12))).float()
        return torch.from_numpy(negatives), log_q


def _fresh(config: MCLRecConfig, fitted: Fitted) -> dict[str, nn.Module]:
    from diptych.split import Split

    model = config.model.model_copy(update={"items": fitted.catalogue.size})
    own = config.model_copy(update={"model": model})
    return modules(own, {}, Fit("final", Split(()), config.run.seeds[0]))


def _settled(objective: MCLRecObjectiveSection, fitted: Fitted) -> MCLRecObjectiveSection:
    """The objective with its loss chosen.

    Raises:
        UsageError: A loss that samples cannot take baskets as targets.
    """
    loss = objective.loss
    if loss == "auto":
        small = fitted.catalogue.size <= FULL_UP_TO or fitted.baskets
        loss = "full" if small else "sampled"
    if loss != "full" and fitted.baskets:
        raise UsageError(
            f"objective.loss: {loss} knows no baskets: set it to full, or data.basket to flat"
        )
    return objective.model_copy(update={"loss": loss})


def _instances(
    table: StepTable, unit: str, max_len: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """First step of each instance, and the step after its last target.

    A prefix is clipped to its last ``max_len`` steps. Sequences are cut into windows from their
    end, each with at most ``max_len`` targets, so that every step but the first is a target once.
    """
    start, stop = table.steps[:-1], table.steps[1:]
    if unit == "prefix":
        targets = np.setdiff1d(np.arange(table.steps[-1]), start, assume_unique=True)
        first = start[table.subjects[targets]]
        return np.maximum(first, targets - max_len), targets + 1
    windows = np.maximum(-(-(stop - start - 1) // max_len), 0)
    owner = np.repeat(np.arange(len(windows)), windows)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(windows) - windows, windows)
    last = stop[owner] - max_len * number
    return np.maximum(start[owner], last - 1 - max_len), last


def _optimizers(config: MCLRecConfig, networks: Networks, *, joint: bool) -> dict[str, Optimizer]:
    encoder = list(networks.encoder.parameters())
    if networks.augmenters is None:
        return {"encoder": _optimizer(config, encoder, config.optim.lr)}
    augmenters = [p for module in networks.augmenters for p in module.parameters()]
    if joint:
        return {"joint": _optimizer(config, encoder + augmenters, config.optim.lr)}
    return {
        "encoder": _optimizer(config, encoder, config.optim.lr),
        "augmenters": _optimizer(config, augmenters, config.optim.augmenter_lr),
    }


def _optimizer(config: MCLRecConfig, parameters: list[nn.Parameter], lr: float) -> Optimizer:
    settings = config.optim
    if settings.name == "sgd":
        return SGD(parameters, lr, momentum=0.9, weight_decay=settings.weight_decay, fused=True)
    kind = AdamW if settings.name == "adamw" else Adam
    return kind(parameters, lr, weight_decay=settings.weight_decay, fused=True)
