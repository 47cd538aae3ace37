"""A Llama of 3.7 million parameters whose widths k-quants divide, trained for some minutes on a text of one's own.

    python benchmarks/trained_llama.py OUT TEXT [TEXT ...] [--steps 300]

Super-blocks of k-quants hold 256 weights of a row: hidden 256, intermediate 768. Trained, because what quantization costs a
model of random weights says nothing. The same texts, steps, processor, threads and PyTorch give the same bytes; products are
bfloat16. TEXT must not hold what the model is evaluated on. llama.cpp's converter knows no tokenizer that was made just now:
it is told `--pre gpt-2`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, BATCH = 2048, 1024, 2
BEGIN, END = "<s>", "</s>"
RATE, WARM_UP, DECAY = 3e-3, 20, 0.1


def made_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """BPE on bytes, words cut as GPT-2 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END, model_max_length=LENGTH)


def made_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rate(step: int, steps: int) -> float:
    """Up in a line, down in half a cosine."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """AdamW on windows that begin anywhere; what is no matrix does not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a token", file=sys.stderr, flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in args.texts]
    tokenizer = made_tokenizer(texts)
    tokens = torch.tensor([i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]])
    if len(tokens) <= LENGTH:
        raise SystemExit(f"{len(tokens)} tokens of text; more than {LENGTH} are needed")
    torch.manual_seed(0)
    model = made_model()
    train(model, tokens, args.steps, torch.Generator().manual_seed(0))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {count:,} parameters, {args.steps * BATCH * LENGTH:,} of {len(tokens):,} tokens of text seen")


if __name__ == "__main__":
    main()
