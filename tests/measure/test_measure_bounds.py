"""The memory of making and measuring a model that would not fit: in a process of its own, whose peak is taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lowbit
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.safetensors_writer import create, index_json, shards_of
from lowbit.measure.memory import in_fresh_process
from tiny import save_tiny, tiny_tokenizer

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")

# Quantizes and measures, once a small model so that everything is imported and warm, and says what the other took on top.
RUN = """
import json, sys
import torch
torch.set_num_threads(1)
import lowbit
from lowbit.measure.memory import peak_resident
from lowbit.planning import measuring
measuring.ROOM = 0
small, model, out = sys.argv[1:4]

def both(model, out):
    lowbit.quantize(model, "absmax@int4:g32", out)
    return lowbit.evaluate(out, model, ["the cat and the hen are in the tree. " * 60], windows=2, length=128)

both(small, out + "-small")
before = peak_resident()
card = both(model, out)
print(json.dumps({"grown": peak_resident() - before, "kl": card.quality.kl_mean.value, "program": card.quality.program}))
"""


def write_llama(folder: Path, dtype: torch.dtype, **sizes: int) -> int:
    """A Llama of random weights with a tiny tokenizer, a tensor in memory at a time; returns the bytes of its weights."""
    name = str(dtype).removeprefix("torch.")
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype=name, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    del state["lm_head.weight"]
    shards = shards_of([(key, {key: (dtype, tuple(t.shape))}) for key, t in state.items()], 1 << 30)
    create(folder, shards)
    (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    most = max(t.numel() for t in state.values())
    noise = bytes_of((torch.randn(most, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    for shard in shards:
        with (folder / shard.file).open("r+b") as file:
            for begin, end in shard.spans.values():
                file.seek(begin)
                file.write(noise[: end - begin])
    return sum(shard.file_bytes for shard in shards)


@linux
def test_a_model_that_would_not_fit_is_made_and_measured(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path / "small")
    size = write_llama(
        tmp_path / "model", torch.bfloat16, hidden_size=512, intermediate_size=1408, num_hidden_layers=32, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=2048,
    )  # fmt: skip
    assert size > 200e6  # 400 MB in float32, beside which there is the quantized one
    done = in_fresh_process(["-c", RUN, *(str(tmp_path / name) for name in ("small", "model", "out"))])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["program"].endswith("block by block") and found["kl"] > 0
    assert found["grown"] < size / 2, found


@linux
@pytest.mark.slow
def test_two_gigabytes_in_bfloat16_with_their_card_in_one_and_a_half(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    size = write_llama(
        model, torch.bfloat16, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=49152,
    )  # fmt: skip
    assert size > 2.1e9
    plan = lowbit.plan(model, "w4")
    done = in_fresh_process(["-m", "lowbit.cli", "quantize", str(model), "w4", "--data-free", "-o", str(out)])
    assert done.bytes < 1.5e9 and lowbit.card(out).quality is not None
    planned = max(plan.peak_bytes, plan.card_peak_bytes or 0)
    assert 0.9 < done.bytes / planned < 1.1, (done.bytes, planned)
    evaluated = in_fresh_process(["-m", "lowbit.cli", "evaluate", str(out), "--against", str(model), "--windows", "1"])
    assert evaluated.bytes < 1.5e9
