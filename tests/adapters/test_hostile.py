"""Adapters that are damaged, of another kind, or of another model: one sentence each, before a weight is read."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from handmade_adapters import LLAMA, SETTINGS, factors, llama_factors, write
from lowbit.adapters.adapter import open_adapter
from lowbit.errors import LowbitError, SourceError, WeightError

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
from damage import damaged_bytes, damaged_json, json_bytes

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(folder: Path, base: Path | None = None) -> str:
    with pytest.raises(SourceError) as found:
        open_adapter(folder) if base is None else lowbit.with_adapter(base, folder)
    text = str(found.value)
    assert "\n" not in text and text.isprintable() and len(text) < 900
    return text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3', and lowbit reads LORA ones"),
        ({"peft_type": "LOHA"}, "of the kind 'LOHA'"),
        ({"peft_type": "PROMPT_TUNING"}, "of the kind 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type is null"),
        ({"peft_type": ["LORA"]}, "peft_type is a list of 1"),
        ({"r": 0}, "r is 0, and it must be a whole number from 1"),
        ({"r": True}, "r is true"),
        ({"r": 3}, "settings say rank 3"),
        ({"r": None}, "r is null"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q_proj": 3}}, "settings say rank 3"),
        ({"rank_pattern": [1]}, "rank_pattern is a list of 1"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "not read as a pattern of names"),
        ({"alpha_pattern": {"(": 3}}, "not read as a pattern of names"),
        ({"alpha_pattern": {"x" * 300: 3}}, "not read as a pattern of names"),
        ({"use_dora": True}, "has no magnitude"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base too"),
        ({"init_lora_weights": "loftq"}, "changed the weights of the base too"),
        ({"init_lora_weights": "new"}, "does not know init_lora_weights='new'"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "repeats layers of the base"),
        ({"alora_invocation_tokens": [3]}, "begins to work at certain tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "changes stacks of experts"),
        ({"trainable_token_indices": [1]}, "changes single rows of the embedding"),
        ({"something_new": {"a": 1}}, "does not know the field 'something_new'"),
    ],
)  # fmt: skip
def test_settings(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(write(tmp_path / "a", llama_factors(), **settings))


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in llama_factors().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "changes nothing"),
        (_without(f"{Q}.lora_B.weight"), "has no lora_B"),
        (_without(f"{Q}.lora_A.weight"), "has no lora_A"),
        (llama_factors() | {f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}, "adapters are floats"),
        (llama_factors() | {f"{Q}.lora_A.weight": torch.zeros(32)}, "is no matrix"),
        (llama_factors() | {f"{Q}.lora_A.weight": torch.zeros(4, 32, 1, 1)}, "of a convolution"),
        (llama_factors() | {f"{Q}.lora_B.weight": torch.zeros(32, 5)}, "settings say rank 4"),
        (llama_factors() | {f"{Q}.lora_magnitude_vector": torch.zeros(32)}, "use_dora=false"),
        (llama_factors() | {f"{Q}.lora_B.bias": torch.zeros(31)}, "it must be [32]"),
        (llama_factors() | {f"{Q}.lora_A.default.weight": torch.zeros(4, 32)}, "mean the same"),
        (llama_factors() | {f"{Q}.lora_E": torch.zeros(4, 32)}, "does not know what the tensor"),
        (llama_factors() | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(1, 32)}, "does not know what"),
    ],
)  # fmt: skip
def test_tensors(tensors: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    assert said in refused(write(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (factors({"model.layers.7.self_attn.q_proj": LLAMA["q_proj"]}), "has no such tensor; did you mean"),
        (factors({"model.layers.0.self_attn.q_proj": (32, 48)}), "is for [32, 48]; give the base model"),
        (factors({"model.embed_tokens": (128, 32)}), "is an embedding, and the factors"),
        (factors({"model.norm": (32, 32)}), "which is no matrix"),
        ({"base_model.model.model.embed_tokens.weight": torch.zeros(130, 32)}, "a larger vocabulary is merged by peft"),
        ({"base_model.model.score.weight": torch.zeros(2, 32)}, "changes 'score.weight'"),
        (factors({"model.layers.0.self_attn.q_proj": (32, 32)}) | {f"{Q}.lora_B.bias": torch.zeros(32)}, "has no bias that could take it"),
    ],
)  # fmt: skip
def test_another_model(
    tensors: dict[str, torch.Tensor], said: str, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    assert said in refused(write(tmp_path / "a", tensors), tiny_folder("llama"))


def test_values_that_are_not_finite(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    tensors = llama_factors()
    tensors[f"{Q}.lora_A.weight"][1, 1] = float("inf")
    with pytest.raises(WeightError, match="of the adapter holds NaN or infinity"):
        lowbit.merge(tiny_folder("llama"), write(tmp_path / "a", tensors), tmp_path / "out", "int8:channel")
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", llama_factors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "a pickle, which can run any code and is not read" in refused(folder)
    (folder / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in refused(folder)
    assert "there is no folder" in refused(tmp_path / "nowhere")


def test_a_pattern_of_names_takes_no_time(tmp_path: Path) -> None:
    name = "q." * 60
    folder = write(tmp_path / "a", factors({name: (8, 8)}), alpha_pattern={f".*.*x{i}": 1 for i in range(20)})
    assert open_adapter(folder).products[name].scaling == 2
    many = write(tmp_path / "b", factors({name * 9: (8, 8)}), alpha_pattern={f".*.*x{i}": 1 for i in range(20)})
    assert "would take too long" in refused(many)


def test_damaged_files_end_in_a_sentence(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    whole = write(tmp_path / "whole", llama_factors())
    fields, rng = tuple(SETTINGS), random.Random(3)
    raw = (whole / "adapter_model.safetensors").read_bytes()
    for at in range(150):
        folder = tmp_path / f"damaged-{at}"
        shutil.copytree(whole, folder)
        if at % 2:
            (folder / "adapter_config.json").write_bytes(
                json_bytes(damaged_json(json.loads(json.dumps(SETTINGS)), rng, fields))
            )
        else:
            (folder / "adapter_model.safetensors").write_bytes(damaged_bytes(raw, rng))
        try:
            both = lowbit.with_adapter(tiny_folder("llama"), folder)
            for name in both.changed():
                assert both.read(name).shape == both.tensors[name].shape
        except LowbitError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
