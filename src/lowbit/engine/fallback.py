"""The same calls through transformers, for models that the engine does not compute: any architecture, slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.engine.arguments import sampling_of, split_prompts, stop_strings, token_ids, whole_number
from lowbit.engine.batch import Running
from lowbit.engine.conversation import PlainConversation
from lowbit.engine.detokenizer import AnswerText
from lowbit.engine.folder_cache import cache_format_of, cache_tables_of, use_cache_format
from lowbit.engine.generation import Generated, OnText, Sampling
from lowbit.engine.tokenizer import AnyTokenizer, TextTokenizer
from lowbit.engine.transformers_loop import generate_tokens
from lowbit.errors import EngineError, RecipeError, SourceError
from lowbit.interchange.end_tokens import end_tokens
from lowbit.interchange.hf.calls import asking
from lowbit.interchange.hf.running import fast_dtype, max_positions
from lowbit.kv import CacheFormat
from lowbit.planning.cache_fit import fitted_cache
from lowbit.planning.kv_cache import kv_cache

if TYPE_CHECKING:
    from lowbit.adapters.adapter import Adapter
    from lowbit.adapters.beside import Beside


class Transformers:
    """A transformers model that generates text. reason: why it is not an `Engine`. beside: its adapters, of which the first is in use where none is named."""

    def __init__(
        self, model: nn.Module, tokenizer: TextTokenizer, reason: str, label: str = "this model", beside: Beside | None = None
    ) -> None:  # fmt: skip
        if not model.can_generate():  # type: ignore[operator]
            raise SourceError(
                f"{label}: a {type(model).__name__} does not generate text; name a causal or seq2seq model"
            )
        self.model, self.tokenizer, self.reason, self.label = model, tokenizer, reason, label
        self.beside = beside
        generation = getattr(model, "generation_config", None)
        self.ends = end_tokens(generation.to_dict() if generation is not None else {}, model.config, tokenizer)

    @staticmethod
    def open(
        model: str, reason: str, cache: str | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> Transformers:  # fmt: skip
        """A folder that lowbit wrote, or a float model by any name that lowbit takes, with adapters beside its weights.

        cache: as of `with_cache`. The tokenizer of a single adapter takes the place of the model's: it has the chat template that the
        adapter was trained with.
        """
        from pathlib import Path

        from lowbit.adapters.beside import Beside
        from lowbit.interchange.files.settings import is_ours
        from lowbit.interchange.hf.loading import load_config, load_tokenizer
        from lowbit.interchange.hf.packed_model import load_packed
        from lowbit.interchange.opening import open_source

        path = Path(model)
        if is_ours(path):
            built: nn.Module = load_packed(path, dtype=answering_type(load_config(path)))
            words: Callable[[], Any] = partial(load_tokenizer, path, model)
        else:
            source = open_source(model)
            built, words = source.load_float(), source.tokenizer
        alone = next(iter(adapters.values())) if adapters and len(adapters) == 1 else None
        if alone is not None and alone.has_tokenizer:
            words = partial(load_tokenizer, alone.folder, alone.label)
        beside = Beside(built, adapters, model) if adapters else None
        return Transformers(with_cache(built, cache), AnyTokenizer(words()), reason, model, beside)

    def __str__(self) -> str:
        found = cache_format_of(self.model)
        said = "" if found is None else f"; its KV cache is stored as {found}"
        return f"transformers, not the engine: {self.reason}{said}"

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 200,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        stream: OnText | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Any:
        """As `Engine.generate`; prompts run one after another, and random numbers are those of PyTorch. adapter: the name of the one that answers,
        by default the first."""
        self.use(adapter)
        alone, every = split_prompts(prompts)
        limit, strings, how = (
            whole_number("max_new_tokens", max_new_tokens, 1),
            stop_strings(stop),
            sampling_of(sampling),
        )
        given = [self._ids(p, raw, limit) for p in every]
        results = [self._one(i, ids, limit, strings, stream, how) for i, ids in enumerate(given)]
        return results[0] if alone else results

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of its adapters."""
        return () if self.beside is None else self.beside.names

    def use(self, adapter: str | None = None) -> None:
        """Let the adapter of this name answer, or the first. RecipeError for one that there is not."""
        if self.beside is not None:
            self.beside.use(adapter or self.beside.names[0])
        elif adapter is not None:
            raise RecipeError(
                f"there is no adapter {adapter!r}, as the model was opened without one; give adapter=FOLDER when it is opened"
            )

    @property
    def positions(self) -> int | None:
        """The longest sequence of prompt and answer, None where there is no such limit."""
        return None if self.model.config.is_encoder_decoder else max_positions(self.model)  # type: ignore[union-attr]

    def conversation(self, system: str | None = None, **sampling: Any) -> PlainConversation:
        """As `Engine.conversation`; every turn reads all of it again."""
        return PlainConversation(self, system, sampling_of(sampling))

    def _ids(self, prompt: Any, raw: bool, limit: int) -> list[int]:
        """The token ids of a prompt. EngineError when it does not fit."""
        config: Any = self.model.config
        ids = token_ids(prompt, self.tokenizer, raw, config.get_text_config().vocab_size)
        most, length = self.positions, len(ids) + limit
        if most is not None and length > most:
            raise EngineError(
                f"{length} tokens, and this model has {most} positions; shorten the prompt or max_new_tokens"
            )
        return ids

    def _one(
        self, index: int, ids: list[int], limit: int, stop: list[str], stream: OnText | None, how: Sampling
    ) -> Generated:
        running = Running(index, list(ids), AnswerText(self.tokenizer.decode, stop), limit)

        def on_tokens(tokens: Tensor) -> bool:
            if not running.reason:
                text = running.push(int(tokens[0]), self.ends)
                if stream is not None and text:
                    stream(text, index)
            return bool(running.reason)

        given = torch.tensor([ids], device=self.model.device)  # type: ignore[arg-type]
        broken = asking("transformers", self.label, "generate text with it", "check the fields of its config")
        with broken, torch.inference_mode(), _seeded((how.seed + index) % 2**64, given.device):
            generate_tokens(
                self.model, given, on_tokens, max_new_tokens=limit, pad_token_id=self._pad(),
                eos_token_id=sorted(self.ends) or None, **_options(how),
            )  # fmt: skip
        return running.result()

    def _pad(self) -> Any:
        found = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        return min(self.ends, default=None) if found is None else found


def with_cache(model: nn.Module, cache: str | None) -> nn.Module:
    """The model, whose answers store the KV cache in this format; None leaves it as its folder says, or as its class does.

    RecipeError where the format cannot be used, such as one whose tables calibration has not found for this model.
    """
    if cache is None:
        return model
    found = CacheFormat.of(cache)
    tables = cache_tables_of(model) if found == cache_format_of(model) else {}
    fitted_cache(kv_cache(model.config), found, f"a {type(model).__name__}")
    if found.calibrated and not tables:
        raise RecipeError(
            f"the cache format {found} has tables that are found on calibration text; quantize the model with kv={found} first"
        )
    use_cache_format(model, found, tables)
    return model


def answering_type(config: Any) -> torch.dtype:
    """The type in which a folder that lowbit wrote answers: its own, or float32 where this processor only emulates that."""
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) and own in (torch.float32, fast_dtype()) else torch.float32


def _options(how: Sampling) -> dict[str, Any]:
    """The options of transformers' generate. A sampling setting of the model's own would only be warned about."""
    penalty = {"repetition_penalty": how.repetition_penalty}
    if how.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None, **penalty}
    return {
        "do_sample": True, "temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p,
        "min_p": how.min_p or None, **penalty,
    }  # fmt: skip


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's random numbers, which transformers draws from, begin at `seed`, and go on as before when all is done."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
