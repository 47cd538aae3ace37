"""What a choice of a recommendation loses, in a figure, a word and a sentence."""

from __future__ import annotations

from lowbit.measure.verdict import THRESHOLDS, Threshold, near_limit, word_of_kl
from lowbit.report.choices import AS_IT_IS, Choice


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


def near(choice: Choice) -> Threshold | None:
    """The other word that its loss may have, where that is within two standard errors of the limit."""
    if choice.measured is not None:
        return near_limit(choice.kl, choice.measured.stderr)
    if choice.loss is None or choice.bound:
        return None
    return near_limit(choice.kl, choice.loss.by.stderr)


def in_words(choice: Choice) -> str:
    """The word for its loss as a table has it: with ± near a limit, and what there is to say where there is no word."""
    word = word_of(choice)
    if word is None:
        return "no further loss" if choice.name == AS_IT_IS else "unknown"
    if choice.bound:
        return word if word == THRESHOLDS[0].word else f"{word} or better"
    return word if near(choice) is None else f"{word} ±"


def expectation(choice: Choice) -> str:
    """What its loss means, in a sentence."""
    if _says_nothing(choice):
        return f"What it loses is not known: {loss_text(choice)} is a bound, and too high to say anything."
    found, other = word_of_kl(choice.kl), near(choice)
    kind = "Measured on this model it is" if choice.measured is not None else "It is likely"
    limit = "" if other is None else f', near the limit of "{other.word}"'
    better = " or better" if choice.bound and found is not THRESHOLDS[0] else ""
    return f'{kind} "{found.word}"{better}{limit}: {found.meaning}.'
