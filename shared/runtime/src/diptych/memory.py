"""How a training process deals with memory that tensors give back."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# Parameters of mallopt(3), from malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _STEP = 2**31 - 1, 64 << 20


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free, instead of returning it to the system.

    A training step on a CPU frees and asks for the same tens of megabytes again and again. By
    default each large block is mapped and unmapped, and the system hands out every page as zeros
    anew; in virtual machines that costs more than the arithmetic on it. The process holds no more
    than its peak. ``tools/bench/mvcnet_step.py`` measures what it gives.

    Returns:
        Whether the C library took it (Linux with the GNU C library); elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        return bool(
            mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_TOP_PAD, _STEP)
        )
    return False
