"""Versions of what modules store: a state dict is loaded whole or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diptych_contrast.errors import ContrastInputError

STATE_VERSION = 1


def keep_version(module: nn.Module) -> None:
    """Store the state's version as a tensor and refuse a state of a later version by name."""
    module.register_buffer("version", torch.tensor(STATE_VERSION))
    name = type(module).__name__

    def check(_: nn.Module, state: Mapping[str, Any], prefix: str, *_rest: Any) -> None:
        found = state.get(prefix + "version")
        if found is not None and int(found) > STATE_VERSION:
            raise ContrastInputError(
                f"{name}.load_state_dict",
                f"{prefix}version",
                f"is {int(found)}, this package reads up to {STATE_VERSION}",
                "update diptych-contrast",
            )

    module.register_load_state_dict_pre_hook(check)  # type: ignore[no-untyped-call]
