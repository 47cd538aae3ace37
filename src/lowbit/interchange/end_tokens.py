"""Which tokens end a text: one rule for folders, sources of any kind, live models, and what is written for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.errors import SourceError

# llama.cpp stops at tokens with these names, whatever else a file says (its list of tokens that end a generation).
LLAMA_CPP_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<turn|>", "<|tool_response>",
})  # fmt: skip


def end_tokens(
    generation: Mapping[str, Any] | None = None, config: Any = None, tokenizer: Any = None
) -> frozenset[int]:
    """The ids that end a text, from the first of these that names any.

    generation: generation_config.json, whose `eos_token_id` may be one id or a list. config: of transformers, or its
    JSON; that of its text model counts where it says nothing itself. tokenizer: of transformers, or anything with
    `eos_token_id`. SourceError for what is neither.
    """
    found = _ids((generation or {}).get("eos_token_id"), "generation_config.json")
    for part in (config, _of(config, "text_config")):
        found = found or _ids(_of(part, "eos_token_id"), "config.json")
    return found or _ids(getattr(tokenizer, "eos_token_id", None), "the tokenizer")


def ends_of_gguf(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> frozenset[int]:
    """The ids at which llama.cpp stops: those that a GGUF file names as ends of text, turn and message, and by their text."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = {i for key in keys if isinstance(i := metadata.get(f"tokenizer.ggml.{key}"), int)}
    named |= {vocabulary[text] for text in LLAMA_CPP_ENDS & vocabulary.keys()}
    if "<|return|>" in vocabulary and "<|call|>" in vocabulary:  # gpt-oss, whose <|end|> ends a message, not the answer
        named.discard(vocabulary.get("<|end|>", -1))
    return frozenset(i for i in named if i >= 0)


def _ids(value: Any, where: str) -> frozenset[int]:
    given = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    wrong = next((i for i in given if isinstance(i, bool) or not isinstance(i, int)), None)
    if wrong is not None:
        raise SourceError(
            f"{where}: eos_token_id has {str(wrong)[:40]!r}, which is no token; give an id or a list of such"
        )
    return frozenset(i for i in given if i >= 0)


def _of(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
