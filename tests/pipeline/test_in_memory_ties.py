"""Models that tie their weights in several ways, quantized in memory: what was one tensor stays one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import packed_weights
from tiny import VOCAB

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "max_position_embeddings": 80, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
KINDS = {
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", {}), "camembert": ("CamembertConfig", "CamembertForMaskedLM", {}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {}), "bert": ("BertConfig", "BertForMaskedLM", {}),
    "jina": ("JinaEmbeddingsV3Config", "JinaEmbeddingsV3ForMaskedLM", {}), "nomic": ("NomicBertConfig", "NomicBertForMaskedLM", {}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {"embedding_size": 32}),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {"embedding_size": 32}),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {"cls_token_id": 0, "sep_token_id": 2}),
    "mobilebert": ("MobileBertConfig", "MobileBertForMaskedLM", {"embedding_size": 32, "intra_bottleneck_size": 32}),
    "bart": ("BartConfig", "BartForConditionalGeneration",
             {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
              "encoder_attention_heads": 2, "decoder_attention_heads": 2}),
}  # fmt: skip


def tiny(kind: str) -> Any:
    config, cls, more = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES | more))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape) * 0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_are_quantized_in_memory(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = lowbit.quantize(model, "int8:channel").model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found, count = logits(made), len(list(packed_weights(made)))
    assert count and (found - logits(model)).norm() < 0.05 * logits(model).norm()
    table, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    assert isinstance(table, PackedWeight) and (head is table) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )

    model.save_pretrained(tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int8:channel", tmp_path / "w8")
    cls = type(model)
    for folder, other in ((tmp_path / "w8", None), (tmp_path / "memory", made), (tmp_path / "again", "w8")):
        if other == "w8":
            other = cls.from_pretrained(tmp_path / "w8")
        if other is not None:
            other.save_pretrained(folder)
        loaded, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), (folder, info)
        assert torch.equal(logits(loaded), found), folder
        assert len(list(packed_weights(loaded))) == count

    plain = lowbit.dequantize(loaded)
    assert (logits(plain) - found).norm() < 2e-4 * found.norm()
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == (head is table)
    plain.save_pretrained(tmp_path / "plain")
    again, info = cls.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(plain))
