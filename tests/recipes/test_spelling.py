"""Names of recipes as people know them: taken where they have one meaning, else answered with what to type."""

from __future__ import annotations

import re

import pytest

from lowbit.errors import FormatError, LowbitError, RecipeError
from lowbit.formats import parse_format
from lowbit.formats.parsing import NAMED, meant_format
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.spelling import accepted

TAKEN = {
    "w4": ("W4", "4bit", "4-bit", "4 bit", "4bits", "4-bits", "W4A16", "w4a16", "4"),
    "w8": ("W8", "8bit", "8-bit", "w8a16", "W8A16", "8"),
    "w3": ("3bit", "3-bit"),
    "w8a8": ("W8A8", "w8-a8"),
    "nf4": ("NF4", "nf-4"),
    "fp8": ("FP8",),
    "mxfp4": ("MXFP4", "MX-FP4"),
    "nvfp4": ("NVFP4",),
    "gptq": ("GPTQ",),
    "awq": ("AWQ",),
    "smoothquant": ("SmoothQuant", "smooth-quant", "smooth_quant"),
    "llm-int8": ("LLM.int8", "llm.int8()", "LLM_int8"),
    "per-channel": ("per_channel", "perchannel"),
}


@pytest.mark.parametrize(("name", "typed"), [(name, t) for name, typed in TAKEN.items() for t in typed])
def test_a_name_with_one_meaning_is_taken(name: str, typed: str) -> None:
    assert Recipe.parse(typed) == Recipe.parse(name) and Recipe.parse(typed).name == name
    assert Recipe.parse(f"{typed},lm_head=keep") == Recipe.parse(f"{name},lm_head=keep")


@pytest.mark.parametrize("name", [*PRESETS, *NAMED, "int4:g32", "gptq@int4:g64", "search(steps=8)@uint4:g32:min=fp16"])
def test_capitals_make_no_difference(name: str) -> None:
    assert Recipe.parse(name.upper()) == Recipe.parse(name)
    if name in NAMED:
        assert parse_format(name.upper()) == parse_format(name)


def test_every_preset_keeps_its_own_name() -> None:
    assert [accepted(name) for name in PRESETS] == list(PRESETS)
    assert all(accepted(name) == name for name in NAMED if name not in PRESETS)


MEANT = {
    "int4:g32": ("int4:32", "int4-g32", "int4_g32", "int4:g=32", "g32:int4", "int4:group32", "int4g32", "INT4-32"),
    "int4:g128": ("w4g128", "w4a16g128", "4bit-128g", "int4:group_size=128", "4bit:groupsize128"),
    "int4:g128:asym": ("int4:g128:asymmetric", "int4-g128-asym"),
    "int8:channel": ("int8:per-channel", "int8:row", "int8-channel"),
    "int8:tensor": ("int8:per_tensor", "int8:tensorwise"),
    "int5:g32": ("5bits-32",),
    "gptq": ("gptq-4bit", "gptq:int4", "int4@gptq", "gptq@4bit", "gptq_int4", "gptq-w4a16"),
    "awq": ("awq-int4", "awq@w4", "awq:4bit", "AWQ-INT4"),
    "hqq": ("hqq-4bit", "hqq:int4"),
    "gptq@int4:g128": ("gptq-4bit-128g", "gptq-int4-g128", "int4:g128@gptq", "gptq:g128:int4"),
    "gptq@int3:g32": ("gptq-3bit", "gptq:int3"),
    "gptq@q4_0": ("gptq:q4_0",),
    "rotate+gptq@int4:g64": ("rotate+gptq:int4:g64",),
    "gptq@int4:g32,a=int8:token": ("gptq-w4a8",),
    "nf4": ("bnb-4bit", "bitsandbytes", "bnb4"),
    "llm-int8": ("bnb-8bit", "bnb_int8"),
    "ternary:g64": ("1.58bit", "b1.58"),
}


@pytest.mark.parametrize(("meant", "typed"), [(meant, t) for meant, typed in MEANT.items() for t in typed])
def test_another_spelling_is_answered_with_the_right_one(meant: str, typed: str) -> None:
    with pytest.raises(LowbitError, match=rf"did you mean '{re.escape(meant)}'"):
        Recipe.parse(typed)
    Recipe.parse(meant)  # what is proposed works


@pytest.mark.parametrize("typed", ["embed=int4:32", "*.down_proj=int4-g32", "lm_head=g32:int4"])
def test_formats_of_single_layers_are_answered_too(typed: str) -> None:
    with pytest.raises(FormatError, match="position [0-9]+: .*; did you mean 'int4:g32'"):
        Recipe.parse(f"w4,{typed}")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("q4_k_m", ["'q4_k_m' is a mix", "lowbit quantize MODEL q4_k_m --as gguf", "w4 has about as many bits"]),
        ("Q5_K_S", ["lowbit quantize MODEL q5_k_s --as gguf", "int5:g32"]),
        ("q4km", ["did you mean 'q4_k_m'", "--as gguf"]),
        ("Q4_K_L", ["'q4_k_m'", "--as gguf", "w4"]),
        ("q4", ["q4_0", "q4_k_m", "--as gguf", "w4"]),
        ("iq3_xxs", ["q3_k_m", "--as gguf", "w3"]),
        ("gguf", ["lowbit quantize MODEL w4 --as gguf"]),
        ("vllm", ["lowbit quantize MODEL w4 --as vllm"]),
        ("bf16", ["8 bits and fewer", "w8"]),
        ("6bit", ["int6:g32"]),
        ("w5", ["'w4'", "int5:g32"]),
    ],
)
def test_what_belongs_elsewhere_says_where(typed: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as found:
        Recipe.parse(typed)
    assert all(word in str(found.value) for word in words), found.value


@pytest.mark.parametrize(
    "typed",
    ["int4:32:64", "g32", "int4 int8", "w4a4", "4bit 8bit", "x" * 5000, "int4:g32:q9", "gptq-4bit-actorder", "ı4", ""],
)
def test_what_has_no_likely_meaning_gets_no_guess(typed: str) -> None:
    assert meant_format(typed) is None
    with pytest.raises(LowbitError) as found:
        Recipe.parse(typed)
    assert len(str(found.value).splitlines()[0]) < 12_000
