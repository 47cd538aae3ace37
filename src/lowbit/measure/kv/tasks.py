"""What a long context is for: facts that are asked at its end, and a sequence that comes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.calibration.windows import Frame, text_ids
from lowbit.measure.kv.figures import Depth, Repetition
from lowbit.measure.kv.runner import Runner, State
from lowbit.measure.kv.stored import Cache
from lowbit.measure.quality import mean_estimate

_NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas")
_FACT = " The secret number of {name} is"
_SEED = 20261128
_NO_FRAME = Frame()
FACTS = 5  # of a context, at 10, 30, 50, 70 and 90 % of it


@dataclass(frozen=True, eq=False)
class Questions:
    """A text with facts in it and all of them asked at its end, with the answers written there.

    ids int64 [tokens]; answers: for each fact its depth, and the positions of the answer's tokens at the end.
    """

    ids: Tensor
    answers: tuple[tuple[float, slice], ...]


def questions(text: Tensor, context: int, tokenizer: Any, frame: Frame, number: int = 0) -> Questions | None:
    """`context` tokens of `text` [tokens] at most with `FACTS` facts planted; None where the context has no room for them.

    number: which of the texts it is; its numbers and names are drawn anew for each.
    """
    rng = np.random.default_rng([_SEED, number])
    names = [str(name) for name in rng.permutation(_NAMES)[:FACTS]]
    secrets = [f" {rng.integers(1000, 10000)}" for _ in names]

    def tokens(words: str) -> Tensor:
        return text_ids(words, tokenizer)

    stated = [torch.cat([tokens(_FACT.format(name=n)), tokens(s), tokens(".")]) for n, s in zip(names, secrets)]
    asked = [int(i) for i in rng.permutation(FACTS)]
    room = context - len(frame.before) - 2 * sum(len(fact) for fact in stated)
    if room < 4 * FACTS or len(text) < room:
        return None
    depths = [(i + 0.5) / FACTS for i in range(FACTS)]
    cuts = [0, *(round(depth * room) for depth in depths), room]
    parts = [torch.tensor(frame.before, dtype=torch.int64)]
    for i in range(FACTS):
        parts += [text[cuts[i] : cuts[i + 1]], stated[i]]
    parts.append(text[cuts[FACTS] : room])
    length = sum(len(part) for part in parts)
    answers: list[tuple[float, slice]] = []
    for i in asked:
        begin = length + len(tokens(_FACT.format(name=names[i])))
        answers.append((depths[i], slice(begin, begin + len(tokens(secrets[i])))))
        parts.append(stated[i])
        length += len(stated[i])
    return Questions(torch.cat(parts), tuple(sorted(answers, key=lambda answer: answer[0])))


def retrieval(
    runner: Runner, asked: Sequence[Questions], caches: Sequence[Cache], progress: Callable[[], None] = lambda: None
) -> list[tuple[Depth, ...]]:
    """Facts found by depth, of each cache. A fact is found where each token of the answer is the model's first choice."""
    found = np.zeros((len(caches) + 1, len(asked), FACTS, 2))  # [.., (first choice, log-probability)]
    for number, question in enumerate(asked):
        for which, cache in enumerate([None, *caches]):
            state = runner.base(question.ids) if cache is None else runner.run(question.ids, cache)
            for place, (_, positions) in enumerate(question.answers):
                found[which, number, place] = _answer(runner, state, question.ids, positions)
            progress()
    if not asked:
        return [() for _ in caches]
    sums, means = found.sum(1), found.mean(1)
    return [
        tuple(
            Depth(
                depth, len(asked), int(sums[0, i, 0]), int(sums[w, i, 0]), float(means[0, i, 1]), float(means[w, i, 1])
            )
            for i, (depth, _) in enumerate(asked[0].answers)
        )
        for w in range(1, len(caches) + 1)
    ]


def _answer(runner: Runner, state: State, ids: Tensor, positions: slice) -> tuple[float, float]:
    logits = runner.logits(state, slice(positions.start - 1, positions.stop - 1)).double().cpu()
    targets = ids[positions]
    logprob = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(bool((logits.argmax(-1) == targets).all())), float(logprob)


def repetition(
    runner: Runner, length: int, vocabulary: int, count: int, caches: Sequence[Cache], frame: Frame = _NO_FRAME,
    progress: Callable[[], None] = lambda: None,
) -> list[Repetition]:  # fmt: skip
    """`count` sequences of `length` random tokens, each twice in a row: the loss on the second time, of each cache."""
    losses = np.zeros((len(caches) + 1, count, length))
    for number in range(count):
        drawn = np.random.default_rng([_SEED, 1, number]).integers(3, vocabulary, length)
        ids = torch.cat([torch.tensor(frame.before, dtype=torch.int64), *[torch.from_numpy(drawn)] * 2])
        rows = slice(len(ids) - length - 1, len(ids) - 1)
        for which, cache in enumerate([None, *caches]):
            state = runner.base(ids) if cache is None else runner.run(ids, cache)
            logits = runner.logits(state, rows).double().cpu()
            nll = -logits.log_softmax(-1).gather(1, ids[-length:, None])[:, 0]
            losses[which, number] = nll.numpy()
            progress()
    base = mean_estimate(losses[0])
    return [Repetition(length, base, mean_estimate(one)) for one in losses[1:]]
