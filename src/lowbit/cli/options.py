"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.help import CALIBRATION, ENGINE, MEASURING, OUTPUT, PROGRAMS, TARGET

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face id, a folder, a .gguf file, or smollm2, the demo.", show_default=False
    ),
]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="[RECIPE]",
        help="A preset (`lowbit recipes` lists them), a format such as int4:g32, METHOD@FORMAT, or a TOML file.",
    ),
]
RecipeOrBits = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="A preset (`lowbit recipes` lists them), a format such as int4:g32, METHOD@FORMAT, or a TOML file.",
        show_default="w4",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits",
        metavar="N",
        help="Use N bits in place of a RECIPE: w8, w4, w3 or w2, and intN:g32 for any other number.",
        show_default=False,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        help="With --bits, let N weights of a row share a scale; -1 means a whole row.",
        show_default=False,
    ),
]
As = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="PROGRAM",
        help="Write for gguf (llama.cpp and Ollama), vllm (also SGLang and transformers), gptq or awq.",
        show_default=False,
    ),
]
QuantizeAs = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="PROGRAM",
        help="Write the format of another program instead of lowbit's own: gguf (llama.cpp and Ollama), vllm (also SGLang and "
        "transformers), gptq or awq. The recipe may then be one of its own names, such as q4_k_m.",
        show_default=False,
        rich_help_panel=PROGRAMS,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Measure on this text: a file of plain text or of records (.jsonl, .json, .csv, .tsv, .parquet), or a Hugging Face "
        "dataset id. When it is left out, the text is Python's own manual.",
        show_default=False,
        rich_help_panel=MEASURING,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Use only the first N windows of the text; all of them when it is left out.",
        show_default=False, rich_help_panel=MEASURING,
    ),
]  # fmt: skip
FewWindows = Annotated[
    int, typer.Option(min=1, metavar="N", help="Use the first N windows of the text.", rich_help_panel=MEASURING)
]
CardWindows = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Use the first N windows of the text, however long that takes. When it is left out, they are 4, "
        "or 2 where there is less time, and more where 4 do not settle the verdict and there is time.",
        show_default=False, rich_help_panel=MEASURING,
    ),
]  # fmt: skip
Length = Annotated[int, typer.Option(min=2, metavar="N", help="Put N tokens into a window.", rich_help_panel=MEASURING)]
Speed = Annotated[
    bool,
    typer.Option(
        "--speed",
        help="Also measure tokens per second, of the result and of the float model.",
        rich_help_panel=MEASURING,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON and nothing else.", rich_help_panel=OUTPUT)
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.", rich_help_panel=OUTPUT)]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Run the model over this text, so that methods see what the weights are multiplied with: a file of plain text or of "
        "records, a Hugging Face dataset id, the word builtin for the text that comes with lowbit, or self for text that the model writes "
        "itself. When it is left out, names such as w4 take builtin as far as --effort goes, and recipes that are spelled out take it "
        "where they cannot do without, as gptq.",
        show_default=False,
        rich_help_panel=CALIBRATION,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="Put this LoRA adapter into the weights as they are read: a folder that peft wrote, trained on MODEL.",
        show_default=False,
    ),
]
Effort = Annotated[
    str,
    typer.Option(
        "--effort",
        metavar="LEVEL",
        help="How much work goes into finding codes: none looks at no text; low weighs errors by the inputs of the weights; medium and high "
        "let later weights make up for the errors of earlier ones, on 12 and 64 windows of text. auto takes the best that is done "
        "within ten minutes on this machine. A recipe that is spelled out, such as search@int4:g32, does what it says.",
        rich_help_panel=CALIBRATION,
    ),
]
DataFree = Annotated[
    bool, typer.Option("--data-free", help="Look at no text, as --effort none.", rich_help_panel=CALIBRATION)
]
KVCalibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="With --kv, find the scales on this text: a file of plain text or of records, a Hugging Face dataset id, or the word self "
        "for text that the model writes itself. When it is left out, the model writes the text.",
        show_default=False,
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, metavar="N", help="Calibrate on N windows of the text, of 1024 tokens each.",
        show_default="as many as the effort has, or 32 of a text that is named", rich_help_panel=CALIBRATION,
    ),
]  # fmt: skip
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Put each paragraph or row of the text into the model's chat template, as the words of a user.",
        rich_help_panel=CALIBRATION,
    ),
]
KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="fp8",
        help="With --as vllm, also store scales with which vLLM keeps its KV cache in fp8. They come from the calibration text.",
        show_default=False,
        rich_help_panel=PROGRAMS,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size", metavar="SIZE", help="Choose a format for each layer, so that the weight files have this size, such as 80MB.",
        show_default=False, rich_help_panel=TARGET,
    ),
]  # fmt: skip
TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bits", metavar="BITS",
        help="Choose a format for each layer, so that the linear layers have this many bits per weight, such as 4.25.",
        show_default=False, rich_help_panel=TARGET,
    ),
]  # fmt: skip
TargetKL = Annotated[
    float | None,
    typer.Option(
        "--target-kl", metavar="KL",
        help="Choose a format for each layer, so that the model is as small as it can be with this predicted KL divergence from "
        "the float model, in nats per token. Below 0.05 models are very close.",
        show_default=False, rich_help_panel=TARGET,
    ),
]  # fmt: skip
FitMemory = Annotated[
    str | None,
    typer.Option(
        "--fit-memory", metavar="SIZE",
        help="Choose a format for each layer, so that the weights and the KV cache of --context tokens fit into this much memory, "
        "such as 8GB.",
        show_default=False, rich_help_panel=TARGET,
    ),
]  # fmt: skip
Context = Annotated[
    int | None,
    typer.Option(
        "--context", min=1, metavar="N", help="With --fit-memory, leave room for a KV cache of N tokens.",
        show_default=False, rich_help_panel=TARGET,
    ),
]  # fmt: skip
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity", metavar="FILE",
        help="Keep in this file how much each layer loses in each format; where the file exists, read it instead of measuring "
        "again.",
        show_default=False, rich_help_panel=TARGET,
    ),
]  # fmt: skip
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="End an answer after N tokens.")]
CacheType = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="FORMAT",
        help="Store keys and values in this format, such as int8, int4:g32, k=int8,v=int4:g32 or kivi2, or as they are with int16.",
        show_default="what the model's folder says, else int16", rich_help_panel=ENGINE,
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Let the engine use N threads.", show_default="all cores", rich_help_panel=ENGINE
    ),
]


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


def rung_of(effort: str, data_free: bool) -> str:
    """The effort that was asked for. RecipeError where it is asked for in two ways that exclude each other."""
    from lowbit.errors import RecipeError
    from lowbit.pipeline.effort import AUTO, NONE, effort_named

    effort_named(effort)
    if data_free and effort not in (AUTO, NONE.name):
        raise RecipeError(f"--data-free and --effort {effort} exclude each other; leave one out")
    return NONE.name if data_free else effort
