"""config.json and tokenizer_config.json that readers of today and of yesterday understand alike.

transformers 5 writes `rope_parameters`, `dtype` and other names that vLLM, llama.cpp's converter, mlx, exllama and
transformers 4 do not look for: without `rope_theta` they take 10000 and say nothing. So the old names stand beside the new
ones, each only where transformers reads the very same config from both.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Fields = dict[str, Any]
_FULL, _SLIDING = "full_attention", "sliding_attention"
# What the base of positions of layers with a window, and of the others, was called.
_LOCAL: Mapping[str, Fields] = {
    "gemma3_text": {"rope_theta": _FULL, "rope_local_base_freq": _SLIDING},
    "gemma3n_text": {"rope_theta": _FULL, "rope_local_base_freq": _SLIDING},
    "modernbert": {"global_rope_theta": _FULL, "local_rope_theta": _SLIDING},
    "modernbert-decoder": {"global_rope_theta": _FULL, "local_rope_theta": _SLIDING},
}
_BASES = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}
_WITH_TYPE = ("linear", "dynamic", "yarn", "longrope")  # kinds that are older than the name `rope_type`


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """Write `config` to config.json in `folder`. May raise OSError."""
    text = json.dumps(config_fields(config), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, "utf-8")


def config_fields(config: PretrainedConfig) -> Fields:
    """What transformers would write of `config`, and beside it the names by which older readers go."""
    plain: Fields = json.loads(config.to_json_string(use_diff=True))
    plain.pop("transformers_weights", None)
    whole = copy.deepcopy(plain)
    meant = _meaning(config, plain, plain)
    for place, group in _additions(plain):
        tried = copy.deepcopy(whole)
        section = tried
        for key in place:
            section = section[key]
        section.update({key: value for key, value in group.items() if key not in section})
        if meant is not None and _meaning(config, tried, plain) == meant:
            whole = tried
    return whole


def _additions(section: Fields, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Fields]]:
    """(where, fields to add there), by groups that make sense alone, of a config and of those in it."""
    for group in _old_names(section):
        if group:
            yield place, group
    for key, value in section.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            yield from _additions(value, (*place, key))


def _old_names(section: Fields) -> Iterator[Fields]:
    kind, rope = str(section.get("model_type")), section.get("rope_parameters") or {}
    if section.get("dtype"):
        yield {"torch_dtype": section["dtype"]}
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if nested:
        names = _LOCAL.get(kind, {"rope_theta": _FULL})
        yield {
            name: nested[layers]["rope_theta"]
            for name, layers in names.items()
            if "rope_theta" in nested.get(layers, {})
        }
        yield _scaling(nested.get(_FULL, {}))
    elif rope:
        base, share = _BASES.get(kind, ("rope_theta", "partial_rotary_factor"))
        yield {base: rope["rope_theta"]} if rope.get("rope_theta") is not None else {}
        yield {share: rope["partial_rotary_factor"]} if rope.get("partial_rotary_factor") is not None else {}
        yield _scaling(rope)
        if not _scaling(rope):
            yield {"rope_scaling": None}
    if "num_local_experts" in section and kind.startswith("qwen3"):
        yield {"num_experts": section["num_local_experts"]}
    period = _period(section.get("layer_types"))
    if period and kind in ("gemma2", "gemma3_text", "cohere2"):
        yield {"sliding_window_pattern": period}
    if period and kind.startswith("modernbert"):
        yield {"global_attn_every_n_layers": period}


def _scaling(rope: Mapping[str, Any]) -> Fields:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    parts = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {"rope_scaling": parts | ({"type": kind} if kind in _WITH_TYPE else {})}


def _period(kinds: Any) -> int:
    """Every how many layers there is one without a window, the first or the last of each period; 0 where there is no such rule."""
    if not isinstance(kinds, list) or set(kinds) != {_FULL, _SLIDING}:
        return 0
    full = [i for i, kind in enumerate(kinds) if kind == _FULL]
    period = full[1] - full[0] if len(full) > 1 else full[0] + 1
    start = 0 if full[0] == 0 else period - 1
    return period if full == list(range(start, len(kinds), period)) else 0


def _meaning(config: PretrainedConfig, fields: Fields, plain: Fields) -> Any:
    """What transformers reads from these fields, of those that `plain` has; None where it cannot."""
    given = {key: _plain_numbers(value) for key, value in fields.items() if key != "quantization_config"}
    try:
        read: Fields = type(config).from_dict(given).to_dict()
    except Exception:  # transformers raises many kinds for a config that it does not like
        return None
    return _pruned(read, plain)


def _plain_numbers(value: Any) -> Any:
    """A copy in which an infinity, which transformers writes as {"__float__": "Infinity"}, is a number again."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_numbers(inner) for key, inner in value.items()}
    return [_plain_numbers(inner) for inner in value] if isinstance(value, list) else value


def _pruned(read: Any, plain: Any, inside: str = "") -> Any:
    """`read` without what is only in the old names; of positions all counts but the old name of their kind."""
    if not isinstance(read, dict):
        return read
    if inside.startswith("rope") or not isinstance(plain, dict):
        return {key: _pruned(value, None, "rope") for key, value in read.items() if key != "type"}
    return {key: _pruned(value, plain[key], key) for key, value in read.items() if key in plain}


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of transformers with what readers before version 5 look for. May raise OSError.

    They know no class `TokenizersBackend`, want special tokens that have no name of their own as `additional_special_tokens`,
    and the chat template in tokenizer_config.json.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    fields: Fields = json.loads(file.read_text("utf-8"))
    before = dict(fields)
    if fields.get("tokenizer_class") == "TokenizersBackend":  # another name of the same class in transformers 5
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        fields.setdefault("chat_template", template)
    if fields != before:
        file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
