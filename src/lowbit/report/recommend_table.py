"""The table of a recommendation: every choice with its sizes, its loss, and that loss in a word."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.measure.verdict import THRESHOLDS, Threshold, near_limit, word_of_kl
from lowbit.report.choices import AS_IT_IS, Choice
from lowbit.report.recommend import Recommendation
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
    cache = f"{bytes_text(memory.cache)} of KV cache and " if memory.cache else ""
    yield f"in all: weights, {cache}{bytes_text(memory.working)} for the program"
    yield "text: whether it is made with calibration text, and its loss was measured so"
    yield "loss: KL divergence from the float model, nats per token"
    said = {loss_text(c)[0] for c in found.choices}
    if "<" in said:
        yield "<: at most that, by the loss of a format that is no better"
    if any(_near(c) is not None for c in found.choices):
        yield "±: within two standard errors of the limit to the next word"


def _cells(found: Recommendation, choice: Choice) -> tuple[str, ...]:
    left = found.memory - choice.memory.total
    room = left if found.best is not None else -left
    return (
        choice.name, f"{choice.bits:.2f}", bytes_text(choice.memory.weights), bytes_text(choice.memory.total),
        bytes_text(room) if room >= 0 else f"-{bytes_text(-room)}", "no" if choice.text is None else "yes",
        loss_text(choice), _in_words(choice),
    )  # fmt: skip


def loss_text(choice: Choice) -> str:
    """'~0.049' measured elsewhere, '<0.29' a bound, '0.049' measured on this model, '0' for what is left as it is."""
    if choice.name == AS_IT_IS:
        return "0"
    sign = "" if choice.measured is not None else "<" if choice.bound else "~"
    return f"{sign}{choice.kl:.2g}"


def word_of(choice: Choice) -> str | None:
    """The word for its loss; None where nothing is lost or a bound is so high that it says nothing."""
    if choice.name == AS_IT_IS or _says_nothing(choice):
        return None
    return word_of_kl(choice.kl).word


def _says_nothing(choice: Choice) -> bool:
    return choice.bound and word_of_kl(choice.kl) is THRESHOLDS[-1]


def _near(choice: Choice) -> Threshold | None:
    """The other word that its loss may have, where that is within two standard errors of the limit."""
    if choice.measured is not None:
        return near_limit(choice.kl, choice.measured.stderr)
    if choice.loss is None or choice.bound:
        return None
    return near_limit(choice.kl, choice.loss.by.stderr)


def _in_words(choice: Choice) -> str:
    word = word_of(choice)
    if word is None:
        return "no further loss" if choice.name == AS_IT_IS else "unknown"
    if choice.bound:
        return word if word == THRESHOLDS[0].word else f"{word} or better"
    return word if _near(choice) is None else f"{word} ±"


def expectation(choice: Choice) -> str:
    """What its loss means, in a sentence."""
    if _says_nothing(choice):
        return f"What it loses is not known: {loss_text(choice)} is a bound, and too high to say anything."
    found, near = word_of_kl(choice.kl), _near(choice)
    kind = "Measured on this model it is" if choice.measured is not None else "It is likely"
    limit = "" if near is None else f', near the limit of "{near.word}"'
    better = " or better" if choice.bound and found is not THRESHOLDS[0] else ""
    return f'{kind} "{found.word}"{better}{limit}: {found.meaning}.'
