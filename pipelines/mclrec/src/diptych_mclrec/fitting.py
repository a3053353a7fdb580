"""What a fit learns from its training part beside weights.

Filter, catalogue, counts, the policy for seen items and how long and repetitive histories are:
they depend on the training part, so they are artifacts of the fit and no part of ``prepare``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from diptych.contract import Artifact
from diptych.errors import DataError
from diptych.split import Split as Rows
from diptych.split import as_rows
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.events import Core, fit_catalogue, k_core, repeat_share
from diptych_mclrec.sequences import Catalogue, Kind, Sequences
from diptych_mclrec.split import Kind as Protocol
from diptych_mclrec.split import Split, split_sequences, step_times, subject_parts, time_cuts
from diptych_mclrec.store import Events

Policy = Literal["mask", "keep"]
LEAST_TARGETS = 1000  # that must all be new before seen items are left out on their own
CATALOGUE, COUNTS, FITTED = "catalogue", "counts", "fitted"  # names of the artifacts


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was learnt from a training part beside weights.

    Args:
        catalogue: The candidates of a ranking, ids 1..I.
        counts: Training events of each item, (I + 1,), index 0 unused. ``catalogue.counts`` are
            those of the events that the catalogue was made of, which for leave-one-out are all.
        holders: Training subjects that have each item, (I + 1,).
        seen: "mask": items of the history are no candidates; "keep": they are.
        kind: "interactions" or "clinical".
        baskets: Whether a step is a basket.
        repeat_share: Share of training targets that were in the history already.
        targets: How many training targets there are.
        median_steps: Median length of a training history.
        most_steps: Longest training history.
        rounds: What each round of the filter left: subjects, items, events.
    """

    catalogue: Catalogue
    counts: Int[np.ndarray, " items_and_one"]
    holders: Int[np.ndarray, " items_and_one"]
    seen: Policy
    kind: Kind = "interactions"
    baskets: bool = False
    repeat_share: float = 0.0
    targets: int = 0
    median_steps: float = 0.0
    most_steps: int = 0
    rounds: tuple[Mapping[str, int], ...] = ()

    def artifacts(self) -> dict[str, Artifact]:
        """The same as artifacts of a fit; :func:`from_artifacts` reads them."""
        about = {
            "seen": self.seen,
            "kind": self.kind,
            "baskets": self.baskets,
            "repeat_share": self.repeat_share,
            "targets": self.targets,
            "median_steps": self.median_steps,
            "most_steps": self.most_steps,
            "rounds": [dict(one) for one in self.rounds],
            "hash": self.catalogue.hash,
        }
        counts = {"events": self.counts, "subjects": self.holders}
        return {CATALOGUE: self.catalogue.to_table(), COUNTS: counts, FITTED: about}

    def policy(self, wanted: Literal["auto", "keep", "mask"]) -> Policy:
        """The policy that a configured word means."""
        return self.seen if wanted == "auto" else wanted


@dataclass(frozen=True, eq=False)
class Divided:
    """Filtered events in ids of a fit's catalogue, divided.

    Args:
        fitted: Learnt from the training part.
        split: Training, validation and test sequences.
        rows: The same as rows of the index.
    """

    fitted: Fitted
    split: Split
    rows: Rows


def from_artifacts(artifacts: Mapping[str, Artifact]) -> Fitted:
    """What :meth:`Fitted.artifacts` gave.

    Args:
        artifacts: Of a finished fit.

    Raises:
        DataError: They are of another fit, or their catalogue was changed.
    """
    missing = [name for name in (CATALOGUE, COUNTS, FITTED) if name not in artifacts]
    if missing:
        raise DataError(
            f"the model comes without its {' and '.join(missing)}, so that its items have no "
            "names: give a run folder, or train"
        )
    about: dict[str, Any] = dict(artifacts[FITTED])
    catalogue = Catalogue.from_table(artifacts[CATALOGUE])
    if about.pop("hash") != catalogue.hash:
        raise DataError(
            "the catalogue is not the one that the model was trained with, its items would get "
            "other names: restore artifacts/catalogue.parquet, or train again"
        )
    counts, rounds = artifacts[COUNTS], tuple(about.pop("rounds"))
    return Fitted(catalogue, counts["events"], counts["subjects"], rounds=rounds, **about)


def fit(events: Events, config: MCLRecConfig) -> Fitted:
    """Learn from the training part of events.

    Args:
        events: All events; ``config`` says which are for training.
        config: The configuration.
    """
    return divide(events, config).fitted


def protocol(events: Events, config: MCLRecConfig) -> Protocol:
    """How events are divided: a split that comes with the data goes before ``auto``."""
    given = events.parts is not None
    if given and (config.split.kind == "auto" or config.split.file is not None):
        return "subject"
    return config.split_kind(events.kind)


def divide(events: Events, config: MCLRecConfig, min_history: int = 1) -> Divided:
    """Filter events, fit the catalogue and make the three parts.

    Where subjects or times are divided, training alone decides which items there are: an event of
    another part whose item training does not know keeps id 0, as a target a miss. Where each
    subject's last step is tested, all events decide, as in the literature.

    Args:
        events: All events.
        config: The configuration.
        min_history: Steps that a prediction needs before it; the rows of a plan need one, so
            that ``evaluate.min_history`` may change later.

    Returns:
        The parts, and what was learnt from the first.

    Raises:
        DataError: Nothing is left to train on or to test.
    """
    chosen = protocol(events, config)
    sequences, size = events.sequences, events.codes.size
    min_subject, min_item = config.least_events(events.kind)
    parts, cuts, fitted = None, None, None
    if chosen == "subject":
        parts = list(events.parts or _by_hash(sequences, config))
        trains = np.array([part == "train" for part in parts])
        _require(trains.any(), "split.kind subject: no subject is for training")
        core = k_core(sequences, size, min_subject=min_subject, min_item=min_item, fitted=trains)
        parts = [parts[row] for row in core.subjects]
        fitted = trains[sequences.rows]
    elif chosen == "global_time":
        cuts = time_cuts(sequences, config.split.fractions, config.split.cuts)
        fitted = step_times(sequences) < cuts[0]
        _require(fitted.any(), "split.kind global_time: no event is before the first cut")
        core = _core_in_time(sequences, size, fitted, min_subject, min_item)
    else:
        core = k_core(sequences, size, min_subject=min_subject, min_item=min_item)
    catalogue, encoded = fit_catalogue(sequences, events.codes, core=core, fitted=fitted)
    split = split_sequences(encoded, chosen, cuts=cuts, parts=parts, min_history=min_history)
    learnt = learn(split.train, catalogue, events.kind, core.rounds)
    return Divided(learnt, split, _rows(sequences, split))


def learn(
    train: Sequences, catalogue: Catalogue, kind: Kind, rounds: tuple[Mapping[str, int], ...] = ()
) -> Fitted:
    """What a training part tells.

    Args:
        train: Training sequences in ids of the catalogue.
        catalogue: The candidates.
        kind: "interactions" or "clinical".
        rounds: Of the filter.
    """
    share, targets = repeat_share(train)
    new = kind == "interactions" and share == 0 and targets >= LEAST_TARGETS
    lengths, size = train.step_counts, catalogue.size + 1
    held = np.unique(train.rows * size + train.items) % size
    return Fitted(
        catalogue,
        np.bincount(train.items, minlength=size),
        np.bincount(held, minlength=size),
        "mask" if new else "keep",
        kind,
        train.baskets is not None,
        share,
        targets,
        float(np.median(lengths)),
        int(lengths.max()),
        rounds,
    )


def whole(events: Events, fitted: Fitted) -> Sequences:
    """Other data in ids of a fit's catalogue; what it does not know has id 0.

    Args:
        events: Data that were not trained on.
        fitted: Of the model.

    Raises:
        DataError: The model reads baskets and the data have none, or the other way round.
    """
    have = events.sequences.baskets is not None
    if have != fitted.baskets:
        words = {True: "baskets", False: "single events"}
        raise DataError(
            f"the model was trained on {words[fitted.baskets]}, the data are read as "
            f"{words[have]}: set data.basket and data.ties as in training"
        )
    ids = np.r_[0, fitted.catalogue.encode(events.codes.names)].astype(np.int32)
    return events.sequences.with_items(ids[events.sequences.items])


def _by_hash(sequences: Sequences, config: MCLRecConfig) -> list[str]:
    return subject_parts(sequences.subjects, config.split.fractions, config.split.seed)


def _core_in_time(
    sequences: Sequences,
    size: int,
    early: Bool[np.ndarray, " events"],
    min_subject: int,
    min_item: int,
) -> Core:
    """Filter by training events; subjects that are only tested stay."""
    before = sequences.keep(early)
    core = k_core(before, size, min_subject=min_subject, min_item=min_item)
    stays = before.step_counts == 0
    stays[core.subjects] = True
    # a subject with a few early events is not trained on, and is not tested as one never seen
    kept = np.flatnonzero(stays)
    return Core(kept, core.items, sequences.step_counts[kept], core.rounds)


def _rows(sequences: Sequences, split: Split) -> Rows:
    place = {name: row for row, name in enumerate(sequences.subjects.tolist())}

    def rows(part: Sequences) -> tuple[int, ...]:
        return as_rows(place[name] for name in part.subjects.tolist())

    trained = split.train.select(np.flatnonzero(split.train.step_counts > 0))
    level: Literal["subject", "time"] = "subject" if split.kind == "subject" else "time"
    return Rows(rows(trained), rows(split.valid), rows(split.test), disjoint_by=level)


def _require(holds: bool | np.bool_, problem: str) -> None:
    if not holds:
        raise DataError(f"{problem}: set split.fractions, split.cuts or split.seed")
