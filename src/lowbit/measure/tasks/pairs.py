"""Pairs of a query and a text, as rerankers and models that answer questions read them: made of windows by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.measure.tasks.task import Example, Facts

_QUERY = 12  # tokens of a query


def paired(facts: Facts, pairs: Sequence[tuple[int, int]]) -> list[Example]:
    """An input for each (query, text), numbers of windows: the beginning of one window, and another as a whole.

    What a pair has more tokens than a window is cut off its text. Facts has windows and a tokenizer.
    """
    windows, words = facts.windows, facts.tokenizer
    if windows is None:
        return []
    inside = [windows.frame.inside(ids) for ids in windows.ids]
    texts = {i: words.decode(inside[i].tolist()) for i in sorted({i for pair in pairs for i in pair})}
    queries = {q: words.decode(inside[q][:_QUERY].tolist()) for q in sorted({q for q, _ in pairs})}
    found: list[Example] = []
    for q, t in pairs:
        made = words(queries[q], texts[t], truncation="only_second", max_length=windows.length, verbose=False)
        found.append({name: torch.tensor(values, dtype=torch.int64)[None] for name, values in made.items()})
    return found
