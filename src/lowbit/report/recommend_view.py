"""A recommendation in words: the answer as a command, its reason, what it costs, and what else there is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lowbit.measure.expected_loss import CAVEAT, PARAMETERS, SECONDS, SECONDS_WITH_TEXT, seconds_of
from lowbit.measure.verdict import THRESHOLDS, word_of_kl
from lowbit.report.choice_words import expectation, loss_text, word_of
from lowbit.report.choices import AS_IT_IS, OWN, Choice
from lowbit.report.recommend_table import parts_text, table
from lowbit.report.recommendation import ACCEPTABLE, OWN_TEXT, Recommendation, about
from lowbit.report.wording import bytes_text

if TYPE_CHECKING:
    from rich.text import Text

# What is to be known of a recipe in one program, by (program, recipe).
_HINTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("vllm", "w8"): (
        "On processors without a GPU vLLM 0.32 has no kernel for 8-bit weights with float inputs; w8a8 runs there.",
    ),
}
_LEFT_OUT, _INSTEAD = "w4", "nl4"
_USEFUL = 512  # tokens: a context that is worth naming


def render_recommendation(found: Recommendation, *, width: int = 80) -> Text:
    """The answer in words, for `print` and notebooks; commands are not broken."""
    from rich.text import Text

    return Text(words(found, min(width, 100)), no_wrap=True, overflow="ignore")


def words(found: Recommendation, width: int = 80) -> str:
    """The whole answer, at most `width` characters wide but for commands and recipes, which are not broken."""

    def wrapped(text: str) -> str:
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)

    parts = [wrapped(_asked(found))]
    if found.best is None:
        parts += [wrapped(text) for text in _nothing(found)]
    else:
        parts += [f"  {found.best.command}", wrapped(" ".join(_reasons(found, found.best)))]
    parts.append(table(found, width))
    if found.best is not None and found.second is not None:
        parts.append(f"Second choice:\n\n  {found.second.command}")
        parts.append(wrapped(_beside(found, found.second, found.best)))
    parts += [wrapped(text) for text in _remarks(found)]
    return "\n\n".join(parts)


def _asked(found: Recommendation) -> str:
    where = f"{found.given} of memory" if found.given is not None else "the memory that is free on this machine"
    for_whom = "" if found.target == OWN else f", for {found.target}"
    room = f" ({bytes_text(found.memory)})"
    if not found.kv.bytes_at(1):
        return f"{found.label} in {where}{room}{for_whom}; it keeps no KV cache."
    stored = "" if found.kv.format is None else f", its KV cache stored as {found.kv.format}"
    longest = ""
    if found.longest is not None:
        longest = f" of the {found.longest:,} that the model takes"
        if found.context > found.longest:
            longest = f", more than the {found.longest:,} that the model was made for"
    return f"{found.label} in {where}{room}{for_whom}, with a context of {found.context:,} tokens{longest}{stored}."


def _reasons(found: Recommendation, best: Choice) -> Iterator[str]:
    if best.name == AS_IT_IS:
        yield (
            f"The model is quantized already ({found.storage}) and fits; quantizing it again would add a loss to the one that "
            "it has."
        )
        return
    yield _why(found, best)
    yield expectation(best)
    yield _making(found, best)


def _why(found: Recommendation, best: Choice) -> str:
    if found.speed and found.acceptable:
        alike = [c.name for c in found.choices if c is not best and found.fits(c) and _reads_as_much(c, best)]
        few = f"as few as {_listed(alike)}, and loses the least of them" if alike else "the fewest of all"
        return (
            f"Of the recipes that fit and lose no more than {ACCEPTABLE.kl:g} nats per token, it reads {bytes_text(best.read)} for each "
            f"new token, {few}; reading them takes most of the time."
        )
    if found.speed:
        return (
            f"Nothing that fits is expected to lose less than {ACCEPTABLE.kl:g} nats per token. Speed decides only among "
            "recipes below that, so this one was taken for its quality."
        )
    return f"It loses the least of what fits, and leaves {bytes_text(found.memory - best.memory.total)} free."


def _reads_as_much(one: Choice, best: Choice) -> bool:
    return one.kl <= ACCEPTABLE.kl and abs(one.read - best.read) < 0.01 * best.read


def _listed(names: Sequence[str]) -> str:
    """'w8, fp8 and w8a8'."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _making(found: Recommendation, choice: Choice) -> str:
    said = about(choice.seconds)
    if choice.text is not None and seconds_of(choice.loss) is None:
        said = said.replace("about", "roughly")
    return f"Making it takes {said} on two cores and roughly {bytes_text(choice.peak)} of memory."


def _beside(found: Recommendation, second: Choice, best: Choice) -> str:
    if second.name == AS_IT_IS:
        return "It keeps the model as it is stored, and adds no loss to the one that it has."
    less = best.memory.weights - second.memory.weights
    size = f"{bytes_text(abs(less))} {'less' if less > 0 else 'more'} for the weights"
    reading = f" and reads {bytes_text(second.read)} for each token" if found.generates else ""
    if best.name == AS_IT_IS:
        return f"It takes {size}{reading}. Beside the model as it is: {expectation(second)}"
    word = word_of(second)
    kind = "Measured:" if second.measured is not None else "Likely"
    if word is None or word != word_of(best):
        return f"It takes {size}{reading}. {expectation(second)}"
    if loss_text(second) != loss_text(best):
        tail = f'"{word}" too, with a loss of {loss_text(second)} instead of {loss_text(best)}'
    else:
        tail = f'"{word}" too, at {second.bits:.2f} bits per weight in the linear layers instead of {best.bits:.2f}'
    return f"It takes {size}{reading}. {kind} {tail}."


def _nothing(found: Recommendation) -> Iterator[str]:
    small = found.smallest
    m = small.memory
    yield (
        f"Nothing fits. The smallest that can be had is {small.name} with {bytes_text(m.total)}: {parts_text(m)}. That is "
        f"{bytes_text(m.total - found.memory)} too much."
    )
    fitting = found.context_that_fits
    if fitting and found.kv.bytes_at(1):
        useful = min(_USEFUL, fitting)
        best, most = next((c, n) for c in found.choices if (n := found.longest_with(c)) >= useful)
        name = "the model as it is" if best.name == AS_IT_IS else best.name
        yield f"With a shorter context, {name} loses the least of what fits: add --context {most}." + (
            f" {small.name}, the smallest, has room for {fitting:,} tokens." if best is not small else ""
        )
    elif m.cache:
        yield "No context is short enough: give more memory, or take a smaller model."
    else:
        yield "Give more memory, or take a smaller model."


def _remarks(found: Recommendation) -> Iterator[str]:
    larger = found.larger
    if larger is not None and found.best is not None:
        yield (
            f"The next better, {larger.name}, does not fit: it needs {bytes_text(larger.memory.total)}, "
            f"{bytes_text(found.extra)} too much."
            + (
                f" With --context {shorter} it would."
                if (shorter := found.longest_with(larger)) and larger.memory.cache
                else ""
            )
        )
        if found.target == OWN and found.generates and found.measured_on is None and found.storage == "float":
            yield (
                "The memory that is left can be used: lowbit quantize --fit-memory measures how much each layer loses in few "
                "bits, and gives each its own format."
            )
    if found.best is not None and found.experts < 1:
        yield f"For each token {bytes_text(found.best.read)} of the weights are read, as only some experts take part."
    if found.best is not None and found.best.loss is not None and word_of_kl(found.best.kl) is THRESHOLDS[-1]:
        yield "A smaller model in more bits answers better than this one in so few: take one, or give more memory."
    yield from _about_text(found)
    yield from _room_to_make(found)
    yield from _names(found)
    if found.target != OWN:
        yield (
            "What the program itself takes comes on top, little for llama.cpp and more for those in Python, and is not known here: "
            "leave room for it."
        )
    yield from _HINTS.get((found.target, "" if found.best is None else found.best.name), ())
    if found.storage != "float" and (found.best is None or found.best.name != AS_IT_IS):
        yield (
            f"The source is itself quantized ({found.storage}), so that its own loss comes on top; start from the float "
            "model where you have it."
        )
    if found.measured_on:
        yield (
            f"Losses without a sign were measured on this model, on {found.measured_on}; the others, with ~ or <, are of the "
            f"same formats on another one. {CAVEAT.partition('. ')[2]}"
        )
    elif any(choice.loss is not None for choice in found.choices):
        measure = " --measure measures the best three on this model." if found.generates else ""
        yield f"{CAVEAT}{measure}"
        if not found.generates:
            yield "That model predicts tokens, and this one does not: the losses only put the recipes in order."


def _about_text(found: Recommendation) -> Iterator[str]:
    best = found.best
    if best is None or best.loss is None:
        return
    if best.text is not None:
        what = (
            f"{OWN_TEXT} stands for a text of your own: a few pages like what the model will read. "
            if best.text == OWN_TEXT
            else ""
        )
        yield (
            f"{what}The calibration text is worth its time at so few bits: on the benchmark model it left a quarter of the loss "
            f"of w4. The time is in proportion to {seconds_of(best.loss) or SECONDS_WITH_TEXT:.0f} s for "
            f"{PARAMETERS / 1e6:.0f} million parameters, {SECONDS:.0f} s without text; a text that the model writes itself takes "
            "some more."
        )
    elif best.measured is not None and best.bits < 7:
        yield "With --calibration builtin the loss of so few bits falls to about a quarter; add it here to measure that."


def _room_to_make(found: Recommendation) -> Iterator[str]:
    """A warning where making the answer needs more memory than it was asked for, or than is free here."""
    best = found.best
    if best is None or best.name == AS_IT_IS:
        return
    over = [f"the {bytes_text(found.memory)} that it is to run in"] if best.peak > found.memory and found.given else []
    over += [f"the {bytes_text(found.here)} that are free on this machine"] if best.peak > found.here > 0 else []
    if over:
        yield (
            f"Warning: making {best.name} takes roughly {bytes_text(best.peak)} of memory, more than {' and '.join(over)}: make it "
            "on a larger machine and copy the result."
            + ("" if best.text is None else " Recipes without calibration text take less.")
        )


def _names(found: Recommendation) -> Iterator[str]:
    """What is to be known of names: presets that stand for another recipe here, formats that others stand in for."""
    for choice in (found.best, found.second):
        if choice is not None and choice.means:
            yield f"For {found.target}, {choice.name} is {choice.recipe}."
    replaced = [c for c in found.choices if c.replaced]
    if replaced:
        reason = replaced[0].replaced[0].partition("instead: ")[2]
        yield (
            f"In {_listed([c.name for c in replaced])} other blocks stand in for those that do not fit this model: {reason}. So "
            "their bits are not those that the name has in other models."
        )
    listed = {c.name: c for c in found.choices}
    if found.target == OWN and _LEFT_OUT not in listed and _INSTEAD in listed:
        yield f"{_LEFT_OUT}, the recipe that quantize takes when none is named, is not listed: {_INSTEAD} is as small and loses less."
