"""Text that a model writes itself: calibration data that needs no file and no network.

A document begins with what the tokenizer puts before a text, else with the beginning-of-sequence token, and one drawn evenly from the vocabulary, which makes documents
differ; the others are sampled at temperature 1 from the softmax, so that they come as the model believes text to
be distributed (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 2.1, whose first few are the likeliest). For chat models with `chat`, the model is
given the opening of a user's message and then writes both sides (Xu et al. 2024, Magpie, arXiv:2406.08464).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.windows import Frame
from lowbit.engine.chat_template import ChatTemplate
from lowbit.errors import SourceError, TextError
from lowbit.interchange.end_tokens import end_tokens
from lowbit.interchange.hf.running import device_of, evaluating
from lowbit.interchange.hf.text_config import text_config
from lowbit.planning.kv_cache import kv_cache

DOCUMENT = 256  # tokens: attention over longer ones would take most of the time on a CPU
_ROWS = 128  # rows decoded together; more gain nothing on a CPU
_CACHE_BYTES, _LOGIT_BYTES = 1 << 29, 1 << 26
_ANY = -1  # in a start: a token drawn evenly from the vocabulary
_MARK = "lowbit-message"


@dataclass(frozen=True)
class Opening:
    """How documents begin and what may be in them.

    start    tokens that open a document, at least one; -1 is one drawn evenly from the vocabulary
    reply    tokens between a user's message and the answer, put after the first end of a chat
    ends     tokens that end a message or document; the next is opened after them
    banned   tokens that are never drawn
    frame    what the tokenizer puts before every text
    """

    start: tuple[int, ...] = (_ANY,)
    reply: tuple[int, ...] = ()
    ends: frozenset[int] = frozenset()
    banned: tuple[int, ...] = ()
    frame: tuple[int, ...] = ()


def opening_of(tokenizer: Any, config: Any = None, *, chat: bool = False) -> Opening:
    """How `tokenizer` opens a document, or with `chat` a user's message. TextError without a chat template."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    frame = Frame.of(tokenizer).before
    known = (i for i in (bos, getattr(config, "bos_token_id", None), eos) if isinstance(i, int))
    opens = frame or tuple(known)[:1]
    ends = end_tokens(config=config, tokenizer=tokenizer) | ({eos} if isinstance(eos, int) else set())
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    banned = tuple(sorted(special - ends - set(opens)))
    if not chat:
        return Opening((*opens, _ANY), (), ends, banned, frame)
    text = render_chat(tokenizer, [{"role": "user", "content": _MARK}], add_generation_prompt=True)
    before, mark, after = text.partition(_MARK)
    if not mark:
        raise TextError(
            "the tokenizer's chat template changes the messages, so it is unknown what it puts before them: leave chat out"
        )
    start, reply = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
    return Opening(start, reply[1:] if reply[:1] and reply[0] in ends else reply, ends, banned)


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation by the tokenizer's chat template. TextError when it has none or refuses."""
    try:
        template = ChatTemplate.of(tokenizer)
        if template is None:
            raise TextError("chat was asked for, but the tokenizer has no chat template: leave chat out")
        return template.render(messages, answer=add_generation_prompt)
    except SourceError as error:
        raise TextError(f"{error}: leave chat out") from error


def write_windows(
    model: nn.Module, opening: Opening, *, count: int, length: int, vocabulary: int | None = None, seed: int = 0,
    on_token: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:  # fmt: skip
    """`count` windows of int64 ids [length], each of documents of at most DOCUMENT tokens that `model` wrote.

    `vocabulary` is the number of tokens that the tokenizer knows; the model's spare rows are not drawn.
    The same model, machine and seed give the same ids. `on_token(tokens written, tokens in all)`. TextError when the model does not
    write text.
    """
    able = getattr(model, "can_generate", None)
    if able is not None and not able():
        raise TextError(f"a {type(model).__name__} does not write text to calibrate on: pass a text file or token ids")
    from lowbit.interchange.hf.fast_decoding import grouped_attention

    per_window = math.ceil(length / DOCUMENT)
    document = math.ceil(length / per_window)
    total = count * per_window
    written: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), torch.inference_mode(), grouped_attention(model):
        rows = min(total, _rows_at_once(getattr(model, "config", None), document))
        while len(written) < total:
            rows = min(rows, total - len(written))
            before, at_once = len(written) * document, rows

            def told(tokens: int) -> None:
                on_token(before + tokens * at_once, total * document)  # noqa: B023  called only before the next round

            written += _documents(model, opening, rows, document, vocabulary, generator, told).unbind()
    return [torch.cat(written[i : i + per_window])[:length] for i in range(0, total, per_window)]


def _rows_at_once(config: Any, document: int) -> int:
    """As many rows as the memory for cache and logits allows; from the config alone, so that it is the same everywhere."""
    inner = text_config(config)
    cache = kv_cache(config).bytes_at(document) if hasattr(config, "get_text_config") else 0
    logits = 4 * (getattr(inner, "vocab_size", None) or 1)
    return max(1, min(_ROWS, _CACHE_BYTES // max(cache, 1), _LOGIT_BYTES // logits))


def _documents(
    model: nn.Module, opening: Opening, rows: int, length: int, vocabulary: int | None, generator: torch.Generator,
    on_token: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """ids [rows, length] int64 on the CPU, sampled row by row from the softmax of `model`; `on_token(tokens of each row so far)`."""
    from lowbit.calibration.decoding import decode

    config: Any = getattr(model, "config", None)
    encoder_ids = None
    if getattr(config, "is_encoder_decoder", False):
        # Something to answer to; the decoder's own first token is no text and is dropped.
        encoder_ids = torch.randint(_known(model, vocabulary), (rows, 8), generator=generator).to(device_of(model))
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        start = next((i for name in names if isinstance(i := getattr(config, name, None), int)), 0)
        opening = Opening((start,), (), frozenset(), (*opening.banned, *opening.ends))
    form = _Form(opening, rows, _bars(_known(model, vocabulary), opening, vocabulary), generator)

    drawn = 0

    def choose(logits: Tensor) -> Tensor:
        nonlocal drawn
        drawn += 1
        on_token(drawn)
        return form.kept(_sample(logits, _bars(logits.shape[1], opening, vocabulary), generator))

    first = form.kept(torch.empty(rows, dtype=torch.int64))  # all of which the form decides
    count = length - 1 if encoder_ids is None else length
    ids = torch.stack([first, *decode(model, first[:, None], choose, count, encoder_ids)], 1)
    return ids[:, -length:]


class _Form:
    """Where each row stands in the form of its document: tokens that are yet to come whatever is drawn, and whose turn it is."""

    def __init__(self, opening: Opening, rows: int, bars: Tensor, generator: torch.Generator) -> None:
        self.opening, self.generator = opening, generator
        allowed = bars.isfinite()
        allowed[[i for i in opening.ends if i < len(allowed)]] = False
        self.evenly = allowed.nonzero()[:, 0]
        self.forced = [deque(opening.start) for _ in range(rows)]
        self.replying = [False] * rows

    def kept(self, tokens: Tensor) -> Tensor:
        """tokens [rows] that were drawn -> those that stand in the text."""
        opening = self.opening
        for row, queue in enumerate(self.forced):
            if queue:
                token = queue.popleft()
                if token == _ANY:
                    token = int(self.evenly[torch.randint(len(self.evenly), (), generator=self.generator)])
                tokens[row] = token
            elif int(tokens[row]) in opening.ends:
                self.replying[row] = bool(opening.reply) and not self.replying[row]
                following = opening.reply if self.replying[row] else opening.start
                repeated = following[:1] == (int(tokens[row]),)  # a token that both ends and opens, as in GPT-2
                queue.extend(following[1:] if repeated else following)
        return tokens


def _known(model: nn.Module, vocabulary: int | None) -> int:
    """Number of tokens that the model and the tokenizer both know."""
    config: Any = getattr(model, "config", None)
    inner = text_config(config)
    size = getattr(inner, "vocab_size", None)
    known = [n for n in (vocabulary, size) if isinstance(n, int)]
    if not known:
        raise TextError(f"{type(model).__name__} does not say how many tokens it knows: pass token ids")
    return min(known)


def _bars(count: int, opening: Opening, vocabulary: int | None) -> Tensor:
    """[count] float32 to add to logits: -inf for tokens that are never drawn, 0 for the others."""
    bars = torch.zeros(count)
    bars[[i for i in opening.banned if i < count]] = -math.inf
    if vocabulary is not None:
        bars[vocabulary:] = -math.inf
    return bars


def _sample(logits: Tensor, bars: Tensor, generator: torch.Generator) -> Tensor:
    """logits [rows, vocabulary] -> tokens [rows] int64, drawn by inverting the distribution function.

    `torch.multinomial` draws a number for every token of the vocabulary, which takes 20 times longer.
    """
    below = (logits.float().cpu() + bars).softmax(-1).cumsum(-1)
    if not bool(torch.isfinite(below[:, -1]).all()):
        raise TextError("the model's logits are not finite, so it cannot write text: pass a text file or token ids")
    drawn = (1 - torch.rand(len(below), 1, generator=generator)) * below[:, -1:]  # never 0: no token of weight 0
    return torch.searchsorted(below, drawn)[:, 0]
