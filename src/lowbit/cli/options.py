"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Hugging Face id, folder, .gguf file, or smollm2.", show_default=False)]
Recipe = Annotated[
    str,
    typer.Argument(help="A preset (see `lowbit recipes`), a format such as int4:g32, METHOD@FORMAT, or a TOML file."),
]
RecipeOrBits = Annotated[
    str | None,
    typer.Argument(
        help="A preset (see `lowbit recipes`), a format such as int4:g32, METHOD@FORMAT, or a TOML file.",
        show_default="w4",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits", help="In place of a recipe: w8, w4, w3 or w2, or intN:g32 of so many bits.", show_default=False
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="With --bits: weights that share a scale, as intN:gSIZE; -1 for a whole row.",
        show_default=False,
    ),
]
As = Annotated[
    str,
    typer.Option(
        "--as", help="The target: gguf (llama.cpp, Ollama), vllm (compressed-tensors), gptq, awq.", show_default=False
    ),
]
QuantizeAs = Annotated[
    str | None,
    typer.Option(
        "--as",
        help="Write the format of another program instead of lowbit's: gguf, vllm, gptq, awq. The recipe may then be one of its own mixes, "
        "such as q4_k_m.",
        show_default=False,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text to measure on: a file (of text, or of records as .jsonl, .json, .csv, .tsv, .parquet) or a Hugging Face "
        "dataset id; Python's own manual when left out.",
        show_default=False,
    ),
]
Windows = Annotated[
    int | None, typer.Option(min=1, help="How many windows of the text; all when left out.", show_default=False)
]
FewWindows = Annotated[int, typer.Option(min=1, help="How many windows of the text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Speed = Annotated[bool, typer.Option("--speed", help="Also measure tokens per second, also of the float model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text for methods that look at data: a file of text or records, a Hugging Face dataset id, or `self` for text that the model "
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
KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="With --as vllm: scales for a KV cache in this type (fp8), from calibration text.",
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", help="Mixed precision: bytes of the weight files, such as 80MB.", show_default=False),
]
TargetBits = Annotated[
    float | None,
    typer.Option("--target-bits", help="Mixed precision: bits per weight in the linear layers.", show_default=False),
]
TargetKL = Annotated[
    float | None,
    typer.Option(
        "--target-kl",
        help="Mixed precision: the smallest size with this predicted KL, nats per token.",
        show_default=False,
    ),
]
FitMemory = Annotated[
    str | None,
    typer.Option(
        "--fit-memory",
        help="Mixed precision: memory for weights and the KV cache of --context tokens, such as 8GB.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None, typer.Option("--context", min=1, help="Tokens in the KV cache of --fit-memory.", show_default=False)
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        help="What each format costs at each layer: read where the file exists, else measured and kept.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")]
CacheType = Annotated[
    str | None,
    typer.Option("--cache", help="Keys and values as int16, or as int8: half the memory.", show_default="int16"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the engine.", show_default="all cores")]


def recipe_of(recipe: str | None, bits: int | None, group_size: int | None) -> str:
    """The recipe that was given, or what --bits and --group-size stand for, or w4. RecipeError for both."""
    from lowbit.errors import RecipeError
    from lowbit.recipes.spelling import of_bits

    if bits is None and group_size is None:
        return "w4" if recipe is None else recipe
    meant = of_bits(bits, group_size)
    if recipe is not None:
        given = "--bits" if group_size is None else "--bits and --group-size"
        raise RecipeError(
            f"the recipe {recipe} and {given} (here {meant}) both say what weights become; give one of them, or a method with "
            f"this format, such as gptq@{meant if ':' in meant else 'int4:g32'}"
        )
    return meant
