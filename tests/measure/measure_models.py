"""Tiny random models to measure, each with its own noise to tell it from a copy."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from lowbit.measure.card import Card, CardParts, Coverage, TextMark
from lowbit.measure.environment import Environment
from lowbit.measure.quality import Estimate, Quality
from lowbit.measure.sample import Sample
from lowbit.measure.speed import STANDARD, Rates, Speed

VOCABULARY = 97


def tiny_llama(**changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def tiny_bert(cls_name: str = "BertForMaskedLM") -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return getattr(transformers, cls_name)(config).eval()


def perturbed(model: nn.Module, amount: float, seed: int = 1) -> nn.Module:
    """A copy whose parameters each got `amount` times noise of their own size."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.abs().mean() * noise)
    return other


def full_card(**changes) -> Card:
    """A card with every part, of numbers that look real."""
    quality = Quality(
        "causal", 24, 1024, 24552,
        perplexity=Estimate(24.2411, 1.9), base_perplexity=Estimate(23.5154, 1.8),
        ratio=Estimate(1.0309, 0.0021), kl_mean=Estimate(0.04126, 0.00072), kl_p99=Estimate(0.31, 0.02),
        top1=Estimate(0.8818, 0.0031),
    )  # fmt: skip
    speed = Speed(STANDARD, Rates(32.5, 700.0, 250.0), Rates(16.25, 560.0, 200.0))
    parts = CardParts(
        "smollm2", "rtn@int4:g32", 134_515_008, Coverage(134_479_872, 134_515_008, ("norms: 1-D",)),
        538_000_000, 91_750_400, 90_000_000, 4.5, 12.34, 900 * 2**20, ("a note",),
    )  # fmt: skip
    card = Card(
        parts,
        TextMark("wikitext2-eval.txt", "ab" * 32, 24, 1024, ("windows of 512",)),
        quality,
        speed,
        400 * 2**20,
        Sample("Why is the sky blue?", "Because.", "Because of [bold]air[/bold]."),
        Environment("0.1.0", "2.13.0", "5.23.0", "3.11.7", "Linux x86_64, 2 cores"),
    )
    return dataclasses.replace(card, **changes)
