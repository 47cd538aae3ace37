"""llama.cpp's name for what cuts text into words before BPE, found by how the tokenizer does it, not by its model.

llama.cpp knows pre-tokenizers by name (`tokenizer.ggml.pre`, `llama-vocab.cpp`); a tokenizer.json spells them out as
steps and regular expressions. Ours are compared with those that belong to each name.
"""

from __future__ import annotations

from typing import Any

# Regular expression of a Split -> llama.cpp's name. Contractions are written in two ways.
_LL3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LL3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    rf"|\p{{N}}{{1,3}}|{_TAIL}"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = {_LL3: "llama-bpe", _QWEN2: "qwen2", _QWEN35: "qwen35", _TEKKEN: "tekken", _GPT4O: "gpt-4o", _GPT2: "gpt-2"}
_NORMALIZERS = (None, "NFC")  # llama.cpp has no normalizer; NFC leaves what people type as it is


def pretokenizer_name(spec: dict[str, Any]) -> tuple[str | None, str]:
    """(llama.cpp's name of the pre-tokenizer of a tokenizer.json, "") or (None, why there is none)."""
    normalizer = spec.get("normalizer")
    kinds = [None if step is None else step["type"] for step in _flat(normalizer, "normalizers")] or [None]
    if any(kind not in _NORMALIZERS for kind in kinds):
        return None, f"its tokenizer changes text first ({', '.join(map(str, kinds))}), which llama.cpp does not"
    steps = _flat(spec.get("pre_tokenizer"), "pretokenizers")
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if not levels:
        return None, "its tokenizer is neither on bytes nor falls back to them, and llama.cpp knows no other BPE"
    if any(step.get("add_prefix_space") for step in levels):
        return None, "its tokenizer puts a space before the text, which llama.cpp's BPE on bytes does not"
    words = [step for step in steps if step["type"] != "ByteLevel"]
    regex = any(step.get("use_regex") for step in levels)
    digits = [step for step in words if step["type"] == "Digits" and step.get("individual_digits")]
    if regex and not words:
        return "gpt-2", ""
    if regex and len(words) == len(digits) == 1:
        return "smollm", ""
    if not regex and len(words) == 1 and words[0]["type"] == "Split" and words[0].get("behavior") == "Isolated":
        pattern = words[0]["pattern"].get("Regex", "")
        if pattern in _WORDS and not words[0].get("invert"):
            return _WORDS[pattern], ""
    shown = [str(step["type"]) for step in steps]
    return None, f"how its tokenizer cuts words ({', '.join(shown)}) has no name in llama.cpp that this version knows"


def _flat(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for child in part[inside] for step in _flat(child, inside)]
