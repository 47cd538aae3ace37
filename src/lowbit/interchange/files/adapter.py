"""Folders of PEFT that hold an adapter, such as LoRA, and not a model: recognised, and answered with how to make one of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path, PurePath

from lowbit.errors import SourceError
from lowbit.interchange.checks.rules import shown

ADAPTER = "adapter_config.json"
_MOST_BYTES = 1 << 20  # of an adapter's settings; they take some hundred
_LONGEST = 96  # characters of a name that is put into a command
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# Kinds that put learned vectors before the text or into attention, of which no weight of the base knows.
_NOT_MERGED = ("PROMPT", "PREFIX", "P_TUNING", "CPT")


def refuse_adapter(folder: Path, label: str, *, always: bool = False) -> None:
    """SourceError when `folder` holds an adapter and no model: its base, and the command that makes a model of the two.

    label: what the user called it. always: also beside a config.json, where no weights of a model were found. The settings of
    an adapter are what its maker wrote, and no more than a name in them is believed.
    """
    if not (folder / ADAPTER).is_file() or ((folder / "config.json").is_file() and not always):
        return
    values = _settings(folder / ADAPTER)
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    word = kind.upper() if isinstance(kind, str) and kind.isascii() and kind.replace("_", "").isalnum() else ""
    what = "a LoRA adapter" if word == "LORA" else "a PEFT adapter" if not word else f"a PEFT adapter ({word[:40]})"
    known = isinstance(base, str) and bool(base.strip())
    of = f"for the base model {shown(base)}" if known else "whose base model it does not name"
    if any(part in word for part in _NOT_MERGED):
        raise SourceError(
            f"{label} is {what} {of}, and no model; this kind cannot be merged into weights, so quantize its base model instead"
        )
    usable = base if known and isinstance(base, str) and len(base) <= _LONGEST else "BASE"
    if word == "LORA":
        raise SourceError(
            f"{label} is {what} {of}, and no model by itself; quantize its base model with it: lowbit quantize {shlex.quote(usable)} --adapter "
            f"{shlex.quote(label)}"
        )
    out = f"{PurePath(label.rstrip('/')).name or 'adapter'}-merged"
    words = label if any((folder / name).is_file() for name in _TOKENIZER) else usable
    model, merged, tokenizer = (json.dumps(name) for name in (label, out, words))
    loaded = f"peft.AutoPeftModelForCausalLM.from_pretrained({model})"
    if not known:
        loaded = f'peft.PeftModel.from_pretrained(t.AutoModelForCausalLM.from_pretrained("BASE"), {model})'
    program = (
        f"import peft, transformers as t; {loaded}.merge_and_unload().save_pretrained({merged}); "
        f"t.AutoTokenizer.from_pretrained({tokenizer}).save_pretrained({merged})"
    )
    raise SourceError(
        f"{label} is {what} {of}, and no model by itself; merge the two (`pip install peft`), then quantize the merged folder: "
        f"python -c {shlex.quote(program)} && lowbit quantize {shlex.quote(out)}"
    )


def _settings(path: Path) -> dict[str, object]:
    """The JSON object of a file, empty where it is none: the file alone says that this is an adapter."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
