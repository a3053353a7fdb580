"""One fit: a network, its objective, its optimizer, and training data as tensors in memory.

MVCNet and the network baselines differ in the views that they see and in their losses alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from diptych.contract import Artifact, Earlier, Facts, Fit, Modules, Schedule
from diptych.randomness import Draw
from diptych_mvcnet.align import References, align_test, align_training, training_references
from diptych_mvcnet.config import BRAINDECODE, NETWORK_BASELINES, MVCNetConfig
from diptych_mvcnet.model import MVCNet, forward_views
from diptych_mvcnet.networks import IFNet, network
from diptych_mvcnet.objective import mvcnet_loss
from diptych_mvcnet.views import (
    are_random,
    build_views,
    class_mirror_index,
    mirror_index,
    usable_views,
)

if TYPE_CHECKING:
    from diptych.loop import EpochContext, StepContext
    from diptych.prepared import Prepared

MODEL, MAIN = "model", "main"  # names of the module and of the optimizer
INNER = "/inner"  # a fit NAME/inner chooses the number of epochs of the fit NAME
VIEW_METHODS = ("", "ifnet_views")
KEPT_BYTES = 1 << 31  # views are computed once where all of them fit into this much memory
CHUNK = 256  # trials whose views are computed, or which are decoded, at a time


class Batch(NamedTuple):
    """Views of a batch of trials.

    Args:
        views: V tensors, raw first.
        labels: Classes of each view.
        ids: Rows of the index.
    """

    views: list[Float[Tensor, "B C T"]]
    labels: list[Int[Tensor, " B"]]
    ids: Int[Tensor, " B"]


class Trials(NamedTuple):
    """Trials of one part of a split, aligned.

    Args:
        x: Trials.
        y: Classes.
    """

    x: Float[Tensor, "N C T"]
    y: Int[Tensor, " N"]


def modules(config: MVCNetConfig, facts: Facts, fit: Fit) -> dict[str, nn.Module]:
    """The fresh network of a fit, from facts alone.

    Args:
        config: The configuration of this fit.
        facts: Of the prepared data.
        fit: Its method chooses the network.

    Returns:
        {"model": network with ``decode(x) -> logits``}.
    """
    return {MODEL: network(fit.method, facts, config)}


def build(
    config: MVCNetConfig, prepared: Prepared, fit: Fit, modules: Modules, earlier: Earlier
) -> MVCNetTask:
    """The task of a fit.

    Args:
        config: The configuration of this fit.
        prepared: Epochs in microvolt, not aligned.
        fit: What to train on.
        modules: From :func:`modules`.
        earlier: Finished fits; those of inner validation give the number of epochs.

    Returns:
        A task of the runtime.
    """
    facts, epochs = prepared.facts, prepared.array("epochs")
    train, validation = _part(prepared, fit.split.train), _part(prepared, fit.split.validation)
    x = np.array(epochs[train["row"].to_numpy()])
    references = training_references(x, train["subject"].to_list(), train["session"].to_list())
    aligned = align_training(
        x, train["subject"].to_list(), train["session"].to_list(), references, config.align
    )
    names, left_out = usable_views(config.views, facts["ch_names"], lesion=_knows_lesions(train))
    return MVCNetTask(
        config,
        facts,
        modules,
        rows=train["row"].to_list(),
        trials=_trials(aligned, train),
        validation=aligned_test_trials(epochs, validation, references, config),
        references=references,
        views=names if fit.method in VIEW_METHODS else (),
        left_out=left_out if fit.method in VIEW_METHODS else {},
        epochs=epochs_of(config, fit, earlier),
    )


def aligned_test_trials(
    epochs: np.ndarray, index: pl.DataFrame, references: References, config: MVCNetConfig
) -> Trials:
    """Trials that were not trained on, aligned session by session as ``align.test`` says.

    Args:
        epochs: The prepared array "epochs".
        index: Rows of the index with a column "row", in the order of recording.
        references: The fit's artifact "alignment".
        config: The configuration.

    Returns:
        Trials in the order of ``index``.
    """
    x = np.array(epochs[index["row"].to_numpy()])
    index = index.with_row_index("place")
    for (subject, session), part in index.group_by(["subject", "session"], maintain_order=True):
        places = part["place"].to_numpy()
        x[places] = align_test(x[places], str(subject), str(session), references, config)
    return _trials(x, index)


def epochs_of(config: MVCNetConfig, fit: Fit, earlier: Earlier) -> int:
    """Epochs of a fit.

    Args:
        config: The configuration of this fit.
        fit: A fit with a finished fit NAME/inner takes its best epoch; ``final`` and
            ``final-<subject>`` take the median of those of their method and subject.
        earlier: Finished fits.

    Returns:
        The number that inner validation chose, otherwise ``train.epochs``.
    """
    if not config.train.inner_validation or fit.name.endswith(INNER):
        return config.train.epochs
    if fit.name + INNER in earlier:
        return earlier[fit.name + INNER].best_epoch
    chosen = [
        result.best_epoch
        for name, result in earlier.items()
        if name.endswith(INNER) and _same_kind(name.removesuffix(INNER), fit)
    ]
    return min(round(median(chosen)), config.train.epochs) if chosen else config.train.epochs


class MVCNetTask:
    """The task of one fit, see :class:`diptych.contract.Task`."""

    def __init__(
        self,
        config: MVCNetConfig,
        facts: Facts,
        modules: Modules,
        *,
        rows: Sequence[int],
        trials: Trials,
        validation: Trials,
        references: References,
        views: tuple[str, ...],
        left_out: Mapping[str, str],
        epochs: int,
    ) -> None:
        self.config, self.modules = config, modules
        self.network = modules[MODEL]
        self.optimizers: dict[str, Optimizer] = {MAIN: optimizer(self.network, config)}
        self.schedules: dict[str, Schedule] = {}
        if config.optim.schedule == "cosine":
            cosine = CosineAnnealingLR(self.optimizers[MAIN], max(epochs, 1))
            self.schedules[MAIN] = Schedule(cosine)
        # contrasts and batch statistics couple the trials of a batch
        self.accumulates = False
        self._rows, self._epochs = list(rows), epochs
        self._place = {row: place for place, row in enumerate(rows)}
        self._trials, self._validation = trials, validation
        self._references, self._views, self._left_out = references, views, left_out
        self._sfreq = float(facts["sfreq"])
        self._class_mirror = class_mirror_index(facts["classes"], facts["class_mirror"])
        self._mirror = None
        if "reflect" in views:
            self._mirror = mirror_index(
                facts["ch_names"],
                pairs=config.views.reflect.pairs,
                allow_partial=config.views.reflect.allow_partial,
            )
        self._keep = [name != "reflect" or not self._swaps_labels() for name in views]
        size = trials.x.element_size() * trials.x.numel() * (1 + len(views))
        self._kept: Batch | None = None
        if size <= KEPT_BYTES and not are_random(config.views, views):
            self._kept = self._all_views()

    def epochs(self) -> int:
        """Number of epochs."""
        return self._epochs

    def batches(self, epoch: int, draw: Draw) -> list[list[int]]:
        """Shuffled batches of rows; a batch of one trial has no statistics and is left out."""
        order = draw.of("shuffle").permutation(self._rows).tolist()
        size = self.config.train.batch
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        drop = self.config.train.drop_last
        if drop == "auto":
            drop = self.config.split.kind == "loso"
        shortest = size if drop and len(batches) > 1 else 2
        return [batch for batch in batches if len(batch) >= shortest]

    def load(self, items: Sequence[int], epoch: int, draw: Draw) -> Batch:
        """All views of the given rows."""
        places = torch.tensor([self._place[item] for item in items], dtype=torch.long)
        if self._kept is not None:
            return Batch(
                [view[places] for view in self._kept.views],
                [label[places] for label in self._kept.labels],
                self._kept.ids[places],
            )
        return self._views_of(places, draw)

    def train_step(self, batch: Batch, ctx: StepContext) -> Mapping[str, Tensor]:
        """One step of the optimizer over all views."""
        ctx.zero(MAIN)
        if isinstance(self.network, MVCNet):
            losses = mvcnet_loss(
                forward_views(self.network, batch.views),
                batch.labels,
                self.config,
                keep=self._keep,
                ids=batch.ids,
                group=ctx.group,
            )
            # the contrasts weigh themselves over the processes; the cross-entropy does not
            ctx.backward(losses["total"] + (ctx.weight - 1) * losses["ce"], weighted=True)
        else:
            losses = {"total": self._cross_entropy(batch)}
            ctx.backward(losses["total"])
        ctx.step(MAIN)
        return losses

    def validate(self, ctx: EpochContext) -> dict[str, float]:
        """Accuracy and negative log-likelihood of the validation part."""
        if not len(self._validation.y):
            return {}
        logits = decode(self.network, self._validation.x, ctx.device)
        y = self._validation.y
        return {
            "accuracy": float((logits.argmax(1) == y).float().mean()),
            "nll": float(F.cross_entropy(logits, y)),
        }

    def artifacts(self) -> dict[str, Artifact]:
        """The references of the training trials, and what became of the views."""
        notes = [f"view '{name}' is not used: {reason}" for name, reason in self._left_out.items()]
        if len(self._rows) % self.config.train.batch == 1:
            notes.append("a batch of one trial is left out in every epoch")
        return {
            "alignment": dict(self._references),
            "training": {"views": list(self._views), "notes": notes, "epochs": self._epochs},
        }

    def _cross_entropy(self, batch: Batch) -> Tensor:
        if isinstance(self.network, IFNet):
            stacked = self.network(torch.cat(batch.views), len(batch.views))
        else:
            stacked = self.network(torch.cat(batch.views))
        logits = stacked.chunk(len(batch.views))
        terms = [F.cross_entropy(one, y) for one, y in zip(logits, batch.labels, strict=True)]
        return torch.stack(terms).sum()

    def _swaps_labels(self) -> bool:
        if self.config.views.reflect.parity_binary_swap:
            return True
        return not self._class_mirror.equal(torch.arange(len(self._class_mirror)))

    def _views_of(self, places: Int[Tensor, " B"], draw: Draw | None) -> Batch:
        ids = [self._rows[place] for place in places.tolist()]
        views, labels = build_views(
            self._trials.x[places],
            self._trials.y[places],
            self._views,
            sfreq=self._sfreq,
            mirror=self._mirror,
            class_mirror=self._class_mirror,
            settings=self.config.views,
            draw=None if draw is None else draw.of("views"),
            ids=ids,
        )
        return Batch(views, labels, torch.tensor(ids, dtype=torch.long))

    def _all_views(self) -> Batch:
        n = len(self._rows)
        parts = [
            self._views_of(torch.arange(start, min(start + CHUNK, n)), None)
            for start in range(0, n, CHUNK)
        ]
        return Batch(
            [torch.cat(same) for same in zip(*(part.views for part in parts), strict=True)],
            [torch.cat(same) for same in zip(*(part.labels for part in parts), strict=True)],
            torch.cat([part.ids for part in parts]),
        )


def optimizer(network: nn.Module, config: MVCNetConfig) -> Optimizer:
    """The optimizer of a network; weight decay spares biases and normalisation.

    Args:
        network: What is trained.
        config: The configuration; its section ``optim`` is used.

    Returns:
        A fused optimizer of torch.
    """
    settings = config.optim
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        return SGD(groups, lr=settings.lr, momentum=0.9, fused=True)
    if settings.name == "adamw":
        return AdamW(groups, lr=settings.lr, fused=True)
    return Adam(groups, lr=settings.lr, fused=True)


@torch.inference_mode()
def decode(
    network: nn.Module, x: Float[Tensor, "N C T"], device: torch.device | str = "cpu"
) -> Float[Tensor, "N K"]:
    """Logits of aligned trials, in evaluation mode, on the CPU.

    Args:
        network: With ``decode``; its mode is restored.
        x: Aligned trials.
        device: Where the network is.

    Returns:
        float32 logits.
    """
    training = network.training
    network.eval()
    forward: Callable[[Tensor], Tensor] = network.decode  # type: ignore[assignment]
    parts = [
        forward(x[start : start + CHUNK].to(device)).float().cpu()
        for start in range(0, len(x), CHUNK)
    ]
    network.train(training)
    return torch.cat(parts)


def _part(prepared: Prepared, rows: Sequence[int]) -> pl.DataFrame:
    """Rows of the index in the order of recording."""
    ordered = sorted(rows)
    return prepared.index[ordered].with_columns(pl.Series("row", ordered, dtype=pl.Int64))


def _trials(x: np.ndarray, index: pl.DataFrame) -> Trials:
    y = torch.from_numpy(index["y"].to_numpy().astype(np.int64))
    return Trials(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), y)


def _knows_lesions(index: pl.DataFrame) -> bool:
    if "lesion_side" not in index.columns:
        return False
    sides = index["lesion_side"].cast(pl.String).str.strip_chars()
    return bool((sides.is_not_null() & (sides != "")).any())


def _same_kind(name: str, final: Fit) -> bool:
    """Whether a fit has the method of a final fit, and its subject where that has one."""
    *path, last = name.split("/")
    method = final.method.replace(":", "-")
    if method:
        return last == method
    if last in NETWORK_BASELINES or last.startswith(BRAINDECODE.replace(":", "-")):
        return False
    subject = final.name.removeprefix("final").removeprefix("-")
    return not subject or subject in (*path, last)
