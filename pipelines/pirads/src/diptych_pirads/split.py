"""Which patients train, validate and test: by subject, the strata dealt out evenly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from diptych.errors import DataError, UsageError
from diptych.findings import Finding, Findings
from diptych.randomness import Draw
from diptych.split import Split, as_rows
from diptych_pirads.config import PiradsSplitSection

PARTS = ("train", "validation", "test")
TERCILES = (1 / 3, 2 / 3)


def splits_of(section: PiradsSplitSection, index: pl.DataFrame) -> list[Split]:
    """The splits that the section means; one for each fold.

    Args:
        section: The section `split`. The user's own division, from the manifest's column split
            or from `split.file`, wins over kind and fractions.
        index: Rows of the prepared data: subject, scheme, center, gland_ml, split or fold.

    Returns:
        Splits by subject. Test and validation hold labelled studies alone; subjects without any
        label train.

    Raises:
        UsageError: The user's own division and `split.kind=kfold` contradict each other.
        DataError: A part that the protocol needs has no labelled subject.
    """
    given = [c for c in ("split", "fold") if c in index.columns and index[c].is_not_null().any()]
    if "fold" in given:
        folds = sorted(index["fold"].drop_nulls().unique().to_list())
        part_of = dict(index.select("subject", "fold").drop_nulls().iter_rows())
        made = [_test_fold(section, index, part_of, fold) for fold in folds]
    elif "split" in given:
        if section.kind == "kfold":
            raise UsageError(
                "split.kind=kfold: the manifest has a column split of its own: leave it empty, or "
                "take split.kind=holdout"
            )
        made = [_rows(index, dict(index.select("subject", "split").drop_nulls().iter_rows()))]
    elif section.kind == "file":
        raise UsageError(
            "split.kind=file: the prepared data hold no division of the user's; name the CSV with "
            "--set split.file=FILE and prepare again"
        )
    elif section.kind == "kfold":
        names = [str(fold) for fold in range(section.folds)]
        part_of = _dealt(index, dict.fromkeys(names, 1 / section.folds), section.seed, "folds")
        made = [_test_fold(section, index, part_of, name) for name in names]
    else:
        shares = dict(zip(PARTS, section.fractions, strict=True))
        made = [_rows(index, _dealt(index, shares, section.seed, "holdout"))]
    for split in made:
        _refuse_empty(split, index)
    return made


def everyone(index: pl.DataFrame) -> Split:
    """All studies as training part: of the model that predicts after a cross-validation."""
    return Split(as_rows(range(index.height)))


def _test_fold(
    section: PiradsSplitSection, index: pl.DataFrame, fold_of: Mapping[str, str], fold: str
) -> Split:
    """One fold tests; of the others the validation part is dealt out."""
    rest = index.filter(
        pl.col("subject").is_in([s for s, f in fold_of.items() if f == fold]).not_()
    )
    share = section.fractions[1]
    shares = {"train": 1 - share, "validation": share}
    part_of = _dealt(rest, shares, section.seed, f"validation of fold {fold}")
    return _rows(index, part_of | {s: "test" for s, f in fold_of.items() if f == fold})


def _rows(index: pl.DataFrame, part_of: Mapping[str, str]) -> Split:
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    labelled = set(index.filter(pl.col("scheme").is_not_null())["subject"])
    for row, (subject, scheme) in enumerate(index.select("subject", "scheme").iter_rows()):
        part = part_of.get(subject, "" if subject in labelled else "train")
        if part and (part == "train" or scheme is not None):
            parts[part].append(row)
    train, validation, test = (as_rows(parts[part]) for part in PARTS)
    return Split(train, validation, test)


def _dealt(
    index: pl.DataFrame, shares: Mapping[str, float], seed: int, purpose: str
) -> dict[str, str]:
    """Labelled subjects to parts: in keyed order within each stratum, to the part that lacks most.

    Args:
        index: Rows of the prepared data.
        shares: Part -> share of the subjects, sum 1.
        seed: `split.seed`.
        purpose: Keeps different divisions apart.

    Returns:
        Subject -> part.
    """
    strata = _strata(index)
    subjects = sorted(strata)
    key = {_number(name): name for name in subjects}
    drawn = [key[number] for number in Draw(seed).of("split").of(purpose).permutation(list(key))]
    ordered = sorted(drawn, key=lambda name: strata[name])  # stable: keyed order inside a stratum
    counts = dict.fromkeys(shares, 0)
    part_of = {}
    for number, subject in enumerate(ordered, 1):
        part = max(shares, key=lambda name: shares[name] * number - counts[name])
        counts[part] += 1
        part_of[subject] = part
    return part_of


def _number(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _strata(index: pl.DataFrame) -> dict[str, tuple[bool, str, str, int]]:
    """Labelled subject -> whether zones are partial, scheme, center, tercile of gland volume."""
    labelled = index.filter(pl.col("scheme").is_not_null())
    volumes = labelled.group_by("subject", maintain_order=True).agg(pl.col("gland_ml").mean())
    values = volumes["gland_ml"].fill_null(0.0).to_numpy()
    edges = np.quantile(values, TERCILES) if len(values) else np.zeros(2)
    tercile = dict(zip(volumes["subject"], np.searchsorted(edges, values).tolist(), strict=True))
    strata: dict[str, tuple[bool, str, str, int]] = {}
    for subject, scheme, center in labelled.select("subject", "scheme", "center").iter_rows():
        own = (scheme != "zones4", str(scheme), str(center or ""), int(tercile[subject]))
        strata[subject] = min(own, strata.get(subject, own))
    return strata


def _refuse_empty(split: Split, index: pl.DataFrame) -> None:
    known = index["scheme"].is_not_null().to_list()
    needed: dict[str, Sequence[int]] = {"train": split.train, "test": split.test}
    empty = [part for part, rows in needed.items() if not any(known[row] for row in rows)]
    if not empty:
        return
    found = f"no labelled study in {' and '.join(empty)}"
    fix = "give more labelled patients, other split.fractions, or a column split in the manifest"
    finding = Finding("error", "split.impossible", "split", found, fix)
    raise DataError(finding.line(), Findings((finding,)))
