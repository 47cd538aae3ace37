"""What measuring takes in memory, and the rule by which models are measured whole or block by block.

Whole, in the engine or in transformers, where the float model in float32, the quantized one as it is stored and the logits of both over one
window take no more than ROOM together; block by block where they take more. It follows from sizes alone, so the same command does
the same on every machine. Whole is faster, and the figures are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.interchange.hf.models import model_class
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.memory import MICRO_BATCH, blocks_of_tensors

ROOM = 1_250_000_000  # bytes
OWN = 400_000_000  # bytes of a quantized model that a quick card opens by itself; while it is opened it takes about twice as much
WINDOW = 1024  # tokens of a window, where nothing else is asked for
SLICE = 1 << 24  # elements of a weight of 16 bits that are in float32 at a time
LOGITS = 32 << 20  # bytes of one model's logits in memory at a time, where models are measured block by block
_TOKEN = 1000  # bytes that a tokenizer takes for each token that it knows (measured: 50 MB for 49 thousand)
_LIVE_WIDTHS = 4  # activations of the widest layer that a block holds at once in float32, roughly


def vocabulary_of(config: Any) -> int:
    """How many tokens a model knows; 0 where its config does not say."""
    text = text_config(config)
    found = getattr(text, "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else 0


def logits_bytes(config: Any, tokens: int = WINDOW) -> int:
    """Of one model over a window, in float32; 0 where the config knows no vocabulary."""
    return 4 * tokens * vocabulary_of(config)


def text_bytes(config: Any) -> int:
    """Of a tokenizer and a text in tokens, roughly."""
    return _TOKEN * vocabulary_of(config)


def whole_bytes(parameters: int, stored: int, config: Any, tokens: int = WINDOW) -> int:
    """What is held against ROOM. parameters: of the float model, 0 where there is none. stored: bytes of the weights of the other."""
    return 4 * parameters + stored + (2 if parameters and stored else 1) * logits_bytes(config, tokens)


def block_by_block(parameters: int, stored: int, config: Any, tokens: int = WINDOW) -> bool:
    """The rule. The arguments are those of `whole_bytes`."""
    return whole_bytes(parameters, stored, config, tokens) > ROOM


def card_bytes(tensors: Sequence[TensorPlan], config: Any, by_engine: bool) -> int:
    """Bytes at the peak of the card of `quantize`, on top of Python and its libraries: of a model and its float model.

    by_engine: whether the engine knows the model, which then runs both where they are measured whole.
    """
    floats = [t for t in tensors if t.dtype.is_floating_point]
    parameters, stored = sum(t.count for t in floats), sum(t.bytes_after for t in tensors)
    if not _scores_tokens(config):
        return 4 * parameters + 2 * stored + text_bytes(config)
    if block_by_block(parameters, stored, config):
        return text_bytes(config) + max(streamed_bytes(tensors), _running(stored) if stored <= OWN else 0)
    logits = logits_bytes(config)
    if by_engine:
        return sum(t.bytes_before for t in floats) + stored + 2 * logits + text_bytes(config)
    return 4 * parameters + 2 * stored + 3 * logits + text_bytes(config)


def streamed_bytes(tensors: Sequence[TensorPlan]) -> int:
    """The same where both are measured block by block.

    Outside the blocks both stand as they are stored, packed weights that are multiplied also as the kernels hold them. Then the
    larger of a block at work and of the head with a slice of the logits of both.
    """
    blocks, outside = blocks_of_tensors(tensors)
    table = max((t for t in outside if t.kind in ("head", "embedding")), key=lambda t: t.count, default=None)
    held = sum(t.bytes_before + t.bytes_after for t in outside)
    widened = max((4 * min(t.count, SLICE) for t in tensors if t.dtype.itemsize < 4), default=0)
    widest = max((max(t.shape) for part in blocks for t in part if len(t.shape) > 1), default=0)
    block = max(
        (max(sum(t.bytes_before for t in part), 2 * sum(t.bytes_after for t in part)) for part in blocks), default=0
    )
    at_block = block + widened + 4 * MICRO_BATCH * widest * _LIVE_WIDTHS
    at_head = 2 * LOGITS + widened + (0 if table is None else 2 * table.bytes_after)
    return held + max(at_block, at_head)


def _scores_tokens(config: Any) -> bool:
    """Whether models of this config predict tokens; others are compared whole, whatever their size."""
    try:
        return predicts_tokens(model_class(config))
    except SourceError:
        return False


def _running(stored: int) -> int:
    """Of the quantized model alone, as it is opened, answers and is timed."""
    return 2 * stored + (48 << 20)
