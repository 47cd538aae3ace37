"""The text that comes with lowbit, for calibrating where nobody names another: `--calibration builtin`.

It was written for this purpose, is under the licence of the package, and is small: prose in English, thirty other languages, code, mathematics,
technical documentation, and conversations, which are put into the model's own chat template where it has one. Two thirds of what is taken
is English prose, the most general kind; the other kinds are there so that no use of a model is unseen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch import Tensor

from lowbit.calibration.records import Message
from lowbit.calibration.windows import Frame, text_ids
from lowbit.engine.chat_template import ChatTemplate
from lowbit.errors import SourceError, TextError

BUILTIN = "builtin"
NAME = "the text that comes with lowbit"


@dataclass(frozen=True)
class Kind:
    """One kind of text: its file in `texts/`, and its share of the windows."""

    file: str
    share: float


KINDS = (
    Kind("english.txt", 0.66), Kind("code.txt", 0.1), Kind("chat.jsonl", 0.08), Kind("languages.txt", 0.06),
    Kind("documentation.txt", 0.05), Kind("mathematics.txt", 0.05),
)  # fmt: skip


def package_windows(tokenizer: Any, frame: Frame, length: int, samples: int) -> list[Tensor]:
    """`samples` windows [length], int64, of all kinds by their shares; all that there are where there are fewer.

    The first windows of a longer list are not those of a shorter one: of each kind they are spread over the whole text. TextError where
    no window is filled.
    """
    if length <= frame.size:
        raise TextError(
            f"a window of {length} tokens has no room for text, since the tokenizer puts {frame.size} tokens around it: "
            f"use {frame.size + 2} or more"
        )
    windows = [frame.windows(text_ids(text_of(kind.file, tokenizer), tokenizer), length) for kind in KINDS]
    if not any(windows):
        raise TextError(f"{NAME} fills no window of {length} tokens: use shorter windows, or a longer text of your own")
    taken = shares([kind.share for kind in KINDS], [len(found) for found in windows], samples)
    queues = [_spread(found, count) for found, count in zip(windows, taken, strict=True)]
    return list(_mixed(queues))


def text_of(file: str, tokenizer: Any) -> str:
    """The text of one file; conversations by the chat template of `tokenizer`, and as plain paragraphs where it has none, or
    refuses one."""
    text = files("lowbit.calibration").joinpath("texts", file).read_text(encoding="utf-8")
    if not file.endswith(".jsonl"):
        return text
    try:
        template = ChatTemplate.of(tokenizer)
    except SourceError:
        template = None
    return "".join(_rendered(template, json.loads(line)["messages"]) for line in text.splitlines())


def shares(wanted: Sequence[float], there: Sequence[int], count: int) -> list[int]:
    """How many of `there` each kind gives, as near to its share of `count` as can be; what one has too few of, the others give."""
    taken = [0] * len(wanted)
    for step in range(1, min(count, sum(there)) + 1):
        open_ = [i for i in range(len(wanted)) if taken[i] < there[i]]
        most = max(open_, key=lambda i: (wanted[i] * step - taken[i], wanted[i]))
        taken[most] += 1
    return taken


def _spread(windows: Sequence[Tensor], count: int) -> list[Tensor]:
    return [windows[i * len(windows) // count] for i in range(count)]


def _mixed(queues: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Windows of all kinds in turns, in proportion to how many each has."""
    order = [
        ((place + 0.5) / len(queue), i, window) for i, queue in enumerate(queues) for place, window in enumerate(queue)
    ]
    yield from (window for _, _, window in sorted(order, key=lambda entry: entry[:2]))


def _rendered(template: ChatTemplate | None, said: Sequence[Message]) -> str:
    if template is not None:
        try:
            return template.render([dict(message) for message in said])
        except SourceError:  # such as a template that takes no word of a system
            pass
    return "\n".join(message["content"] for message in said) + "\n\n"
