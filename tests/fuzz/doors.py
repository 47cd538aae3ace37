"""The doors: which file of which model is damaged, how, and which commands then read it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from damage import damaged_bytes, damaged_gguf, damaged_json, damaged_text, json_bytes
from templates import damaged_template

Change = Callable[[bytes, random.Random], bytes]
SAY = ["the", "--max-new-tokens", "2", "--threads", "1"]


def _config(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.06:
        return damaged_text(raw, rng)
    return json_bytes(damaged_json(json.loads(raw), rng))


def _section(raw: bytes, rng: random.Random) -> bytes:
    """The quantization_config alone, or one entry of it."""
    config = json.loads(raw)
    section = config["quantization_config"]
    tensors = section.get("tensors")
    fields = (
        "format",
        "shape",
        "inputs",
        "transposed",
        "tensors",
        "tied",
        "quant_method",
        "recipe",
        "bits",
        "group_size",
        "x",
    )
    if isinstance(tensors, dict) and rng.random() < 0.6:
        name = rng.choice(list(tensors))
        tensors[name] = damaged_json(tensors[name], rng, fields)
    else:
        config["quantization_config"] = damaged_json(section, rng, fields)
    return json_bytes(config)


def _either(first: Change, second: Change, share: float) -> Change:
    return lambda raw, rng: (first if rng.random() < share else second)(raw, rng)


def _words(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return damaged_text(raw, rng)
    fields = ("bos_token", "eos_token", "pad_token", "chat_template", "eos_token_id", "tokenizer_class", "model_max_length",
              "added_tokens_decoder", "auto_map", "do_sample", "temperature", "max_length", "truncation", "padding")  # fmt: skip
    return json_bytes(damaged_json(json.loads(raw), rng, fields))


def _template(raw: bytes, rng: random.Random) -> bytes:
    return damaged_template(rng).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Door:
    """models: folders of models, as `float/llama`; files: one of these is damaged; commands: run on each input."""

    models: tuple[str, ...]
    files: tuple[str, ...]
    change: Change
    commands: tuple[str, ...]


_FLOAT = tuple(f"float/{n}" for n in ("llama", "llama3", "yarn", "gemma3", "smollm3", "granite", "phi3"))
_OTHER = tuple(f"float/{n}" for n in ("gpt2", "bert", "opt", "mixtral"))
_LOWBIT = tuple(f"lowbit/{n}" for n in ("w4", "q8", "w8", "nf4", "gpt2", "inputs"))
_FOREIGN = tuple(f"foreign/{n}" for n in ("gptq", "act", "awq", "packed", "nvfp4", "bnb", "fp8"))
_GGUF = ("gguf/blocks", "gguf/k-quants")
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "generation_config.json")

DOORS = {
    "config": Door(_FLOAT, ("config.json",), _config, ("generate", "plan", "inspect", "quantize", "dequantize")),
    "families": Door(_OTHER, ("config.json",), _config, ("plan", "inspect", "quantize", "generate")),
    "packed": Door(_LOWBIT, ("config.json",), _either(_section, _config, 0.75), ("generate", "inspect", "dequantize", "export", "vllm")),
    "foreign": Door(_FOREIGN, ("config.json",), _either(_section, _config, 0.75), ("plan", "inspect", "dequantize", "generate", "import")),
    "metadata": Door(_GGUF, ("model.gguf",), damaged_gguf, ("generate", "plan", "inspect", "dequantize")),
    "gguf": Door(_GGUF, ("model.gguf",), damaged_bytes, ("generate", "inspect", "dequantize")),
    "safetensors": Door((*_FLOAT, *_LOWBIT, *_FOREIGN, *_OTHER), ("model.safetensors",), damaged_bytes, ("generate", "inspect", "plan", "dequantize")),
    "index": Door(("float/shards",), ("model.safetensors.index.json",), _words, ("generate", "plan")),
    "words": Door(("float/llama", "lowbit/w4", "float/gpt2"), _BESIDE, _words, ("generate", "quantize", "export")),
    "template": Door(("float/llama", "lowbit/w4"), ("chat_template.jinja",), _template, ("generate",)),
}  # fmt: skip


def command(name: str, model: Path, room: Path) -> tuple[list[str], Path | None]:
    """(arguments of `lowbit`, what it is to write) of a command of a door."""
    target = model / "model.gguf" if (model / "model.gguf").exists() else model
    out = room / f"out-{name}{'.gguf' if name == 'export' else ''}"
    args, made = {
        "generate": (["generate", target, *SAY[:3]], None),
        "plan": (["plan", target, "w4"], None),
        "inspect": (["inspect", target], None),
        "quantize": (["quantize", target, "w8", "-o", out, "--no-card"], out),
        "dequantize": (["dequantize", target, "-o", out], out),
        "export": (["export", target, "--as", "gguf", "-o", out], out),
        "vllm": (["export", target, "--as", "vllm", "-o", out], out),
        "import": (["import", target, "-o", out], out),
    }[name]
    return [str(a) for a in args], made
