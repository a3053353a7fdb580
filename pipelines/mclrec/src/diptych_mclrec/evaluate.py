"""Every fit and baseline on the steps of its test part, ranked among all items.

Files beside the tables: ``strata`` (by length of the history and frequency of the target),
``calibration``, ``examples``, ``neighbours`` and ``views`` (for pictures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.sparse import csr_array

from diptych.contract import Artifact, Evaluation, Fit, Trained
from diptych.errors import DataError
from diptych.findings import Finding, Findings
from diptych.randomness import Draw
from diptych_mclrec.baselines import (
    Baseline,
    Blend,
    Frequency,
    ItemKNN,
    Markov1,
    Popularity,
    Recency,
)
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.fitting import FITTED, Fitted, divide, from_artifacts, learn, whole
from diptych_mclrec.geometry import view_geometry
from diptych_mclrec.metrics import usable_cutoffs
from diptych_mclrec.model import SequenceEncoder
from diptych_mclrec.notes import notes_of
from diptych_mclrec.queries import Queries, queries_of
from diptych_mclrec.scores import Scorer, baseline_scorer, network_scorer, rank_all
from diptych_mclrec.sequences import Sequences, joined
from diptych_mclrec.store import Events, load
from diptych_mclrec.tables import (
    Scored,
    calibration,
    examples,
    neighbours,
    rows,
    strata,
    whole_set,
)
from diptych_mclrec.task import ENCODER
from diptych_mclrec.truth import judged

if TYPE_CHECKING:
    from diptych.prepared import Prepared

STATE = "state"  # name of a baseline's artifact
REFIT = " (train+valid)"
COUNTING: Mapping[str, type[Popularity | Recency | Frequency | Markov1 | ItemKNN]] = {
    "popularity": Popularity,
    "recency": Recency,
    "frequency": Frequency,
    "markov1": Markov1,
    "itemknn": ItemKNN,
}
ONE_FIT = ("recency", "frequency")  # they count for ties alone


@dataclass(frozen=True, eq=False)
class Tested:
    """The test part of a fit.

    Args:
        fitted: Of the fit.
        queries: Steps to predict.
        train: Training sequences; None where the data are other ones.
        refit: Training sequences with the steps that validation predicted; None likewise.
        valid: Steps of the validation part; None without one.
        cold: Steps of subjects that training holds nothing of, where it holds others'.
    """

    fitted: Fitted
    queries: Queries
    train: Sequences | None = None
    refit: Sequences | None = None
    valid: Queries | None = None
    cold: Bool[np.ndarray, " Q"] | None = None


def evaluate(config: MCLRecConfig, prepared: Prepared, trained: Trained) -> Evaluation:
    """Scores of the model and of SASRec on the test parts of their fits.

    Args:
        config: The run's configuration.
        prepared: The data that the fits' splits index.
        trained: Finished fits.

    Returns:
        Rows by method, with both policies for seen items; files; notes on what was ranked among
        what; for the generated sample a finding where the scores are not credible.
    """
    events = load(prepared)
    own = _first_seed_first(config, [fit for fit in trained.fits if fit.split.test])
    found, tables, bins, ranked = [], [], [], []
    files: dict[str, Artifact] = {}
    notes: list[str] = []
    tested: Tested | None = None
    for fit in own:
        tested = tested or held_out(config, events, trained, fit)
        modules = trained.modules(fit.name)
        encoder = modules[ENCODER]
        assert isinstance(encoder, SequenceEncoder)
        scorer = network_scorer(encoder, tested.fitted)
        scored = _score(config, tested, fit.method, fit.seed, scorer)
        found += [_rows(config, scored), whole_set(scored, is_network=True)]
        tables += strata(scored)
        bins.append(calibration(scored))
        ranked.append(scored)
        if not fit.method and "examples" not in files:
            least = config.evaluate.min_count
            files["examples"] = examples(scored, least)
            vectors = encoder.item_weight().detach().cpu().numpy()
            files["neighbours"] = neighbours(vectors, tested.fitted, least)
            files["views"] = view_geometry(modules, tested.queries, config.views)
            notes += notes_of(config, events, scored, trained.fits)
    if tested is None:
        raise DataError("no fit has a test part: set split.fractions or split.kind")
    files |= {"strata": pl.DataFrame(tables), "calibration": pl.concat(bins)}
    truth = judged(config, prepared, tested, ranked)
    return Evaluation(
        rows=pl.concat([*found, *truth.rows]),
        files=files,
        notes=(*notes, *truth.notes),
        findings=Findings((*_warnings(config), *truth.findings)),
    )


def evaluate_baseline(
    name: str, config: MCLRecConfig, prepared: Prepared, trained: Trained
) -> Evaluation:
    """Scores of a baseline that counts, on the splits of the model.

    Args:
        name: "popularity", "recency", "frequency", "markov1", "itemknn" or "blend" (of the model
            and markov1).
        config: The run's configuration.
        prepared: The data.
        trained: Finished fits of the model.

    Returns:
        Rows of the fit on the events that the model trains on, and, where the method learns more
        than an order of ties, of a second one that has seen those of validation too; strata; and
        the counts of the first fit.
    """
    events = load(prepared)
    own = [fit for fit in trained.fits if fit.split.test and not fit.method]
    own = _first_seed_first(config, own)
    found: list[Scored] = []
    artifacts: dict[str, dict[str, Artifact]] = {}
    notes: list[str] = []
    for fit in own if name == "blend" else own[:1]:  # only the model depends on the seed
        tested = held_out(config, events, trained, fit)
        fits: Mapping[str, Baseline]
        if name == "blend":
            fits, said = _blends(config, trained, fit, tested)
            notes += said
        else:
            fits = _counting(name, trained, fit, tested)
        if not fits:
            notes.append(f"{name}: the model comes without its training data; not scored.")
        for method, baseline in fits.items():
            scorer = baseline_scorer(baseline)
            found.append(_score(config, tested, method, fit.seed, scorer))
        if name in fits:
            artifacts[fit.name] = {STATE: _state(fits[name])}
    frames = [
        frame
        for scored in found
        for frame in (_rows(config, scored), whole_set(scored, is_network=False))
    ]
    tables = [row for scored in found for row in strata(scored)]
    return Evaluation(
        rows=pl.concat(frames) if frames else _no_rows(),
        artifacts={name: artifacts} if artifacts else {},
        files={f"strata-{name}": pl.DataFrame(tables)} if tables else {},
        notes=tuple(notes),
    )


def held_out(config: MCLRecConfig, events: Events, trained: Trained, fit: Fit) -> Tested:
    """The steps that a fit is tested on.

    Args:
        config: The run's configuration.
        events: The prepared events.
        trained: Finished fits.
        fit: One of them; without training rows every subject of the data is tested.

    Raises:
        DataError: The data do not fit the model.
    """
    artifacts = trained.artifacts(fit.name)
    settings = config.evaluate
    if not fit.split.train:
        known = FITTED in artifacts
        fitted = from_artifacts(artifacts) if known else _published(config, events)
        part = whole(events, fitted).select(np.array(fit.split.test, np.int64))
        long = np.flatnonzero(part.step_counts > settings.min_history)
        if not len(long):
            raise DataError("no subject has a step to predict: give longer histories")
        start = np.full(len(long), settings.min_history)
        return Tested(fitted, queries_of(part.select(long), start, settings.steps))
    parts = divide(events, config, settings.min_history)
    fitted, split = from_artifacts(artifacts), parts.split
    if fitted.catalogue.hash != parts.fitted.catalogue.hash:
        raise DataError("the data are not those of the run: evaluate it with --data")
    valid = None
    if len(split.valid):
        valid = queries_of(split.valid, split.valid_start, settings.steps)
    queries = queries_of(split.test, split.test_start, settings.steps)
    cold = split.cold[queries.subject] if split.kind == "global_time" else None
    refit = _refit(split.train, split.valid)
    return Tested(fitted, queries, split.train, refit, valid, cold)


def _first_seed_first(config: MCLRecConfig, fits: Sequence[Fit]) -> list[Fit]:
    """Fits in the order of seeds, the one that predicts before the others."""
    return sorted(fits, key=lambda fit: fit.seed != config.run.seeds[0])


def _published(config: MCLRecConfig, events: Events) -> Fitted:
    """For weights that come alone: their table has the items in the order of first appearance."""
    if events.codes.size != config.model.items:
        raise DataError(
            f"the weights have {config.model.items} items and the data {events.codes.size}: give "
            "the file that they were trained on"
        )
    return learn(events.sequences, events.codes, events.kind)


def _refit(train: Sequences, valid: Sequences) -> Sequences:
    """Subjects as validation has them, and the rest as training has them."""
    rest = np.flatnonzero(~np.isin(train.subjects, valid.subjects))
    return joined(train.select(rest), valid)


def _score(config: MCLRecConfig, tested: Tested, method: str, seed: int, scorer: Scorer) -> Scored:
    fitted, settings = tested.fitted, config.evaluate
    policy, size = fitted.policy(settings.seen), fitted.catalogue.size
    draw = Draw(config.split.seed, "evaluate") if settings.sampled_negatives else None
    ranked = rank_all(scorer, tested.queries, settings, policy, size, draw)
    ks = usable_cutoffs(settings.k, size)
    return Scored(method, seed, tested.queries, ranked, fitted, policy, ks, tested.cold)


def _rows(config: MCLRecConfig, scored: Scored) -> pl.DataFrame:
    clinical = scored.fitted.kind == "clinical"
    return rows(scored, clinical=clinical, sampled=config.evaluate.sampled_negatives)


def _no_rows() -> pl.DataFrame:
    from diptych_mclrec.tables import SCHEMA

    return pl.DataFrame(schema=SCHEMA)


def _warnings(config: MCLRecConfig) -> tuple[Finding, ...]:
    count = config.evaluate.sampled_negatives
    if not count:
        return ()
    found = f"one table ranks each target among {count} random items only"
    fix = "do not quote it: such ranks order methods otherwise than ranks among all items"
    return (Finding("warning", "evaluate.sampled", "evaluate", found, fix),)


def _counting(
    name: str, trained: Trained, fit: Fit, tested: Tested
) -> dict[str, Popularity | Recency | Frequency | Markov1 | ItemKNN]:
    """The fits of a counting baseline by their names in the tables."""
    kind, size = COUNTING[name], tested.fitted.catalogue.size
    if tested.train is None or tested.refit is None:
        state = trained.artifacts(f"{name}/{fit.name}").get(STATE)
        return {} if state is None else {name: _restored(kind(), state)}
    fits = {name: kind().fit(tested.train, n_items=size)}
    if name not in ONE_FIT:
        fits[name + REFIT] = kind().fit(tested.refit, n_items=size)
    return fits


def _blends(
    config: MCLRecConfig, trained: Trained, fit: Fit, tested: Tested
) -> tuple[dict[str, Blend], list[str]]:
    """The model mixed with markov1, with the weight that ranks validation best."""
    encoder = trained.modules(fit.name)[ENCODER]
    assert isinstance(encoder, SequenceEncoder)
    scorer, fitted = network_scorer(encoder, tested.fitted), tested.fitted

    def model(histories: Sequences) -> Float[np.ndarray, "S items"]:
        found: NDArray[np.float64] = np.asarray(scorer(_as_queries(histories)), np.float64)
        return found

    blend = Blend(model)
    if tested.train is None:
        state = trained.artifacts(f"blend/{fit.name}").get(STATE)
        return ({}, []) if state is None else ({"blend": _restored(blend, state)}, [])
    blend.fit(tested.train, n_items=fitted.catalogue.size)
    if tested.valid is None:
        return {"blend": blend}, ["blend: without a validation part its weight stays 0."]
    histories = tested.valid.histories()
    targets = np.maximum(tested.valid.targets, 0)
    masked = fitted.policy(config.evaluate.seen) == "mask"
    if masked:
        targets = np.where(tested.valid.repeated(histories), 0, targets)
    left = np.flatnonzero(targets.any(1))
    if len(left):
        blend.choose(histories.select(left), targets[left], mask_seen=masked)
    return {"blend": blend}, [f"blend_weight_of_markov1={blend.weight:g}"]


def _as_queries(histories: Sequences) -> Queries:
    ends, rows_ = histories.step_counts, np.arange(len(histories))
    none = np.zeros((len(histories), 1), np.int64)
    return Queries(histories, rows_, ends, none, np.ones(len(histories), bool))


def _state(baseline: Baseline) -> dict[str, NDArray[Any]]:
    """The arrays of a fitted baseline."""
    state: dict[str, NDArray[Any]] = {}
    for key, value in vars(baseline).items():
        if isinstance(value, np.ndarray):
            state[key] = value
        elif isinstance(value, csr_array):
            arrays = {"data": value.data, "indices": value.indices, "indptr": value.indptr}
            state |= {f"{key}.{name}": array for name, array in arrays.items()}
        elif isinstance(value, Markov1):
            state |= {f"{key}.{name}": array for name, array in _state(value).items()}
        elif key == "weight":
            state[key] = np.array([value])
    return state


def _restored(baseline: Any, state: Mapping[str, NDArray[Any]]) -> Any:
    """A baseline with the arrays that :func:`_state` took from its like."""
    for key, value in vars(baseline).items():
        inner = {
            name.removeprefix(f"{key}."): array
            for name, array in state.items()
            if name.startswith(f"{key}.")
        }
        if isinstance(value, np.ndarray):
            setattr(baseline, key, state[key])
        elif isinstance(value, csr_array):
            size = len(inner["indptr"]) - 1
            table = csr_array(
                (inner["data"], inner["indices"], inner["indptr"]), shape=(size, size)
            )
            setattr(baseline, key, table)
        elif isinstance(value, Markov1):
            _restored(value, inner)
        elif key == "weight":
            baseline.weight = float(state[key][0])
    return baseline
