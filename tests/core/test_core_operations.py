"""Operations of the decoder that only some families have, held against transformers in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.kernels.core import core

pytestmark = pytest.mark.skipif(core() is None, reason="lowbit._core is not built")
lowbit_core: Any = core()

TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "olmo2": {},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
    "qwen3_moe shares that do not add up to one": EXPERTS | {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "mixtral": EXPERTS,
}


def tiny(name: str) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.split()[0], **TINY | FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if parameter.ndim == 1 else torch.randn_like(parameter) * 0.15
            )
    return model


def projection(weights: Sequence[Tensor], paired: bool = False) -> Any:
    packed = lowbit_core.pack_floats("f32", [w.detach().contiguous().numpy() for w in weights], paired)
    width = len(weights[0]) if paired else sum(len(w) for w in weights)
    part = lowbit_core.PartSpec(weight=packed, activations=lowbit_core.ActivationSpec())
    return lowbit_core.ProjectionSpec(cols=weights[0].shape[1], width=width, parts=[part])


def mlp(gate: Tensor, up: Tensor, down: Tensor) -> Any:
    return lowbit_core.MlpSpec(gate_up=projection([gate, up], paired=True), down=projection([down]))


def layer_of(found: Any, config: Any) -> Any:
    attention, experts = found.self_attn, getattr(found.mlp, "experts", None)

    def norm(module: Any) -> Any:
        return None if module is None else module.weight.detach().numpy()

    feed: dict[str, Any] = {}
    if experts is None:
        feed["mlp"] = mlp(found.mlp.gate_proj.weight, found.mlp.up_proj.weight, found.mlp.down_proj.weight)
    else:
        pairs = [(*w.chunk(2), down) for w, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)]
        feed["experts"] = lowbit_core.ExpertsSpec(
            router=projection([found.mlp.gate.weight]), experts=[mlp(*pair) for pair in pairs],
            top_k=config.num_experts_per_tok, normalized=getattr(config, "norm_topk_prob", True),
        )  # fmt: skip
    before = hasattr(found, "input_layernorm")
    norms = {
        "attention_norm" if before else "attention_post_norm": found.input_layernorm if before else found.post_attention_layernorm,
        "mlp_norm" if before else "mlp_post_norm": found.post_attention_layernorm if before else found.post_feedforward_layernorm,
        "query_norm": getattr(attention, "q_norm", None), "key_norm": getattr(attention, "k_norm", None),
    }  # fmt: skip
    return lowbit_core.LayerSpec(
        qkv=projection([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        output=projection([attention.o_proj.weight]), **feed, **{k: norm(v) for k, v in norms.items()}, rope=0, window=0,
    )  # fmt: skip


def decoder_of(model: Any, threads: int, isa: str = "") -> Any:
    c, inner = model.config, model.model
    rope = lowbit_core.RopeSpec(inverse_frequency=inner.rotary_emb.inv_freq.float().numpy())
    spec = lowbit_core.ModelSpec(
        width=c.hidden_size, heads=c.num_attention_heads, key_heads=c.num_key_value_heads, head_dim=16,
        vocabulary=c.vocab_size, epsilon=c.rms_norm_eps, attention_scale=16**-0.5, gate=lowbit_core.Gate.silu,
        embedding=lowbit_core.pack_floats("f32", [inner.embed_tokens.weight.detach().numpy()]),
        final_norm=inner.norm.weight.detach().numpy(), head=projection([model.lm_head.weight]),
        layers=[layer_of(layer, c) for layer in inner.layers],
    )  # fmt: skip
    return lowbit_core.Decoder(spec, [rope], lowbit_core.ThreadPool(threads), isa)


def logits(decoder: Any, texts: Sequence[Any], chunk: int) -> list[Any]:
    """The logits after every token of each text, all texts read together, `chunk` tokens of each at a time."""
    cache, found = lowbit_core.KVCache(decoder, len(texts), 256), [[] for _ in texts]
    for first in range(0, max(map(len, texts)), chunk):
        parts = [(i, t[first : first + chunk]) for i, t in enumerate(texts) if len(t) > first]
        sequence = np.concatenate([np.full(len(p), i, np.int32) for i, p in parts])
        position = np.concatenate([np.arange(first, first + len(p), dtype=np.int32) for _, p in parts])
        ids, wanted = np.concatenate([p for _, p in parts]), np.arange(len(sequence), dtype=np.int32)
        rows = np.zeros((len(wanted), 96), np.float32)
        decoder.forward(cache, ids, sequence, position, wanted, rows)
        for i, _ in parts:
            found[i].append(rows[sequence == i])
    return [np.concatenate(f) for f in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    model, rng = tiny(name), np.random.default_rng(0)
    text = rng.integers(0, 96, 70).astype(np.int32)
    with torch.no_grad():
        right = model(torch.tensor(text[None].astype(np.int64))).logits[0].numpy()
    for isa in lowbit_core.isas():
        (found,) = logits(decoder_of(model, 1, isa), [text], 70)
        error = np.linalg.norm(found - right, axis=1) / np.linalg.norm(right, axis=1)
        assert error.max() < 1e-3, (name, isa, error.max())  # keys and values in int16


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_depend_on_nothing_but_the_text(name: str) -> None:
    """Neither on other texts of the batch, nor on chunks, nor on threads: bit for bit."""
    model, rng = tiny(name), np.random.default_rng(1)
    texts = [rng.integers(0, 96, n).astype(np.int32) for n in (70, 3, 41)]
    for isa in lowbit_core.isas():
        alone = [logits(decoder_of(model, 1, isa), [text], 1)[0] for text in texts]
        for threads, chunk in ((1, 70), (2, 1), (3, 70), (3, 13)):
            found = logits(decoder_of(model, threads, isa), texts, chunk)
            assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True)), (name, isa, threads, chunk)


def test_experts_that_cannot_be_are_refused() -> None:
    one = mlp(torch.zeros(32, 64), torch.zeros(32, 64), torch.zeros(64, 32))
    for rows, top_k in ((3, 1), (2, 0), (2, 3)):
        with pytest.raises(ValueError, match="expert"):
            lowbit_core.ExpertsSpec(
                router=projection([torch.zeros(rows, 64)]), experts=[one, one], top_k=top_k, normalized=True
            )
    with pytest.raises(TypeError):
        lowbit_core.ExpertsSpec(router=projection([torch.zeros(2, 64)]), expert=[one, one], top_k=1, normalized=True)
