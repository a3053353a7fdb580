"""Folders that are complete or absent: written beside, synced, then renamed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from diptych.files import sync_folder

BESIDE = re.compile(r"\.(.+)\.[0-9a-f]{8}")  # a name while it is written


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Write a folder so that a reader sees it whole or not at all.

    A folder that was there before is replaced; between its two renames there is none.

    Args:
        target: Where the folder belongs; its parents are made.
        write: Receives a new empty folder and puts files into it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, before = _name_beside(target), _name_beside(target)
    try:
        beside.mkdir()
        write(beside)
        for entry in (beside, *beside.rglob("*")):
            sync_folder(entry) if entry.is_dir() else _sync_file(entry)
        if target.exists():
            os.replace(target, before)  # noqa: PTH105 - one name for what tests interrupt
        os.replace(beside, target)  # noqa: PTH105
        sync_folder(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing beside the entries of a folder."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if BESIDE.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _name_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _sync_file(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
