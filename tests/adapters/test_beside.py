"""Adapters beside the weights of a model that runs: the same as merged, several by name, and the text that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from handmade_adapters import factors, llama_factors, write
from lowbit.adapters.beside import Beside
from lowbit.adapters.named import named_adapters
from lowbit.cli.main import app
from lowbit.engine.fallback import Transformers
from lowbit.engine.generator import open_generator
from lowbit.errors import EngineError, RecipeError, SourceError

IDS = torch.tensor([[1, 5, 9, 20, 3], [7, 7, 2, 90, 11]])
Q = "model.layers.1.self_attn.q_proj"


def dora(module: str, shape: tuple[int, int]) -> dict[str, Any]:
    return factors({module: shape}) | {f"base_model.model.{module}.lora_magnitude_vector": torch.rand(shape[0]) + 0.5}


def embedding() -> dict[str, Any]:
    name = "base_model.model.model.embed_tokens.lora_embedding"
    return {f"{name}_A": torch.rand(4, 128), f"{name}_B": torch.rand(32, 4)}


def biases() -> dict[str, Any]:
    return dora(Q, (32, 32)) | {f"base_model.model.{Q}.base_layer.bias": torch.rand(32)}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoRA": ("llama", llama_factors(), {}),
    "rsLoRA": ("llama", llama_factors(), {"use_rslora": True}),
    "DoRA": ("llama", dora(Q, (32, 32)), {"use_dora": True}),
    "DoRA and a bias": ("qwen2", biases(), {"use_dora": True, "bias": "all"}),
    "a bias in LoRA": ("qwen2", factors({Q: (32, 32)}) | {f"base_model.model.{Q}.lora_B.bias": torch.rand(32)}, {"lora_bias": True}),
    "Conv1D": ("gpt2", factors({"transformer.h.0.attn.c_attn": (96, 32)}), {"fan_in_fan_out": True}),
    "an embedding that is tied": ("llama-tied", embedding(), {}),
    "an embedding that is scaled": ("gemma3", embedding(), {}),
    "saved modules": ("llama-tied", llama_factors() | {"base_model.model.lm_head.weight": torch.rand(128, 32), "base_model.model.model.norm.weight": torch.rand(32)}, {}),
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_beside_is_what_merged_is(
    case: str,
    packed: bool,
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    packed_folder: Callable[[str, str], Path],
) -> None:
    arch, tensors, settings = CASES[case]
    base = packed_folder(arch, "int8:channel") if packed else tiny_folder(arch)
    folder = write(tmp_path / "a", tensors, **settings)
    model = (
        lowbit.load(base, kernel="expand")
        if packed
        else lowbit.with_adapter(
            base,
            write(
                tmp_path / "no",
                llama_factors(size=0.0)
                if "llama" in arch
                else {f"{n}": v * 0 for n, v in tensors.items() if ".lora" in n and "magnitude" not in n},
            ),
        ).load_float()
    )
    plain, merged = logits(model), logits(lowbit.with_adapter(base, folder).load_float())
    beside = Beside(model, named_adapters(folder, base), str(base))
    assert torch.equal(logits(model), plain) and beside.used is None
    beside.use("a")
    assert torch.linalg.vector_norm(logits(model) - merged) < 1e-4 * torch.linalg.vector_norm(merged - plain)
    beside.use(None)
    assert torch.equal(logits(model), plain)
    beside.use("a")
    beside.remove()
    assert torch.equal(logits(model), plain)


def test_several_by_name(tmp_path: Path, packed_folder: Callable[[str, str], Path]) -> None:
    base = packed_folder("llama", "int4:g32")
    one, two = (write(tmp_path / name, llama_factors(seed=seed, size=2.0)) for seed, name in enumerate(("one", "two")))
    both = lowbit.generate(base, [5, 9, 20], adapter={"first": one, "second": two}, max_new_tokens=6)
    alone = {
        name: lowbit.generate(base, [5, 9, 20], adapter=folder, max_new_tokens=6)
        for name, folder in (("first", one), ("second", two))
    }
    without = lowbit.generate(base, [5, 9, 20], max_new_tokens=6).tokens
    assert list(both) == ["first", "second"]
    assert {name: each.tokens for name, each in both.items()} == {name: each.tokens for name, each in alone.items()}
    assert both["first"].tokens != both["second"].tokens and without not in (
        both["first"].tokens,
        both["second"].tokens,
    )


def test_text_is_that_of_the_merged_model(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    folder = write(tmp_path / "a", llama_factors(size=2.0))
    lowbit.merge(tiny_folder("llama"), folder, tmp_path / "merged")
    program = open_generator(str(tiny_folder("llama")), {}, adapters=named_adapters(folder, tiny_folder("llama")))
    assert isinstance(program, Transformers)
    assert "the engine does not compute adapters beside the weights yet (`lowbit merge" in str(program)
    merged = lowbit.generate(tmp_path / "merged", [5, 9, 20], max_new_tokens=8)
    assert program.generate([5, 9, 20], max_new_tokens=8).tokens == merged.tokens


def test_names_and_options_that_cannot_be(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    base, folder = tiny_folder("llama"), write(tmp_path / "a", llama_factors())
    with pytest.raises(RecipeError, match="two adapters are called 'a'"):
        named_adapters([folder, str(folder)], base)
    assert list(named_adapters([folder, f"b={folder}"], base)) == ["a", "b"]
    with pytest.raises(EngineError, match="transformers runs it, without activations"):
        lowbit.generate(base, [5, 9], adapter=folder, activations="int8")
    with pytest.raises(SourceError, match="no folder 'nowhere'"):
        lowbit.generate(base, [5, 9], adapter="nowhere")
    with pytest.raises(SourceError, match="has no such tensor"):
        lowbit.generate(base, [5, 9], adapter=write(tmp_path / "b", factors({"model.layers.8.mlp.up_proj": (64, 32)})))
    program = open_generator(str(base), {}, adapters=named_adapters(folder, base))
    with pytest.raises(RecipeError, match="there is no adapter 'b'.*there are a"):
        program.generate([5, 9], adapter="b", max_new_tokens=1)


def test_the_command(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    base, one = str(tiny_folder("llama")), str(write(tmp_path / "one", llama_factors(size=2.0)))
    two = str(write(tmp_path / "two", llama_factors(seed=1, size=2.0)))
    alone = CliRunner().invoke(app, ["generate", base, "the hen", "--adapter", one, "--max-new-tokens", "6"])
    assert alone.exit_code == 0 and "transformers, not the engine" in alone.stderr.replace("\n", " ")
    both = CliRunner().invoke(
        app, ["generate", base, "the hen", "--adapter", one, "--adapter", f"other={two}", "--max-new-tokens", "6"]
    )
    assert both.exit_code == 0
    first, second = both.stdout.split("\n\nother:\n")
    assert first == "one:\n" + alone.stdout.rstrip("\n") and second.rstrip("\n") != alone.stdout.rstrip("\n")
    talk = CliRunner().invoke(app, ["chat", base, "--adapter", one, "--adapter", two], input="hello\n")
    assert talk.exit_code == 2 and "a conversation has one adapter" in talk.stderr
