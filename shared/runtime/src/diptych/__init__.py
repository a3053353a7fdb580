"""The runtime of the Diptych pipelines; names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.api import Run, open_run, train

__all__ = ["Run", "__version__", "open_run", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("diptych")
    if name in __all__:
        from diptych import api

        return getattr(api, name)
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
