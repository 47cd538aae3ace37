"""QuantizedCache in transformers: every kind of model, and every way to generate, against a cache that rounds and stores nothing."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from cache_models import cache_model
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, EncoderDecoderCache, LlamaConfig, cache_utils

import lowbit
from lowbit.errors import RecipeError
from lowbit.kv import CacheFormat, calibrate, round_trip
from tiny import VOCAB, save_tiny

MODELS = [
    "llama", "qwen3", "gemma2", "gemma3", "phi", "gpt2", "gpt-neox", "opt", "bloom", "falcon", "mixtral", "mla", "windows", "linear",
    "gemma3n", "zamba", "ctrl",
]  # fmt: skip


class Rounded(DynamicCache):
    """What is stored is rounded and kept in full: the reference of sides that read each token as stored."""

    def __init__(self, cache: str, config: Any) -> None:
        super().__init__(config=config)
        self.format = CacheFormat.of(cache)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        states = []
        for which, x in (("k", key_states), ("v", value_states)):
            flat = x.reshape(-1, *x.shape[-2:]).float()
            side = self.format.side(layer_idx, which)  # type: ignore[arg-type]
            states.append(round_trip(flat, side).view(x.shape).to(x.dtype))
        return super().update(states[0], states[1], layer_idx, *rest, **more)


def argument(model: Any) -> str:
    """What the forward calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, cache: Any, text: Tensor, chunks: tuple[int, ...] = (9, 1, 1, 4, 1, 1)) -> Tensor:
    """Of text read in chunks through a cache."""
    out, at = [], 0
    for chunk in chunks:
        out.append(model(text[:, at : at + chunk], use_cache=True, **{argument(model): cache}).logits)
        at += chunk
    return torch.cat(out, 1)


def generated(model: Any, cache: Any, text: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found = model.generate(text, max_new_tokens=10, do_sample=False, **{argument(model): cache}, **options)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_model_reads_what_was_rounded(name: str) -> None:
    model, text = cache_model(name), ids(2, 17)
    floats = logits(model, DynamicCache(config=model.config), text)
    for cache, most in (("int8", 0.03), ("k=int4:g4,v=rotate@int4", 0.4)):
        quantized = lowbit.QuantizedCache(cache, model)
        found = logits(model, quantized, text)
        assert torch.equal(found, logits(model, Rounded(cache, model.config), text))
        assert 0 < float((found - floats).norm() / floats.norm()) < most
        assert quantized.nbytes < sum(t.numel() * 4 for t in _states(model, text))
    exact = logits(model, lowbit.QuantizedCache("int16", model), text)
    assert torch.equal(exact, floats)


def _states(model: Any, text: Tensor) -> list[Tensor]:
    cache = DynamicCache(config=model.config)
    logits(model, cache, text)
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [t for t in found if t is not None] + [
        t for layer in cache.layers for name in ("conv_states", "recurrent_states")
        for t in getattr(layer, name, {}).values() if t is not None
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "windows", "linear"])
def test_exact_where_nothing_is_stored_yet(name: str) -> None:
    model, text = cache_model(name), ids(1, 17)
    floats = logits(model, DynamicCache(config=model.config), text)
    for cache in ("int2:recent=32", "uint1:32x1:min=fp16", "int2:sinks=32"):
        assert torch.equal(logits(model, lowbit.QuantizedCache(cache, model), text), floats)


@pytest.mark.parametrize("name", ["llama", "windows", "mla"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 1}])
def test_beams_and_padding(name: str, options: dict[str, int]) -> None:
    model, text = cache_model(name), ids(2, 12)
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    caches = [lowbit.QuantizedCache("int4", model), Rounded("int4", model.config)]
    found, wanted = (generated(model, cache, text, attention_mask=mask, **options) for cache in caches)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["llama", "windows"])
@pytest.mark.parametrize("cache", ["int4", "uint3:4x1:min=fp16:recent=5:sinks=2"])
def test_assisted_generation_is_generation(name: str, cache: str) -> None:
    """Drafts are taken back without a trace: in sides that read each token as stored, to the bit."""
    model, text = cache_model(name), ids(1, 12)
    alone = lowbit.QuantizedCache(cache, model)
    assisted = lowbit.QuantizedCache(cache, model)
    wanted = generated(model, alone, text)
    found = generated(model, assisted, text, prompt_lookup_num_tokens=3)
    if cache == "int4":
        assert torch.equal(found, wanted)
    assert alone.get_seq_length() == assisted.get_seq_length() == text.shape[1] + 9
    draft = generated(model, lowbit.QuantizedCache(cache, model), text, assistant_model=cache_model(name))
    assert draft.shape == wanted.shape


def test_a_shared_prefix_is_repeated_and_chosen_from() -> None:
    model, prefix = cache_model("llama"), ids(1, 9)
    rest = ids(3, 6, seed=1)
    cache = lowbit.QuantizedCache("int8:recent=2:outliers=1", model)
    logits(model, cache, prefix, (9,))
    copied = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    together = logits(model, cache, rest, (6,))
    for row in range(3):
        alone = logits(model, copy.deepcopy(copied), rest[row : row + 1], (6,))
        assert float((together[row] - alone[0]).norm() / alone.norm()) < 1e-5
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.layers[0].keys.shape == (2, 2, 15, 8)
    assert copied.get_seq_length() == 9


def test_crop_and_reset() -> None:
    model, text = cache_model("llama"), ids(1, 17)
    cache = lowbit.QuantizedCache("int8", model)
    logits(model, cache, text)
    held = cache.nbytes
    cache.crop(-8)
    assert cache.get_seq_length() == 9 and cache.nbytes * 17 == held * 9
    again = logits(model, cache, text[:, 9:], (1, 1, 4, 1, 1))
    fresh = logits(model, lowbit.QuantizedCache("int8", model), text)[:, 9:]
    assert torch.equal(again, fresh) and cache.nbytes == held
    cache.reset()
    assert cache.nbytes == 0 and torch.equal(logits(model, cache, text)[:, 9:], fresh)


@pytest.mark.parametrize("name", ["t5", "marian"])
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoders(name: str, beams: int) -> None:
    model, text = cache_model(name), ids(2, 9)

    def pair(make: Any) -> EncoderDecoderCache:
        return EncoderDecoderCache(make("int4:g4"), make("int8"))

    found = generated(model, pair(lambda c: lowbit.QuantizedCache(c, model)), text, num_beams=beams)
    assert torch.equal(found, generated(model, pair(lambda c: Rounded(c, model.config)), text, num_beams=beams))
    generated(model, lowbit.QuantizedCache("int8", model), text, num_beams=beams)


def test_bytes_of_a_model_are_those_of_the_plan() -> None:
    model = cache_model("llama").to(torch.bfloat16)
    for text in ("int8", "k=int4:g4,v=int3", "rotate@int4:recent=4:sinks=2", "k=int8,v=int16"):
        cache, tokens = lowbit.QuantizedCache(text, model), 25
        logits(model, cache, ids(2, tokens), (24, 1))
        sides = [CacheFormat.of(text).side(layer, which) for layer in range(2) for which in ("k", "v")]  # type: ignore[arg-type]
        per_head = sum(side.nbytes(tokens, 8) + 2 * 8 * side.exact_tokens(tokens) for side in sides)
        assert cache.nbytes == 2 * 2 * per_head


def test_quantized_models_and_calibrated_caches(tmp_path: Any) -> None:
    save_tiny("llama", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "w4", tmp_path / "packed")
    model, text = lowbit.load(tmp_path / "packed"), ids(1, 17)
    floats = logits(model, DynamicCache(config=model.config), text)
    format = CacheFormat.of("kvquant4")
    tables = calibrate(model, [ids(1, 60, seed=i)[0] for i in range(3)], format)
    found = logits(model, lowbit.QuantizedCache(format, model, tables), text)
    assert 0 < float((found - floats).norm() / floats.norm()) < 0.1
    with pytest.raises(RecipeError, match=r"calibration text.*lowbit\.kv\.calibrate"):
        lowbit.QuantizedCache(format, model)


def test_a_window_beside_linear_attention() -> None:
    """No small model of transformers has such layers, so the layers themselves are asked."""
    config = LlamaConfig(num_hidden_layers=1, layer_types=["hybrid_sliding"], sliding_window=6)
    ours, plain = lowbit.QuantizedCache("int4", config), Rounded("int4", config)
    for cache in (ours, plain):
        cache.activate_past_recording()
    for i, tokens in enumerate((9, 1, 4, 1)):
        generator = torch.Generator().manual_seed(i)
        k, v = torch.randn(2, 3, 2, tokens, 8, generator=generator)
        conv = torch.randn(3, 5, 4 + tokens, generator=generator)
        for cache in (ours, plain):
            cache.update_conv_state(conv, 0, conv_kernel_size=4)
        assert ours.get_mask_sizes(tokens, 0) == plain.get_mask_sizes(tokens, 0)
        assert all(map(torch.equal, ours.update(k, v, 0), plain.update(k, v, 0)))
        for cache in (ours, plain):
            cache.crop(-(i % 2))
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert torch.equal(ours.get_conv_state(0), plain.get_conv_state(0))  # type: ignore[arg-type]
        assert ours.get_seq_length() == plain.get_seq_length()
    ours.reset()
    assert ours.get_seq_length() == 0


def test_what_cannot_be_quantized_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(DynamicLayer):
        pass

    model = cache_model("llama")
    with pytest.raises(RecipeError, match="takes a model"):
        lowbit.QuantizedCache("int8", None)
    model.config.layer_types = ["full_attention", "strange"]
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "strange", Strange)
    with pytest.raises(RecipeError, match=r"layer 1 .* Strange.* kv:1=int16"):
        lowbit.QuantizedCache("int8", model)
    assert lowbit.QuantizedCache("int8,kv:1=int16", model) is not None


def test_layers_that_have_nothing_to_quantize_are_left() -> None:
    model = cache_model("linear")
    plain, ours = DynamicCache(config=model.config), lowbit.QuantizedCache("int8", model)
    assert type(ours.layers[0]) is type(plain.layers[0]) and type(ours.layers[1]) is not type(plain.layers[1])
    mixed = lowbit.QuantizedCache("int8,kv:1=int16", model)
    assert type(mixed.layers[1]) is type(plain.layers[1])
