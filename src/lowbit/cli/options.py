"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Hugging Face id, folder, .gguf file, or smollm2.", show_default=False)]
Recipe = Annotated[
    str,
    typer.Argument(
        help="A preset (see `lowbit recipes`), a format such as int4:g32, METHOD@FORMAT, or a TOML file.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text to measure on: a file or a Hugging Face dataset id; Python's own manual when left out.",
        show_default=False,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(min=1, help="How many windows of the text; all when left out.", show_default=False),
]
FewWindows = Annotated[int, typer.Option(min=1, help="How many windows of the text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Speed = Annotated[bool, typer.Option("--speed", help="Also measure tokens per second beside the float model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text for methods that look at data: a file, a Hugging Face dataset id, or `self` for text that the model "
        "writes itself, which methods that cannot do without take when left out.",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Windows of calibration text, of 1024 tokens each; 32 when left out."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Calibrate on chat: each paragraph or row becomes a user's message.")
]
