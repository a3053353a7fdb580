"""Settings of all tests of the contrastive primitives."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The double loops of `references` are shared by several test files.
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep small tests from fighting over cores, and runs equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
