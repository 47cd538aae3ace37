"""What stands beside a tokenizer: tokenizer_config.json, special_tokens_map.json, generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.interchange.checks.config import check_values
from lowbit.interchange.checks.fields import TOKEN_IDS
from lowbit.interchange.checks.rules import FLAG, NULL, OBJECT, TEXT, Rule, check, number, whole

_ENDLESS = 1 << 128  # what transformers writes for a length without limit, 10^30, is a whole number
_token = TEXT | NULL | Rule("an object with a text as content", lambda v: isinstance(v, Mapping) and isinstance(v.get("content"), str))  # fmt: skip
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The chat template is checked where it is rendered: text can be read without it.
TOKENIZER: Mapping[str, Rule] = {
    **dict.fromkeys(SPECIAL, _token),
    "tokenizer_class": TEXT | NULL,
    "added_tokens_decoder": OBJECT | NULL,
    "model_max_length": number(-1, 1e300) | NULL,
    "add_bos_token": FLAG | NULL,
    "add_eos_token": FLAG | NULL,
}
GENERATION: Mapping[str, Rule] = {
    **TOKEN_IDS,
    "max_length": whole(0, 2**31 - 1) | NULL,
    "max_new_tokens": whole(0, 2**31 - 1) | NULL,
    "do_sample": FLAG | NULL,
    "temperature": number(0, 1e6) | NULL,
    "top_p": number(0, 1) | NULL,
    "top_k": whole(0, 2**31 - 1) | NULL,
    "transformers_version": TEXT | NULL | number(0, 1000),
}


def check_tokenizer(values: Mapping[str, Any], where: str) -> None:
    """SourceError for the first field of tokenizer_config.json that is not what a tokenizer can have."""
    check_values(values, where, largest=_ENDLESS)
    check(TOKENIZER, values, where)


def check_generation(values: Mapping[str, Any], where: str) -> None:
    """SourceError for the first field of generation_config.json that is not what generating can take."""
    check_values(values, where)
    check(GENERATION, values, where)
