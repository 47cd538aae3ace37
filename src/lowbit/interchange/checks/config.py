"""config.json as a whole: every object in it by the tables of fields, and what fields must be beside one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from lowbit.errors import SourceError
from lowbit.families import decoder_of
from lowbit.interchange.checks.fields import ANY, DECODER, GIVEN, NEEDED, NUMBERS, TOKEN_IDS
from lowbit.interchange.checks.rope import check_rope
from lowbit.interchange.checks.rules import REMEDY, check, need, refuse

_DEEP = 32  # objects and lists inside one another; transformers' configs are six deep
_LARGE = 1 << 62  # torch's sizes are 64-bit numbers
_SECTIONS = ("quantization_config", "compression_config")  # have tables of their own


def check_config(config: Mapping[str, Any], where: str) -> None:
    """SourceError that names the first field of a config (as JSON) that makes no model. Unknown fields pass.

    `where`: the file, for the message.
    """
    check_values(config, where)
    for path, part in _parts(config):
        check(ANY, part, where, path)
        plain = decoder_of(part) is not None
        check(TOKEN_IDS, part, where, path)
        if plain:
            check(DECODER, part, where, path)
        _check_patterns(part, where, path)
        check_rope(part, where, path, plain)
        _check_layers(part, where, path)
        if plain:
            _check_decoder(part, where, path)


def check_decoder(config: Mapping[str, Any], where: str) -> None:
    """The same, and SourceError where a field is absent without which a decoder has no shape."""
    check_config(config, where)
    need(NEEDED, config, where, "", f"a model of type {config.get('model_type')!r}")


def lacks(config: Mapping[str, Any]) -> bool:
    """Whether a field of a decoder is absent for which its class has a value of its own."""
    decoder = decoder_of(config)
    given = (*GIVEN, *(decoder.given if decoder else ()))
    return (
        any(config.get(name) is None for name in NEEDED)
        or any(name not in config for name in given)
        or not ("hidden_act" in config or "hidden_activation" in config)
    )


def check_values(values: Any, where: str, path: str = "", deep: int = 0, largest: int = _LARGE) -> None:
    """SourceError for what no field of JSON may be: NaN, numbers beyond `largest`, lists and objects too deep."""
    if isinstance(values, float) and values != values:
        refuse(where, path, values, "a number")
    if type(values) is int and abs(values) > largest:
        refuse(where, path, values, f"a number of at most {largest.bit_length() - 1} bits")
    if isinstance(values, (Mapping, list)):
        if deep == _DEEP:
            raise SourceError(f"{where}: it has objects more than {_DEEP} deep; {REMEDY}")
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            check_values(value, where, f"{path}.{key}" if path else str(key), deep + 1, largest)


def _parts(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(its path with a dot behind it, the object) of the config and of every config inside it."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config") and key not in _SECTIONS:
            yield from _parts(value, f"{path}{key}.")


def _check_patterns(config: Mapping[str, Any], where: str, path: str) -> None:
    for name, value in config.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for pattern, rule in NUMBERS.items():
            # A number that should be whole and is written as 8.0 is transformers' to judge.
            if fnmatchcase(name, pattern) and not rule.holds(int(value) if value == int_or_none(value) else value):
                refuse(where, f"{path}{name}", value, rule.says)


def int_or_none(value: float) -> int | None:
    """The number without its fraction; None for an infinite one."""
    try:
        return int(value)
    except (OverflowError, ValueError):
        return None


def _check_layers(config: Mapping[str, Any], where: str, path: str) -> None:
    """Lists with an entry for each layer have as many as there are layers."""
    layers = config.get("num_hidden_layers")
    if type(layers) is not int:
        return
    for name in ("layer_types", "no_rope_layers"):
        given = config.get(name)
        if given and len(given) != layers:
            refuse(where, f"{path}{name}", given, f"a list of {layers}, as num_hidden_layers says")


def _check_decoder(config: Mapping[str, Any], where: str, path: str) -> None:
    """Heads, widths and tokens of a decoder beside one another."""
    width, heads, keys = (config.get(k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if heads and keys and heads % keys:
        refuse(where, f"{path}num_key_value_heads", keys, f"a divisor of num_attention_heads, which is {heads}")
    if width and heads and not config.get("head_dim") and width % heads:
        refuse(
            where,
            f"{path}num_attention_heads",
            heads,
            f"a divisor of hidden_size, which is {width}, or head_dim must be given",
        )
    pad, tokens = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and type(tokens) is int and pad >= tokens:
        refuse(where, f"{path}pad_token_id", pad, f"below vocab_size, which is {tokens}")
