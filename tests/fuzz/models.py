"""The whole models that fuzzers damage: tiny, of every kind of file that lowbit opens.

python models.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers

import lowbit
from quantized_folders import awq_layer, bnb4_layer, fp4_layer, fp8_layer, gptq_layer, packed_layer, save_quantized
from tiny import save_tiny, tiny_tokenizer

_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def _compressed(kind: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


FOREIGN = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}, gptq_layer),
    "act": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": True}, lambda w: gptq_layer(w, by_order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq_layer),
    "packed": (_compressed("pack-quantized", _WEIGHTS), lambda w: packed_layer(w, symmetric=False)),
    "nvfp4": (_compressed("nvfp4-pack-quantized", _NVFP4), lambda w: fp4_layer(w, 16, True)),
    "bnb": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w: bnb4_layer(w, nested=True)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8_layer),
}  # fmt: skip
_SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_THETA = {"rope_theta": 10000.0}
ENGINE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {**_THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "yarn": ("Qwen2", {"rope_parameters": {**_THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "granite": ("Granite", {}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 64, "rope_parameters": {**_THETA, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}}),
}  # fmt: skip
_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def _save_engine(kind: str, values: dict[str, Any], folder: Path, shards: bool = False) -> None:
    architecture = _CLASSES.get(kind, f"{kind}ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(architectures=[architecture], **{**_SIZES, **values})
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(
        folder, **({"max_shard_size": "60KB"} if shards else {})
    )
    words = tiny_tokenizer()
    words.chat_template = _TEMPLATE
    words.save_pretrained(folder)


def write_gguf(path: Path, kinds: tuple[str, ...], wide: int = 64) -> None:
    """A llama of one layer with a tokenizer; its matrices have these types in turn."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    wide = 256 if any(kind.endswith("_K") or kind == "IQ4_XS" for kind in kinds) else wide
    out, rng = GGUFWriter(path, "llama"), np.random.default_rng(0)
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(wide)
    out.add_feed_forward_length(wide)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    tokens = [chr(code) for code in range(33, 127)] + ["ab"]
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_types([1] * len(tokens))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_tensor("token_embd.weight", rng.standard_normal((len(tokens), wide)).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        out.add_tensor(f"{name}.weight", np.ones(wide, np.float32))
    half = {"attn_k": wide // 2, "attn_v": wide // 2}
    for i, name in enumerate(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")):
        kind = GGMLQuantizationType[kinds[i % len(kinds)]]
        block, size = GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 60, (half.get(name, wide), wide // block * size), dtype=np.uint8)
        out.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def make_all(root: Path) -> None:
    """Every model in a folder of its own below float/, lowbit/, foreign/ and gguf/ of `root`."""
    for name, (kind, values) in ENGINE.items():
        _save_engine(kind, values, root / "float" / name)
    _save_engine("Llama", {}, root / "float" / "shards", shards=True)
    for name in ("gpt2", "bert", "opt", "mixtral"):
        save_tiny(name, root / "float" / name)
    quantized = {
        "w4": ("llama3", "w4"),
        "q8": ("llama", "q8_0"),
        "w8": ("gemma3", "w8"),
        "nf4": ("phi3", "nf4"),
        "gpt2": ("gpt2", "w4"),
    }
    for name, (source, recipe) in quantized.items():
        lowbit.quantize(root / "float" / source, recipe, root / "lowbit" / name)
    lowbit.quantize(root / "float" / "llama", "w8a8", root / "lowbit" / "inputs")
    for name, (section, layer) in FOREIGN.items():
        save_quantized(root / "foreign" / name, section, layer)
    for name, kinds in {
        "blocks": ("Q4_0", "Q8_0", "Q5_1", "IQ4_NL"),
        "k-quants": ("Q4_K", "Q6_K", "Q3_K", "IQ2_XXS"),
    }.items():
        (root / "gguf" / name).mkdir(parents=True)
        write_gguf(root / "gguf" / name / "model.gguf", kinds)
    facts = {
        p.parent.name: sorted(f.name for f in p.iterdir()) for p in root.rglob("*") if p.is_dir() and p.parent != root
    }
    (root / "made.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
