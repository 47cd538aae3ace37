"""How long a pass over both models block by block will take, from the first block of each kind run over few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.blockwise.stored_walk import StoredWalk
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.pace import Clock
from lowbit.kernels.heap import trim
from lowbit.measure.files import Files
from lowbit.measure.quality import compare_logits
from lowbit.measure.streamed import Streamed
from lowbit.measure.windows import Tokens
from lowbit.planning.measuring import vocabulary_of

_TOKENS = 128
_ROWS = 16  # of logits that are compared
_HEADS = ("head", "embedding")


@dataclass(frozen=True)
class Forecast:
    """Seconds. fixed: of reading the weights, whatever the text. token: of one token. opening: of the model that was made, whole."""

    fixed: float
    token: float
    opening: float

    def seconds(self, tokens: int) -> float:
        """Of one pass over so many."""
        return self.fixed + tokens * self.token


def forecast(files: Files, tokens: Tokens, clock: Clock) -> Forecast:
    """Of the model, and of the float model where there is one. Reading, and each token, take as long in a block as its part of the weights."""
    cut = tokens.windows(min(_TOKENS, tokens.longest or _TOKENS), 1)
    found = []
    for model in (files.model, files.against):
        if model is not None:
            with temporary_folder() as folder:
                found.append(_one(model, model.walk(cut, folder), cut.length, clock))
            trim()
    rows = torch.zeros(_ROWS, vocabulary_of(files.model.module.config) or 1 << 15)
    start = clock()
    compare_logits(rows, torch.zeros(_ROWS, dtype=torch.int64), rows if len(found) > 1 else None)
    compared = (clock() - start) / _ROWS
    return Forecast(sum(f for f, _ in found), sum(t for _, t in found) + compared, found[0][0])


def _one(model: Streamed, walk: StoredWalk, tokens: int, clock: Clock) -> tuple[float, float]:
    """(seconds of reading, seconds of a token) of one model."""
    sizes = {t.name: t.count for t in model.stored.tensors}
    chains: dict[str, int] = {}
    firsts: dict[str, int] = {}
    for i, (place, names) in enumerate(walk.inside):
        firsts.setdefault(place.chain, i)
        chains[place.chain] = chains.get(place.chain, 0) + sum(sizes[name] for name in names)
    fixed = token = 0.0
    start = clock()
    walk.place_outside()
    fixed += clock() - start
    start = clock()
    for block in walk.blocks(frozenset(firsts.values())):
        if not block.returns:
            break
        read = clock()
        output = block.run(0)
        first = clock()
        block.run(0)
        second = clock()
        block.save(0, output)
        place, names = walk.inside[block.index]
        share = chains[place.chain] / max(1, sum(sizes[name] for name in names))
        fixed += share * (read - start + max(0.0, (first - read) - (second - first)))
        token += share * (second - first) / tokens
        start = clock()
    walk.release()
    heads = max((t.count for t in model.stored.tensors if t.kind in _HEADS), default=0)
    return fixed, token * (1 + heads / max(1, sum(chains.values())))
