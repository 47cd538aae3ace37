"""From weights to the program: the same in any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.engine.build import Builder, Program
from lowbit.engine.opening import opened
from lowbit.engine.shape import shape_of
from lowbit.engine.weights import Found, Weights
from lowbit.errors import EngineError
from lowbit.kernels.core import core


def program(weights: Weights, threads: int) -> Program:
    return Builder(core(), shape_of(weights.config), weights, "int8").build(threads)


def rows(model: Any) -> Iterator[Any]:
    """Every row of every weight of a model, in its order."""
    for weight in model.weights:
        row = np.empty(weight.cols, dtype=np.float32)
        for i in range(weight.rows):
            weight.unpack_row(i, row)
            yield row.copy()


@pytest.mark.parametrize("recipe", ["int4:g32", "nf4:g32", "int8:g32"])
def test_threads_build_what_one_builds(recipe: str, packed_folder: Callable[..., Path]) -> None:
    weights, _, _ = opened(packed_folder("qwen3", recipe))
    one, several = program(weights, 1), program(weights, 4)
    assert (one.nbytes, one.lookup_bytes, one.expanded) == (several.nbytes, several.lookup_bytes, several.expanded)
    assert one.rounded == several.rounded and bool(one.rounded) == (recipe == "nf4:g32")
    first, second = list(rows(one.model)), list(rows(several.model))
    assert len(first) == len(second) > 0
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_missing_in_a_layer_is_said_in_order(packed_folder: Callable[..., Path]) -> None:
    weights, _, _ = opened(packed_folder("qwen3", "int4:g32"))

    class Without(Weights):
        config = weights.config

        def find(self, name: str) -> Found | None:
            return None if name.endswith("down_proj.weight") else weights.find(name)

    with pytest.raises(EngineError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight'"):
        program(Without(), 4)


def test_a_token_reads_the_experts_that_it_takes(packed_folder: Callable[..., Path]) -> None:
    weights, _, _ = opened(packed_folder("mixtral", "int4:g32"))
    config, shape = dict(weights.config), shape_of(weights.config)
    idle, whole = [], 0
    for taken in (1, 2, 3, 4):  # of four
        weights.config = {**config, "num_experts_per_tok": taken}
        built = program(weights, 2)
        idle.append(built.idle_bytes)
        whole = built.nbytes
    each = idle[2]
    assert idle == [3 * each, 2 * each, each, 0]
    assert 3 * shape.layers * shape.width * shape.expert_hidden / 2 <= each < whole / 4
