"""torchao beside lowbit: int8 linear layers, activations quantized dynamically or left alone.

    python benchmarks/peers/torchao_peer.py MODEL CALIBRATION OUT [--config w8a8] --eval TEXT

Needs no calibration: CALIBRATION is taken so that all adapters are called alike. What w8a8 does to activations
cannot be written as weights, so its quality is measured here, beside the float model.
"""

from __future__ import annotations

import common
import torch
from torchao import __version__
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

CONFIGS = {"w8a8": Int8DynamicActivationInt8WeightConfig, "w8": Int8WeightOnlyConfig}
FILE = "model.pt"


def main() -> None:
    arguments = common.parser(__doc__, "w8a8").parse_args()
    if arguments.config not in CONFIGS:
        raise SystemExit(f"torchao has no config {arguments.config!r} here: use {' or '.join(CONFIGS)}")
    out = common.fresh(arguments.out)
    steps: common.Steps = {}
    with common.timed(steps, "load"):
        model = common.load_float(arguments.model)
    names = common.linear_names(model)
    with common.timed(steps, "quantize"):
        # The default filter takes every linear layer but would untie a tied head, so it is told which ones.
        quantize_(model, CONFIGS[arguments.config](), filter_fn=lambda _, name: f"{name}.weight" in names)
    with common.timed(steps, "write"):
        torch.save(model.state_dict(), out / FILE)
    peak = common.peak_resident()
    weights = {name: parameter for name, parameter in model.named_parameters() if name in names}
    bits, parts = 0, {}
    for weight in weights.values():
        for part in weight.tensor_data_names:
            tensor = getattr(weight, part)
            bits += 8 * tensor.numel() * tensor.element_size()
            parts[part] = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if arguments.config == "w8":
        with torch.no_grad():
            tensors = {name: weight.dequantize().float() for name, weight in weights.items()}
        common.write_weights(arguments.model, out / common.WEIGHTS, tensors)
    result = common.Result(
        peer="torchao",
        version=__version__,
        config=arguments.config,
        peak_resident_bytes=peak,
        file_bytes=(out / FILE).stat().st_size,
        parameters=sum(p.numel() for p in model.parameters()),
        linear_bits=bits / sum(w.numel() for w in weights.values()),
        steps=steps,
        weights=common.WEIGHTS if arguments.config == "w8" else None,
        details={"last_layer": parts},
        notes=["embedding and norms stay float32", "file: torch.save of the state dict"],
    )
    (out / FILE).unlink()
    common.finish(result, arguments, lambda: model)


if __name__ == "__main__":
    main()
