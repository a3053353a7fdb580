"""The options of the verb that this pipeline adds to the common ones."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from diptych.config import Section


class ItemsOptions(Section):
    """Where the item vectors go."""

    out: Path = Field(description="New folder for items.npy, items.parquet and items.json.")
