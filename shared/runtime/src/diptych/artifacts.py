"""Artifacts of a fit: tables, arrays and JSON in a folder, one file each, without pickle."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diptych.contract import JSON, Artifact
from diptych.errors import DataError
from diptych.files import read_json, write_json
from diptych.folders import write_folder

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def save(artifacts: Mapping[str, Artifact], folder: Path) -> None:
    """Write artifacts into a folder, in place of what was there.

    Tables become ``NAME.parquet``, arrays ``NAME.npy``, mappings of arrays ``NAME.npz`` and
    everything else ``NAME.json``, where numbers that are not finite become null.

    Args:
        artifacts: By name: letters, digits, ``_``, ``-`` and ``.``.
        folder: Where; a reader sees the old folder or the whole new one.

    Raises:
        TypeError: An artifact is of another kind, or an array holds python objects.
        ValueError: A name cannot be a file name.
    """
    for name in artifacts:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"artifact {name!r}: use letters, digits, '_', '-' and '.' in its name"
            )

    def write(beside: Path) -> None:
        for name, value in artifacts.items():
            _save_one(name, value, beside)

    write_folder(folder, write)


def load(folder: Path) -> dict[str, Artifact]:
    """Read what :func:`save` wrote.

    Args:
        folder: The folder of artifacts.

    Returns:
        Artifacts by name, in the order of their names; none where there is no folder.

    Raises:
        DataError: A file is damaged.
    """
    files = sorted(file for file in folder.glob("*") if not file.name.startswith("."))
    return {file.name.removesuffix(file.suffix): _load_one(file) for file in files}


def _save_one(name: str, value: Artifact, folder: Path) -> None:
    import polars as pl

    if isinstance(value, pl.DataFrame):
        value.write_parquet(folder / f"{name}.parquet")
    elif isinstance(value, np.ndarray):
        np.save(folder / f"{name}.npy", _without_objects(name, value), allow_pickle=False)
    elif isinstance(value, Mapping) and _holds_arrays(value):
        # numpy.savez takes the names as keywords, which forbids an array called "file"
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as archive:
            for key, array in value.items():
                entry = zipfile.ZipInfo(f"{key}.npy")  # carries no date: equal fits, equal bytes
                with archive.open(entry, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(
                        stream, _without_objects(f"{name}/{key}", array), allow_pickle=False
                    )
    else:
        write_json(folder / f"{name}.json", _plain(value, name))


def _load_one(file: Path) -> Artifact:
    import polars as pl

    try:
        if file.suffix == ".parquet":
            return pl.read_parquet(file)
        if file.suffix == ".npy":
            return np.load(file, allow_pickle=False)
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        if file.suffix == ".json":
            return read_json(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}): restore it from a copy, or train this fit again"
        ) from error
    raise DataError(f"{file}: no artifact has this ending: remove the file")


def _holds_arrays(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(array, np.ndarray) for array in value.values())


def _without_objects(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.hasobject:
        raise TypeError(f"artifact {name}: holds python objects: convert it to numbers or strings")
    return array


def _plain(value: Any, where: str) -> JSON:
    """The value as ``json`` takes it; numpy's scalars become python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"artifact {where}: key {key!r} is no string: convert the keys")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"artifact {where}: is a {type(value).__name__}: give a polars DataFrame, an ndarray, "
        "a mapping of ndarrays, or JSON"
    )
