"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of the fuzzers, which are slow tests: how many inputs, and which."""
    parser.addoption("--fuzz-count", type=int, default=2000, help="damaged files in all")
    parser.addoption("--fuzz-seed", type=int, default=1, help="of the damage")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where other programs want the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
