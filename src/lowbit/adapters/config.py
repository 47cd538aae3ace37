"""adapter_config.json: what an adapter says of itself, field by field, and what of it lowbit does not compute."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.rules import (
    FLAG,
    LIST,
    NULL,
    OBJECT,
    TEXT,
    Rule,
    check,
    list_of,
    map_of,
    number,
    one_of,
    shown,
    whole,
)
from lowbit.interchange.files.adapter import ADAPTER
from lowbit.interchange.files.settings import read_json

_RANK = whole(1, 1 << 20)
_ALPHA = number(-1e6, 1e6)
_NAMES = list_of(TEXT) | TEXT | NULL
FIELDS: Mapping[str, Rule] = {
    "peft_type": TEXT, "task_type": TEXT | NULL, "base_model_name_or_path": TEXT | NULL, "revision": TEXT | NULL,
    "peft_version": TEXT | NULL, "auto_mapping": OBJECT | NULL, "inference_mode": FLAG | NULL,
    "r": _RANK, "lora_alpha": _ALPHA, "lora_dropout": number(0, 1) | NULL, "rank_pattern": map_of(_RANK) | NULL,
    "alpha_pattern": map_of(_ALPHA) | NULL, "use_rslora": FLAG | NULL, "use_dora": FLAG | NULL, "fan_in_fan_out": FLAG | NULL,
    "bias": one_of("none", "all", "lora_only") | NULL, "lora_bias": FLAG | NULL, "target_modules": _NAMES,
    "exclude_modules": _NAMES, "modules_to_save": _NAMES, "layers_to_transform": list_of(whole(0, 1 << 20)) | whole(0, 1 << 20) | NULL,
    "layers_pattern": _NAMES, "init_lora_weights": FLAG | TEXT | NULL, "target_parameters": LIST | NULL,
    "ensure_weight_tying": FLAG | NULL,
}  # fmt: skip
# Of training alone: without meaning once the adapter is trained.
_OF_TRAINING = frozenset({
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "runtime_config", "velora_config", "qalora_group_size",
})  # fmt: skip
# Field -> what it asks for, which is no low-rank product added to a weight of the base, or not to one that can be found.
_NOT_COMPUTED = {
    "alora_invocation_tokens": "begins to work at certain tokens of a text (aLoRA)",
    "arrow_config": "chooses among several adapters while it runs (Arrow)",
    "kasa_config": "takes singular values of the base away (KaSA)",
    "layer_replication": "repeats layers of the base",
    "monteclora_config": "draws its weights at random (MonteCLoRA)",
    "target_parameters": "changes stacks of experts (target_parameters)",
    "trainable_token_indices": "changes single rows of the embedding (trainable_token_indices)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "averages inputs in groups (QA-LoRA)",
}
# Beginnings that take what they start from out of the base, so that the adapter belongs to a base which is not at hand.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_KNOWN = {*FIELDS, *_OF_TRAINING, *_NOT_COMPUTED}
_MOST_PATTERNS, _LONGEST, _MOST_STEPS = 4096, 256, 1e10


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter's settings its use needs: the scale of each product, and where the adapter belongs.

    base: the model that it was trained on, by the name that its trainer used. rank, alpha: where no pattern says another.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    base: str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank that the settings give a module."""
        return _by_pattern(self.ranks, module, self.rank)

    def scaling(self, module: str) -> float:
        """What B A is multiplied with: alpha / r (Hu et al. 2021), or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: Path, label: str) -> AdapterConfig:
    """The settings of the adapter in `folder`. SourceError that names the first field that is wrong, unknown or not computed."""
    where = str(folder / ADAPTER)
    if not (folder / ADAPTER).is_file():
        raise SourceError(
            f"{label} has no {ADAPTER}, so it is no adapter; name a folder that save_pretrained of peft wrote"
        )
    values = read_json(folder / ADAPTER)
    check({"peft_type": FIELDS["peft_type"]}, values, where)
    kind = values.get("peft_type")
    if kind != "LORA":
        named = shown(kind) if kind else "of a kind that it does not name"
        raise SourceError(
            f"{label} is an adapter {'of the kind ' * bool(kind)}{named}, and lowbit reads LORA ones, with DoRA and rsLoRA among them; "
            "merge it with merge_and_unload of peft, where that kind can be merged, and quantize the result"
        )
    check(FIELDS, values, where)
    for name, what in _NOT_COMPUTED.items():
        if values.get(name):
            raise SourceError(f"{label}: the adapter {what}, which lowbit does not compute; {_BY_PEFT}")
    unknown = sorted(
        name for name, value in values.items() if name not in _KNOWN and value not in (None, False, [], {})
    )
    if unknown:
        raise SourceError(
            f"{where}: lowbit does not know the field {shown(unknown[0])} of adapters, and would ignore it; {_BY_PEFT}"
        )
    _check_start(values.get("init_lora_weights"), label)
    for name in ("r", "lora_alpha"):
        if values.get(name) is None:
            raise SourceError(
                f"{where}: {name} is missing, without which the scale of the adapter is not known; correct the file"
            )
    ranks, alphas = (
        _patterns(values.get(name) or {}, f"{where}: {name}") for name in ("rank_pattern", "alpha_pattern")
    )
    base = values.get("base_model_name_or_path")
    return AdapterConfig(
        values["r"], float(values["lora_alpha"]), bool(values.get("use_rslora")), bool(values.get("use_dora")),
        base.strip() or None if isinstance(base, str) else None, ranks, alphas,
    )  # fmt: skip


_BY_PEFT = "merge it with merge_and_unload of peft, and quantize the result"


def _check_start(start: Any, label: str) -> None:
    """SourceError for a start of training that changed the base itself, or that nobody knows."""
    if not isinstance(start, str) or start in _PLAIN_STARTS:
        return
    if start.startswith(_CHANGES_BASE):
        raise SourceError(
            f"{label}: training began with init_lora_weights={shown(start)}, which changed the weights of the base too; save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft, which makes a plain LoRA adapter of it"
        )
    raise SourceError(
        f"{label}: lowbit does not know init_lora_weights={shown(start)}, which may have changed the base; {_BY_PEFT}"
    )


def _patterns(found: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Regular expressions that take a bounded time on any name. SourceError for others."""
    if len(found) > _MOST_PATTERNS:
        raise SourceError(f"{where} has {len(found)} patterns, and no more than {_MOST_PATTERNS} are read; give fewer")
    for pattern in found:
        quick = len(pattern) <= _LONGEST and _repetitions(pattern) <= 2 and not re.search(r"\)[*+?{]", pattern)
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            quick = False
        if not quick:
            raise SourceError(
                f"{where} has {shown(pattern)}, which is not read as a pattern of names: it may have 256 characters and two repetitions, "
                "none of a group; write out the names"
            )
    return found


def _repetitions(pattern: str) -> int:
    return len(re.findall(r"[*+?{]", pattern))


def check_patterns(config: AdapterConfig, modules: Collection[str], label: str) -> None:
    """SourceError where matching all names with all patterns could take minutes: the steps of a match grow with the length of a name to the power of one more
    than the repetitions."""
    longest = max(map(len, modules), default=0)
    steps = sum(len(modules) * longest ** (1 + _repetitions(pattern)) for pattern in (*config.ranks, *config.alphas))
    if steps > _MOST_STEPS:
        raise SourceError(
            f"{label}: the patterns of ranks and alphas would take too long on {len(modules)} names of up to {longest} characters; write out the names"
        )


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the name, or its end after a dot; as peft matches them."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)
