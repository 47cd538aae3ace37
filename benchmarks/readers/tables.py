"""The record of foreign_readers.py as Markdown."""

from __future__ import annotations

from typing import Any

HEAD = """# What other programs make of lowbit's folders

`python benchmarks/foreign_readers.py`. Every folder is loaded without lowbit; beside it stands what lowbit computes from its own
folder in float32. *logits*: |a - b| / |b|; in brackets what rounding the inputs to int8 or fp8 changes of lowbit's own
logits, since a reader that rounds a little otherwise makes that error anew. *tokens*: greedy ones that are the same up to the first
difference. The difference is the reader's arithmetic (its type is named), not the weights: those were read back equal, tables in
16 bits aside, before the export was called done.
vLLM runs on a CPU here; what it has no kernel for there is said as it says it.
"""
_LINE = "| reader | target | recipe | loads | logits | tokens | arithmetic |\n|---|---|---|---|---|---|---|"


def markdown(found: dict[str, Any]) -> str:
    """Tables of the records, one for the model and one for the tiny one, then what was served and measured."""
    parts = [HEAD]
    rows, length, new = found["rows"]
    for key, title in (("on_model", "the benchmark model"), ("on_tiny", "a tiny random Llama, every way of storing")):
        if found.get(key):
            parts.append(f"## {title}\n\n{rows} rows of {length} tokens, {new} new ones each.\n")
            parts.append("\n".join([_LINE, *map(_row, found[key])]) + "\n")
    if "served" in found:
        parts.append("## vLLM's server, through the `openai` client\n")
        parts.append("\n".join(map(_served, found["served"])) + "\n")
    for one in found.get("harness", ()):
        value = (
            one.get("error") or f"{one['bits_per_byte']:.5f} bits per byte, by lowbit's own arithmetic {one['own']:.5f}"
        )
        parts.append(f"## lm-eval on a lowbit folder\n\n{_versions(one)}, model class `hf`: {value}\n")
    return "\n".join(parts)


def _versions(record: dict[str, Any]) -> str:
    found = record.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in found.items() if name != "torch")


def _row(record: dict[str, Any]) -> str:
    start = f"| {_versions(record) or record['reader']} | {record['target']} | `{record['recipe']}` |"
    if "error" in record:
        return f"{start} no: {record['error'].replace('|', '/')} | | | |"
    kernels = ", ".join(k for k in record["linear"] if k != "Linear")
    how = f"{record['dtype']}{f', {kernels}' if kernels else ''}"
    rounding = f" ({record['rounding']:.1e})" if record.get("rounding") else ""
    return f"{start} yes | {record['logits']:.1e}{rounding} | {record['tokens']} of {record['of']} | {how} |"


def _served(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"- `{record['recipe']}`: {record['error']}"
    same = "the same text as lowbit's" if record["same"] else f"lowbit's is {record['own']!r}"
    return f"- `{record['recipe']}`, {_versions(record)}: {record['text']!r}, {same}"
