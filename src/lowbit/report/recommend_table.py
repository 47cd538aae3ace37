"""The table of a recommendation: every choice with its sizes, its loss, and that loss in a word."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.budget.memory import Memory
from lowbit.report.choice_words import in_words, loss_text, near
from lowbit.report.choices import Choice
from lowbit.report.recommendation import Recommendation
from lowbit.report.wording import bytes_text, fitting

_TO_THE_LEFT = ("recipe", "likely", "in words", "text")
_EXPENDABLE = ("left", "too much", "bits")


def table(found: Recommendation, width: int) -> str:
    """All choices, the best quality first, the answer marked, and what the columns are; columns go until it is `width` wide."""
    room = "left" if found.best is not None else "too much"
    word = "likely" if found.measured_on is None else "in words"
    headings = ("recipe", "bits", "weights", "in all", room, "text", "loss", word)
    body = [_cells(found, c) for c in found.choices]
    kept = fitting(headings, body, width, _EXPENDABLE)
    rows = [[row[i] for i in kept] for row in (headings, *body)]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(kept))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(n) if rows[0][i] in _TO_THE_LEFT else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(row, sizes, strict=True))
        ]
        chosen = number > 0 and found.choices[number - 1] is found.best
        lines.append((("* " if chosen else "  ") + "  ".join(cells)).rstrip())
    return "\n".join([*lines, "", *_legend(found)])


def _legend(found: Recommendation) -> Iterator[str]:
    memory = found.choices[0].memory
    if memory.beside:
        yield f"in all: {parts_text(memory, 'weights')}"
    yield "text: whether it is made with calibration text, and its loss was measured so"
    yield "loss: KL divergence from the float model, nats per token"
    said = {loss_text(c)[0] for c in found.choices}
    if "<" in said:
        yield "<: at most that, by the loss of a format that is no better"
    if any(near(c) is not None for c in found.choices):
        yield "±: within two standard errors of the limit to the next word"


def parts_text(memory: Memory, weights: str = "") -> str:
    """'55.9 MiB of weights, 90 MiB of KV cache and 572 MiB for the program': what memory is for. weights: in place of the first."""
    parts = [weights or f"{bytes_text(memory.weights)} of weights"]
    parts += [f"{bytes_text(memory.cache)} of KV cache"] if memory.cache else []
    parts += [f"{bytes_text(memory.working)} for the program"] if memory.working else []
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _cells(found: Recommendation, choice: Choice) -> tuple[str, ...]:
    left = found.memory - choice.memory.total
    room = left if found.best is not None else -left
    return (
        choice.name, f"{choice.bits:.2f}", bytes_text(choice.memory.weights), bytes_text(choice.memory.total),
        bytes_text(room) if room >= 0 else f"-{bytes_text(-room)}", "no" if choice.text is None else "yes",
        loss_text(choice), in_words(choice),
    )  # fmt: skip
