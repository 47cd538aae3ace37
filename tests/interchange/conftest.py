"""Lets the tests of this folder import `tiny` from the folder above, and finds SmolLM2 without the network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of SmolLM2 where it is installed or cached; else the test is skipped."""
    from lowbit.interchange.hub import smollm2

    path = smollm2.at_hand()
    if path is None:
        pytest.skip("SmolLM2 is neither installed nor in the cache")
    return path
