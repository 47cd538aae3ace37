"""config.json and tokenizer_config.json as readers before transformers 5 read them, and as transformers 5 does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers

import lowbit
from lowbit.convert.dequantizing import dequantize_model
from lowbit.interchange.hf.configs import config_fields, write_tokenizer
from tiny import _ROPE, save_tiny, tiny_tokenizer

THETA = 500000.0
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0}


def older(config: dict[str, Any], base: str = "rope_theta", share: str = "partial_rotary_factor") -> tuple[Any, ...]:
    """(theta, share of a head, kind, all of the scaling) as vLLM, llama.cpp, mlx and transformers 4 look for them."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return config.get(base, 10000.0), config.get(share, 1.0), kind, scaling


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}),
    "llama3": ("Llama", {"rope_parameters": {"rope_theta": THETA, **LLAMA3}}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": {"rope_theta": THETA, **YARN}}),
    "phi3 longrope": ("Phi3", {
        "rope_parameters": {"rope_theta": THETA, **LONG}, "original_max_position_embeddings": 64}),
    "phi": ("Phi", {"rope_parameters": {"rope_theta": THETA, "partial_rotary_factor": 0.4, "rope_type": "default"}}),
    "linear": ("Mistral", {"rope_parameters": {"rope_theta": THETA, **LINEAR}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_by_both_names(name: str) -> None:
    kind, values = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**{**_ROPE, **values})
    written = json.loads(json.dumps(config_fields(config)))
    rope = values["rope_parameters"]
    theta, share, found, scaling = older(written)
    assert theta == THETA and found == rope["rope_type"] and share == rope.get("partial_rotary_factor", 1.0)
    for key in set(rope) - {"rope_theta", "rope_type", "partial_rotary_factor"}:
        assert scaling[key] == rope[key]
    if found not in ("default", "llama3"):  # before 4.43 it was `type` alone
        assert scaling["type"] == found
    same_for_transformers_5(config, written)


def same_for_transformers_5(config: Any, written: dict[str, Any]) -> None:
    """The fields that it had are read as they were, but for the old name of a kind of positions."""

    def without_type(value: Any) -> Any:
        return {k: without_type(v) for k, v in value.items() if k != "type"} if isinstance(value, dict) else value

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(written))
        read = type(config).from_pretrained(folder).to_dict()
    for key, value in config.to_dict().items():
        if key in ("transformers_version", "_name_or_path"):
            continue
        assert without_type(read[key]) == without_type(value), key


@pytest.mark.parametrize("scaling", [{}, LINEAR])
def test_layers_with_positions_of_their_own(scaling: dict[str, Any]) -> None:
    full = {"rope_type": "default", "rope_theta": 2e6} | scaling
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 777.0}}
    config = transformers.Gemma3TextConfig(**{**_ROPE, "num_hidden_layers": 7}, rope_parameters=rope)
    written = config_fields(config)
    theta, _, kind, found = older(written)
    assert (theta, written["rope_local_base_freq"]) == (2e6, 777.0) and written["sliding_window_pattern"] == 6
    assert kind == full["rope_type"] and found.get("factor") == scaling.get("factor")
    same_for_transformers_5(config, written)
    whole = transformers.Gemma3Config(text_config=config)
    inside = config_fields(whole)["text_config"]
    assert inside["rope_theta"] == 2e6 and inside["rope_local_base_freq"] == 777.0
    bert = transformers.ModernBertConfig(rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
    })  # fmt: skip
    written = config_fields(bert)
    assert (written["global_rope_theta"], written["local_rope_theta"], written["global_attn_every_n_layers"]) == (
        1e5,
        3e3,
        3,
    )
    same_for_transformers_5(bert, written)


def test_other_names_that_changed() -> None:
    neox = transformers.GPTNeoXConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_theta": THETA, "partial_rotary_factor": 0.5, "rope_type": "default"}
    )  # fmt: skip
    assert older(config_fields(neox), "rotary_emb_base", "rotary_pct")[:2] == (THETA, 0.5)
    experts = config_fields(transformers.Qwen3MoeConfig(**_ROPE, num_experts=6, dtype="bfloat16"))
    assert experts["num_experts"] == experts["num_local_experts"] == 6
    assert experts["torch_dtype"] == experts["dtype"] == "bfloat16"


def test_every_class_of_transformers_means_the_same_with_the_old_names() -> None:
    tried = 0
    for kind in ("gpt2", "bert", "t5", "mamba", "falcon", "olmo3", "gemma3n_text", "gpt_oss", "llama4_text", "deepseek_v3", "cohere2",
                 "qwen2_vl", "mllama", "smollm3", "exaone4", "glm4", "whisper", "qwen3_next", "falcon_h1"):  # fmt: skip
        config = transformers.CONFIG_MAPPING[kind]()
        same_for_transformers_5(config, json.loads(json.dumps(config_fields(config))))
        tried += 1
    assert tried == 19


def test_folders_of_every_kind_have_them(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "rope_parameters"}
    file.write_text(json.dumps({**old, "rope_theta": THETA, "rope_scaling": LLAMA3, "transformers_version": "4.51.0"}))
    lowbit.quantize(tmp_path / "model", "int4:g32", tmp_path / "q")
    lowbit.export(tmp_path / "q", "gptq", tmp_path / "gptq")
    dequantize_model(tmp_path / "q", tmp_path / "back")
    for name in ("q", "gptq", "back"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert older(written)[0] == THETA and older(written)[3].items() >= LLAMA3.items(), name
        read = transformers.AutoConfig.from_pretrained(tmp_path / name)
        assert read.rope_parameters == {"rope_theta": THETA, **LLAMA3}, name


def test_tokenizers_that_are_saved_anew(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    write_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (
        written["tokenizer_class"] == "PreTrainedTokenizerFast" and written["chat_template"] == tokenizer.chat_template
    )
    assert written["additional_special_tokens"] == ["<mark>"] and "extra_special_tokens" not in written
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the hen <mark> in a tree"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.chat_template == tokenizer.chat_template
    assert again.all_special_tokens == tokenizer.all_special_tokens
