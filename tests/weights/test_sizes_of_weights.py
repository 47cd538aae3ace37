"""Models whose weights are very small or large, from quantize to the engine and to other programs' files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.errors import ExportError
from lowbit.kernels.core import core
from tiny import tiny_tokenizer

UP, DOWN = (f"model.layers.0.mlp.{side}_proj.weight" for side in ("up", "down"))
IDS = torch.arange(3, 35)[None]


def sized(folder: Path, power: int, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama with up projections times 2^-power and down projections times 2^power: the same function."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[UP], tensors[DOWN] = tensors[UP] * 2.0**-power, tensors[DOWN] * 2.0**power
    save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def loaded(folder: Path) -> torch.nn.Module:
    """By the kernel that expands weights: which of the others is fastest differs from run to run, and so do last bits."""
    return lowbit.load(folder, torch.float32, kernel="expand")


@pytest.mark.parametrize("recipe", ["w4", "kmeans4:g32", "gptq@int4:g32"])
def test_codes_and_logits_are_those_of_the_usual_model(tmp_path: Path, recipe: str) -> None:
    options = (
        {"calibration": [IDS[:, i : i + 16] for i in (0, 16)], "samples": 2, "length": 16} if "gptq" in recipe else {}
    )
    for power in (0, -20, 30):
        name = str(power)
        sized(tmp_path / name, power)
        lowbit.quantize(tmp_path / name, recipe, tmp_path / f"q{name}", **options)  # type: ignore[arg-type]
    usual = tmp_path / "q0"
    right, codes = logits(loaded(usual)), load_file(usual / "model.safetensors")
    for name in ("-20", "30"):
        folder = tmp_path / f"q{name}"
        made = load_file(folder / "model.safetensors")
        assert all(torch.equal(made[k], codes[k]) for k in codes if k.endswith("codes"))
        assert (folder / "model.safetensors").stat().st_size == (usual / "model.safetensors").stat().st_size
        assert float((logits(loaded(folder)) - right).norm() / right.norm()) < 1e-5
        listed = json.loads((folder / "config.json").read_text())["quantization_config"]["tensors"]
        assert any(":x=" in listed[n]["format"] for n in (UP, DOWN))
        if core() is not None and "gptq" not in recipe:
            engine = torch.as_tensor(lowbit.Engine.open(folder, threads=1).logits(IDS[0].tolist()))
            assert float((engine - right[0]).norm() / right.norm()) < 2e-3


def test_in_memory_and_saved(tmp_path: Path) -> None:
    sized(tmp_path / "m", -20, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    made = lowbit.quantize(model, "w8")
    assert float((logits(made.model) - logits(model)).norm() / logits(model).norm()) < 0.03
    made.save(tmp_path / "q")
    assert float((logits(loaded(tmp_path / "q")) - logits(made.model)).norm()) < 1e-2


def test_tuners_move_what_is_stored(tmp_path: Path) -> None:
    """Distillation starts from the weights as they are: its loss before is that of the usual model."""
    text = {"calibration": [IDS[:, i : i + 16] for i in (0, 16)], "samples": 2, "length": 16}
    before = []
    for power in (0, -20):
        sized(tmp_path / f"{power}", power)
        made = lowbit.quantize(tmp_path / f"{power}", "rtn+distill(steps=2)@int4:g32", tmp_path / f"q{power}", **text)  # type: ignore[arg-type]
        assert made.report.tuning is not None
        before.append(json.dumps(made.report.tuning, sort_keys=True))
    assert before[0][:60] == before[1][:60]


def test_other_programs_hold_them_or_say_why_not(tmp_path: Path) -> None:
    sized(tmp_path / "m", -24)
    lowbit.quantize(tmp_path / "m", "int4:g32", tmp_path / "q")
    made = lowbit.export(tmp_path / "q", "vllm", tmp_path / "vllm")
    assert made.weights == 0.0 or set(made.unequal) <= {"model.embed_tokens.weight", "lm_head.weight"}
    for target in ("gguf", "gptq"):
        out = tmp_path / ("x.gguf" if target == "gguf" else target)
        with pytest.raises(ExportError, match=r"(down|up)_proj.* has .*too (small|large) for fp16; use --as vllm"):
            lowbit.quantize(tmp_path / "m", "q4_0,embed=q8_0", tmp_path / f"q-{target}")
            lowbit.export(tmp_path / f"q-{target}", target, out)
        assert not out.exists()
    sized(tmp_path / "row", 0)
    tensors = load_file(tmp_path / "row/model.safetensors")
    tensors[UP][5] *= 2.0**-16  # a tiny row of a usual weight
    save_file(tensors, tmp_path / "row/model.safetensors", {"format": "pt"})
    lowbit.quantize(tmp_path / "row", "q4_0,embed=q8_0", tmp_path / "qr")
    with pytest.raises(ExportError, match=rf"{UP} has 2 scales such as .* too small for fp16"):
        lowbit.export(tmp_path / "qr", "gguf", tmp_path / "r.gguf")
    sized(tmp_path / "large", 8)  # inside the range of float16: exported as it is
    lowbit.quantize(tmp_path / "large", "q4_0,embed=q8_0", tmp_path / "ql")
    assert lowbit.export(tmp_path / "ql", "gguf", tmp_path / "l.gguf").weights == 0.0
