"""The quantization_config of other programs: the fields that the readers in `interchange/readers/schemes/` read, by quant_method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.config import check_values
from lowbit.interchange.checks.rules import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Rule,
    check,
    list_of,
    map_of,
    number,
    refuse,
    whole,
)

_LONGEST = 100  # characters of a method's name
_flag = FLAG | NULL
_words = TEXT | NULL
_bits = whole(1, 32)
_group = whole(-1, 1 << 30)
_modules = list_of(TEXT) | NULL
_GPTQ: Mapping[str, Rule] = {
    "bits": _bits, "group_size": _group | NULL, "desc_act": _flag, "sym": _flag, "checkpoint_format": _words,
    "format": _words, "packing_format": _words, "dynamic": map_of(OBJECT) | NULL,
}  # fmt: skip
METHODS: Mapping[str, Mapping[str, Rule]] = {
    "gptq": _GPTQ, "auto-round": _GPTQ, "intel/auto-round": _GPTQ,
    "awq": {
        "bits": _bits, "group_size": _group | NULL, "zero_point": _flag, "version": _words, "format": _words,
        "checkpoint_format": _words, "modules_to_not_convert": _modules,
    },
    "bitsandbytes": {
        "load_in_4bit": _flag, "load_in_8bit": _flag, "llm_int8_threshold": number(0, 1e9) | NULL,
        "bnb_4bit_quant_type": _words, "bnb_4bit_use_double_quant": _flag, "llm_int8_skip_modules": _modules,
    },
    "fp8": {"weight_block_size": list_of(whole(1, 1 << 24), 2, 2) | NULL, "activation_scheme": _words},
    "fbgemm_fp8": {"weight_block_size": list_of(whole(1, 1 << 24), 2, 2) | NULL, "activation_scheme": _words},
    "mxfp4": {"modules_to_not_convert": _modules},
    "compressed-tensors": {
        "format": _words, "config_groups": map_of(OBJECT) | NULL, "sparsity_config": OBJECT | NULL, "ignore": _modules,
        "kv_cache_scheme": OBJECT | NULL, "quantization_status": _words,
    },
}  # fmt: skip
_GROUP: Mapping[str, Rule] = {
    "targets": list_of(TEXT) | NULL, "weights": OBJECT | NULL, "input_activations": OBJECT | NULL,
    "output_activations": OBJECT | NULL, "format": _words,
}  # fmt: skip
_ARGS: Mapping[str, Rule] = {
    "num_bits": whole(1, 64), "type": TEXT, "symmetric": _flag, "strategy": _words, "group_size": _group | NULL,
    "block_structure": list_of(whole(1, 1 << 24), 2, 2) | NULL | TEXT, "dynamic": FLAG | TEXT | NULL,
    "scale_dtype": _words, "actorder": FLAG | TEXT | NULL,
}  # fmt: skip


def method_of(section: Mapping[str, Any], where: str) -> str:
    """The `quant_method` of a section. SourceError where there is none, or it is no text."""
    method = section.get("quant_method")
    if isinstance(method, str) and len(method) > _LONGEST:
        refuse(where, "quantization_config.quant_method", method, f"a name of at most {_LONGEST} characters")
    if isinstance(method, str) and method:
        return method
    if method is None:
        return "an unnamed method"
    raise SourceError(f"{where}: quantization_config.quant_method is no text; correct config.json or download it again")


def check_foreign(section: Mapping[str, Any], where: str) -> None:
    """SourceError for the first field of a section of another program that is not what its reader takes."""
    check_values(section, where, "quantization_config")
    method = method_of(section, where)
    check(METHODS.get(method, {}), section, where, "quantization_config.")
    groups = section.get("config_groups") if method == "compressed-tensors" else None
    for name, group in (groups or {}).items():
        path = f"quantization_config.config_groups.{name}."
        check(_GROUP, group, where, path)
        for args in ("weights", "input_activations"):
            if group.get(args) is not None:
                check(_ARGS, group[args], where, f"{path}{args}.")
