"""Which tokens end a text, whoever says so."""

from __future__ import annotations

from typing import Any

import pytest

from lowbit.errors import SourceError
from lowbit.interchange.end_tokens import end_tokens, ends_of_gguf
from lowbit.interchange.exporters.gguf.vocabulary import vocabulary
from lowbit.interchange.readers.module import ModuleSource
from tiny import tiny_model, tiny_tokenizer


class Words:
    eos_token_id = 5


@pytest.mark.parametrize(
    ("generation", "config", "right"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 2}, {7, 9}),
        ({"eos_token_id": 7}, {"eos_token_id": [2, 3]}, {7}),
        ({}, {"eos_token_id": [2, 3]}, {2, 3}),
        ({"eos_token_id": None}, {"eos_token_id": None, "text_config": {"eos_token_id": [4, 6]}}, {4, 6}),
        ({"eos_token_id": []}, {}, {5}),
        (None, {"eos_token_id": -1}, {5}),
    ],
)
def test_the_first_that_names_any(generation: Any, config: Any, right: set[int]) -> None:
    assert end_tokens(generation, config, Words()) == right


@pytest.mark.parametrize("wrong", ["2", 2.0, True, [2, "3"], [[2]], {"a": 1}])
def test_what_is_no_token(wrong: Any) -> None:
    with pytest.raises(SourceError, match=r"generation_config.json: eos_token_id has .*, which is no token"):
        end_tokens({"eos_token_id": wrong})


def test_a_module_and_its_float_copy_say_the_same() -> None:
    model: Any = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 9]
    assert ModuleSource(model).end_tokens() == {2, 9}
    assert ModuleSource(model, tiny_tokenizer()).generation()["eos_token_id"] == [2, 9]


def test_gguf_ends_as_llama_cpp_does() -> None:
    metadata = {f"tokenizer.ggml.{key}_token_id": i for key, i in (("bos", 1), ("eos", 2), ("eot", 3), ("eom", 4))}
    assert ends_of_gguf(metadata, {"a": 8, "<|im_end|>": 9, "<|fim_prefix|>": 10}) == {2, 3, 4, 9}
    harmony = {"<|end|>": 5, "<|return|>": 6, "<|call|>": 7}
    assert ends_of_gguf({}, harmony) == {6, 7} and ends_of_gguf({}, {"<|end|>": 5}) == {5}


def test_gguf_has_a_place_for_three_and_knows_others_by_their_text() -> None:
    tokenizer = tiny_tokenizer()  # </s> is 2
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    known = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = vocabulary(tokenizer, 128, {2, 8, 9, known}).ids
    assert {name: i for name, i in found.items() if name.startswith("add_eo")} == {
        "add_eos_token_id": 2, "add_eot_token_id": 8, "add_eom_token_id": 9,
    }  # fmt: skip
    assert vocabulary(tokenizer, 128, {8}).ids["add_eos_token_id"] == 8
    with pytest.raises(SourceError, match="write on past token 10"):
        vocabulary(tokenizer, 128, {2, 8, 9, 10})
