"""How much of a card `lowbit quantize` measures: `--card quick`, `full` or `none`, and the short forms `--card` and `--no-card`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from lowbit.cli.help import MEASURING, Command

LEAST = 30.0  # seconds that a quick card may take, where quantizing took less


class HowMuch(StrEnum):
    """What `--card` takes."""

    quick = "quick"
    full = "full"
    none = "none"


CardOption = Annotated[
    HowMuch,
    typer.Option(
        "--card",
        metavar="quick|full|none",
        help="Measure what the result cost: quick keeps to the time that quantizing took, or to 30 s where that is more, unless a model is so large that the least takes longer; full measures "
        "4 windows, speed and memory by the standard protocol, however long that takes; none measures nothing.",
        rich_help_panel=MEASURING,
    ),
]
NoCard = Annotated[
    bool, typer.Option("--no-card", help="Measure nothing, which is --card none.", rich_help_panel=MEASURING)
]


class CommandWithCard(Command):
    """A command whose `--card` may stand without a value, as it did when it had none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of every command."""
        end = args.index("--") if "--" in args else len(args)
        given: list[str] = []
        for at, word in enumerate(args):
            alone = at + 1 == len(args) or args[at + 1].startswith("-")
            given += [word, HowMuch.quick.value] if word == "--card" and alone and at < end else [word]
        return super().parse_args(ctx, given)


def how_much(card: HowMuch, no_card: bool) -> HowMuch:
    """What both options say. RecipeError where they disagree."""
    from lowbit.errors import RecipeError

    if no_card and card is HowMuch.full:
        raise RecipeError("--no-card and --card full contradict each other; give one of them")
    return HowMuch.none if no_card else card
