"""OpenVINO's speed, asked for line by line: `decode`, `prefill` or `batch` on stdin, tokens per second on stdout.

    python benchmarks/peers/openvino_speed.py MODEL WORK [--bits 4] [--group 64] [--threads 2]

MODEL: a Hugging Face folder. WORK: a new folder for the exported model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import serving
import torch
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    runtime = {"INFERENCE_NUM_THREADS": str(args.threads), "PERFORMANCE_HINT": "LATENCY"}
    if not (Path(args.work) / "openvino_model.xml").exists():
        group = {"group_size": args.group, "ratio": 1.0, "sym": True} if args.bits == 4 else {}
        config = OVWeightQuantizationConfig(bits=args.bits, **group)
        OVModelForCausalLM.from_pretrained(args.model, export=True, quantization_config=config).save_pretrained(
            args.work
        )
    model = OVModelForCausalLM.from_pretrained(args.work, ov_config=runtime)

    def seconds(sequences: int, prompt: int, new: int) -> float:
        ids = torch.tensor(serving.prompt_ids(prompt))[None].expand(sequences, -1).contiguous()
        start = time.perf_counter()
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        took = time.perf_counter() - start
        assert found.shape == (sequences, prompt + new)
        return took

    serving.serve(seconds)


if __name__ == "__main__":
    main()
