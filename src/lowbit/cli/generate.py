"""lowbit generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.options import Model


def register(app: typer.Typer) -> None:
    app.command(epilog='Example:  lowbit generate smollm2-w4 "Why is the sky blue?" --max-new-tokens 60')(generate)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to answer or to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers when the temperature is above 0.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
) -> None:
    """Let a model answer, word by word. Takes quantized folders and float models alike."""
    import torch

    from lowbit.errors import SourceError

    console.quiet()
    with console.stderr().status("loading"):
        module, tokenizer = _opened(model)
    if not module.can_generate():
        raise SourceError(f"{model}: a {type(module).__name__} does not generate text; name a causal or seq2seq model")
    inputs = _inputs(tokenizer, prompt, raw)
    if inputs["input_ids"].shape[1] == 0:
        raise SourceError(f"the prompt {prompt!r} has no tokens; write a few words")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if temperature == 0:  # a sampling setting of the model's own would only be warned about
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    torch.manual_seed(seed)
    with torch.inference_mode():
        module.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=_streamer(tokenizer, module),
            **sampling,
        )


def _opened(model: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that lowbit wrote or of any float model."""
    import lowbit
    from lowbit.interchange.folder import load_tokenizer, quantization_method
    from lowbit.interchange.source import open_source

    if Path(model).is_dir() and quantization_method(model) == "lowbit":
        return lowbit.load(model), load_tokenizer(Path(model), model)
    source = open_source(model)
    return source.load_float(), source.tokenizer()


def _inputs(tokenizer: Any, prompt: str, raw: bool) -> dict[str, Any]:
    """Token ids and mask, with the chat template where there is one and `raw` is not asked for."""
    if not raw and getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        found = tokenizer(prompt, return_tensors="pt")
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def _streamer(tokenizer: Any, module: Any) -> Any:
    from transformers import TextStreamer

    class Stdout(TextStreamer):
        """Writes whole words to stdout as they come."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Stdout(tokenizer, skip_prompt=not module.config.is_encoder_decoder, skip_special_tokens=True)
