"""CTranslate2's speed, asked for line by line: `decode`, `prefill` or `batch` on stdin, tokens per second on stdout.

    python benchmarks/peers/ctranslate2_speed.py MODEL WORK [--type int8] [--threads 2]

MODEL: a Hugging Face folder. WORK: a new folder for the converted model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import ctranslate2
import serving
from ctranslate2.converters import TransformersConverter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work")
    parser.add_argument("--type", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not (Path(args.work) / "model.bin").exists():
        TransformersConverter(args.model).convert(args.work, quantization=args.type, force=True)
    generator = ctranslate2.Generator(args.work, device="cpu", intra_threads=args.threads, compute_type=args.type)
    vocabulary = serving.tokens_of(args.model)

    def seconds(sequences: int, prompt: int, new: int) -> float:
        words = [vocabulary[i] for i in serving.prompt_ids(prompt)]
        start = time.perf_counter()
        found = generator.generate_batch(
            [words] * sequences, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False,
            max_batch_size=sequences,
        )  # fmt: skip
        took = time.perf_counter() - start
        assert all(len(one.sequences_ids[0]) == new for one in found)
        return took

    serving.serve(seconds)


if __name__ == "__main__":
    main()
