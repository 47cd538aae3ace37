"""`lowbit quantize --as` in one call: from a float model to the files of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.convert.exporting import Exported
from lowbit.convert.quantize_as import prepare_for, quantized_as, work_folder
from lowbit.interchange.progress import Progress
from lowbit.pipeline.effort import AUTO
from lowbit.pipeline.options import OnLayer, Options
from lowbit.recipes.recipe import Recipe


def quantize_as(
    model: Any,
    recipe: str | Recipe,
    target: str,
    out: str | Path,
    *,
    keep: str | Path | None = None,
    kv: str | None = None,
    calibration: Any = None,
    samples: int | None = None,
    length: int | None = None,
    chat: bool = False,
    effort: str = AUTO,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    on_layer: OnLayer | None = None,
) -> Exported:
    """Quantize a float model into the format of another program, in one step.

    recipe: as in `quantize`, or a mix of the target's own, such as "q4_k_m". target: "gguf", "vllm", "gptq" or "awq". out: what to write,
    a file whose name ends in .gguf or a folder. keep: also keep lowbit's own folder, under this name. kv: as in `export`. calibration,
    samples, length, chat, effort and on_layer are those of `quantize`. What was written is read back and compared before it gets its name.

    ExportError when the target cannot hold what the recipe asks for, with the nearest that it can; OutputError when `out` is not free.

    >>> lowbit.quantize_as(model, "int4:g32", "gptq", folder / "small-gptq").target
    'gptq'
    """
    given = Options(tokenizer, calibration=calibration, samples=samples, length=length, chat=chat)
    place = keep or work_folder(Path(out))
    ready, decision = prepare_for(model, recipe, target, effort, given, place, kv)
    text = {"calibration": calibration, "samples": samples, "length": length, "chat": chat}
    if decision.calibration is not None or kv is None:
        text |= {"calibration": decision.calibration, "samples": decision.samples}
    with quantized_as(
        model,
        ready,
        out,
        keep=keep,
        overwrite=overwrite,
        tokenizer=tokenizer,
        progress=progress,
        on_layer=on_layer,
        **text,
    ) as (_, exported):
        return exported
