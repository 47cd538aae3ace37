"""Keys and values that the decoder stores packed: attention against float64 over what the reference reads back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.engine.cache_layout import checked, layers_of
from lowbit.kernels.core import core
from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.round_trip import round_trip
from lowbit.kv.storing import rotated

pytestmark = pytest.mark.skipif(core() is None, reason="lowbit._core is not built")
lowbit_core: Any = core()

HEADS, KEY_HEADS, TOKENS = 6, 2, 320
FORMATS = [
    "int16", "int8", "int4", "int4:g32", "int8:g32", "int2:g16", "int3:g32", "int5:g32", "int6", "int7:g32", "uint8:min=fp16",
    "uint4:g32:min=fp16", "uint2:g32:min=fp16", "uint8:zero=fp16", "uint3:g32:zero=fp16", "iq4nl:g32", "e2m1:g32", "rotate@int4",
    "rotate@int3:g32", "norm@int4:g32", "symmetric@int4:g32", "k=int8,v=int4:g32", "k=int16,v=int4", "k=int4:g32,v=int16",
    "int4:g32:recent=20:sinks=4", "int8:sinks=70", "int8:recent=130", "uint2:32x1:min=fp16", "int4:64x1", "simquant", "kivi2", "kivi4",
    "k=int16,v=int4:g32:recent=9:sinks=3", "rotate@uint3:32x1:min=fp16", "rotate+norm@int4:g32:sinks=1",
]  # fmt: skip


def projection(weight: Any) -> Any:
    weight = np.ascontiguousarray(weight, np.float32)
    part = lowbit_core.PartSpec(
        weight=lowbit_core.pack_floats("f32", [weight]), activations=lowbit_core.ActivationSpec()
    )
    return lowbit_core.ProjectionSpec(cols=weight.shape[1], width=len(weight), parts=[part])


def attention_alone(x: Any, head_dim: int, threads: int = 1, isa: str = "", window: int = 0) -> Any:
    """A decoder whose token i has the queries, keys and values x[i], and whose logits are what it attended to after x[i]."""
    width, vocabulary = x.shape[1], max(x.shape)
    table = np.zeros((vocabulary, width), np.float32)
    table[: len(x)] = x
    nothing = lowbit_core.MlpSpec(
        gate_up=lowbit_core.ProjectionSpec(
            cols=width, width=16, parts=[lowbit_core.PartSpec(weight=lowbit_core.pack_floats("f32", [np.zeros((16, width), np.float32)] * 2, True), activations=lowbit_core.ActivationSpec())],
        ),
        down=projection(np.zeros((width, 16))),
    )  # fmt: skip
    layer = lowbit_core.LayerSpec(
        qkv=projection(np.eye(width)), output=projection(np.eye(width)[:, : HEADS * head_dim]), mlp=nothing,
        attention_norm=None, mlp_norm=None, rope=-1, window=window,
    )  # fmt: skip
    spec = lowbit_core.ModelSpec(
        width=width, heads=HEADS, key_heads=KEY_HEADS, head_dim=head_dim, vocabulary=vocabulary, epsilon=1e-5,
        attention_scale=head_dim**-0.5, gate=lowbit_core.Gate.silu, embedding=lowbit_core.pack_floats("f32", [table]), final_norm=None,
        head=projection(np.eye(vocabulary, width)), layers=[layer],
    )  # fmt: skip
    return lowbit_core.Decoder(spec, [], lowbit_core.ThreadPool(threads), isa)


def numbers(head_dim: int, seed: int = 0, tokens: int = TOKENS) -> Any:
    """float32 [tokens, width]: queries, keys with a few channels above the others, values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, (HEADS + 2 * KEY_HEADS) * head_dim)).astype(np.float32)
    keys = x[:, HEADS * head_dim : (HEADS + KEY_HEADS) * head_dim]
    keys[:, 3::head_dim] *= 3
    return x


def attended(
    cache: str, x: Any, head_dim: int, parts: Iterable[Sequence[int]], isa: str = "", threads: int = 1, window: int = 0
) -> Any:
    """float32 [tokens, HEADS * head_dim], read in these parts."""
    decoder = attention_alone(x, head_dim, threads, isa, window)
    kept = lowbit_core.KVCache(decoder, 1, len(x), layers_of(lowbit_core, checked(cache), 1, head_dim))
    rows = np.zeros((len(x), max(x.shape)), np.float32)
    for part in parts:
        ids = np.array(part, np.int32)
        found = np.zeros((len(ids), max(x.shape)), np.float32)
        decoder.forward(kept, ids, np.zeros_like(ids), ids, np.arange(len(ids), dtype=np.int32), found)
        rows[ids] = found
    width = HEADS * head_dim
    return rows[:, :width] - x[:, :width]


def pieces(size: int, tokens: int = TOKENS) -> list[range]:
    return [range(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def in_16_bits(x: torch.Tensor, keys: bool, turned: bool) -> torch.Tensor:
    """Integers with a scale for each vector, of keys also by its norm, so that no product overflows. turned: rotated before, and back."""
    x = rotated(x) if turned else x
    scale = x.abs().amax(-1, keepdim=True) / 32767
    scale = torch.maximum(scale, x.norm(dim=-1, keepdim=True) / 46000) if keys else scale
    found = (x / scale).round() * scale
    return rotated(found, inverse=True) if turned else found


def guarded(x: torch.Tensor, side: CacheSide, stored: torch.Tensor) -> torch.Tensor:
    """What is read of 8 bits: vectors that they would lose too much of, for a channel far above the others, are kept in float16."""
    if side.rotate or str(side.format) not in (
        str(CacheFormat.of(f).keys.format) for f in ("int8", f"int8:g{x.shape[-1]}")
    ):
        return stored
    n = x.shape[-1]
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    steps = x.abs() / scale
    small, nothing = ((1 - steps / bound).clamp_min(0) for bound in (2, 127 / 32767 * 5000 / n**1.5))
    loses = ((small - 0.25 + 0.22 * n * nothing) * (x != 0)).sum(-1, keepdim=True) > 0
    return torch.where(loses, (x / scale).half().float() * scale, stored)


def reference(cache: CacheFormat, x: Any, head_dim: int, window: int = 0) -> Any:
    """The same in float64, over what is read back."""
    q, k, v = (
        torch.from_numpy(part).view(len(x), -1, head_dim).transpose(0, 1)
        for part in np.split(x, [HEADS * head_dim, (HEADS + KEY_HEADS) * head_dim], axis=1)
    )
    sides = cache.side(0, "k"), cache.side(0, "v")
    # Groups of tokens are stored once they are complete, of what is kept of them in 16 bits.
    given = [
        in_16_bits(t, i == 0, side.rotate) if side.group > 1 else t
        for i, (t, side) in enumerate(zip((k, v), sides, strict=True))
    ]
    stored = [guarded(t, side, round_trip(t.contiguous(), side)).double() for t, side in zip(given, sides, strict=True)]
    out = torch.zeros(len(x), HEADS, head_dim, dtype=torch.float64)
    for i in range(len(x)):
        first = max(0, i + 1 - window) if window else 0
        read = []
        for exact, rounded, side in zip((k, v), stored, sides, strict=True):
            kept = torch.arange(i + 1)
            kept = (kept < side.sinks) | (kept >= side.first_recent(i))
            read.append(torch.where(kept[None, :, None], exact[:, : i + 1].double(), rounded[:, : i + 1])[:, first:])
        for h in range(HEADS):
            keys, values = (t[h // (HEADS // KEY_HEADS)] for t in read)
            out[i, h] = (keys @ q[h, i].double() / head_dim**0.5).softmax(0) @ values
    return out.reshape(len(x), -1).numpy()


@pytest.mark.parametrize("head_dim", [64, 16])
@pytest.mark.parametrize("text", FORMATS)
def test_attention_is_that_over_what_the_reference_reads_back(text: str, head_dim: int) -> None:
    if head_dim == 16:
        text = text.replace("g32", "g16")
    x = numbers(head_dim)
    right = reference(CacheFormat.of(text), x, head_dim)
    for isa in lowbit_core.isas():
        found = attended(text, x, head_dim, pieces(200), isa)
        error = np.linalg.norm(found - right, axis=1) / np.linalg.norm(right, axis=1)
        assert error.max() < 2e-3, (isa, error.max(), error.argmax())
        assert np.median(error) < 4e-4, (isa, np.median(error))


@pytest.mark.parametrize(
    "text", ["int8", "int4:g32", "uint3:min=fp16", "kivi4", "simquant", "rotate@int4:recent=40:sinks=5"]
)
@pytest.mark.parametrize("window", [0, 50])
def test_attention_depends_neither_on_threads_nor_on_how_a_text_is_cut(text: str, window: int) -> None:
    x = numbers(64, tokens=600)
    right = None
    for threads, size in ((1, 256), (1, 600), (2, 100), (3, 1)):
        if size == 600 and checked(text).keys.group + checked(text).keys.recent > 1:
            continue  # more than a piece
        found = attended(text, x, 64, pieces(size, 600), threads=threads, window=window)
        right = found if right is None else right
        assert (found == right).all(), (threads, size)


@pytest.mark.parametrize(
    "text",
    ["int8", "int4:g32", "uint2:32x1:min=fp16", "k=int8,v=uint4:g32:min=fp16", "simquant", "rotate@int4:recent=8"],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [6 * 64 + 5, 8 * 64 + 70])
def test_what_is_no_number_stays_so_for_those_who_see_it_and_for_no_others(text: str, bad: float, where: int) -> None:
    """where: a channel of the first head's keys, or of the second one's values."""
    x = numbers(64)
    x[100, where] = bad
    head = 0 if where < 8 * 64 else 1
    for isa in lowbit_core.isas():
        found = attended(text, x, 64, pieces(64), isa)[100:].reshape(-1, HEADS, 64)
        seen = found[:, head * 3 : head * 3 + 3]
        assert np.isnan(seen).all(2).all() if bad != bad else not np.isfinite(seen).all(2).any()
        assert np.isfinite(attended(text, x, 64, pieces(64), isa)[:100]).all()


def test_bytes_per_position_are_those_of_the_format() -> None:
    for text in FORMATS:
        if "int16" in text:
            continue
        cache = CacheFormat.of(text)
        kept = lowbit_core.KVCache(
            attention_alone(numbers(64), 64), 1, 64, layers_of(lowbit_core, checked(text), 1, 64)
        )
        right = sum(cache.side(0, which).nbytes(64, 64) for which in "kv") * KEY_HEADS  # type: ignore[arg-type]
        assert kept.bytes_per_position == -(-right // 64), text
