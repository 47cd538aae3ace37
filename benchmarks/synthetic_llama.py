"""A Llama with random weights, for speed and memory alone.

    python benchmarks/synthetic_llama.py OUT --tokenizer FOLDER [--size 1b|7b]

`1b`: the shapes of Llama 3.2 1B, 1.07 billion parameters in one file. `7b`: those of Llama 2 7B with a head of its own, 6.88 billion parameters
(13.8 GB), one file a layer, written in the memory of one layer. Both with the vocabulary of FOLDER's tokenizer and in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config_of(size: str) -> LlamaConfig:
    common = {
        "vocab_size": 49152, "num_attention_heads": 32, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if size == "1b":
        return LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_key_value_heads=8, head_dim=64,
            tie_word_embeddings=True, **common,
        )  # fmt: skip
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_key_value_heads=32, head_dim=128,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16", **common,
    )  # fmt: skip


def write_by_layer(config: LlamaConfig, out: Path) -> int:
    """Files of the model, one for each layer and one for the rest; the number of its parameters."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(f"layer-{int(parts[2]):02d}" if parts[1] == "layers" else "rest", []).append(name)
    out.mkdir(parents=True)
    config.save_pretrained(out)
    where: dict[str, str] = {}
    for file, names in files.items():
        tensors = {
            n: torch.ones(shapes[n], dtype=torch.bfloat16) if len(shapes[n]) == 1
            else torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, config.initializer_range)
            for n in names
        }  # fmt: skip
        save_file(tensors, out / f"{file}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(names, f"{file}.safetensors")
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", choices=("1b", "7b"), default="1b")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = config_of(args.size)
    if args.size == "1b":
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(args.out)
        count = sum(p.numel() for p in model.parameters())
    else:
        count = write_by_layer(config, args.out)
    for name in TOKENIZER:
        if (args.tokenizer / name).exists():
            shutil.copy(args.tokenizer / name, args.out / name)
    print(f"{args.out}: {count / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
