"""What `bench` lets take turns: the engine, transformers, llama.cpp; each gives the same measurements by the same names."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.engine.engine import Engine
from lowbit.errors import LowbitError, SourceError
from lowbit.interchange.hf.running import max_positions
from lowbit.measure.generation import engine_times, greedy_times
from lowbit.measure.interleave import Probe, SpeedSettings, Times, rate_probes
from lowbit.measure.size import module_bytes
from lowbit.measure.startup import Startup, startup

WORDS = 5  # tokens of "The secret of life is", with which a batch begins


@dataclass(frozen=True, eq=False)
class Backend:
    """A program with a model.

    probes: its measurements by name, given the settings. weight_bytes: what a token must read of the weights. products:
    multiply-adds with weights, for the tokens of a prompt whose last one gives logits. Both None where not known.
    positions: the longest sequence. first: loads the model in a fresh process up to its first token, where it can.
    threads: of a pool of its own. close: called when all is measured.
    """

    name: str
    probes: Callable[[SpeedSettings], Mapping[str, Probe]]
    weight_bytes: int | None = None
    products: Callable[[int], int] | None = None
    positions: int | None = None
    first: Callable[[], Startup] | None = None
    note: str = ""
    threads: int | None = None
    startups: list[Startup] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    def all_probes(self, settings: SpeedSettings) -> dict[str, Probe]:
        """The measurements, "first_token" in seconds among them where it can be taken."""
        first = self.first

        def first_token() -> float:
            assert first is not None
            self.startups.append(first())
            return self.startups[-1].seconds

        return {**self.probes(settings), **({} if first is None else {"first_token": first_token})}


def of_engine(engine: Engine, name: str, open_again: Mapping[str, Any] | None = None) -> Backend:
    """An engine. open_again: the arguments of `Engine.open`, as JSON, that make it in another process."""
    shape, told = engine.shape, engine.describe()

    def times(sequences: int, prompt: int, new: int) -> list[float]:
        return engine_times(engine, some_ids(prompt, shape.vocabulary), sequences, new)

    return Backend(
        name, _rates(times), told.bytes_per_token, lambda n: shape.products(n, 1), shape.positions,
        None if open_again is None else lambda: startup("engine", open_again), threads=told.threads,
    )  # fmt: skip


def of_module(model: nn.Module, name: str, open_again: Mapping[str, Any] | None = None, note: str = "") -> Backend:
    """A model in transformers. SourceError for one that generates no text."""
    if not getattr(model, "can_generate", lambda: False)():
        raise SourceError(f"{name}: a {type(model).__name__} does not generate text; name a causal or seq2seq model")
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]

    def times(sequences: int, prompt: int, new: int) -> list[float]:
        ids = torch.tensor(some_ids(prompt, vocabulary))[None].expand(sequences, -1)
        return greedy_times(model, ids, new)

    return Backend(
        name, _rates(times), _read_by_module(model), None, max_positions(model),
        None if open_again is None else lambda: startup("transformers", open_again), note,
    )  # fmt: skip


def in_transformers(model: nn.Module, open_again: Mapping[str, Any] | None = None, note: str = "") -> Backend:
    """`of_module`, by the name of the type that it computes in, such as "transformers, float32"."""
    if not getattr(model, "can_generate", bool)():
        raise SourceError(f"a {type(model).__name__} does not generate text")
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return of_module(model, f"transformers, {str(own).removeprefix('torch.')}", open_again, note)


def of_llama_cpp(binary: str, gguf: Path, threads: int) -> Backend:
    """llama.cpp's own benchmark program on a GGUF file: decode and prefill. LowbitError when it fails."""

    def rate(*options: str) -> float:
        command = [binary, "-m", str(gguf), "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json", *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            rate = float(json.loads(done.stdout)[0]["avg_ts"])
        except OSError as error:
            raise LowbitError(
                f"{binary} cannot be run: {error.strerror or error}; build llama.cpp, or name it"
            ) from None
        except (ValueError, LookupError, TypeError):
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise LowbitError(f"{binary} on {gguf} ended with {done.returncode}: {last}") from None
        if not (math.isfinite(rate) and rate > 0):
            raise LowbitError(f"{binary} on {gguf} says {rate} tokens/s")
        return rate

    def probes(settings: SpeedSettings) -> dict[str, Probe]:
        return {
            "decode": lambda: rate("-p", "0", "-n", str(settings.new), "-d", str(settings.prompt)),
            "prefill": lambda: rate("-p", str(settings.prefill), "-n", "0"),
        }

    weight_bytes, layers, head = _read_by_llama_cpp(gguf)
    return Backend(f"llama.cpp {gguf.stem}", probes, weight_bytes, lambda n: n * layers + head)


def of_program(name: str, command: str) -> Backend:
    """A program that stays loaded: it says `ready`, and to each line `decode`, `prefill` or `batch` answers tokens/s.

    It measures with the standard settings. LowbitError when it stops or says something else.
    """
    try:
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, ValueError) as error:
        raise LowbitError(f"{command!r} cannot be run: {error}; name a program and its arguments") from None
    to, answers = process.stdin, process.stdout
    assert to is not None and answers is not None
    if not any(line.strip() == "ready" for line in answers):
        raise LowbitError(f"{command!r} ended with {process.wait()} before it said 'ready'; run it by hand to see why")

    def ask(what: str) -> float:
        try:
            print(what, file=to, flush=True)
        except OSError:
            raise LowbitError(f"{command!r} has stopped; run it by hand to see why") from None
        answer = answers.readline().strip()
        try:
            rate = float(answer)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise LowbitError(f"{command!r} answered {answer!r} to {what!r}; it must say tokens per second")
        return rate

    names = ("decode", "prefill", "batch")
    return Backend(name, lambda _: {what: partial(ask, what) for what in names}, close=process.kill)


def some_ids(count: int, vocabulary: int) -> list[int]:
    """Token ids that look like no text in particular."""
    return [(i * 37 + 11) % min(vocabulary, 1000) for i in range(count)]


def _rates(times: Times) -> Callable[[SpeedSettings], Mapping[str, Probe]]:
    return lambda settings: rate_probes(times, settings, WORDS)


def _read_by_module(model: nn.Module) -> int | None:
    """Bytes of weights that a token reads: all of a decoder, but an embedding that is not the head as well.

    None for a model that does not say which they are.
    """
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return None
    try:
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    tied = head is not None and head.weight is table
    return module_bytes(model) - (0 if tied else sum(t.nbytes for t in _tensors(table)))


def _tensors(weight: Any) -> list[torch.Tensor]:
    return [*weight.buffers()] if isinstance(weight, nn.Module) else [weight]


def _read_by_llama_cpp(gguf: Path) -> tuple[int, int, int]:
    """(bytes of weights that a token reads, weights in the layers, weights in the head). SourceError for no GGUF file."""
    from gguf import GGUFReader

    try:
        tensors = {t.name: t for t in GGUFReader(gguf).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise SourceError(f"{gguf}: not a GGUF file that can be read ({error})") from None
    nbytes = sum(int(t.n_bytes) for t in tensors.values())
    embedding, head = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if head is not None and embedding is not None:
        nbytes -= int(embedding.n_bytes)
    layers = sum(int(t.n_elements) for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2)
    last = head if head is not None else embedding
    return nbytes, layers, int(last.n_elements) if last is not None else 0
