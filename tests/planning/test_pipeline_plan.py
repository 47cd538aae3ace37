"""A plan is exact before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.files import safetensors_reader as safetensors_file
from lowbit.interchange.files.safetensors_writer import index_json, shards_of
from lowbit.interchange.hub import hub
from lowbit.interchange.readers import folder
from lowbit.planning.kv_cache import kv_cache
from lowbit.recipes.presets import PRESETS
from tiers import mostly_nightly
from tiny import TINY, tiny_model, tiny_tokenizer

Float = Callable[[str], Path]


def weight_bytes(out: Path) -> int:
    return sum(f.stat().st_size for f in out.iterdir() if f.name.endswith((".safetensors", ".safetensors.index.json")))


@pytest.mark.parametrize("name", TINY)
def test_bytes_are_exact_for_every_architecture(name: str, tiny_folder: Float, packed_folder: Any) -> None:
    plan = lowbit.plan(tiny_folder(name), "search@int4:g32")
    out = packed_folder(name, "search@int4:g32")
    assert plan.output_bytes == weight_bytes(out)
    assert plan.bits_per_weight == 8 * plan.output_bytes / plan.parameters
    assert plan.parameters == sum(p.numel() for p in tiny_model(name).parameters())
    quantized = sum(t.count for t in plan.tensors if t.format is not None)
    assert plan.coverage == quantized / plan.parameters
    assert quantized + sum(n for _, n in plan.kept().values()) == sum(t.count for t in plan.tensors)
    assert all(t.keep for t in plan.tensors if t.format is None)
    report = json.loads((out / "lowbit.json").read_text())
    assert report["coverage"] == plan.coverage and report["bits_per_weight"] == plan.bits_per_weight


RECIPES = [*PRESETS, "int3:g7", "kmeans@kmeans3:g16", "uint4:g32:min=(int6:g8)", "int4:g32,embed=keep", "ternary:g10",
           "int4:g32,*.down_proj=int8:channel,lm_head=keep", "nvfp4,embed=int5:tensor", "int8:128x128"]  # fmt: skip


TYPES = [(torch.float32, 1 << 30), (torch.bfloat16, 20_000), (torch.float16, 1)]


@pytest.mark.parametrize(("recipe", "case"), mostly_nightly(RECIPES, TYPES, every=lambda r, t: (r + t) % 3 == 0))
def test_bytes_are_exact_for_every_recipe_type_and_shard_size(
    recipe: str, case: tuple[torch.dtype, int], tmp_path: Path
) -> None:
    (dtype, shard), folder, out = case, tmp_path / "float", tmp_path / "out"
    tiny_model("llama").to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    plan = lowbit.plan(folder, recipe, max_shard_bytes=shard)
    text = {"samples": 2, "length": 16} if plan.recipe.needs_calibration else {}
    lowbit.quantize(folder, recipe, out, max_shard_bytes=shard, **text)
    assert plan.output_bytes == weight_bytes(out)
    assert [s.file for s in plan.shards] == sorted(p.name for p in out.glob("*.safetensors"))
    assert all(s.file_bytes == (out / s.file).stat().st_size for s in plan.shards)
    kept = {t.name: t for t in plan.tensors if t.format is None}
    assert all(t.dtype == dtype for t in kept.values())


def test_no_weight_is_read(tiny_folder: Float, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan read a tensor")

    monkeypatch.setattr(safetensors_file, "read_tensor", refuse)
    monkeypatch.setattr(folder, "read_tensor", refuse)
    for name in ("llama-tied", "mixtral", "t5"):
        assert lowbit.plan(tiny_folder(name), "w4").output_bytes > 0
    with pytest.raises(AssertionError, match="read a tensor"):
        lowbit.quantize(tiny_folder("llama"), "w4")


def giant() -> transformers.PretrainedConfig:
    """The sizes of Llama 3.1 405B."""
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=16384, intermediate_size=53248,
        num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, max_position_embeddings=131072,
        dtype="bfloat16",
    )  # fmt: skip


def test_a_model_of_400_billion_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import get_safetensors_metadata  # noqa: F401 (what is replaced must exist)

    config = giant()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    info = {n: SimpleNamespace(dtype="BF16", shape=list(t.shape)) for n, t in state.items()}
    found = SimpleNamespace(files_metadata={"model-00001-of-00001.safetensors": SimpleNamespace(tensors=info)})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda repo: found)
    monkeypatch.setattr(hub, "snapshot", lambda *args, **kwargs: tmp_path)
    plan = lowbit.plan("meta-llama/Llama-3.1-405B", "w4", context=131072)
    assert plan.parameters == 405_853_388_800
    assert plan.bytes_before == 2 * plan.parameters
    linear = sum(t.count for t in plan.tensors if t.kind == "linear")
    tables = 2 * 128256 * 16384
    norms = (2 * 126 + 1) * 16384
    assert linear == plan.parameters - tables - norms
    # 4.5 bits in linear layers; a byte and a float32 scale a row in embedding and head; norms in bfloat16.
    data = linear * 9 // 16 + tables + 2 * 128256 * 4 + 2 * norms
    assert plan.bytes_after == data and data < plan.output_bytes < data + 1_000_000
    assert plan.kv_bytes_per_token == 126 * 2 * 8 * 128 * 2 and plan.kv_bytes == 131072 * plan.kv_bytes_per_token
    assert plan.peak_bytes < 8e9 and len(plan.shards) > 40
    assert all(s.file_bytes <= plan.max_shard_bytes + len(s.header) for s in plan.shards)
    with pytest.raises(SourceError, match="only the headers"):
        hub.HubHeaders("meta-llama/Llama-3.1-405B").read("lm_head.weight")


def cache(cls: str, **values: Any) -> Any:
    return kv_cache(getattr(transformers, cls)(**values))


def test_kv_cache_of_grouped_queries() -> None:
    kv = cache("LlamaConfig", num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8)
    assert kv.bytes_per_token == 16 * 2 * 8 * 64 * 2 == 32768  # Llama 3.2 1B
    assert kv.bytes_at(1000) == 32_768_000


def test_kv_cache_of_sliding_windows() -> None:
    kv = cache("Gemma2Config", num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    layer = 2 * 4 * 256 * 2  # Gemma 2 2B: every other layer sees 4096 tokens
    assert kv.bytes_per_token == 26 * layer
    assert kv.bytes_at(10_000) == 13 * layer * 10_000 + 13 * layer * 4096
    kv = cache("MistralConfig", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    assert kv.bytes_at(10_000) == 32 * 2 * 8 * 128 * 2 * 4096  # Mistral 7B v0.1: all layers slide
    full = cache(
        "MistralConfig", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096,
        sliding_window=None,
    )  # fmt: skip
    assert full.bytes_at(10_000) == 32 * 2 * 8 * 128 * 2 * 10_000
    kv = cache(
        "Gemma3TextConfig", num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        sliding_window=512,
    )  # fmt: skip
    assert kv.bytes_at(5000) == 1024 * (4 * 5000 + 22 * 512)  # Gemma 3 1B: one full layer in six
    qwen = cache("Qwen2Config", num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, hidden_size=896)
    assert qwen.bytes_at(50_000) == 24 * 2 * 2 * 64 * 2 * 50_000  # its window is off


def test_kv_cache_of_latent_attention() -> None:
    kv = cache("DeepseekV3Config", num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
    assert kv.bytes_per_token == 61 * (512 + 64) * 2


def test_kv_cache_of_the_rest() -> None:
    falcon = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544}
    assert cache("FalconConfig", multi_query=True, **falcon).bytes_per_token == 32 * 2 * 1 * 64 * 2  # Falcon 7B
    assert cache("FalconConfig", multi_query=False, **falcon).bytes_per_token == 32 * 2 * 71 * 64 * 2
    new = {"num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "hidden_size": 8192}
    kv = cache("FalconConfig", new_decoder_architecture=True, **new)
    assert kv.bytes_per_token == 60 * 2 * 8 * 64 * 2  # Falcon 40B
    assert cache("GPT2Config").bytes_per_token == 12 * 2 * 12 * 64 * 2
    assert (
        cache("GPTNeoXConfig", num_hidden_layers=6, num_attention_heads=8, hidden_size=512).bytes_per_token
        == 6 * 2 * 512 * 2
    )
    assert cache("OPTConfig").bytes_per_token == 12 * 2 * 768 * 2
    assert cache("BloomConfig", n_layer=24, n_head=16, hidden_size=1024).bytes_per_token == 24 * 2 * 1024 * 2
    assert cache("MixtralConfig").bytes_per_token == 32 * 2 * 8 * 128 * 2
    mamba = cache("MambaConfig", num_hidden_layers=24, hidden_size=768, state_size=16)
    assert mamba.bytes_per_token == 0 and mamba.bytes_at(10) == mamba.bytes_at(10**6) == 24 * 1536 * (16 + 4) * 2
    mamba = cache(
        "Mamba2Config", num_hidden_layers=64, hidden_size=4096, num_heads=128, head_dim=64, state_size=128, n_groups=8
    )
    assert mamba.bytes_per_token == 0 and mamba.fixed == 64 * (8192 * 128 + (8192 + 2 * 8 * 128) * 4) * 2
    assert cache("BertConfig", architectures=["BertForMaskedLM"]).bytes_at(512) == 0
    assert kv_cache(None).bytes_at(1000) == 0


def test_kv_cache_of_encoder_decoders_counts_the_decoder() -> None:
    kv = cache("T5Config", num_layers=6, num_decoder_layers=8, num_heads=8, d_kv=64, d_model=512)
    assert kv.bytes_per_token == 8 * 2 * 8 * 64 * 2
    kv = cache(
        "BartConfig",
        encoder_layers=3,
        decoder_layers=5,
        encoder_attention_heads=4,
        decoder_attention_heads=8,
        d_model=512,
    )
    assert kv.bytes_per_token == 5 * 2 * 512 * 2


def test_layer_globs(tiny_folder: Float) -> None:
    plan = lowbit.plan(tiny_folder("llama"), "absmax@int4:g32,*.layers.0.*=int8:channel,*.down_proj=keep,lm_head=int6:g32,*.layers.0.mlp.down_proj.weight=int2:g32")  # fmt: skip
    became = {t.name: str(t.format) for t in plan.tensors}
    assert became["model.layers.0.self_attn.q_proj.weight"] == "int8:channel"
    assert became["model.layers.1.self_attn.q_proj.weight"] == "int4:g32"
    assert became["model.layers.1.mlp.down_proj.weight"] == "None"
    assert became["model.layers.0.mlp.down_proj.weight"] == "int2:g32"  # the last match wins
    assert became["lm_head.weight"] == "int6:g32" and became["model.embed_tokens.weight"] == "int8:channel"
    assert became["model.layers.0.input_layernorm.weight"] == "None"  # a norm stays a norm
    assert plan.kept()["kept by the recipe"] == (1, 32 * 64)


@pytest.mark.parametrize("glob", ["*.layers.7.*", "*.donw_proj", "model.embed", "lm_haed.weight"])
def test_a_glob_that_matches_nothing_is_an_error(glob: str, tiny_folder: Float, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        lowbit.plan(tiny_folder("llama"), f"int4:g32,{glob}=keep")
    with pytest.raises(RecipeError, match="matches no tensor"):
        lowbit.quantize(tiny_folder("llama"), f"int4:g32,{glob}=keep", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_glob_that_only_matches_what_is_never_quantized_is_an_error(tiny_folder: Float) -> None:
    with pytest.raises(RecipeError, match="input_layernorm"):
        lowbit.plan(tiny_folder("llama"), "int4:g32,*.input_layernorm=int8:channel")
    assert lowbit.plan(tiny_folder("llama"), "int4:g32,*.input_layernorm=keep").coverage > 0.9


def test_a_plan_is_json(tiny_folder: Float) -> None:
    plan = lowbit.plan(tiny_folder("mixtral"), "w4", context=99)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["output_bytes"] == plan.output_bytes == sum(data["files"].values()) and data["context"] == 99
    assert [t["name"] for t in data["tensors"]] == [t.name for t in plan.tensors]
    assert sum(t["bytes_after"] for t in data["tensors"]) == data["bytes_after"]
    experts = [t for t in data["tensors"] if t["kind"] == "experts"]
    assert len(experts) == 4 and all(t["format"] == "int4:g32" for t in experts)


def test_shards_hold_every_tensor_once_and_aligned() -> None:
    tensors = [
        (f"t{i}", {f"t{i}.codes": (torch.uint8, (i + 1, 3)), f"t{i}.scale": (torch.float32, (i + 1,))})
        for i in range(20)
    ]
    for limit in (1, 50, 200, 10**6):
        shards = shards_of(tensors, limit)
        names = [name for shard in shards for name in shard.spans]
        assert sorted(names) == sorted(name for _, stored in tensors for name in stored)
        for shard in shards:
            assert len(shard.header) % 8 == 0
            for name, (begin, end) in shard.spans.items():
                assert begin % (4 if name.endswith("scale") else 1) == 0 and end > begin >= len(shard.header)
        for i in range(20):
            assert len({s.file for s in shards if f"t{i}.codes" in s.spans or f"t{i}.scale" in s.spans}) == 1
        assert set(json.loads(index_json(shards))["weight_map"]) == set(names)


def test_a_source_that_is_quantized_is_said_in_text_and_json(tiny_folder: Float) -> None:
    plan = lowbit.plan(tiny_folder("llama"), "w4")
    assert not plan.about_source and "itself quantized" not in str(plan)
    small = replace(plan, source_bytes=plan.bytes_before // 4)
    assert "the source is itself quantized, a file of" in " ".join(str(small).split())
    assert any("the size before is of its float values" in note for note in small.to_json()["notes"])


def test_the_peak_with_calibration_text_is_said_beside_the_one_without(tiny_folder: Float) -> None:
    plan = lowbit.plan(tiny_folder("llama"), "w4")
    wide = replace(plan, tensors=tuple(replace(t, shape=tuple(32 * n for n in t.shape)) for t in plan.tensors))
    needs = replace(wide, recipe=lowbit.Recipe.parse("qronos@int4:g32")).peak_bytes
    assert wide.calibrated_peak_bytes == needs == wide.to_json()["calibrated_peak_bytes"] > wide.peak_bytes
    assert "while quantizing, about" in " ".join(str(wide).split()) and "with calibration text" in " ".join(
        str(wide).split()
    )
    assert lowbit.plan(tiny_folder("llama"), "absmax@int4:g32").calibrated_peak_bytes is None
