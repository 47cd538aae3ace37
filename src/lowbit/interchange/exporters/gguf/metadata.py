"""A model's family as llama.cpp knows it, and the metadata of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.families import families
from lowbit.families.config_facts import ConfigFacts
from lowbit.families.family import Family, Gguf
from lowbit.interchange.exporters.gguf import rope

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


def family_of(config: PretrainedConfig | None) -> Family | None:
    """The family of a config by its class name, or None."""
    names = tuple(config.architectures or ()) if config is not None else ()
    return next((f for f in families().values() if f.gguf and f.gguf.model_class in names), None)


def known_classes() -> str:
    """Every class that can be written, for messages; Llama, which most models are like, first."""
    found = [f.gguf for f in families().values() if f.gguf]
    return ", ".join(g.model_class for g in sorted(found, key=lambda g: g.model_class != "LlamaForCausalLM"))


def gguf_of(family: Family) -> Gguf:
    """What llama.cpp knows of a family that `family_of` has found."""
    assert family.gguf is not None
    return family.gguf


def config_facts(family: Family) -> ConfigFacts:
    """What becomes of each field of a config in a file: written, in llama.cpp's own code, or without influence."""
    assert family.config is not None
    return family.config.fixing(gguf_of(family).fixed)


def refusal(family: Family, config: Any) -> str | None:
    """Why llama.cpp would compute another model than this config's, or None."""
    gguf = gguf_of(family)
    who = f"llama.cpp's {gguf.architecture}"
    return (
        config_facts(family).refusal(config.to_dict(), who)
        or rope.refusal(config, who, gguf.scalings, family.partial_rotary)
        or gguf.refuses(config)
    )


def describe(family: Family, writer: GGUFWriter, whole: PretrainedConfig) -> None:
    """Add the metadata of the model to the file."""
    config: Any = whole.get_text_config()
    gguf = gguf_of(family)
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    writer.add_context_length(_context(family, config))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if family.norm == "rms":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(_first(config, "layer_norm_epsilon", "layer_norm_eps"))
    if gguf.head_size:
        writer.add_key_length(size)
        writer.add_value_length(size)
    rope.describe(writer, config, family.partial_rotary)
    for name, value in gguf.metadata(config).items():
        getattr(writer, f"add_{name}")(value)


def _context(family: Family, config: Any) -> int:
    """The longest sequence that llama.cpp computes as transformers does: it has windows in few families."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    reads = "sliding_window" in config_facts(family).read and not gguf_of(family).windows
    windowed = reads and getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and windowed else longest


def _first(config: Any, *names: str) -> float:
    return float(next(value for name in names if (value := getattr(config, name, None)) is not None))
