"""Training with the rounding in place beside float fine-tuning and quantizing afterwards: loss curves on Python's own manual.

    python benchmarks/qat.py MODEL --out benchmarks/results/qat.json [--steps 400] [--rate 2e-5] [--length 256] [--batch 4]
        [--recipe int4:g64 ...] [--scales learned recomputed ...] [--windows 24] [--every 50]

The text is `pydoc_data.topics` of the Python that runs this: seven of eight topics to train on, the eighth held out. Arms, each in a process of
its own: `float` fine-tunes; `ptq RECIPE` quantizes what that gave, data-free, and `ptq gptq@RECIPE` with the training text; `qat RECIPE SCALES` trains as
long from the same start and on the same windows with the rounding in place, and is converted: the loss of the packed model is read from its folder, and must be the same
number. A run that was stopped goes on with the arms that --out does not have. Losses are nats per token, held out, in float32; beside each the seconds of a
step and the peak memory of its process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.interchange.opening import open_source
from lowbit.measure.environment import environment
from lowbit.measure.memory import peak_resident

RECIPES = ("int4:g64", "int3:g64", "int2:g64")
FLOAT = "float"


def windows(model: str, length: int) -> tuple[Tensor, Tensor]:
    """Training and held-out windows of token ids, [n, length] each."""
    from pydoc_data.topics import topics

    tokenizer, parts = open_source(model).tokenizer(), []
    texts = [topics[name] for name in sorted(topics)]
    for chosen in (lambda i: i % 8 != 7, lambda i: i % 8 == 7):
        text = "\n\n".join(t for i, t in enumerate(texts) if chosen(i))
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        parts.append(ids[: len(ids) // length * length].view(-1, length))
    return parts[0], parts[1]


@torch.no_grad()
def held_out_loss(model: Any, rows: Tensor) -> float:
    """Nats per token over whole windows."""
    training = model.training
    model.eval()
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    model.train(training)
    return sum(losses) / len(losses)


def train(model: Any, rows: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """AdamW with warm-up and linear decay; the losses by step, before the update of that step, and seconds of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
    warm = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (args.steps - i) / max(1, args.steps - warm))
    )
    generator, order = torch.Generator().manual_seed(0), []
    while len(order) < args.steps * args.batch:
        order += torch.randperm(len(rows), generator=generator).tolist()
    curve, losses, took = [[0, held_out_loss(model, held_out)]], [], 0.0
    model.train()
    for step in range(args.steps):
        start = time.perf_counter()
        batch = rows[order[step * args.batch : (step + 1) * args.batch]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(float(loss.detach()), 4))
        took += time.perf_counter() - start
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            curve.append([step + 1, held_out_loss(model, held_out)])
            print(f"  step {step + 1}: {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
    return {"held_out": curve, "training": losses, "seconds_per_step": took / max(1, args.steps)}


def packed_loss(folder: Path, held_out: Tensor) -> float:
    return held_out_loss(lowbit.load(folder, dtype="float32", kernel="expand"), held_out)


def arm(words: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm: "float", "ptq RECIPE", or "qat RECIPE SCALES"."""
    rows, held_out = windows(args.model, args.length)
    held_out = held_out[: args.windows]
    kind, *rest = words.split()
    tuned, place = args.work / "float", args.work / words.replace(" ", "_").replace(":", "-").replace("@", "_")
    if kind == FLOAT:
        source = open_source(args.model)
        model = source.load_float(torch.float32).requires_grad_(True)
        found = train(model, rows, held_out, args)
        model.save_pretrained(tuned)
        source.tokenizer().save_pretrained(tuned)
    elif kind == "ptq":
        text = {} if "@" not in rest[0] else {"calibration": list(rows[:: max(1, len(rows) // 64)][:64])}
        lowbit.quantize(tuned, rest[0], place, overwrite=True, **text)
        found = {"held_out": [[args.steps, packed_loss(place, held_out)]]}
    else:
        model = lowbit.prepare_qat(args.model, rest[0], scales=rest[1])  # type: ignore[arg-type]
        found = train(model, rows, held_out, args)
        done = lowbit.convert(model, place, overwrite=True)
        found |= {"packed": packed_loss(place, held_out), "linear_bits": done.plan.linear_bits_per_weight}
        if found["packed"] != found["held_out"][-1][1]:
            raise SystemExit(f"{words}: the packed model has {found['packed']}, not {found['held_out'][-1][1]}")
    found["peak_mb"] = round(peak_resident() / 1e6)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: an arm a row, float first."""
    lines = ["| arm | held out before | held out after | seconds a step | peak MB |", "|---|---|---|---|---|"]
    for words, told in found["arms"].items():
        first = f"{told['held_out'][0][1]:.4f}" if len(told["held_out"]) > 1 else ""
        pace = f"{told['seconds_per_step']:.2f}" if "seconds_per_step" in told else ""
        lines.append(f"| `{words}` | {first} | {told['held_out'][-1][1]:.4f} | {pace} | {told['peak_mb']} |")
    return "\n".join(lines) + "\n"


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("qat-work"), help="where models go")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--scales", nargs="+", default=["learned", "recomputed"])
    for name, value in (("steps", 400), ("length", 256), ("batch", 4), ("windows", 24), ("every", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--arm", help="run this arm alone and print it")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args = parsed(words)
    if args.arm is not None:
        print(json.dumps(arm(args.arm, args)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("steps", "length", "batch", "windows", "every", "rate")}
    found: dict[str, Any] = {"settings": settings, "arms": {}}
    if args.out.is_file():
        before = json.loads(args.out.read_text())
        if before["settings"] != settings:
            raise SystemExit(f"{args.out} is of other settings, {before['settings']}; give another file")
        found = before
    arms = [FLOAT, *(f"ptq {method}{r}" for r in args.recipe for method in ("", "gptq@"))]
    arms += [f"qat {r} {scales}" for r in args.recipe for scales in args.scales]
    for words_of in arms:
        if words_of in found["arms"]:
            continue
        print(words_of, file=sys.stderr, flush=True)
        given = sys.argv[1:] if words is None else words
        done = subprocess.run([sys.executable, __file__, *given, "--arm", words_of], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{words_of} failed")
        found["arms"][words_of] = json.loads(done.stdout.splitlines()[-1])
        found["environment"] = asdict(environment())
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
