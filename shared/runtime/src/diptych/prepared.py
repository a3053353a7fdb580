"""The prepared folder: an index, facts and memory-mapped arrays, complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock
from joblib import Parallel, delayed

from diptych.errors import DataError
from diptych.files import digest_of, read_json, sync_folder, write_atomically, write_json
from diptych.manifest import FILE as MANIFEST
from diptych.manifest import Manifest, ManifestEntry, Source
from diptych.progress import progress

INDEX, FACTS, CACHE = "index.parquet", "facts.json", "cache"
Ragged = Mapping[str, Sequence[np.ndarray | None]]


@dataclass(frozen=True)
class Prepared:
    """Data ready for training.

    Args:
        path: The prepared folder, or None for data in memory.
        index: One row per smallest thing that a split moves: item, unit, subject, labels.
        facts: JSON that describes the data (classes, channels, preprocessing), free of names.
        arrays: Arrays in memory, for data without a folder.
        ragged_arrays: Arrays in memory that differ in shape from row to row: one a row, or None.
    """

    path: Path | None
    index: pl.DataFrame
    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    ragged_arrays: Ragged = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> Prepared:
        """Open a prepared folder.

        Raises:
            DataError: The folder is not a complete prepared folder.
        """
        if not is_prepared(path):
            raise DataError(
                f"{path}: not a prepared folder ({MANIFEST} or {INDEX} is missing): "
                "run 'prepare' on the original data again"
            )
        return cls(path, pl.read_parquet(path / INDEX), read_json(path / FACTS))

    @classmethod
    def from_arrays(
        cls,
        index: pl.DataFrame,
        facts: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        ragged: Ragged | None = None,
    ) -> Prepared:
        """Prepared data in memory, for estimators and notebooks.

        Args:
            index: At least the column subject; item and unit are added if missing.
            facts: As ``facts.json``.
            arrays: By name, axis 0 aligned with the index.
            ragged: By name one array a row, or None for rows that have none.
        """
        return cls(None, with_items(index), dict(facts), dict(arrays), dict(ragged or {}))

    def array(self, name: str) -> np.ndarray:
        """An array by name, read-only and memory-mapped where a folder holds it."""
        if self.path is None:
            return self.arrays[name]
        return _mapped(self.path / f"{name}.npy")

    def ragged(self, name: str, row: int) -> np.ndarray:
        """One row's array of a name whose arrays differ in shape, memory-mapped in a folder.

        Raises:
            KeyError: This row has no array of the name.
        """
        if self.path is None:
            rows = self.ragged_arrays.get(name, ())
            array = rows[row] if row < len(rows) else None
        else:
            path = self.path / name / _row_file(row)
            array = _mapped(path) if path.is_file() else None
        if array is None:
            raise KeyError(f"row {row} has no array '{name}'")
        return array

    def table(self, name: str) -> pl.DataFrame:
        """A table ``<name>.parquet`` of the folder."""
        if self.path is None:
            raise KeyError(f"data in memory have no table '{name}'")
        return pl.read_parquet(self.path / f"{name}.parquet")

    def digest(self) -> str:
        """Names the data: equal for equal sources, settings and version."""
        if self.path is None:
            return digest_of({"index": self.index.write_csv()})
        return Manifest.read(self.path).digest()

    def cache(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """An array computed once and mapped afterwards; its file may be deleted at any time.

        Args:
            name: What it is: "teacher-features".
            key: Everything that the result depends on (weights, preprocessing, source).
            compute: Gives the array when it is not there.
        """
        if self.path is None:
            return compute()
        path = self.path / CACHE / f"{name}-{digest_of(key)}.npy"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            array = compute()
            write_atomically(path, lambda stream: np.save(stream, array, allow_pickle=False))
        return _mapped(path)


@dataclass(frozen=True)
class Part:
    """What one source file becomes.

    Args:
        rows: Its rows of the index, without the constant columns of its source.
        arrays: By name, axis 0 aligned with the rows.
        facts: JSON about this file that the folder's facts are made of.
        ragged: By name one array a row whose shapes differ, or None for rows that have none.
    """

    rows: pl.DataFrame
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    ragged: Ragged = field(default_factory=dict)


def _mapped(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _row_file(row: int) -> str:
    return f"{row:06d}.npy"


def is_prepared(path: Path) -> bool:
    """Whether a folder is a complete prepared folder."""
    return all((path / name).is_file() for name in (MANIFEST, INDEX, FACTS))


def with_items(index: pl.DataFrame) -> pl.DataFrame:
    """The index with its item column (the row number) and a unit column."""
    index = index.drop("item", strict=False).with_row_index("item")
    index = index.with_columns(pl.col("item").cast(pl.Int64))
    if "unit" not in index.columns:
        index = index.with_columns(unit=pl.col("item").cast(pl.String))
    return index


def prepare_parts(
    target: Path,
    sources: Sequence[Source],
    convert: Callable[[Source], Part],
    *,
    version: str,
    settings: Mapping[str, Any],
    facts: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    label: str = "prepare",
    jobs: int = 1,
) -> Prepared:
    """Convert source files one by one into a prepared folder.

    Nothing is done where the folder already agrees with sources, settings and version. Files that
    did not change keep their rows; an interrupted preparation goes on where it stopped. The folder
    appears under its name only when it is complete.

    Args:
        target: The prepared folder.
        sources: Source files in the order of their rows.
        convert: One file to its part; must be picklable when ``jobs`` > 1.
        version: Changes whenever ``convert`` would give something else.
        settings: JSON of everything that ``convert`` depends on.
        facts: The parts' facts, in the order of the sources, to the folder's facts.
        label: Words beside the progress bar.
        jobs: Processes; each holds one file in memory.

    Returns:
        The opened folder.

    Raises:
        DataError: A file could not be converted, or parts do not fit together.
    """
    if not sources:
        raise DataError("no file to prepare: every file was excluded or skipped")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        wanted = Manifest(
            version,
            digest_of(settings),
            tuple(
                ManifestEntry(s.size, s.digest, 0, dict(s.columns), {}, s.files) for s in sources
            ),
        )
        before = Prepared.open(target) if is_prepared(target) else None
        if before is not None and before.digest() == wanted.digest():
            return before
        partial = _partial_folder(target, wanted)
        try:
            _convert_missing(partial, sources, convert, before, wanted, label, jobs)
            _assemble(partial, sources, wanted, facts)
        except DataError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial / "parts")
        (partial / "key.json").unlink()
        publish(partial, target)
    return Prepared.open(target)


def _partial_folder(target: Path, wanted: Manifest) -> Path:
    """The folder of an unfinished preparation, emptied if it belongs to other settings."""
    partial = target.with_name(f".{target.name}.partial")
    key = {"version": wanted.version, "settings": wanted.settings}
    mark = partial / "key.json"
    if partial.exists() and not (mark.is_file() and read_json(mark) == key):
        shutil.rmtree(partial)
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    write_json(mark, key)
    return partial


def _convert_missing(
    partial: Path,
    sources: Sequence[Source],
    convert: Callable[[Source], Part],
    before: Prepared | None,
    wanted: Manifest,
    label: str,
    jobs: int,
) -> None:
    kept = _kept_parts(before, wanted)
    missing = {s.name: s for s in sources if not (partial / "parts" / s.name).is_dir()}
    for name in missing.keys() & kept.keys():
        _save_part(partial, name, kept[name]())
    todo = [source for name, source in missing.items() if name not in kept]
    work = (delayed(_convert_one)(partial, source, convert) for source in todo)
    with progress(len(todo), label) as bar:
        for _ in Parallel(n_jobs=min(jobs, max(len(todo), 1)), return_as="generator_unordered")(
            work
        ):
            bar.advance()


def _convert_one(partial: Path, source: Source, convert: Callable[[Source], Part]) -> None:
    _save_part(partial, source.name, convert(source))


def _kept_parts(before: Prepared | None, wanted: Manifest) -> dict[str, Callable[[], Part]]:
    """The unchanged files of the folder that is being replaced."""
    if before is None or before.path is None:
        return {}
    manifest = Manifest.read(before.path)
    if (manifest.version, manifest.settings) != (wanted.version, wanted.settings):
        return {}
    names = [path.stem for path in before.path.glob("*.npy")]
    ragged_names = _ragged_names(before.path)
    parts: dict[str, Callable[[], Part]] = {}
    for entry in manifest.sources:
        name = entry.sha256[:12]

        def part(name: str = name, entry: ManifestEntry = entry) -> Part:
            rows = before.index.filter(pl.col("source") == name)
            items = rows["item"].to_numpy()
            arrays = {key: before.array(key)[items] for key in names}
            ragged = {key: [_stored(before, key, item) for item in items] for key in ragged_names}
            constant = ["item", "source", *entry.columns]
            return Part(rows.drop(constant, strict=False), arrays, entry.facts, ragged)

        parts[name] = part
    return parts


def _ragged_names(folder: Path) -> list[str]:
    return sorted({path.parent.name for path in folder.glob("*/*.npy")} - {CACHE})


def _stored(before: Prepared, name: str, row: int) -> np.ndarray | None:
    try:
        return before.ragged(name, int(row))
    except KeyError:
        return None


def _save_part(partial: Path, name: str, part: Part) -> None:
    lengths = {key: len(array) for key, array in part.arrays.items()}
    lengths |= {key: len(arrays) for key, arrays in part.ragged.items()}
    if any(length != part.rows.height for length in lengths.values()):
        raise ValueError(f"a part has {part.rows.height} rows and arrays of lengths {lengths}")
    beside = partial / "parts" / f".{name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    part.rows.write_parquet(beside / INDEX)
    write_json(beside / FACTS, dict(part.facts))
    for key, array in part.arrays.items():
        np.save(beside / f"{key}.npy", array, allow_pickle=False)
    for key, arrays in part.ragged.items():
        for row, own in enumerate(arrays):
            if own is not None:
                (beside / key).mkdir(exist_ok=True)
                np.save(beside / key / _row_file(row), own, allow_pickle=False)
    beside.replace(partial / "parts" / name)


def _assemble(
    partial: Path,
    sources: Sequence[Source],
    wanted: Manifest,
    facts: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
) -> None:
    parts = [partial / "parts" / source.name for source in sources]
    rows = [pl.read_parquet(part / INDEX) for part in parts]
    part_facts = [read_json(part / FACTS) for part in parts]
    tables = [
        table.with_columns(
            *(pl.lit(value).alias(column) for column, value in source.columns.items()),
            pl.lit(source.name).alias("source"),
            *_units(table, source),
        )
        for table, source in zip(rows, sources, strict=True)
        if table.height
    ]
    if not tables:
        raise DataError("the preparation kept no row of any file: see the findings of 'check'")
    index = with_items(pl.concat(tables, how="diagonal_relaxed"))
    for key in sorted(path.stem for path in parts[0].glob("*.npy")):
        _concatenate([part / f"{key}.npy" for part in parts], partial / f"{key}.npy", index.height)
    _gather_ragged(parts, [table.height for table in rows], partial)
    write_atomically(partial / INDEX, index.write_parquet)
    write_json(partial / FACTS, dict(facts(part_facts)))
    entries = tuple(
        ManifestEntry(entry.size, entry.sha256, table.height, entry.columns, own, entry.files)
        for entry, table, own in zip(wanted.sources, rows, part_facts, strict=True)
    )
    write_json(partial / MANIFEST, Manifest(wanted.version, wanted.settings, entries).to_json())


def _units(table: pl.DataFrame, source: Source) -> list[pl.Expr]:
    """Names of units for a pipeline that gives none; they stay when other files change."""
    if "unit" in table.columns or "unit" in source.columns:
        return []
    row = pl.int_range(pl.len()).cast(pl.String)
    return [(pl.lit(f"{source.name}-") + row).alias("unit")]


def _concatenate(parts: Sequence[Path], target: Path, rows: int) -> None:
    """Join arrays along axis 0, one part in memory at a time."""
    arrays = [array for part in parts if len(array := np.load(part, mmap_mode="r"))]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise DataError(
            f"prepared files differ in shape ({sorted(shapes)}): give all the same channels, "
            "sampling rate and window, or exclude the odd ones"
        )
    header = {
        "descr": np.lib.format.dtype_to_descr(arrays[0].dtype),
        "fortran_order": False,
        "shape": (rows, *arrays[0].shape[1:]),
    }
    # Not through a memory map: on a full disk that kills the process, where a write says so.
    with target.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for array in arrays:
            np.ascontiguousarray(array).tofile(stream)


def _gather_ragged(parts: Sequence[Path], heights: Sequence[int], target: Path) -> None:
    """Link the arrays of single rows under their numbers in the whole index."""
    for name in sorted({name for part in parts for name in _ragged_names(part)}):
        shutil.rmtree(target / name, ignore_errors=True)
        (target / name).mkdir()
    first = 0
    for part, height in zip(parts, heights, strict=True):
        for path in part.glob("*/*.npy"):
            _link(path, target / path.parent.name / _row_file(first + int(path.stem)))
        first += height


def _link(source: Path, target: Path) -> None:
    """A second name for a file: if the process dies here, its part is still whole."""
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def publish(partial: Path, target: Path) -> None:
    """Put a finished folder under its name; an older one makes way for it.

    Args:
        partial: The folder, beside the target.
        target: Its name.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    partial.replace(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
