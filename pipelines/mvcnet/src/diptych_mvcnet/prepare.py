"""Recordings to the prepared folder: trials in microvolt, an index and facts without names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.errors import DataError
from diptych.files import read_json
from diptych.manifest import Source
from diptych.prepared import Part, Prepared, prepare_parts
from diptych.split_file import join_split_file
from diptych_mvcnet.anonymise import write_anonymised
from diptych_mvcnet.check import Survey, Surveyed, survey
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.epochs import cut_epochs
from diptych_mvcnet.layout import PLACE
from diptych_mvcnet.sources import open_sources, read_located

VERSION = "1"
TRUTH = "truth.json"  # beside a generated sample
# What changes a prepared trial; everything else of section data only chooses or repairs files.
_SETTINGS = frozenset(
    {"unit", "channels", "rename", "interpolate", "events", "classes", "window", "window_closed"}
    | {"filter", "resample_hz", "reject", "repair_crlf", "allow_truncated", "class_mirror", "moabb"}
)


def prepare(config: MVCNetConfig, source: Path, target: Path) -> Prepared:
    """Filter, resample and cut every recording; one of them is in memory at a time.

    Args:
        config: The configuration.
        source: A file or a folder.
        target: The prepared folder. ``epochs`` is float32 (N, C, T) in microvolt, filtered and
            not aligned; the index is in time within subject, session and run and holds rejected
            trials too.

    Returns:
        The opened folder; nothing is done where it already agrees with files and settings.

    Raises:
        DataError: The data have errors; the findings say which.
    """
    with open_sources(config, source) as (located, findings):
        seen = survey(config, located, findings)
        if seen.findings.errors:
            raise DataError(
                "\n".join(finding.line() for finding in seen.findings.errors), seen.findings
            )
        prepared = _prepare(config, seen, target, _truth(source))
        if config.data.anonymise:
            write_anonymised(seen, target / "anonymised", config.data)
    return prepared


def _prepare(
    config: MVCNetConfig, seen: Survey, target: Path, truth: Mapping[str, Any]
) -> Prepared:
    by_name = {one.source.name: one for one in seen.files}

    def convert(source: Source) -> Part:
        return _part(by_name[source.name], seen, config)

    def facts(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return _facts(parts, seen, config, truth)

    chosen = config.data.model_dump(mode="json", include=set(_SETTINGS))
    split = seen.split
    settings = {
        **chosen,
        "channels": list(seen.channels),
        "sfreq": seen.sfreq,
        "subjects": _names_inside(seen),
        "split": None
        if split is None
        else [list(split.keys), *sorted(map(list, split.part.items()))],
        "truth": dict(truth),
    }
    return prepare_parts(
        target,
        [_source(one, seen) for one in seen.files],
        convert,
        version=VERSION,
        settings=settings,
        facts=facts,
        label="prepare",
    )


def _names_inside(seen: Survey) -> list[str]:
    """Pseudonyms that stand in the rows of files with several subjects."""
    own = {
        name
        for one in seen.files
        if "subject" in one.inside and one.rows is not None
        for name in one.rows["subject"]
    }
    return sorted(seen.names[name] for name in own)


def _source(one: Surveyed, seen: Survey) -> Source:
    """The file with the columns that are constant in it, names as pseudonyms."""
    located = one.located
    columns = {name: getattr(located, name) for name in PLACE if name not in one.inside}
    if "subject" in columns:
        columns["subject"] = seen.names[located.subject]
    if located.lesion_side:
        columns["lesion_side"] = located.lesion_side
    return Source(one.source.path, one.source.digest, one.source.size, columns)


def _part(one: Surveyed, seen: Survey, config: MVCNetConfig) -> Part:
    recording = read_located(one.located, config.data)
    cut = cut_epochs(recording, config, channels=seen.channels, sfreq=seen.sfreq)
    rows = one.located.fill(cut.rows)
    if seen.split is not None:
        rows = join_split_file(rows, seen.split)
    rows = rows.drop(name for name in PLACE if name not in one.inside)
    if "subject" in one.inside:
        names = [seen.names[name] for name in rows["subject"]]
        rows = rows.with_columns(pl.Series("subject", names, dtype=pl.String))
    units = [f"{one.source.name}-{row}" for row in range(rows.height)]
    rows = rows.with_columns(pl.Series("unit", units, dtype=pl.String))
    facts = {
        "n_times": int(cut.x.shape[2]),
        "sfreq": recording.sfreq,
        "given": recording.epochs is not None,
        "interpolated": list(cut.interpolated),
        "rejected": dict(Counter(why for why in rows["reason"] if why)),
    }
    return Part(rows, {"epochs": np.ascontiguousarray(cut.x, dtype=np.float32)}, facts)


def _facts(
    parts: Sequence[Mapping[str, Any]],
    seen: Survey,
    config: MVCNetConfig,
    truth: Mapping[str, Any],
) -> dict[str, Any]:
    """The facts that ``config.py`` describes, and what was changed on the way."""
    from diptych_mvcnet.views import unpaired_channels

    section = config.data
    lengths = sorted({part["n_times"] for part in parts})
    if len(lengths) > 1:
        raise DataError(
            f"trials differ in length ({', '.join(map(str, lengths))} samples): give all files "
            "trials of one length, or leave the odd ones out with data.exclude"
        )
    both = {**{right: left for left, right in section.class_mirror.items()}, **section.class_mirror}
    given = section.moabb is None and all(part["given"] for part in parts)
    rejected: Counter[str] = sum((Counter(part["rejected"]) for part in parts), Counter())
    window = [0.0, lengths[0] / seen.sfreq] if given else list(section.window)
    return {
        "ch_names": list(seen.channels),
        "sfreq": float(seen.sfreq),
        "n_times": lengths[0],
        "classes": list(section.classes),
        "class_mirror": {name: both.get(name, name) for name in section.classes},
        "window": window,
        "window_closed": section.window_closed and not given,
        "filter": {"band": None, "phase": "zero", "notch": None}
        if given
        else section.filter.model_dump(mode="json"),
        "unpaired": unpaired_channels(seen.channels),
        "recorded_hz": sorted({part["sfreq"] for part in parts}),
        "interpolated": sorted({name for part in parts for name in part["interpolated"]}),
        "rejected": dict(sorted(rejected.items())),
        **truth,
    }


def _truth(source: Path) -> dict[str, Any]:
    """What a generated sample knows about itself."""
    path = source / TRUTH
    if not source.is_dir() or not path.is_file():
        return {}
    stored = read_json(path)
    return {key: stored[key] for key in ("bayes_accuracy", "sources") if key in stored}
