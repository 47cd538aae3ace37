"""Training with the rounding in place (QAT) at 1 bit: in a loop of your own, and with transformers' Trainer.

    python examples/training.py

It prints the loss of a tiny random model that was trained on a few lines in float, of the same quantized afterwards, and of two
that were trained as long, the second half of it with the rounding in place; the second of them by Trainer, where accelerate is
installed. The last line is the first of these after packing: the same number.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lowbit

TEXT = (
    b"Quantization maps many numbers to few. Training with the rounding in place lets a model live with the few. " * 20
)
WINDOWS = torch.tensor(list(TEXT))[: len(TEXT) // 64 * 64].view(-1, 64)
RECIPE = "binary:channel,a=int8:token"  # weights of two values a row, inputs of linear layers in 8 bits
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TOLD = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 1, "report_to": []}


def train(model: torch.nn.Module, steps: int) -> torch.nn.Module:
    """Any loop does: scales are parameters like others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = WINDOWS[step % len(WINDOWS), None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(steps: int = 60, folder: str | None = None) -> dict[str, float]:
    """The losses; the packed model goes into `folder`."""
    torch.manual_seed(0)
    place, found = Path(folder or tempfile.mkdtemp()), {}
    half = train(LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES)), steps)
    half.save_pretrained(place / "half")
    found["trained by a loop"] = train(lowbit.prepare_qat(place / "half", RECIPE), steps)
    if importlib.util.find_spec("accelerate"):
        found["trained by Trainer"] = student = lowbit.prepare_qat(place / "half", RECIPE)
        told = TrainingArguments(str(place / "runs"), max_steps=steps, **TOLD)
        Trainer(student, told, train_dataset=[{"input_ids": w, "labels": w} for w in WINDOWS]).train()
    found |= {"float": train(half, steps), "quantized": lowbit.quantize(half, RECIPE).model}
    lowbit.convert(found["trained by a loop"], place / "packed")
    found["packed"] = lowbit.load(place / "packed", kernel="expand")  # products in float32, as in training
    with torch.no_grad():
        losses = {name: float(each.eval()(WINDOWS[:8], labels=WINDOWS[:8]).loss) for name, each in found.items()}
    print("\n".join(f"{name:20} {loss:.6f}" for name, loss in losses.items()))
    return losses


if __name__ == "__main__":
    main()
