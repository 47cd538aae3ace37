"""The same calls through transformers, for models that the engine does not compute: any architecture, slower."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lowbit.engine.conversation import PlainConversation
from lowbit.engine.engine import sampling_of
from lowbit.engine.results import Generated, OnText, Sampling
from lowbit.engine.text import TokenText
from lowbit.engine.tokenizer import AnyTokenizer, TextTokenizer
from lowbit.errors import SourceError


class Transformers:
    """A transformers model that generates text. reason: why it is not an `Engine`."""

    def __init__(self, model: nn.Module, tokenizer: TextTokenizer, reason: str, label: str = "this model") -> None:
        if not model.can_generate():  # type: ignore[operator]
            raise SourceError(
                f"{label}: a {type(model).__name__} does not generate text; name a causal or seq2seq model"
            )
        self.model, self.tokenizer, self.reason, self.label = model, tokenizer, reason, label

    @staticmethod
    def open(model: str, reason: str) -> Transformers:
        """A folder that lowbit wrote, or a float model by any name that lowbit takes."""
        from pathlib import Path

        from lowbit.interchange.folder import load_tokenizer, quantization_method
        from lowbit.interchange.inventory import model_class
        from lowbit.interchange.source import open_source

        path = Path(model)
        if path.is_dir() and quantization_method(path) == "lowbit":
            from lowbit.interchange.folder import load_config

            build: Any = model_class(load_config(path)).from_pretrained
            return Transformers(
                build(path, local_files_only=True).eval(), AnyTokenizer(load_tokenizer(path, model)), reason, model
            )
        source = open_source(model)
        return Transformers(source.load_float(), AnyTokenizer(source.tokenizer()), reason, model)

    def __str__(self) -> str:
        return f"transformers, not the engine: {self.reason}"

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 200,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        stream: OnText | None = None,
        **sampling: Any,
    ) -> Any:
        """As `Engine.generate`; prompts run one after another, and random numbers are those of PyTorch."""
        alone = isinstance(prompts, str)
        every = [prompts] if alone else list(prompts)
        strings, how = [stop] if isinstance(stop, str) else list(stop), sampling_of(sampling)
        results = [self._one(i, p, max_new_tokens, strings, raw, stream, how) for i, p in enumerate(every)]
        return results[0] if alone else results

    def conversation(self, system: str | None = None, **sampling: Any) -> PlainConversation:
        """As `Engine.conversation`; every turn reads all of it again."""
        return PlainConversation(self, system, sampling_of(sampling))

    def _one(
        self, index: int, prompt: Any, limit: int, stop: list[str], raw: bool, stream: OnText | None, how: Sampling
    ) -> Generated:
        from transformers import StoppingCriteriaList

        ids = self.tokenizer.prompt(prompt, raw) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise SourceError(f"the prompt {prompt!r} has no tokens; write a few words")
        watch = _watch(TokenText(self.tokenizer.decode, stop), index, stream)
        given = torch.tensor([ids], device=self.model.device)  # type: ignore[arg-type]
        torch.manual_seed(how.seed + index)
        with torch.inference_mode():
            type(self.model).generate(  # type: ignore[attr-defined]
                self.model, given, attention_mask=torch.ones_like(given), max_new_tokens=limit, streamer=watch,
                stopping_criteria=StoppingCriteriaList([watch.criterion]), pad_token_id=self._pad(), **_options(how),
            )  # fmt: skip
        tokens = watch.tokens
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        reason = "stop" if watch.text.stopped else "eos" if tokens and tokens[-1] in ends else "length"
        return Generated(
            watch.text.text, tokens, len(ids), reason, watch.first - watch.started, watch.last - watch.started
        )

    def _pad(self) -> Any:
        known = getattr(self.model, "generation_config", None)
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(known, name, None)
            if found is not None:
                return found[0] if isinstance(found, list) else found
        return None


def _options(how: Sampling) -> dict[str, Any]:
    """The options of transformers' generate. A sampling setting of the model's own would only be warned about."""
    penalty = {"repetition_penalty": how.repetition_penalty}
    if how.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None, **penalty}
    return {
        "do_sample": True, "temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p,
        "min_p": how.min_p or None, **penalty,
    }  # fmt: skip


def _watch(text: TokenText, index: int, stream: OnText | None) -> Any:
    from transformers import StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            return torch.full((input_ids.shape[0],), watch.text.stopped, device=input_ids.device, dtype=torch.bool)

    class Watch(BaseStreamer):
        """Sees tokens as they come: the prompt first, which is not text of the answer."""

        def __init__(self) -> None:
            self.text, self.criterion = text, Criterion()
            self.tokens: list[int] = []
            self.started, self.first, self.last, self._prompt = perf_counter(), 0.0, 0.0, True

        def put(self, value: Any) -> None:
            if self._prompt:
                self._prompt = False
                return
            if self.text.stopped:  # transformers may look at its criteria one token late
                return
            self.last = perf_counter()
            self.first = self.first or self.last
            for token in value.reshape(-1).tolist():
                self.tokens.append(token)
                self._show(self.text.push(token))

        def end(self) -> None:
            self._show(self.text.close())

        def _show(self, piece: str) -> None:
            if stream is not None and piece:
                stream(piece, index)

    watch = Watch()
    return watch
