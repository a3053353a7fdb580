"""The pipelines that are installed, found by their entry points."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from diptych.contract import Pipeline
from diptych.errors import UsageError

GROUP = "diptych.pipelines"


def points() -> dict[str, EntryPoint]:
    """Entry points by pipeline name, sorted."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    return dict(sorted(found.items()))


def load(name: str) -> Pipeline:
    """A pipeline by its name.

    Raises:
        UsageError: No installed wheel offers it.
    """
    known = points()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"pip install diptych-{name}"
        raise UsageError(f"no pipeline '{name}' is installed: {hint}")
    pipeline: Pipeline = known[name].load()
    return pipeline
