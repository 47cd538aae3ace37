"""A prompt and what the models answer to it: the figure that needs no explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.engine.chat_template import ChatTemplate
from lowbit.interchange.hf.running import device_of, evaluating


@dataclass(frozen=True)
class Sample:
    """`answer` of the quantized model and `base_answer` of the float one, greedy and cut at a length."""

    prompt: str
    answer: str
    base_answer: str | None = None


def answer(model: nn.Module, tokenizer: Any, prompt: str, *, new: int = 60) -> str:
    """The greedy answer of at most `new` tokens. Uses the chat template when the tokenizer has one."""
    template = ChatTemplate.of(tokenizer)
    if template is not None:
        text = template.render([{"role": "user", "content": prompt}], answer=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(device_of(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluating(model):
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )[0]
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)  # type: ignore[union-attr]
    fresh = out if encoder_decoder else out[ids.shape[1] :]
    return tokenizer.decode(fresh, skip_special_tokens=True).strip()


def take_sample(
    model: nn.Module, tokenizer: Any, prompt: str, *, base: nn.Module | None = None, new: int = 60
) -> Sample | None:
    """Both models' answers, or None when the model cannot generate."""
    able = getattr(model, "can_generate", None)
    if not callable(able) or not able():
        return None
    mine = answer(model, tokenizer, prompt, new=new)
    return Sample(prompt, mine, answer(base, tokenizer, prompt, new=new) if base is not None else None)
