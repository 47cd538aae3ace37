"""What measuring takes in memory, and the rule by which models are measured whole or block by block.

Whole, in the engine or in transformers, where the float model in float32, the quantized one as it is stored and the logits of both over one
window take no more than ROOM together; block by block where they take more. It follows from sizes alone, so the same command does
the same on every machine. Whole is faster, and the figures are the same.
"""

from __future__ import annotations

from typing import Any

ROOM = 1_250_000_000  # bytes
WINDOW = 1024  # tokens of a window, where nothing else is asked for


def logits_bytes(config: Any, tokens: int = WINDOW) -> int:
    """Of one model over a window, in float32; 0 where the config knows no vocabulary."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    return 4 * tokens * vocabulary if isinstance(vocabulary, int) else 0


def whole_bytes(parameters: int, stored: int, config: Any, tokens: int = WINDOW) -> int:
    """What is held against ROOM. parameters: of the float model, 0 where there is none. stored: bytes of the weights of the other."""
    return 4 * parameters + stored + (2 if parameters and stored else 1) * logits_bytes(config, tokens)


def block_by_block(parameters: int, stored: int, config: Any, tokens: int = WINDOW) -> bool:
    """The rule. The arguments are those of `whole_bytes`."""
    return whole_bytes(parameters, stored, config, tokens) > ROOM
