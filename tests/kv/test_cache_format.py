"""Cache formats as text and back, what they refuse, and their bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.kv import CacheFormat

SIDES = st.sampled_from(
    ["int8", "int16", "int4:g32", "rotate@int4:g64", "rotate+search@int3:g32:recent=64:sinks=4", "uint2:32x1:min=fp16", "nf4:g32",
     "kmeans3:*x1:cb=tensor:outliers=2", "uint4:g32:asym", "int6:s=fp32"]
)  # fmt: skip
GLOBS = st.sampled_from(["0", "*", "[1-3]", "1?"])


@given(SIDES, SIDES, st.lists(st.tuples(GLOBS, st.sampled_from("kv"), SIDES), max_size=3))
def test_text_to_value_and_back(keys: str, values: str, layers: list[tuple[str, str, str]]) -> None:
    text = ",".join([f"k={keys}", f"v={values}", *(f"{which}:{glob}={side}" for glob, which, side in layers)])
    found = CacheFormat.of(text)
    assert CacheFormat.of(str(found)) == found


@pytest.mark.parametrize(
    "text, words",
    [
        ("k=int8", "how values are stored"),
        ("kv=int8,k=int4", "'k' twice"),
        ("int8:recent=x", "recent=N"),
        ("gptq@int4", "solver for weights"),
        ("uint4", "both signs"),
        ("uint4:32x32:asym", "several tokens and channels"),
        ("int16:sinks=4", "unknown grid"),
        ("rotate+rotate@int4", "'rotate'"),
        ("rotate+int4:g32", "rotate@int4:g32"),
        ("kmeans3:*x1", "cb=tensor"),
        ("kmeans3:cb=g32", "cb=tensor"),
        ("turboquant9", "1 to 8 bits"),
        ("", "unknown grid"),
    ],
)
def test_what_is_no_cache_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(LowbitError, match=words):
        CacheFormat.of(text)


def test_bytes_are_those_of_codes_and_scales() -> None:
    side = CacheFormat.of("int4:g32").keys
    assert side.nbytes(1024, 64) == 1024 * (32 + 2 * 2)  # 64 codes of half a byte, two scales of float16
    kivi = CacheFormat.of("uint2:32x1:min=fp16").keys
    assert kivi.nbytes(64, 64) == 64 * 16 + 2 * 64 * (
        2 + 2
    )  # two groups of 32 tokens, each channel a scale and a minimum
    assert [kivi.first_recent(query) for query in (0, 31, 32, 40)] == [0, 0, 32, 32]
