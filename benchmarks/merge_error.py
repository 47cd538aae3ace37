"""What merging an adapter into a quantized model costs: the naive way and lowbit's, for several ranks and bits.

    python benchmarks/merge_error.py MODEL TRAINING EVAL --out benchmarks/results/merge-error.json
        [--ranks 8 64] [--recipes w4 w3] [--steps 150] [--adapter FOLDER ...] [--samples 32] [--windows 24]

An adapter of all linear layers is trained on TRAINING for each rank (or taken from FOLDER), in float. Held against the float model with the adapter, on windows of 1024 tokens of
EVAL, in nats per token:

beside    the quantized base, with the adapter beside its weights in float: nothing is rounded after training
naive     the adapter added to the dequantized weights, and the sum rounded to nearest on the scales that the base has
again     the adapter added to the dequantized weights, and the sum quantized again as the base was: `lowbit merge QUANTIZED ADAPTER`
ours      the adapter added to the float weights, and the sum quantized with calibration: `lowbit quantize BASE RECIPE --adapter ADAPTER`
no text   the same without calibration

`lost` is the KL of the base without the adapter: what a merge that loses the adapter would have. Rows that are in OUT already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import lowbit
from lowbit.adapters.adapter import Adapter, open_adapter
from lowbit.adapters.beside import Beside
from lowbit.adapters.changes import factors
from lowbit.adapters.source import AdaptedSource
from lowbit.calibration.data import load_calibration
from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.measure.environment import environment
from lowbit.measure.quality import Reference, measure_quality
from lowbit.measure.windows import make_windows
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import packed_weights, place
from lowbit.solvers.rounding import with_values


def trained(source: Source, text: str, rank: int, steps: int, folder: Path, length: int) -> Path:
    """An adapter of every linear layer, trained to predict `text` from windows of `length` tokens, saved as peft saves one."""
    torch.manual_seed(rank)
    model = source.load_float().requires_grad_(False)
    windows = load_calibration(text, source.tokenizer(), source, samples=steps, length=length).ids
    products: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = products[name]
        return output + 2 * F.linear(F.linear(inputs[0], a), b)

    for name, param in source.inventory.params.items():
        if param.kind == "linear" and param.keep is None:
            out, inner = param.shape
            a, b = torch.randn(rank, inner) / math.sqrt(inner), torch.zeros(out, rank)
            module = name.removesuffix(".weight")
            products[module] = (nn.Parameter(a), nn.Parameter(b))
            model.get_submodule(module).register_forward_hook(partial(add, module))
    optimizer = torch.optim.AdamW([p for pair in products.values() for p in pair], lr=5e-4)
    for step in range(steps):
        ids = windows[step % len(windows)][None]
        loss = model(input_ids=ids, labels=ids).loss  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"rank {rank}, step {step}: loss {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{n}.lora_{s}.weight": t.detach()
        for n, ab in products.items()
        for s, t in zip("AB", ab, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "base_model_name_or_path": source.label,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def naive(folder: Path, adapter: Adapter, changes: AdaptedSource) -> nn.Module:
    """The packed model whose codes are those nearest to W + s B A on the scales and offsets that it has."""
    model = lowbit.load(folder)
    for name, weight in list(packed_weights(model)):
        change = changes._changes.get(name)
        if change is not None and change.product is not None:
            left, right = factors(adapter, change.product)
            q = weight.qtensor()
            total = q.dequantize().double() + left @ right
            place(
                model,
                name,
                PackedWeight.of(with_values(q, total.float()), transposed=weight.transposed, dtype=weight.dtype),
            )
    return model


def beside(folder: Path, adapter: Adapter) -> nn.Module:
    model = lowbit.load(folder)
    Beside(model, {"it": adapter}, str(folder)).use("it")
    return model


def size_of(changes: AdaptedSource, source: Source) -> float:
    """|s B A| / |W| over the weights that change."""
    changed = total = 0.0
    for name in changes.changed():
        weight = source.read(name).double()
        changed += float(((changes.read(name).double() - weight) ** 2).sum())
        total += float((weight**2).sum())
    return math.sqrt(changed / total)


def digits(value: float) -> float:
    """Four digits of a figure."""
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("training")
    parser.add_argument("evaluation")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--recipes", nargs="*", default=["w4", "w3"])
    parser.add_argument("--adapter", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window of training")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--eval-length", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    source = open_source(given.model)
    windows = make_windows(
        load_text(given.evaluation), source.tokenizer(), limit=given.windows, length=given.eval_length
    )
    text = {"calibration": "builtin", "samples": given.samples, "length": given.calibration_length}
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as made:
        room = Path(made)
        found = given.adapter or [
            trained(source, given.training, rank, given.steps, room / f"rank-{rank}", given.length)
            for rank in given.ranks
        ]
        for folder in found:
            adapter = open_adapter(folder)
            both = lowbit.with_adapter(given.model, adapter)
            assert isinstance(both, AdaptedSource)
            about = {"adapter": adapter.about(), "size": digits(size_of(both, source))}
            reference = Reference(both.load_float(), windows)
            lost = measure_quality(source.load_float(), windows, base=reference).kl_mean
            for recipe in given.recipes:
                if any((r["adapter"], r["recipe"]) == (about["adapter"], recipe) for r in rows):
                    continue
                base = room / f"base-{recipe}"
                if not base.exists():
                    lowbit.quantize(given.model, recipe, base, **text)
                ours, again, plain = (room / f"{folder.name}-{recipe}-{kind}" for kind in ("ours", "again", "plain"))
                lowbit.quantize(both, recipe, ours, **text)
                lowbit.quantize(both, recipe, plain, effort="none")
                lowbit.merge(base, folder, again)
                models: dict[str, Callable[[], nn.Module]] = {
                    "beside": partial(beside, base, adapter), "naive": partial(naive, base, adapter, both), "again": partial(lowbit.load, again),
                    "ours": partial(lowbit.load, ours), "no text": partial(lowbit.load, plain),
                }  # fmt: skip
                row = about | {"recipe": recipe, "lost": digits(lost.value) if lost else None}
                for name, model in models.items():
                    kl = measure_quality(model(), windows, base=reference).kl_mean
                    assert kl is not None
                    row |= {name: digits(kl.value), f"{name} ±": digits(kl.stderr or 0.0)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                given.out.write_text(
                    json.dumps({"environment": environment().__dict__, "rows": rows}, indent=2, default=str) + "\n"
                )
    print(
        "| adapter | size | recipe | beside | naive | again | ours | no text | lost |\n| --- | --: | --- | --: | --: | --: | --: | --: | --: |"
    )
    for r in rows:
        figures = " | ".join(f"{r[name]:.4g}" for name in ("beside", "naive", "again", "ours", "no text", "lost"))
        print(f"| {r['adapter']} | {r['size']} | `{r['recipe']}` | {figures} |")


if __name__ == "__main__":
    main()
