"""A table of events in, a ranked table of next items out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import polars as pl

from diptych.contract import Trained
from diptych.errors import DataError
from diptych.files import write_atomically
from diptych.findings import Finding, Findings
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.histories import Histories, encoded, ordered_events, table_of
from diptych_mclrec.read import read_source, whole
from diptych_mclrec.serve import Recommender, open_recommender

NOTICE = "ranking of recorded events, not a treatment recommendation"
Write = Callable[[pl.DataFrame, IO[bytes]], object]
WRITERS: Mapping[str, Write] = {
    ".parquet": lambda table, stream: table.write_parquet(stream),
    ".csv": lambda table, stream: table.write_csv(stream),
}


def predict(config: MCLRecConfig, trained: Trained, source: Path, out: Path) -> Findings:
    """Rank the next items of every subject of a source.

    Args:
        config: The run's configuration with the values of this call.
        trained: The run's fits.
        source: A file or a folder of events, as `train` reads them.
        out: A ``.parquet`` or ``.csv`` file: subject (the user's own name), rank, item,
            description where the training data had some, score, probability, fallback, and for
            clinical data a note. Not written where the source has errors.

    Returns:
        Findings over the source, what was left out of histories, and who got the fallback.
    """
    if out.suffix not in WRITERS:
        found = f"predictions are written as {' or '.join(WRITERS)}, not as '{out.suffix}'"
        fix = "end the name given by --out with one of these"
        return Findings((Finding("error", "predict.format", out.name, found, fix),))
    recommender = open_recommender(config, trained)
    reading = read_source(source, config.data)
    findings = list(reading.findings)
    try:
        table = table_of(reading)
        ordered = ordered_events(table, config, baskets=recommender.fitted.baskets)
    except DataError as error:
        if not error.findings:
            fix = "give all events a time, or none"
            findings.append(Finding("error", "events.bad_time", source.name, str(error), fix))
        return Findings(tuple(findings))
    histories = encoded(ordered, recommender.fitted.catalogue)
    findings += _left_out(histories, whole(source))
    asked = config.predict
    ranked = recommender.rank(histories.sequences, asked.k, asked.seen)
    written = complete(ranked, recommender)
    write_atomically(out, lambda stream: WRITERS[out.suffix](written, stream))
    return Findings(tuple(findings))


def complete(ranked: pl.DataFrame, recommender: Recommender) -> pl.DataFrame:
    """Rankings with the items' names in words and, for clinical data, the note.

    Args:
        ranked: From :meth:`Recommender.rank`.
        recommender: The model.
    """
    words = recommender.fitted.catalogue.descriptions
    if words:
        named = pl.col("item").replace_strict(dict(words), default=None, return_dtype=pl.String)
        columns = [*ranked.columns[:3], "description", *ranked.columns[3:]]
        ranked = ranked.with_columns(description=named).select(columns)
    if recommender.fitted.kind == "clinical":
        ranked = ranked.with_columns(note=pl.lit(NOTICE))
    return ranked


def _left_out(histories: Histories, source: Path) -> list[Finding]:
    findings = []
    unknown, subjects = int(histories.unknown.sum()), len(histories)
    if unknown:
        rows = int((histories.unknown > 0).sum())
        found = f"{unknown} events of {rows} of {subjects} histories are of items it has not seen"
        fix = "they are left out of the histories; train again where they matter"
        findings.append(Finding("warning", "predict.unknown", source.name, found, fix))
    empty = int((histories.sequences.step_counts == 0).sum())
    if empty:
        found = f"{empty} of {subjects} histories hold no known item"
        fix = "they get the most frequent items of the training data (column fallback)"
        findings.append(Finding("warning", "predict.fallback", source.name, found, fix))
    return findings
