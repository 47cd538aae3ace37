"""GPTQModel beside lowbit: GPTQ of the linear layers with the defaults of the library.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/peers/gptqmodel_peer.py MODEL CALIBRATION OUT [--config w4g32]

The variable is for machines with two cores, where the library stops without it. A config is w<bits>g<group>.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read when the library is imported

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.version import __version__
from safetensors.torch import load_file

PACKED = ("qweight", "qzeros", "scales", "g_idx")
WRITTEN = "gptq"


def codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The 32 // bits numbers in each int32, lowest bits first: [..., n] to [..., n * 32 // bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def unpack(packed: dict[str, torch.Tensor], bits: int, offset: int) -> torch.Tensor:
    """Weight [out, in] in float32. `offset`: 1 where the file stores zero points less one, as format "gptq" does."""
    level = codes(packed["qweight"].T, bits).T  # [in, out]
    zero = (codes(packed["qzeros"], bits) + offset) & (2**bits - 1)  # [groups, out]
    group = packed["g_idx"].long()
    return ((level - zero[group]).float() * packed["scales"].float()[group]).T.contiguous()


def read(folder: Path, bits: int) -> tuple[dict[str, torch.Tensor], float, int]:
    """float32 tensors by name, bits per weight in the quantized layers, and bytes of the weight files."""
    tensors: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors |= load_file(file)
    offset = 1 if json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "gptq" else 0
    found, stored, weights = {}, 0, 0
    for layer in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        packed = {part: tensors.pop(f"{layer}.{part}") for part in PACKED}
        weight = found[f"{layer}.weight"] = unpack(packed, bits, offset)
        stored += sum(t.numel() * t.element_size() for t in packed.values())
        weights += weight.numel()
    found |= {name: tensor.float() for name, tensor in tensors.items()}
    return found, 8 * stored / weights, sum(file.stat().st_size for file in files)


def errors(model: Path, tensors: dict[str, torch.Tensor], names: set[str]) -> dict[str, Any]:
    """How far the layers are from the float model: relative norms, which show at once that a file was misread."""
    known = common.load_float(model).state_dict()
    relative = [float((tensors[n] - known[n]).norm() / known[n].norm()) for n in sorted(names)]
    return {"relative_error_mean": sum(relative) / len(relative), "relative_error_max": max(relative)}


def main() -> None:
    arguments = common.parser(__doc__, "w4g32").parse_args()
    if not (asked := re.fullmatch(r"w([248])g(\d+)", arguments.config)):
        raise SystemExit(f"config {arguments.config!r}: write w<bits>g<group>, such as w4g32, with 2, 4 or 8 bits")
    bits, group = map(int, asked.groups())
    out = common.fresh(arguments.out)
    arguments.model, out = arguments.model.resolve(), out.resolve()
    arguments.calibration, arguments.out = arguments.calibration.resolve(), out
    arguments.eval = arguments.eval and arguments.eval.resolve()
    os.chdir(out)  # the library writes logs into the folder that it runs in
    rows = common.windows(arguments.model, arguments.calibration, arguments.windows, arguments.length)
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    settings = QuantizeConfig(bits=bits, group_size=group)
    steps: common.Steps = {}
    with common.timed(steps, "load"):
        model = GPTQModel.load(str(arguments.model), settings)
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    with common.timed(steps, "quantize"):
        model.quantize(calibration, batch_size=1)
    with common.timed(steps, "write"):
        model.save(str(out / WRITTEN))
    peak = common.peak_resident()
    tensors, linear_bits, size = read(out / WRITTEN, bits)
    names = common.linear_names(common.load_float(arguments.model))
    if missing := sorted(name for name in names if name not in tensors):
        raise SystemExit(f"GPTQModel left {len(missing)} layers alone, such as {missing[0]}")
    common.write_weights(arguments.model, out / common.WEIGHTS, tensors)
    shutil.rmtree(out / WRITTEN)
    result = common.Result(
        peer="gptqmodel",
        version=__version__,
        config=arguments.config,
        peak_resident_bytes=peak,
        file_bytes=size,
        parameters=sum(p.numel() for p in common.load_float(arguments.model).parameters()),
        linear_bits=linear_bits,
        steps=steps,
        calibration=common.mark(rows),
        weights=common.WEIGHTS,
        details={
            "dtype": dtype,
            **{k: getattr(settings, k, None) for k in ("sym", "desc_act", "act_group_aware", "damp_percent")},
            **errors(arguments.model, tensors, names),
        },
        notes=[f"the tensors that it does not quantize are {dtype}"],
    )
    common.finish(result, arguments)


if __name__ == "__main__":
    main()
