"""How other programs store a KV cache: the names of their types, and the options that ask for them.

Sources: `--cache-type-k` of llama.cpp's tools (tools/cli/README.md of its repository), `CacheDType` of vLLM (vllm/config/cache.py), both of autumn 2026.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheType:
    """A type by its name. codes: bits of a number alone; bits: with scales, where a head has 64 channels."""

    name: str
    codes: int
    bits: float


@dataclass(frozen=True)
class CacheTypes:
    """What one program has.

    program   its name
    types     its types, of equal bits the usual one first
    options   of its command line, with `{k}` and `{v}`, or `{kv}` where keys and values are stored alike
    note      what a person should know of them, a sentence
    """

    program: str
    types: tuple[CacheType, ...]
    options: str
    note: str

    def nearest(self, codes: float) -> CacheType:
        """The first type of fewest bits that has at least these for a number alone; the largest where none has."""
        enough = [each for each in self.types if each.codes >= codes]
        return min(enough, key=lambda each: each.codes, default=max(self.types, key=lambda each: each.codes))


LLAMA_CPP = CacheTypes(
    "llama.cpp",
    (
        CacheType("q4_0", 4, 4.5), CacheType("iq4_nl", 4, 4.5), CacheType("q4_1", 4, 5.0), CacheType("q5_0", 5, 5.5), CacheType("q5_1", 5, 6.0),
        CacheType("q8_0", 8, 8.5), CacheType("f16", 16, 16.0),
    ),
    "-ctk {k} -ctv {v} -fa on",
    "llama.cpp stores values in few bits only with -fa on, every layer alike, and 32 numbers of a token under one scale",
)  # fmt: skip
VLLM = CacheTypes(
    "vLLM",
    (
        CacheType("int4_per_token_head", 4, 4.25), CacheType("int8_per_token_head", 8, 8.5), CacheType("auto", 16, 16.0),
    ),
    "--kv-cache-dtype {kv}",
    "vLLM has these in its Triton attention; `--kv-cache-dtype fp8` is faster on newer cards, and `lowbit export --as vllm --kv fp8` writes its scales",
)  # fmt: skip
