"""SmolLM3: Llama whose every fourth layer has no positions."""

from __future__ import annotations

from lowbit.families.config_facts import BIASES, LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import Decoder, Family

FAMILY = Family(
    "smollm3",
    ConfigFacts(LLAMA | WINDOWS | BIASES | {"no_rope_layers"}),
    decoder=Decoder(given=("layer_types", "no_rope_layers")),
)
