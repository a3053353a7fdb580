"""What a training process keeps of the memory that tensors give back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from diptych.memory import keep_freed_memory
{keep}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(8 << 20)
before = faults()
for _ in range(5):
    np.ones(8 << 20)
print(faults() - before)
"""


def page_faults(keep: str) -> int:
    """Page faults of five arrays of 64 MB after the first, in a fresh process."""
    code = FAULTS.format(keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_a_large_array_reuses_the_pages_of_the_one_before_it() -> None:
    assert page_faults("assert keep_freed_memory()") < page_faults("") / 10
