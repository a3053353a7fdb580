"""Motor-imagery EEG decoding (MVCNet): from recordings to a decoder beside honest baselines."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "MVCNet": "model",
    "MVCNetClassifier": "estimator",
    "StreamDecoder": "stream",
    "generate_sample": "sample",
}
__all__ = ["MVCNet", "MVCNetClassifier", "StreamDecoder", "generate_sample"]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used, so that ``--help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diptych_mvcnet' has no attribute '{name}'")
    return getattr(importlib.import_module(f"diptych_mvcnet.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
