"""Peak memory of quantizing a checkpoint far larger than the memory it may use.

    python benchmarks/memory.py FOLDER [--layers 12] [--recipe w4] [--limit-gb 4] [--out FILE]

Writes a Llama-shaped checkpoint (hidden 4096, MLP 11008, bfloat16, random values) into FOLDER/model unless it is there,
then quantizes it in a fresh process whose address space is limited (RLIMIT_AS, which counts PyTorch's own libraries
too), and reports the peak resident bytes beside the plan's figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig

import lowbit
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.safetensors_writer import INDEX, create, index_json, shards_of
from lowbit.interchange.hf.models import meta_model
from lowbit.measure.memory import in_fresh_process

RUN = """
import resource, sys, time
limit = int(float(sys.argv[4]) * 1e9)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import lowbit
start = time.perf_counter()
lowbit.quantize(sys.argv[1], sys.argv[3], sys.argv[2], overwrite=True)
print(time.perf_counter() - start)
"""


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, one tensor in memory at a time."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).state_dict().items()}
    shards = shards_of([(name, {name: (torch.bfloat16, shape)}) for name, shape in shapes.items()], 2_000_000_000)
    create(folder, shards)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with (folder / shard.file).open("r+b") as file:
            for name, (begin, _) in shard.spans.items():
                file.seek(begin)
                file.write(bytes_of(torch.randn(shapes[name], generator=generator).mul_(0.02).to(torch.bfloat16)))
    (folder / INDEX).write_bytes(index_json(shards))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = arguments.folder / "model"
    if not model.exists():
        write_checkpoint(model, arguments.layers)
    plan = lowbit.plan(model, arguments.recipe)
    command = ["-c", RUN, str(model), str(arguments.folder / "out"), arguments.recipe, str(arguments.limit_gb)]
    peak = in_fresh_process(command)
    size = sum(f.stat().st_size for f in (arguments.folder / "out").glob("*.safetensors*"))
    result = {
        "checkpoint_bytes": sum(f.stat().st_size for f in model.glob("*.safetensors")),
        "largest_tensor_bytes": max(t.bytes_before for t in plan.tensors),
        "address_space_limit_bytes": int(arguments.limit_gb * 1e9),
        "peak_resident_bytes": peak.bytes,
        "planned_peak_bytes": plan.peak_bytes,
        "output_bytes": size,
        "planned_output_bytes": plan.output_bytes,
        "recipe": str(plan.recipe),
        "seconds": round(float(peak.stdout.strip().splitlines()[-1]), 1),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
