"""Scales of a KV cache in exports: against a naive float64 model, in the folder, and where they are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import lowbit
from lowbit.calibration.data import Calibration
from lowbit.cli.main import app
from lowbit.convert.kv_ranges import kv_cost, kv_ranges
from lowbit.convert.quantize_as import prepare, quantized_as
from lowbit.errors import ExportError, RecipeError
from lowbit.interchange.exporters.common.kv_ranges import KVRanges, stored
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.pipeline.loading import load
from tiny import _ROPE, VOCAB, save_tiny, tiny_tokenizer

LARGEST = 448.0  # of e4m3
WINDOWS = torch.randint(3, VOCAB, (3, 1, 24), generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {"kv": "fp8", "calibration": list(WINDOWS)}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries that lowbit quantized."""
    folder = tmp_path_factory.mktemp("kv")
    save_tiny("llama", folder / "llama")
    lowbit.quantize(folder / "llama", "int4:g32", folder / "small")
    return folder / "small"


def scales(folder: Path) -> dict[str, float]:
    tensors = load_file(folder / "model.safetensors")
    found = {name: t for name, t in tensors.items() if name.endswith((".self_attn.k_scale", ".self_attn.v_scale"))}
    assert all(t.shape == (1,) and t.dtype == torch.float32 for t in found.values())
    return {name: float(t) for name, t in found.items()}


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, base: float) -> Tensor:
    """[tokens, head_dim]: dimension i turns with i + head_dim / 2 (Su et al. 2021, halves as Llama's checkpoints have them)."""
    half, found = x.shape[1] // 2, x.clone()
    for p in range(x.shape[0]):
        for i in range(half):
            angle = p * base ** (-i / half)
            a, b = float(x[p, i]), float(x[p, i + half])
            found[p, i] = a * math.cos(angle) - b * math.sin(angle)
            found[p, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return found


def naive_peaks(folder: Path, ids: Tensor) -> list[tuple[float, float]]:
    """Llama in float64, head by head and token by token: the largest |key| and |value| of each layer."""
    dense = LowbitFolder(folder).dense()
    config: Any = dense.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads

    def w(name: str) -> Tensor:
        return dense.read(f"model.{name}.weight").double()

    x, peaks = w("embed_tokens")[ids], []
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}"
        h = norm(x, w(f"{at}.input_layernorm"))
        q, k, v = (h @ w(f"{at}.self_attn.{p}_proj").T for p in "qkv")
        keys = [rotated(k[:, j * dim : (j + 1) * dim], 10000.0) for j in range(kv_heads)]
        values = [v[:, j * dim : (j + 1) * dim] for j in range(kv_heads)]
        peaks.append((max(float(a.abs().max()) for a in keys), max(float(a.abs().max()) for a in values)))
        out = []
        for j in range(heads):
            query, of = rotated(q[:, j * dim : (j + 1) * dim], 10000.0), j * kv_heads // heads
            rows = []
            for t in range(len(ids)):
                share = (keys[of][: t + 1] @ query[t] / math.sqrt(dim)).softmax(0)
                rows.append(share @ values[of][: t + 1])
            out.append(torch.stack(rows))
        x = x + torch.cat(out, 1) @ w(f"{at}.self_attn.o_proj").T
        h = norm(x, w(f"{at}.post_attention_layernorm"))
        gate = h @ w(f"{at}.mlp.gate_proj").T
        x = x + (gate * gate.sigmoid() * (h @ w(f"{at}.mlp.up_proj").T)) @ w(f"{at}.mlp.down_proj").T
    return peaks


def test_scales_are_the_largest_of_a_naive_model_in_float64(small: Path, tmp_path: Path) -> None:
    made = lowbit.export(small, "vllm", tmp_path / "v", **TEXT)
    assert section(made.path)["kv_cache_scheme"] == SCHEME
    windows = [naive_peaks(small, window[0]) for window in WINDOWS]
    found = scales(made.path)
    assert len(found) == 4
    for layer in range(2):
        for part, name in enumerate("kv"):
            wanted = max(peaks[layer][part] for peaks in windows) / LARGEST
            assert found[f"model.layers.{layer}.self_attn.{name}_scale"] == pytest.approx(wanted, rel=1e-5)
    assert any("3 windows (72 tokens) of token ids" in note for note in made.notes)
    assert any("fp8 keys and values move the logits by" in note for note in made.notes)


def test_without_kv_nothing_of_it_is_there(small: Path, tmp_path: Path) -> None:
    made = lowbit.export(small, "vllm", tmp_path / "v")
    assert section(made.path)["kv_cache_scheme"] is None and not scales(made.path)
    assert not any("keys and values" in note for note in made.notes)


def test_the_same_bytes_again_and_only_scales_more(small: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        lowbit.export(small, "vllm", tmp_path / name, **TEXT)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    lowbit.export(small, "vllm", tmp_path / "plain")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "plain"))
    assert set(one) - set(two) == set(scales(tmp_path / "a"))
    assert all(torch.equal(one[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in two.items())


def test_lowbit_reads_the_folder_and_names_what_it_leaves_out(small: Path, tmp_path: Path) -> None:
    made = lowbit.export(small, "vllm", tmp_path / "v", **TEXT)
    source = open_source(made.path)
    assert set(scales(made.path)) <= set(source.dropped)  # type: ignore[attr-defined]
    lowbit.import_model(made.path, tmp_path / "imported")
    ours, again = (LowbitFolder(f) for f in (small, tmp_path / "imported"))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(ours.values(name), again.values(name))
    lowbit.dequantize_model(made.path, tmp_path / "float")
    assert not any("_scale" in name for name in load_file(tmp_path / "float" / "model.safetensors"))


def test_a_window_does_not_hide_what_it_drops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(architectures=["MistralForCausalLM"], sliding_window=4, head_dim=8, **_ROPE)
    model = transformers.MistralForCausalLM(config).eval()
    peaks = [0.0, 0.0]

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            peaks[layer] = max(peaks[layer], float(out.detach().abs().max()))

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(keep(i))
    found = kv_ranges(model, Calibration.of("ids", [w[0] for w in WINDOWS]), "fp8")
    assert [v for _, v in found.layers] == peaks
    ids = torch.arange(3, 27)
    assert 0 < kv_cost(model, ids, found) < 0.05


def test_experts_go_by_their_published_names(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "m")
    lowbit.quantize(tmp_path / "m", "int4:g32", tmp_path / "q")
    made = lowbit.export(tmp_path / "q", "vllm", tmp_path / "v", **TEXT)
    assert set(scales(made.path)) == {f"model.layers.{i}.self_attn.{p}_scale" for i in (0, 1) for p in "kv"}


def test_a_stored_number_is_the_nearest_level() -> None:
    """Against all levels of e4m3, and cut at the largest."""
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()]
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3
    scale = float(x.abs().max()) / LARGEST / 1.25  # so that some are cut
    best = (x[:, None] / scale - levels).abs().min(1).values
    got = (x / scale - stored(x, "fp8", scale) / scale).abs()
    assert torch.allclose(got, best, atol=1e-4)
    assert float(stored(x, "fp8", scale).abs().max()) == pytest.approx(LARGEST * scale)


def test_a_layer_of_zeros_gets_a_scale_that_readers_take() -> None:
    assert KVRanges("fp8", "", ((0.0, LARGEST * 2),)).scales(0) == (1.0, 2.0)


def test_values_that_are_not_finite_are_an_error(small: Path) -> None:
    model: Any = load(small, torch.float32, kernel="expand")
    with torch.no_grad():
        model.model.embed_tokens.weight = torch.nn.Parameter(torch.full((VOCAB, 32), float("nan")))
    with pytest.raises(ExportError, match="layer 0 has keys or values that are not finite"):
        kv_ranges(model, Calibration.of("ids", [WINDOWS[0, 0]]), "fp8")


@pytest.mark.parametrize("target", ["gguf", "gptq", "awq"])
def test_other_targets_name_those_that_can(small: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(ExportError, match=f"{target} cannot hold .*'fp8' \\(vllm has fp8\\)"):
        lowbit.export(quantized_for(target, small, tmp_path), target, tmp_path / "x.gguf", **TEXT)
    assert not (tmp_path / "x.gguf").exists()


def quantized_for(target: str, small: Path, tmp_path: Path) -> Path:
    if target != "gguf":
        return small
    lowbit.quantize(small.parent / "llama", "q4_0,embed=q8_0", tmp_path / "q")
    return tmp_path / "q"


def test_unknown_kinds_and_ignored_text_are_errors(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'int8' \\(vllm has fp8\\)"):
        lowbit.export(small, "vllm", tmp_path / "v", kv="int8")
    for options in ({"calibration": "self"}, {"samples": 3}, {"length": 8}, {"chat": True}):
        with pytest.raises(RecipeError, match="would be ignored"):
            lowbit.export(small, "vllm", tmp_path / "v", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


CANNOT = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
             "in 0 of its 2 layers"),
    "mla": ("DeepseekV3Config", "DeepseekV3ForCausalLM",
            {**_ROPE, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
             "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1,
             "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}, "kv_lora_rank"),
    "linear": ("Qwen3NextConfig", "Qwen3NextForCausalLM",
               {**_ROPE, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
                "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
               "linear_attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_models_without_a_plain_cache_are_refused(tmp_path: Path, name: str) -> None:
    kind, architecture, sizes, reason = CANNOT[name]
    config = getattr(transformers, kind)(architectures=[architecture], **(sizes | {"vocab_size": VOCAB}))
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ExportError, match=f"{reason}.*the nearest is this export without --kv"):
        prepare(tmp_path / "m", "int4:g32", "vllm", kv="fp8")


def said(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return file


def test_export_on_the_command_line(small: Path, text: Path, tmp_path: Path) -> None:
    told = said(
        "export", small, "--as", "vllm", "--kv", "fp8", "--calibration", text, "--samples", 2, "-o", tmp_path / "v"
    )
    assert "keys and values in fp8, scales from 2 windows" in told and len(scales(tmp_path / "v")) == 4
    assert "would be ignored" in said("export", small, "--as", "vllm", "--calibration", text, code=2)


@pytest.mark.parametrize("recipe", ["absmax@int4:g32", "gptq@int4:g32"])
def test_straight_from_a_float_model(small: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    """The text goes to the method if it looks at text, and to the scales in any case."""
    model = small.parent / "llama"
    words = ("--as", "vllm", "--kv", "fp8", "--calibration", text, "--samples", 2, "--no-card", "-o", tmp_path / "v")
    told = said("quantize", model, recipe, *words)
    assert "text.txt" in told and section(tmp_path / "v")["kv_cache_scheme"] == SCHEME
    assert len(scales(tmp_path / "v")) == 4 and [p.name for p in tmp_path.iterdir()] == ["v"]


def test_an_iterator_serves_method_and_scales(small: Path, tmp_path: Path) -> None:
    ready = prepare(small.parent / "llama", "gptq@int4:g32", "vllm", calibrated=True, kv="fp8")
    with quantized_as(small.parent / "llama", ready, tmp_path / "v", calibration=iter(WINDOWS)) as (_, made):
        assert any("3 windows (72 tokens) of token ids" in note for note in made.notes)


def test_a_text_that_is_too_short_is_known_before_the_work(small: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    words = ("--as", "vllm", "--kv", "fp8", "--calibration", tmp_path / "short.txt", "-o", tmp_path / "v")
    assert "fewer than one calibration window" in said(
        "quantize", small.parent / "llama", "absmax@int4:g32", *words, code=2
    )
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_quantize_refuses_before_the_work(small: Path, tmp_path: Path) -> None:
    model = small.parent / "llama"
    assert "--kv belongs to --as" in said("quantize", model, "w4", "--kv", "fp8", "-o", tmp_path / "v", code=2)
    refused = said("quantize", model, "w4", "--as", "gptq", "--kv", "fp8", "-o", tmp_path / "v", code=2)
    assert "vllm has fp8" in refused and not list(tmp_path.iterdir())
