"""Events to the prepared folder: ordered, unfiltered, without names of people."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock

from diptych.errors import DataError
from diptych.files import digest_of, write_atomically, write_json
from diptych.manifest import FILE as MANIFEST
from diptych.manifest import Manifest, ManifestEntry, scan, sha256_of
from diptych.prepared import FACTS, INDEX, Prepared, is_prepared, publish, with_items
from diptych.privacy import pseudonyms
from diptych_mclrec.check import Survey, survey
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.events import Ordered
from diptych_mclrec.read import files_of
from diptych_mclrec.sample import sample_seed
from diptych_mclrec.sequences import Sequences, SourceTable
from diptych_mclrec.store import CODES, EVENTS

VERSION = "1"
ROW_GROUP = 1 << 20  # fixed, so that equal inputs give equal bytes
# What changes the prepared events; the rest of section data only filters later or repairs files.
_SETTINGS = frozenset(
    {"format", "kind", "columns", "time_format", "time_unit", "encoding", "ties", "basket"}
    | {"drop_duplicates", "omop", "meds", "on_error", "exclude"}
)


def prepare(config: MCLRecConfig, source: Path, target: Path) -> Prepared:
    """Order the events of a source and write them under pseudonyms.

    Nothing is filtered, encoded or split here: what depends on the training part belongs to a
    fit. Clinical times are kept as time since the subject's first event, unless the split cuts
    by time.

    Args:
        config: The configuration.
        source: A file or a folder.
        target: The prepared folder; ``config.py`` says what it holds. It appears when complete.

    Returns:
        The opened folder; nothing is done where it already agrees with files and settings.

    Raises:
        DataError: The data have errors; the findings say which.
    """
    if not source.exists():
        raise DataError(f"{source.name}: no such file or folder: check the path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        wanted = _manifest(config, source)
        if is_prepared(target) and Prepared.open(target).digest() == wanted.digest():
            return Prepared.open(target)
        seen = survey(config, source)
        if seen.ordered is None or seen.findings.errors:
            raise DataError(
                "\n".join(finding.line() for finding in seen.findings.errors), seen.findings
            )
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write(partial, source, seen, seen.ordered, config, wanted)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        publish(partial, target)
    return Prepared.open(target)


def _manifest(config: MCLRecConfig, source: Path) -> Manifest:
    sources = scan(files_of(source, config.data))
    key, split = config.run.pseudonym_key, config.split.file
    settings = {
        **config.data.model_dump(mode="json", include=set(_SETTINGS)),
        "seed": config.split.seed if config.data.ties == "random" else None,
        "absolute": config.split.kind == "global_time",
        "key": sha256_of(key) if key is not None and key.is_file() else None,
        "split": sha256_of(split) if split is not None and split.is_file() else None,
    }
    entries = tuple(ManifestEntry(one.size, one.digest, 0, {}, {}) for one in sources)
    return Manifest(VERSION, digest_of(settings), entries)


def _write(
    folder: Path,
    source: Path,
    seen: Survey,
    ordered: Ordered,
    config: MCLRecConfig,
    wanted: Manifest,
) -> None:
    table = seen.reading.table
    if table is None:
        raise ValueError("a survey without errors has its events")
    sequences, catalogue = ordered.sequences, ordered.catalogue
    absolute = config.split.kind == "global_time"
    times, said = _times(sequences, seen.reading.kind, absolute=absolute)
    events = pl.DataFrame(
        {
            "subject": sequences.rows.astype(np.int32),
            "code": sequences.items - np.int32(1),
            "time": times,
            "basket": _column(sequences.baskets, len(sequences.items), pl.Int32),
        }
    )
    _write_table(folder / f"{EVENTS}.parquet", events)
    described = [catalogue.descriptions.get(name) for name in catalogue.names]
    codes = pl.DataFrame(
        {"code": list(catalogue.names), "description": described},
        schema={"code": pl.String, "description": pl.String},
    )
    _write_table(folder / f"{CODES}.parquet", codes)
    _write_table(folder / INDEX, _index(seen, ordered, table.sources, config))
    facts = {
        "kind": seen.reading.kind,
        "format": seen.reading.format,
        "codes": catalogue.size,
        "events": len(sequences.items),
        "duplicates": ordered.events - len(sequences.items),
        "tie_share": ordered.tie_share,
        "repeat_share": seen.repeat_share,
        "baskets": sequences.baskets is not None,
        "times": said,
    }
    seed = sample_seed(source, sequences, catalogue)
    if seed is not None:
        facts["generated"] = seed
    write_json(folder / FACTS, facts)
    rows = {one.sha256: one.rows for one in table.sources}
    entries = [{**vars(one), "rows": rows.get(one.sha256, 0)} for one in wanted.sources]
    files = {
        path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {**wanted.to_json(), "sources": entries, "files": files})


def _times(sequences: Sequences, kind: str, *, absolute: bool) -> tuple[pl.Series, str]:
    if sequences.times is None:
        return _column(None, len(sequences.items), pl.Int64), "none"
    if absolute or kind == "interactions":
        return pl.Series(sequences.times), "absolute"
    held = sequences.lengths > 0
    first = np.zeros(len(sequences), np.int64)
    # Baskets stand where their first event does, so the earliest time need not come first.
    first[held] = np.minimum.reduceat(sequences.times, sequences.offsets[:-1][held])
    return pl.Series(sequences.times - first[sequences.rows]), "relative"


def _column(values: Any, length: int, kind: type[pl.DataType]) -> pl.Series:
    if values is None:
        return pl.repeat(None, length, dtype=kind(), eager=True)
    return pl.Series(values, dtype=kind())


def _index(
    seen: Survey, ordered: Ordered, sources: tuple[SourceTable, ...], config: MCLRecConfig
) -> pl.DataFrame:
    own: list[str] = ordered.sequences.subjects.tolist()
    digests = [source.sha256 for source in sources]
    files = [tuple(digests[number] for number in numbers) for numbers in ordered.sources]
    names = pseudonyms(dict(zip(own, files, strict=True)), config.run.pseudonym_key)
    columns: dict[str, Any] = {
        "subject": [names[name] for name in own],
        "unit": [names[name] for name in own],
        "events": ordered.sequences.lengths,
        "source": [held[0][:12] for held in files],
    }
    if seen.parts is not None:
        columns["split"] = pl.Series([seen.parts.get(name) for name in own], dtype=pl.String)
    return with_items(pl.DataFrame(columns))


def _write_table(path: Path, table: pl.DataFrame) -> None:
    whole = table.rechunk()
    write_atomically(
        path,
        lambda stream: whole.write_parquet(stream, compression="zstd", row_group_size=ROW_GROUP),
    )
