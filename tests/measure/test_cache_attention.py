"""Attention over a stored cache at once, against decoding token by token with a cache that stores round trips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.round_trip import round_trip
from lowbit.measure.kv.runner import Runner
from lowbit.measure.kv.stored import FormatCache, OneSide, stored_side
from tiny import tiny_model

TOKENS = 40


class Stored(DynamicLayer):
    """One token at a time: what it returns is what the format says that a query at the newest position reads."""

    def __init__(self, keys: CacheSide, values: CacheSide) -> None:
        super().__init__()
        self.sides = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        exact = super().update(key_states, value_states)
        assert key_states.shape[2] == 1
        query = exact[0].shape[2] - 1
        return tuple(self._read(x, side, query) for x, side in zip(exact, self.sides, strict=True))  # type: ignore[return-value]

    def _read(self, x: Tensor, side: CacheSide, query: int) -> Tensor:
        stored = round_trip(x[0].float(), side)[None].to(x.dtype)
        for j in range(query + 1):
            if j < side.sinks or j >= side.first_recent(query):
                stored[:, :, j] = x[:, :, j]
        return stored


def stepwise(model: Any, ids: Tensor, fmt: CacheFormat) -> Tensor:
    """Logits [tokens, vocabulary] by plain decoding."""
    cache = DynamicCache()
    cache.layers = [Stored(fmt.side(i, "k"), fmt.side(i, "v")) for i in range(model.config.num_hidden_layers)]
    with torch.no_grad():
        return torch.cat([model(token[None, None], past_key_values=cache, use_cache=True).logits[0] for token in ids])


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    """Weights large enough that attention looks at something; in float64, so that no code is a matter of rounding."""
    found = tiny_model(request.param).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3.0)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "int4",
        "rotate@int4",
        "int3:recent=5",
        "int3:sinks=2",
        "int3:recent=1",
        "uint2:8x1:min=fp16",
        "uint2:8x1:min=fp16:recent=3:sinks=1",
        "k=uint2:16x1:min=fp16:recent=4,v=int2:recent=9:sinks=3",
        "k=int16,v=int2:g4:recent=2",
        "kv=int3:recent=2,k:0=int16,v:1=uint2:4x1:min=fp16",
    ],
)
def test_all_positions_at_once_read_what_decoding_reads(model: Any, text: str) -> None:
    fmt = CacheFormat.of(text)
    ids = torch.randint(3, 128, (TOKENS,), generator=torch.Generator().manual_seed(1))
    runner = Runner(model)
    assert runner.parallel
    found = runner.logits(runner.run(ids, FormatCache(fmt)), slice(0, TOKENS))
    expected = stepwise(model, ids, fmt)
    exact = runner.logits(runner.run(ids), slice(0, TOKENS))
    changed = (expected - exact).norm() / exact.norm()
    assert (found - expected).norm() / exact.norm() < 1e-4
    assert changed > 1e-3  # it tells formats apart


def test_long_contexts_are_cut_into_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.measure.kv import attention

    runner = Runner(tiny_model("llama"))
    ids = torch.randint(3, 128, (100,), generator=torch.Generator().manual_seed(2))
    cache = FormatCache(CacheFormat.of("uint2:16x1:min=fp16:recent=5:sinks=3"))
    whole = runner.logits(runner.run(ids, cache), slice(0, 100))
    monkeypatch.setattr(attention, "_SCORES", 1)
    assert torch.allclose(runner.logits(runner.run(ids, cache), slice(0, 100)), whole, atol=1e-6)


def test_logits_of_some_positions_are_those_of_the_whole_model() -> None:
    for name in ("llama", "gemma2", "opt"):  # gemma2 bends its logits after the head, opt is not split
        model = tiny_model(name)
        ids = torch.arange(3, 30)
        with torch.no_grad():
            expected = model(ids[None], use_cache=False).logits[0]
        runner = Runner(model)
        assert torch.allclose(runner.logits(runner.run(ids), slice(5, 9)), expected[5:9], atol=1e-5), name
        assert "forward" not in vars(model.base_model) and model.config._attn_implementation != "lowbit-stored-cache"


def test_one_side_changes_nothing_before_its_layer() -> None:
    runner = Runner(tiny_model("llama"))
    ids = torch.arange(3, 40)
    seen: dict[int, Tensor] = {}
    side = stored_side(CacheFormat.of("int2").keys)
    runner.run(ids, None, lambda layer, q, *_: seen.__setitem__(layer, q))
    exact = dict(seen)
    runner.run(ids, OneSide(1, "v", side), lambda layer, q, *_: seen.__setitem__(layer, q))
    assert all(torch.equal(seen[layer], exact[layer]) for layer in exact)
    runner.run(ids, OneSide(0, "k", side), lambda layer, q, *_: seen.__setitem__(layer, q))
    assert torch.equal(seen[0], exact[0]) and not torch.equal(seen[1], exact[1])
