"""What a reader of the tables has to know, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.contract import Fit
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import protocol
from diptych_mclrec.queries import MISS
from diptych_mclrec.store import Events
from diptych_mclrec.tables import Scored

FUTURE = {
    "leave_one_out": "The last step of each subject is tested, the one before validated: training "
    "saw events of other subjects that are later than the tested ones.",
    "global_time": "Training ends at a point in time, validation at a second one; the history of a "
    "tested step holds the subject's own later events up to it.",
}


def notes_of(
    config: MCLRecConfig, events: Events, scored: Scored, fits: Sequence[Fit]
) -> tuple[str, ...]:
    """Notes on the policy, the candidates and what the protocol lets training see.

    Args:
        config: The run's configuration.
        events: The prepared events.
        scored: The model's ranks.
        fits: All fits.
    """
    kind = protocol(events, config)
    trained = any(fit.split.train for fit in fits)
    notes = [
        f"seen={'masked' if scored.policy == 'mask' else 'kept'}",
        f"ties={config.evaluate.ties}",
        f"protocol={kind if trained else 'every subject is a test subject'}",
        *_policy(scored),
        *_candidates(scored),
    ]
    if trained and kind in FUTURE:
        notes.append(FUTURE[kind])
    if scored.fitted.kind == "clinical":
        notes.append(
            "This ranks recorded events, not treatments to choose. The last step of a subject is "
            "no evidence that nothing followed."
        )
    notes += _filter(scored)
    left_out = [k for k in config.evaluate.k if k not in scored.ks]
    if left_out:
        words = ", ".join(map(str, left_out))
        notes.append(f"Lists of {words} hold every item there is and are left out.")
    if config.evaluate.baselines == ():
        notes.append("Unanchored: no baseline was scored on the same splits.")
    elif trained and not config.train.epochs:
        notes.append("Nothing was trained here, so there is no SASRec beside the model.")
    return tuple(notes)


def _policy(scored: Scored) -> list[str]:
    ranked, queries = scored.ranked, scored.queries
    wanted = (queries.targets != 0) & queries.is_last[:, None]
    repeated = int((ranked.repeated & wanted).sum())
    total = int(wanted.sum())
    share = f"{repeated} of {total} tested targets ({repeated / max(total, 1):.1%})"
    if scored.policy == "keep":
        return [
            f"Items of the history are candidates (kept): {share} are repeats. Figures without "
            "them end in _masked."
        ]
    return [
        f"Items of the history are no candidates (masked): {share} are repeats and left out, novel "
        "targets only. Figures with them end in _kept."
    ]


def _candidates(scored: Scored) -> list[str]:
    queries = scored.queries
    notes = [f"Each target is ranked among all {scored.fitted.catalogue.size} items."]
    targets = int((queries.targets != 0).sum())
    missed = int((queries.targets == MISS).sum())
    if missed:
        notes.append(
            f"{missed} of {targets} targets ({missed / targets:.1%}) are items that training does "
            "not know: they count as misses."
        )
    unread = int((queries.ends == 0).sum())
    if unread:
        notes.append(
            f"{unread} of {len(queries)} histories hold no item that training knows: the model "
            "ranks them by popularity."
        )
    if scored.ranked.tied:
        notes.append(
            f"In {scored.ranked.tied} of {len(queries)} steps another item has a target's score."
        )
    return notes


def _filter(scored: Scored) -> list[str]:
    rounds = scored.fitted.rounds
    if not rounds:
        return []
    words = "; ".join(
        f"{one['subjects']} subjects, {one['items']} items, {one['events']} events"
        for one in rounds
    )
    lengths = f"histories of {scored.fitted.median_steps:g} steps in the median"
    return [f"The filter left, round by round: {words}. Training has {lengths}."]
