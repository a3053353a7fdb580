"""Where the real tables lie, and small ones written in each form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

FOLDER = "recsys"


def real_data() -> Path:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("DIPTYCH_TEST_DATA", root / ".." / "shared" / "data")) / FOLDER
    if not folder.is_dir():
        pytest.skip(f"no real tables: set DIPTYCH_TEST_DATA to a folder that holds {FOLDER}/")
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[object]], header: str = "") -> Path:
    header = header or "subject_id,item_id,time"
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def histories() -> Mapping[str, list[str]]:
    """Three subjects; no item id is a subject id, so that exchanged columns are seen."""
    return {"ann": ["11", "13", "12"], "bob": ["12", "11"], "cy": ["14", "11", "13", "12"]}
