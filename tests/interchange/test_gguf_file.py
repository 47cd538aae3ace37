"""GGUF files as sources, held against transformers' own loader and against llama.cpp's formulas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize

from lowbit.errors import SourceError
from lowbit.interchange.opening import open_source

H, FF, HEADS, KV, VOCAB = 64, 96, 4, 2, 96


def writer(path: Path, architecture: str) -> GGUFWriter:
    out = GGUFWriter(path, architecture)
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(H)
    out.add_feed_forward_length(FF)
    out.add_head_count(HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_token_list([f"t{i}" for i in range(VOCAB)])
    return out


def close(out: GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class Tensors:
    """Adds random tensors to a writer and remembers the values that a reader must see."""

    def __init__(self, out: GGUFWriter) -> None:
        self.out, self.seen, self.random = out, {}, np.random.default_rng(0)

    def add(self, name: str, *shape: int, kind: Type = Type.F32, values: np.ndarray | None = None) -> None:
        values = self.random.standard_normal(shape).astype(np.float32) if values is None else values
        stored = values if kind == Type.F32 else quantize(values, kind)
        self.out.add_tensor(name, stored, raw_dtype=kind)
        self.seen[name] = torch.from_numpy(np.array(dequantize(stored, kind), dtype=np.float32))


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp stores q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def attention(tensors: Tensors, kind: Type = Type.F32) -> None:
    head = H // HEADS
    tensors.add("token_embd.weight", VOCAB, H, kind=kind)
    tensors.add("output_norm.weight", H)
    tensors.add("blk.0.attn_norm.weight", H)
    tensors.add("blk.0.ffn_norm.weight", H)
    tensors.add("blk.0.attn_v.weight", KV * head, H, kind=kind)
    tensors.add("blk.0.attn_output.weight", H, H, kind=kind)


def llama(path: Path, kind: Type, extra: bool = False) -> dict[str, torch.Tensor]:
    """Write a llama of one layer; return model name -> expected values."""
    out = writer(path, "llama")
    out.add_head_count_kv(KV)
    out.add_vocab_size(VOCAB)
    tensors = Tensors(out)
    attention(tensors, kind)
    head, want = H // HEADS, {}
    for name, heads in (("q", HEADS), ("k", KV)):
        plain = tensors.random.standard_normal((heads * head, H)).astype(np.float32)
        tensors.add(f"blk.0.attn_{name}.weight", kind=kind, values=permute(plain, heads))
        stored = plain if kind == Type.F32 else dequantize(quantize(plain, kind), kind)  # rows are apart in a block
        want[f"model.layers.0.self_attn.{name}_proj.weight"] = torch.from_numpy(np.array(stored))
    for name, shape in (("gate", (FF, H)), ("up", (FF, H)), ("down", (H, FF))):
        tensors.add(f"blk.0.ffn_{name}.weight", *shape, kind=kind)
        want[f"model.layers.0.mlp.{name}_proj.weight"] = tensors.seen[f"blk.0.ffn_{name}.weight"]
    if extra:
        tensors.add("rope_freqs.weight", values=np.linspace(1, 5, 8, dtype=np.float32))
    want["model.layers.0.self_attn.v_proj.weight"] = tensors.seen["blk.0.attn_v.weight"]
    want["model.layers.0.self_attn.o_proj.weight"] = tensors.seen["blk.0.attn_output.weight"]
    want["model.embed_tokens.weight"] = tensors.seen["token_embd.weight"]
    want["model.norm.weight"] = tensors.seen["output_norm.weight"]
    want["model.layers.0.input_layernorm.weight"] = tensors.seen["blk.0.attn_norm.weight"]
    want["model.layers.0.post_attention_layernorm.weight"] = tensors.seen["blk.0.ffn_norm.weight"]
    close(out)
    return want


KINDS = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_llama_is_renamed_unpermuted_and_unpacked(kind: Type, tmp_path: Path) -> None:
    want = llama(tmp_path / "m.gguf", kind, extra=True)
    source = open_source(tmp_path / "m.gguf")
    assert set(source.tensors) == set(want)
    for name, tensor in want.items():
        got = source.read(name)
        assert got.dtype == torch.float32 and torch.equal(got, tensor), name
        assert source.tensors[name].shape == tuple(tensor.shape)
        stored = source.stored_as(name)
        if kind in (Type.F32, Type.F16, Type.BF16) or tensor.dim() == 1:
            assert stored is None
            wanted = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(kind, torch.float32)
            assert source.float_type(name) == (wanted if tensor.dim() > 1 else torch.float32)
        else:
            assert stored is not None and stored.read is not None and torch.equal(stored.read().dequantize(), tensor), (
                name
            )
    assert source.storage == f"gguf, {kind.name}"
    assert source.inventory.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert source.dropped == () and source.extra == ()
    assert source.config.rope_parameters["long_factor"] == pytest.approx(np.linspace(1, 5, 8))
    assert source.config.architectures == ["LlamaForCausalLM"]


def moe(path: Path) -> None:
    """A qwen3moe of one layer; its expert width is the config's default, which no GGUF key carries."""
    from transformers import Qwen3MoeConfig

    width, experts, head = Qwen3MoeConfig().moe_intermediate_size, 2, H // HEADS
    out = writer(path, "qwen3moe")
    out.add_head_count_kv(KV)
    out.add_key_length(head)
    out.add_expert_count(experts)
    out.add_expert_used_count(1)
    tensors = Tensors(out)
    attention(tensors)
    tensors.add("blk.0.attn_q.weight", H, H)
    tensors.add("blk.0.attn_k.weight", KV * head, H)
    tensors.add("blk.0.attn_q_norm.weight", head)
    tensors.add("blk.0.attn_k_norm.weight", head)
    tensors.add("blk.0.ffn_gate_inp.weight", experts, H)
    tensors.add("blk.0.ffn_gate_exps.weight", experts, width, H, kind=Type.Q8_0)
    tensors.add("blk.0.ffn_up_exps.weight", experts, width, H, kind=Type.Q8_0)
    tensors.add("blk.0.ffn_down_exps.weight", experts, H, width, kind=Type.Q8_0)
    tensors.add("output.weight", VOCAB, H)
    close(out)


def lfm2(path: Path) -> None:
    """An lfm2 of one convolution layer and one attention layer."""
    head = H // HEADS
    out = GGUFWriter(path, "lfm2")
    out.add_block_count(2)
    out.add_context_length(64)
    out.add_embedding_length(H)
    out.add_feed_forward_length(FF)
    out.add_head_count(HEADS)
    out.add_head_count_kv([0, KV])
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_uint32("lfm2.shortconv.l_cache", 3)
    out.add_token_list([f"t{i}" for i in range(VOCAB)])
    tensors = Tensors(out)
    tensors.add("token_embd.weight", VOCAB, H, kind=Type.Q8_0)
    tensors.add("token_embd_norm.weight", H)
    for block in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            tensors.add(f"blk.{block}.{norm}.weight", H)
        for name, shape in (("gate", (FF, H)), ("up", (FF, H)), ("down", (H, FF))):
            tensors.add(f"blk.{block}.ffn_{name}.weight", *shape, kind=Type.Q8_0)
    tensors.add("blk.0.shortconv.conv.weight", H, 3)
    tensors.add("blk.0.shortconv.in_proj.weight", 3 * H, H, kind=Type.Q8_0)
    tensors.add("blk.0.shortconv.out_proj.weight", H, H, kind=Type.Q8_0)
    for name, rows in (("attn_q", H), ("attn_k", KV * head), ("attn_v", KV * head), ("attn_output", H)):
        tensors.add(f"blk.1.{name}.weight", rows, H, kind=Type.Q8_0)
    tensors.add("blk.1.attn_q_norm.weight", head)
    tensors.add("blk.1.attn_k_norm.weight", head)
    close(out)


def same_as_transformers(path: Path) -> None:
    """Every tensor equals, bit for bit, what transformers loads from the file as float32."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF weights with accelerate only")
    from transformers import AutoModelForCausalLM, GgufConfig

    source = open_source(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    state = model.state_dict()
    assert set(source.tensors) | set(source.inventory.tied) == set(state)
    for name in source.tensors:
        assert torch.equal(source.read(name), state[name]), name
    assert source.inventory.model_class == type(model).__name__
    ours = source.load_float()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("make", [moe, lfm2, lambda path: llama(path, Type.Q8_0)], ids=["qwen3moe", "lfm2", "llama"])
def test_equal_to_the_loader_of_transformers(make: object, tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")  # type: ignore[operator]
    same_as_transformers(tmp_path / "m.gguf")


@pytest.mark.slow
def test_smollm2_is_equal_to_the_loader_of_transformers(smollm2_file: Path) -> None:
    same_as_transformers(smollm2_file)


def test_smollm2_brings_tokenizer_and_chat_template(smollm2_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    source = open_source(smollm2_file)
    source.save_assets(tmp_path)
    saved, chat = AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "Hi"}]
    text = "The secret of life is\n\n 42!"
    assert saved(text).input_ids == source.tokenizer()(text).input_ids and saved.decode(saved(text).input_ids) == text
    assert "<|im_start|>user\nHi<|im_end|>" in saved.apply_chat_template(chat, tokenize=False)
    # llama.cpp stops at <|endoftext|> too, which the file does not name.
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [saved.eos_token_id, 0] == [2, 0]


@pytest.mark.slow
def test_smollm2_is_never_in_memory_as_a_whole(smollm2_file: Path) -> None:
    """Reading all tensors takes at most twice the largest one (113 MB) over what opening takes."""
    code = """
import resource, sys, torch
torch.set_num_threads(1)
from lowbit.interchange.opening import open_source
source = open_source(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
total = sum(source.read(name).numel() for name in source.tensors)
print(peak() - before, total)
"""
    done = subprocess.run([sys.executable, "-c", code, str(smollm2_file)], capture_output=True, text=True, check=True)
    grown, total = map(int, done.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert total == 134_515_008 and grown * unit < 2 * 113_246_208


def test_identity_changes_with_one_weight(tmp_path: Path) -> None:
    llama(tmp_path / "m.gguf", Type.F32)
    before = open_source(tmp_path / "m.gguf").identity()
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "m.gguf").write_bytes(raw)
    assert open_source(tmp_path / "m.gguf").identity() != before == json.loads(json.dumps(before))


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    llama(path, Type.Q8_0)
    raw = path.read_bytes()
    for damaged, said in (
        (b"", "cannot be read as GGUF"),
        (b"GGUF", "cannot be read as GGUF"),
        (b"PK\x03\x04" + raw[4:], "cannot be read as GGUF"),
        (raw[:300], "cannot be read as GGUF"),
        (raw[:-100], "truncated"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=said) as caught:
            open_source(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    out = writer(tmp_path / "m.gguf", "no-such-architecture")
    Tensors(out).add("token_embd.weight", VOCAB, H)
    close(out)
    with pytest.raises(SourceError, match="no-such-architecture"):
        open_source(tmp_path / "m.gguf")


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    out = writer(tmp_path / "m.gguf", "llama")
    out.add_head_count_kv(KV)
    attention(Tensors(out))
    close(out)
    with pytest.raises(SourceError, match=r"lack \d+ of .*q_proj"):
        open_source(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("adapter", "llama-export-lora"), ("mmproj", "its language model"), ("imatrix", "how much weights matter")],
)
def test_a_file_that_holds_no_model_says_what_it_is(kind: str, words: str, tmp_path: Path) -> None:
    out = GGUFWriter(tmp_path / "x.gguf", "llama")
    out.add_type(kind)
    out.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, H), np.float32))
    close(out)
    with pytest.raises(SourceError, match=f"general.type is '{kind}'; .*{words}"):
        open_source(tmp_path / "x.gguf")
