"""Granite: Llama with factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from typing import Any

from lowbit.families.config_facts import BIASES, LLAMA, ConfigFacts
from lowbit.families.family import Config, Decoder, Family

_FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def _values(config: Config) -> dict[str, Any]:
    return {
        "embedding_scale": config["embedding_multiplier"],
        "attention_scale": config["attention_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": 1.0 / config["logits_scaling"],
    }


FAMILY = Family("granite", ConfigFacts(LLAMA | BIASES | {*_FACTORS}), decoder=Decoder(values=_values, given=_FACTORS))
