"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float folder of a tiny architecture, written once."""

    from tiny import save_tiny

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(f"float-{name}") / "model"
        save_tiny(name, path)
        return path

    return folder


@pytest.fixture(scope="session")
def packed_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]
) -> Callable[[str, str], Path]:
    """The folder that quantizing a tiny architecture by a recipe gives, made once. Do not write to it."""

    @cache
    def folder(name: str, recipe: str) -> Path:
        import lowbit

        out = tmp_path_factory.mktemp(f"packed-{name}") / "out"
        lowbit.quantize(tiny_folder(name), recipe, out)
        return out

    return folder
