"""A recommendation in words: the answer as a command, its reason, what it costs, and what else there is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lowbit.measure.expected_loss import CAVEAT, PARAMETERS, SECONDS, SECONDS_WITH_TEXT
from lowbit.measure.verdict import THRESHOLDS, word_of_kl
from lowbit.report.choices import AS_IT_IS, OWN, Choice
from lowbit.report.recommend import ACCEPTABLE, OWN_TEXT, Recommendation, about
from lowbit.report.wording import bytes_text

# What is to be known of a recipe in one program, by (program, recipe).
_HINTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("vllm", "w8"): (
        "On processors without a GPU vLLM 0.32 has no kernel for 8-bit weights with float inputs; w8a8 runs there.",
    ),
}
_HEADINGS = ("recipe", "bits", "weights", "in all", "left", "loss", "in words")


def words(found: Recommendation, width: int = 80) -> str:
    """The whole answer, at most `width` characters wide but for commands and recipes, which are not broken."""

    def wrapped(text: str) -> str:
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)

    parts = [wrapped(_asked(found))]
    if found.best is None:
        parts += [wrapped(text) for text in _nothing(found)]
    else:
        parts += [f"  {found.best.command}", wrapped(" ".join(_reasons(found, found.best)))]
    parts.append(_table(found))
    if found.best is not None and found.second is not None:
        parts.append(f"Second choice:\n\n  {found.second.command}")
        parts.append(wrapped(_beside(found, found.second, found.best)))
    parts += [wrapped(text) for text in _remarks(found)]
    return "\n\n".join(parts)


def plain(found: Recommendation) -> dict[str, Any]:
    """For JSON."""

    def name(choice: Choice | None) -> str | None:
        return None if choice is None else choice.name

    keys = (
        "label", "target", "memory", "context", "longest", "speed", "float_bytes", "storage", "samples", "measured_on", "extra",
    )  # fmt: skip
    out: dict[str, Any] = {key: getattr(found, key) for key in keys}
    out |= {"best": name(found.best), "second": name(found.second), "larger": name(found.larger)}
    if found.best is None:
        out |= {"smallest": found.smallest.name, "context_that_fits": found.context_that_fits}
    out["choices"] = [_plain(found, choice) for choice in found.choices]
    return out


def _plain(found: Recommendation, choice: Choice) -> dict[str, Any]:
    loss, measured, memory = choice.loss, choice.measured, choice.memory
    return {
        "name": choice.name, "recipe": choice.recipe, "command": choice.command, "fits": found.fits(choice),
        "weight_bytes": memory.weights, "cache_bytes": memory.cache, "working_bytes": memory.working,
        "total_bytes": memory.total, "read_bytes_per_token": choice.read, "linear_bits_per_weight": choice.bits,
        "seconds": choice.seconds, "peak_bytes": choice.peak, "verdict": word_of_kl(choice.kl).word,
        "expected_kl": None if loss is None else {
            "kl": loss.kl, "at_most": loss.at_most, "measured_as": loss.by.recipe, "source": loss.by.source,
        },
        "kl": None if measured is None else {"value": measured.value, "stderr": measured.stderr},
    }  # fmt: skip


def _asked(found: Recommendation) -> str:
    where = f"{found.given} of memory" if found.given is not None else "the memory that is free on this machine"
    for_whom = "" if found.target == OWN else f", for {found.target}"
    room = f" ({bytes_text(found.memory)})"
    if not found.kv.bytes_at(1):
        return f"{found.label} in {where}{room}{for_whom}; it keeps no KV cache."
    longest = ""
    if found.longest is not None:
        longest = f" of the {found.longest:,} that the model takes"
        if found.context > found.longest:
            longest = f", more than the {found.longest:,} that the model was made for"
    return f"{found.label} in {where}{room}{for_whom}, with a context of {found.context:,} tokens{longest}."


def _reasons(found: Recommendation, best: Choice) -> Iterator[str]:
    if best.name == AS_IT_IS:
        yield (
            f"The model is quantized already ({found.storage}) and fits; quantizing it again would add a loss to the one that "
            "it has."
        )
        return
    yield _why(found, best)
    loss = word_of_kl(best.kl)
    if best.measured is not None:
        yield f'Measured on this model it is "{loss.word}": {loss.meaning}.'
    else:
        yield f'Expect "{loss.word}": {loss.meaning}.'
    yield _making(found, best)


def _why(found: Recommendation, best: Choice) -> str:
    if found.speed and found.acceptable:
        return (
            f"Of the recipes that fit and lose no more than {ACCEPTABLE.kl:g} nats per token, it reads the fewest bytes for each "
            f"new token, {bytes_text(best.read)}; reading them takes most of the time."
        )
    if found.speed:
        return (
            f"Nothing that fits is expected to lose less than {ACCEPTABLE.kl:g} nats per token. Speed decides only among "
            "recipes below that, so this one was taken for its quality."
        )
    return f"It loses the least of what fits, and leaves {bytes_text(found.memory - best.memory.total)} free."


def _making(found: Recommendation, choice: Choice) -> str:
    return f"Making it takes {about(choice.seconds)} on two cores and {bytes_text(choice.peak)} of memory."


def _beside(found: Recommendation, second: Choice, best: Choice) -> str:
    if second.name == AS_IT_IS:
        return "It keeps the model as it is stored, and adds no loss to the one that it has."
    less = best.memory.weights - second.memory.weights
    size = f"{bytes_text(abs(less))} {'less' if less > 0 else 'more'} for the weights"
    reading = f" and reads {bytes_text(second.read)} for each token" if found.generates else ""
    if best.name == AS_IT_IS:
        return f'It takes {size}{reading}. Expect it to be "{word_of_kl(second.kl).word}" beside the model as it is.'
    word = word_of_kl(second.kl).word
    kind = "Measured" if second.measured is not None else "Expect"
    if word != word_of_kl(best.kl).word:
        tail = f'"{word}" instead of "{word_of_kl(best.kl).word}"'
    elif _loss(second) != _loss(best):
        tail = f'"{word}" too, with a loss of {_loss(second)} instead of {_loss(best)}'
    else:
        tail = f'"{word}" too, at {second.bits:.2f} bits per weight in the linear layers instead of {best.bits:.2f}'
    return f"It takes {size}{reading}. {kind} {tail}."


def _nothing(found: Recommendation) -> Iterator[str]:
    small = found.smallest
    m = small.memory
    yield (
        f"Nothing fits. The smallest that can be had is {small.name} with {bytes_text(m.total)}: {bytes_text(m.weights)} of "
        f"weights, {bytes_text(m.cache)} of KV cache and {bytes_text(m.working)} for the program itself. That is "
        f"{bytes_text(m.total - found.memory)} too much."
    )
    fitting = found.context_that_fits
    better = next(((c, n) for c in found.choices if c is not small and (n := found.longest_with(c))), None)
    if fitting and found.kv.bytes_at(1):
        yield f"With it, a context of {fitting:,} tokens would fit: add --context {fitting}." + (
            f" With {better[0].name}, which loses less, one of {better[1]:,} tokens." if better else ""
        )
    elif m.cache:
        yield "No context is short enough: give more memory, or take a smaller model."
    else:
        yield "Give more memory, or take a smaller model."


def _table(found: Recommendation) -> str:
    """All choices, the best quality first; the answer is marked."""
    rows = [_HEADINGS, *(_cells(found, c) for c in found.choices)]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    mark = {True: "* ", False: "  "}
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(n) if i in (0, 6) else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, sizes, strict=True))
        ]
        chosen = number > 0 and found.choices[number - 1] is found.best
        lines.append((mark[chosen] + "  ".join(cells)).rstrip())
    memory = found.choices[0].memory
    cache = f"{bytes_text(memory.cache)} of KV cache and " if memory.cache else ""
    unit = "loss: KL divergence from the float model, nats per token"
    return "\n".join([*lines, "", f"in all: weights, {cache}{bytes_text(memory.working)} for the program", unit])


def _cells(found: Recommendation, choice: Choice) -> tuple[str, ...]:
    left = found.memory - choice.memory.total
    verdict = "no further loss" if choice.name == AS_IT_IS else word_of_kl(choice.kl).word
    return (
        choice.name, f"{choice.bits:.2f}", bytes_text(choice.memory.weights), bytes_text(choice.memory.total),
        bytes_text(left) if left >= 0 else f"-{bytes_text(-left)}", _loss(choice), verdict,
    )  # fmt: skip


def _loss(choice: Choice) -> str:
    if choice.name == AS_IT_IS:
        return "0"
    sign = "" if choice.measured is not None else "<" if choice.loss is not None and choice.loss.at_most else "~"
    return f"{sign}{choice.kl:.2g}"


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
    if found.best is not None and found.best.peak > found.here > 0:
        yield (
            f"Making it takes {bytes_text(found.best.peak)}, and {bytes_text(found.here)} are free on this machine: run the "
            "command on a larger one."
            + ("" if found.best.text is None else " Recipes without calibration text take less.")
        )
    if found.target != OWN:
        yield (
            f"The {bytes_text(found.choices[0].memory.working)} for the program are what lowbit takes with Python; other programs "
            "take less (llama.cpp) or more (vLLM), and how much is not known here."
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
            "same formats on a model of 135 million parameters."
        )
    elif any(choice.loss is not None for choice in found.choices):
        measure = " --measure measures the best three on this model." if found.generates else ""
        yield f"{CAVEAT} < is an upper bound, from a format that is no better.{measure}"
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
            f"of w4. The time is in proportion to {SECONDS_WITH_TEXT:.0f} s for {PARAMETERS / 1e6:.0f} million parameters, "
            f"{SECONDS:.0f} s without text; a text that the model writes itself takes some more."
        )
    elif best.measured is not None and best.bits < 7:
        yield "With --calibration self the loss of so few bits falls to about a quarter; add it here to measure that."
