"""vLLM's speed, asked for line by line: `decode`, `prefill` or `batch` on stdin, tokens per second on stdout.

    python benchmarks/peers/vllm_speed.py MODEL [--dtype bfloat16] [--threads 2]

MODEL: a Hugging Face folder. What vLLM prints goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    answers = os.dup(1)
    os.dup2(2, 1)  # vLLM and what it starts write to 1
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    # Bound to processors as vLLM binds them by itself, but to as many as the others have.
    processors = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, processors)))

    import serving
    from vllm import LLM, SamplingParams

    longest = max(serving.PROMPT + serving.NEW, serving.PREFILL + 1, serving.LENGTH)
    model = LLM(
        args.model, dtype=args.dtype, max_model_len=longest, max_num_seqs=serving.BATCH, max_num_batched_tokens=1024,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip

    def seconds(sequences: int, prompt: int, new: int) -> float:
        prompts = [{"prompt_token_ids": serving.prompt_ids(prompt)} for _ in range(sequences)]
        sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        found = model.generate(prompts, sampling, use_tqdm=False)
        took = time.perf_counter() - start
        assert [len(f.outputs[0].token_ids) for f in found] == [new] * sequences
        return took

    seconds(1, serving.PREFILL, 1)  # kernels are chosen at the first call
    sys.stdout = os.fdopen(answers, "w")
    serving.serve(seconds)


if __name__ == "__main__":
    main()
