"""The table of architectures: which of those that the installed transformers knows are quantized, loaded again and generated with.

    python benchmarks/architectures.py [NAME ...] [--out benchmarks/results/architectures.json] [--again] [--seconds 60]
        [--kind lm --kind s2s ...] [--list]

Every config class of transformers' own mappings becomes a tiny random model, its sizes shrunk by what their fields are called (`tiny_config`);
what that does not suit is in `OVERRIDES`. Each goes through `w8` and `w4` without text and `gptq@int4:g32` on a few token ids, is loaded as its own
class and as `AutoModel`, and generates where its class does. One process for each model, forked from one that has imported everything, with a limit
of time. What is in the JSON already is not done again. A cell is `ok`, `refused` (one sentence of lowbit), `fails` (anything else, which is a
defect), or `-` where the float model does not do it either.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lowbit
from lowbit.errors import LowbitError
from lowbit.measure.environment import environment

LAYERS, HIDDEN, HEADS, VOCAB, TOKENS = 2, 64, 4, 256, 24
RECIPES = {"w8": None, "w4": None, "gptq@int4:g32": 4}  # with windows of text
LARGEST = 40_000_000  # parameters: a config that shrinks to more is not tiny
# The kind of a model is that of the first automatic class that knows its config.
KINDS = {
    "mm": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForZeroShotImageClassification"),
    "s2s": ("AutoModelForSeq2SeqLM",), "enc": ("AutoModelForMaskedLM",),
    "audio": (
        "AutoModelForSpeechSeq2Seq", "AutoModelForCTC", "AutoModelForTextToWaveform", "AutoModelForTextToSpectrogram",
        "AutoModelForAudioClassification",
    ),
    "lm": ("AutoModelForCausalLM",),
    "vision": (
        "AutoModelForImageClassification", "AutoModelForObjectDetection", "AutoModelForDepthEstimation",
        "AutoModelForUniversalSegmentation", "AutoModelForMaskGeneration", "AutoModelForVideoClassification",
    ),
    "other": ("AutoModel",),
}  # fmt: skip
# Sizes by what fields are called, the first pattern that matches the whole name.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab(ulary)?_size.*", VOCAB), (r"(max_.*position.*|n_positions|n_ctx|max_seq_len|seq_length|max_.*length)", 128),
    (r"(num_hidden_layers|n_layers?|num_layers|num_(en|de)coder_layers|(en|de)coder_layers|depth|num_blocks)", LAYERS),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)", 2), (r"(.*num_.*attention_heads|n_heads?|num_heads|.*attention_heads)", HEADS),
    (r"(head_dim|.*_head_dim|d_kv|attention_head_size|kv_channels|rotary_dim|qk_rope_head_dim)", HIDDEN // HEADS),
    (r"(.*q_lora_rank|.*kv_lora_rank|time_step_rank)", 32),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token)", 2), (r"(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"(n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts|first_k_dense_replace)", 1),
    (r"(.*intermediate_size.*|ffn_dim|.*_ffn_dim|d_ff|n_inner|ffn_hidden_size|dim_feedforward|dff|dim_ff|feedforward_dim|hidden_dim_ff)", 2 * HIDDEN),
    (r"(.*hidden_size.*|d_model|n_embd|dim|embed_dim|.*embed(ding)?_size|embed(ding)?_dim|emb_dim|projection_dim|.*hidden_dim|width|text_hidden)", HIDDEN),
    (r"(image_size|img_size)", 32), (r"patch_size", 8), (r"(state_size|ssm_state_size|mamba_d_state)", 16),
    (r"(sliding_window|attention_window|local_window.*|chunk_size)", 16),
)  # fmt: skip
# By model_type: fields that the shrinking gets wrong, those of configs inside by dots. None leaves the default; "skip: why" leaves the model out.
OVERRIDES: dict[str, dict[str, Any] | str] = {
    "esm": {"vocab_size": VOCAB, "mask_token_id": 4, "pad_token_id": 0},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "funnel": {"block_sizes": [1, 2], "num_decoder_layers": 1, "d_inner": 128, "n_head": 4, "d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4, "intermediate_size": [128] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 16, "laurel_rank": 16,
    },
    "gemma4": {"vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                                 "num_key_value_heads": 4, "head_dim": 16, "pooling_kernel_size": 2, "patch_size": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64},
    "perceiver": {"num_self_attends_per_block": 2, "d_latents": 64, "num_latents": 16, "d_model": 64},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "num_key_value_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128,
    },
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "mamba_dt_rank": 16,
    },
}  # fmt: skip
_WIDTH = HIDDEN // HEADS


def _sections(*sizes: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}}


# What is tried in turn, for the config and for the text config inside it, until a model can be made that reads text.
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"num_key_value_heads": HEADS}, {"head_dim": _WIDTH}, {"head_dim": _WIDTH, "num_key_value_heads": HEADS}, _sections(4, 2, 2),
    _sections(2, 1, 1), {"qk_rope_head_dim": _WIDTH // 2, "qk_nope_head_dim": _WIDTH // 2},
)  # fmt: skip


def entries() -> dict[str, tuple[str, type[Any], type[Any]]]:
    """model_type -> (kind, config class, model class), of all that transformers knows."""
    found: dict[str, tuple[str, type[Any], type[Any]]] = {}
    for name in sorted(transformers.CONFIG_MAPPING):
        config = transformers.CONFIG_MAPPING[name]
        for kind, autos in KINDS.items():
            mappings = [getattr(transformers, auto)._model_mapping for auto in autos if hasattr(transformers, auto)]
            classes = (_class_of(mapping, config) for mapping in mappings)
            model = next((cls for cls in classes if cls is not None), None)
            if model is not None:
                found[name] = (kind, config, model[0] if isinstance(model, (tuple, list)) else model)
                break
    return found


def _class_of(mapping: Any, config: type[Any]) -> Any:
    """None where the mapping has no class for a config, or names one that is not there."""
    try:
        return mapping[config] if config in mapping else None  # noqa: SIM401  # `get` raises nothing of its own
    except (ValueError, AttributeError, ImportError):
        return None


def tiny_config(cls: type[Any], overrides: dict[str, Any] | None = None) -> Any:
    """A small config of a class: what it has inside is made small in the same way."""
    overrides = overrides or {}
    default = cls()
    inside = {name: sub for name in cls.sub_configs if (sub := getattr(default, name, None)) is not None}
    given: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        small = _small(name, value)
        if name not in inside and small is not None:
            given[name] = small
    layers = [v for k, v in default.to_dict().items() if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", k)]
    for name, value in default.to_dict().items():
        if isinstance(value, list) and len(value) in layers and len(value) > LAYERS:
            given[name] = _some_of_each(value)
        if isinstance(value, dict) and "mrope_section" in value:
            given[name] = value | {"mrope_section": [HIDDEN // HEADS // 4, HIDDEN // HEADS // 8, HIDDEN // HEADS // 8]}
    special = [
        k
        for k, v in default.to_dict().items()
        if re.search(r"_(token_id|token_index|index)$", k) and isinstance(v, int)
    ]
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for i, name in enumerate(special):
        if not 0 <= getattr(default, name, 0) < VOCAB - 50:
            given[name] = known.get(name, VOCAB - 1 - i)
    for name, sub in inside.items():
        own = {k.removeprefix(f"{name}."): v for k, v in overrides.items() if k.startswith(f"{name}.")}
        given[name] = tiny_config(type(sub), own).to_dict() | {"model_type": sub.model_type}
    given |= {k: v for k, v in overrides.items() if k.split(".")[0] not in inside}
    return cls(**{name: value for name, value in given.items() if value is not ...})


def _small(name: str, value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return size if size is not None and value > size else None


def _some_of_each(kinds: list[Any]) -> list[Any]:
    """The first layers of a list with a value for each, but so that the last is of another kind where there are several."""
    other = next((kind for kind in kinds if kind != kinds[0]), kinds[-1])
    return [*kinds[: LAYERS - 1], other]


class Row:
    """What is found out of one model, told to the parent as it goes."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self.tell = tell

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """`work()`, with what came of it; None where it failed."""
        start = time.perf_counter()
        try:
            value, what = work(), {"is": "ok"}
        except LowbitError as error:
            value, what = None, {"is": "refused", "says": str(error)}
        except Exception as error:
            value, what = None, {"is": "fails", "says": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if "says" in what:
            what["says"] = re.sub(r"/tmp/tmp\w+/", "", what["says"])
        if isinstance(value, float):
            what["error"] = value
        self.tell({"step": name, **what, "seconds": round(time.perf_counter() - start, 2)})
        return value


def examine(kind: str, name: str, config_class: type[Any], model_class: type[Any], row: Row, folder: Path) -> None:
    """All steps of one model."""
    torch.manual_seed(0)
    overrides = OVERRIDES.get(name, {})
    if isinstance(overrides, str):
        row.tell({"step": "build", "is": "refused", "says": overrides})
        return

    def build() -> nn.Module:
        suits, count = variant(kind, config_class, model_class, overrides)
        if count > LARGEST:
            raise ValueError(f"{count:,} parameters are left of its config, which is not tiny")
        row.tell({"parameters": count})
        config = tiny_config(config_class, suits)
        config.architectures = [model_class.__name__]
        model = model_class(config).eval()
        model.save_pretrained(folder / "float")
        return model

    model = row.step("build", build)
    if model is None:
        return
    ids = [torch.randint(3, 60, (TOKENS,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    floats = _quietly(lambda: output(model_class.from_pretrained(folder / "float"), ids[0][None]))
    auto = _quietly(lambda: transformers.AutoModel.from_pretrained(folder / "float"))
    auto_output = None if auto is None else _quietly(lambda: output(auto, ids[0][None]))
    generates = model_class.can_generate() and _quietly(lambda: generated(model, ids[0][None])) is not None
    row.tell({"reads": floats is not None, "auto": auto is not None, "generates": generates})
    for recipe, windows in RECIPES.items():
        out = folder / re.sub(r"\W", "_", recipe)
        text: dict[str, Any] = {"effort": "none"} if windows is None else {"calibration": ids[:windows]}
        made = row.step(
            recipe, lambda out=out, recipe=recipe, text=text: lowbit.quantize(folder / "float", recipe, out, **text)
        )
        if made is None:
            continue
        row.tell(
            {"coverage": made.report.coverage, "unread": sum("not used while" in x.note for x in made.report.layers)}
        )

        def own(out: Path = out) -> Any:
            loaded = lowbit.load(out)
            return loaded if floats is None else distance(floats, output(loaded, ids[0][None]))

        row.step(f"{recipe} own class", own)
        if auto is not None:

            def as_auto(out: Path = out) -> Any:
                loaded = transformers.AutoModel.from_pretrained(out)
                return loaded if auto_output is None else distance(auto_output, output(loaded, ids[0][None]))

            row.step(f"{recipe} AutoModel", as_auto)
        if generates:
            row.step(
                f"{recipe} generate", lambda out=out: generated(model_class.from_pretrained(out).eval(), ids[0][None])
            )
        shutil.rmtree(out, ignore_errors=True)


def variant(
    kind: str, config_class: type[Any], model_class: type[Any], overrides: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """The first overrides of which a model can be made, and which reads text where its kind does; and its parameters."""
    problem: Exception | None = None
    made: tuple[dict[str, Any], int] | None = None
    ids = torch.randint(3, 60, (1, TOKENS))
    for more in VARIANTS:
        inside = {f"text_config.{k}": v for k, v in more.items()} if "text_config" in config_class.sub_configs else more
        suits = inside | overrides
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in model_class(tiny_config(config_class, suits)).parameters())
        except Exception as error:
            problem = problem or error
            continue
        made = made or (suits, count)
        if kind not in ("mm", "lm", "s2s", "enc") or count > LARGEST:
            break
        if _quietly(lambda suits=suits: output(model_class(tiny_config(config_class, suits)), ids)) is not None:
            return suits, count
    if made is None:
        raise problem or ValueError("no variant")
    return made


def output(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits or hidden states over token ids."""
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        out = model.eval()(**inputs)
    return next(t for t in tree_leaves(dict(out)) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1)


def distance(right: Tensor, found: Tensor) -> float:
    """|found - right| / |right|; 1 where a model decides for itself how long its output is (speech), ValueError where it is no number."""
    if found.shape != right.shape and found.dim() == right.dim():
        return 1.0
    error = float((found - right).norm() / right.norm().clamp_min(1e-30))
    if error != error:
        raise ValueError("the outputs are no numbers")
    return error


def generated(model: nn.Module, ids: Tensor) -> Any:
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=4, do_sample=False)


def _quietly(work: Callable[[], Any]) -> Any:
    """What the float model does, None where it does not."""
    try:
        return work()
    except Exception:
        return None


def in_a_child(work: Callable[[Row], None], seconds: float) -> dict[str, Any]:
    """The row that `work` tells in a process of its own; what it told before it was stopped counts."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            work(Row(lambda fact: os.write(writing, (json.dumps(fact) + "\n").encode())))  # type: ignore[arg-type,return-value]
        finally:
            os._exit(0)
    os.close(writing)
    told, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                break
            told += part
    late = time.monotonic() >= end
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    row: dict[str, Any] = {"steps": {}}
    for line in told.decode().splitlines():
        fact = json.loads(line)
        step = fact.pop("step", None)
        row["steps"].update({step: fact}) if step else row.update(fact)
    if late:
        row["late"] = f"stopped after {seconds:g} s"
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        row["died"] = f"signal {os.WTERMSIG(status)}"
    return row


def as_json(found: dict[str, Any]) -> str:
    """A line for each model."""
    about = {key: value for key, value in found.items() if key != "rows"}
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(found["rows"].items())
    )
    return json.dumps(about, sort_keys=True)[:-1] + f',\n"rows": {{\n{rows}\n}}}}\n'


def markdown(found: dict[str, Any]) -> str:
    """The table, with what was refused or failed below it."""
    about, rows = found["environment"], found["rows"]
    tried = {name: row for name, row in rows.items() if row["steps"].get("build", {}).get("is") == "ok"}
    lines = [
        "# Architectures", "",
        f"Tiny random models of transformers {found['transformers']}, on {about['machine']}; errors are relative, of logits or hidden states (100 %: of another length, which some models of speech choose themselves). "
        "A row that has numbers in all columns works as its float model does; `-`: the float model does not do it either, or not on text alone.",
        "", f"{len(tried)} architectures of {len(rows)} were built.", "",
        "| architecture | kind | w8 | w4 | gptq | text does not reach | as AutoModel | generates |", "|---|---|--:|--:|--:|--:|---|---|",
    ]  # fmt: skip
    for name, row in sorted(tried.items()):
        cells = [_result(row, recipe) for recipe in RECIPES]
        lines.append(
            f"| {name} | {row['kind']} | {' | '.join(cells)} | {row.get('unread') or ''} | {_all_of(row, 'AutoModel')} | {_all_of(row, 'generate')} |"
        )
    for title, what in (("Refused", "refused"), ("Failed", "fails")):
        alike: dict[str, list[tuple[str, str]]] = {}
        for name, row in sorted(tried.items()):
            for step, fact in row["steps"].items():
                if fact["is"] == what:
                    alike.setdefault(_pattern(step, fact["says"]), []).append((name, f"{step}: {fact['says']}"))
        said = [f"- {', '.join(dict.fromkeys(n for n, _ in found))}: {found[0][1]}" for found in alike.values()]
        lines += ["", f"## {title}", "", *(said or ["Nothing."])]
    late = [
        f"- {name}: {row.get('late') or row.get('died')}"
        for name, row in sorted(tried.items())
        if row.get("late") or row.get("died")
    ]
    not_built = [
        f"- {n}: {row['steps'].get('build', {}).get('says', row.get('late', row.get('died', '')))}"
        for n, row in sorted(rows.items())
        if n not in tried
    ]
    lines += [
        "",
        "## Stopped",
        "",
        *(late or ["Nothing."]),
        "",
        "## Not built from a config that is shrunk this way",
        "",
        *not_built,
        "",
    ]
    return "\n".join(lines)


def _pattern(step: str, says: str) -> str:
    """What is the same in sentences about different models."""
    kind = step.removeprefix(next((recipe for recipe in RECIPES if step.startswith(recipe)), ""))
    return kind + re.sub(r"/\S+|'[^']*'|\b[A-Z]\w*|\d+", "", says)


def _result(row: dict[str, Any], recipe: str) -> str:
    made, own = row["steps"].get(recipe), row["steps"].get(f"{recipe} own class")
    if made is None or made["is"] != "ok":
        return "**stopped**" if made is None else _bold(made["is"])
    if own is None or own["is"] != "ok":
        return "**stopped**" if own is None else f"loading {_bold(own['is'])}"
    return f"{100 * own['error']:.1f} %" if "error" in own else "ok"


def _all_of(row: dict[str, Any], what: str) -> str:
    found = {f["is"] for step, f in row["steps"].items() if step.endswith(f" {what}")}
    return "-" if not found else _bold(next((x for x in ("fails", "refused") if x in found), "ok"))


def _bold(word: str) -> str:
    return f"**{word}**" if word == "fails" else word


def wanted(names: Iterable[str], kinds: Iterable[str]) -> Iterator[tuple[str, tuple[str, type[Any], type[Any]]]]:
    for name, entry in entries().items():
        if (not names or name in names) and (not kinds or entry[0] in kinds):
            yield name, entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "architectures.json")
    parser.add_argument("--again", action="store_true", help="also those that are in the JSON already")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kind", action="append", default=[], choices=[*KINDS])
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print(
            "\n".join(
                f"{name:32} {kind:7} {model.__name__}" for name, (kind, _, model) in wanted(given.names, given.kind)
            )
        )
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = json.loads(given.out.read_text()) if given.out.is_file() else {"rows": {}}
    found |= {
        "transformers": transformers.__version__,
        "lowbit": lowbit.__version__,
        "environment": asdict(environment()),
    }
    for name, (kind, config, model) in wanted(given.names, given.kind):
        if name in found["rows"] and not given.again:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = in_a_child(lambda row: examine(kind, name, config, model, row, Path(folder)), given.seconds)  # noqa: B023
        found["rows"][name] = {"kind": kind, "class": model.__name__, **row}
        bad = [f"{step} {f['is']}: {f.get('says')}" for step, f in row["steps"].items() if f["is"] != "ok"]
        print(
            f"{name:28} {kind:6} {row.get('late') or row.get('died') or ''} {'; '.join(bad)[:230] or 'ok'}", flush=True
        )
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(as_json(found))
        given.out.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    sys.exit(main())
