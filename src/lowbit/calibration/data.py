"""Calibration data: the token ids that statistics are gathered on.

They come from a text (cut into windows by `calibration/windows.py`, as is the text that is measured on), from conversations, from token ids that the caller has, or from the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from lowbit.calibration.package_text import BUILTIN, NAME, package_windows
from lowbit.calibration.records import kind_of
from lowbit.calibration.selftext import opening_of, render_chat, write_windows
from lowbit.calibration.text import is_dataset, load_text
from lowbit.calibration.windows import Frame, framed_windows, text_ids
from lowbit.errors import SourceError, TextError
from lowbit.interchange.hf.running import check_vocabulary, fast_dtype, max_positions
from lowbit.interchange.pooling import pooling_of
from lowbit.interchange.source import Source

OnToken = Callable[[int, int], None]
SELF = "self"
SAMPLES, LENGTH = 32, 1024
PASSAGE = 128  # tokens of a window for a model that reads texts and writes none: what is searched, ranked and labelled are paragraphs
# A file, a dataset id, "builtin", "self" or None; texts, conversations or records; tensors, lists of ids or batches of a DataLoader.
CalibrationSource = Union[str, Path, Iterable[Any], None]
_ASIDE = "pass a file, a list of strings, conversations or records, a dataset id, token ids, a DataLoader, 'builtin' or 'self'"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of token ids, each int64 [length]; lengths differ only where the caller gave ids.

    `name` says where they are from. `sha256` is that of all ids as little-endian int64, each window after its length.
    `frame`: what the tokenizer puts around a text, for who cuts the windows into shorter ones; nothing where ids were given.
    """

    name: str
    ids: tuple[Tensor, ...]
    sha256: str
    frame: Frame = field(default_factory=Frame)

    @staticmethod
    def of(name: str, ids: Iterable[Tensor], frame: Frame | None = None) -> Calibration:
        """Name and hash `ids`."""
        windows = tuple(window.to("cpu", torch.int64).contiguous() for window in ids)
        digest = hashlib.sha256()
        for window in windows:
            for part in (torch.tensor([len(window)]), window):
                digest.update(part.numpy().astype("<i8").tobytes())
        return Calibration(name, windows, digest.hexdigest(), frame or Frame())

    @property
    def tokens(self) -> int:
        """Tokens in all windows together."""
        return sum(len(window) for window in self.ids)

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {"name": self.name, "windows": len(self.ids), "tokens": self.tokens, "sha256": self.sha256}


def load_calibration(
    source: CalibrationSource,
    tokenizer: Any,
    model: nn.Module | Source,
    *,
    samples: int | None = None,
    length: int | None = None,
    chat: bool = False,
    seed: int = 0,
    on_token: OnToken = lambda done, total: None,
) -> Calibration:
    """`samples` windows (None: SAMPLES) of `length` tokens (None: LENGTH) to calibrate `model` on, fewer where the text has no more.

    For a model that writes nothing each of these windows is cut into `pieces_of`, where no length is given: as many tokens in all.

    source     a file of text or of records, a list of strings, conversations or records, or a Hugging Face dataset id (its
               "train" split): the whole text is tokenised once without special tokens and cut into windows that do not
               overlap, each in what the tokenizer puts around a text (`Frame.of`); `samples` are taken evenly. Token ids, as tensors, lists, or batches of a DataLoader with
               `input_ids` and `attention_mask`: the first `samples` rows in their order and their lengths,
               without padding. "builtin": the text that comes with lowbit (`package_text.py`). "self" or None: the model writes the
               text; only then are its weights loaded.
    tokenizer  None takes that of a Source; token ids need none.
    chat       each document is a user's message and gets the tokenizer's chat template; of a file of text, each
               paragraph. Conversations are rendered with or without it.
    seed       of the text that the model writes, and `on_token(tokens written, tokens in all)` while it does.

    Windows are no longer than the positions of the model. The same arguments give the same ids. TextError
    when the source cannot be read, fills no window, or does not fit the model's vocabulary.
    """
    pieces = pieces_of(model) if length is None else 1
    samples = SAMPLES * pieces if samples is None else samples
    length = LENGTH // pieces if length is None else length
    if samples < 1:
        raise TextError(f"{samples} calibration samples were asked for: use 1 or more")
    if length < 2:
        raise TextError(f"calibration windows of {length} tokens are too short: use 2 or more")
    longest = _longest(model)
    length = min(length, longest or length)
    if isinstance(source, str) and source == BUILTIN:
        return _package_text(_tokenizer(tokenizer, model), model, samples, length, chat)
    if source is None or (isinstance(source, str) and source == SELF):
        return _own_text(_tokenizer(tokenizer, model), model, samples, length, chat, seed, on_token)
    kind, data = _kind_of(source)
    if kind == "ids":
        if chat:
            raise TextError(
                "chat was asked for, but a chat template takes text, not token ids: leave chat out, or pass texts"
            )
        found = Calibration.of("token ids", _rows(data, samples, longest))
        if not found.ids:
            raise TextError("the calibration data holds no token: every row is empty or padding")
    else:
        tokenizer = _tokenizer(tokenizer, model)
        text = load_text(data, split="train" if is_dataset(data) else None, chat=chat)
        text = text.rendered(lambda said: render_chat(tokenizer, said))
        frame = _frame(tokenizer, model)
        windows = framed_windows(text.name, text_ids(text.joined, tokenizer), frame, length, "calibration window")
        found = Calibration.of(text.name, _spread(windows, samples), frame)
    for window in found.ids:
        check_vocabulary(model, window)  # type: ignore[arg-type]  # only `config` is looked at
    return found


def pieces_of(model: nn.Module | Source) -> int:
    """Into how many windows one of LENGTH tokens is cut for a model, where nobody says how long they are.

    A model that writes nothing reads a paragraph from its first token to its last, and statistics of long windows fit it less: at as many tokens, the cosine of
    embeddings with the float model's was 0.9899 with windows of 128 tokens, 0.9876 with 256 and less with 512
    (benchmarks/results/embedding-model.md).
    """
    if _embeds(model):
        return LENGTH // PASSAGE
    if isinstance(model, Source):
        from lowbit.interchange.hf.models import model_class

        kind: Any = None if model.config is None else model_class(model.config)
    else:
        kind = model
    able = getattr(kind, "can_generate", None)
    return 1 if able is None or able() else LENGTH // PASSAGE


def _embeds(model: nn.Module | Source) -> bool:
    """Whether the files of a source say how it makes embeddings, so that it reads texts as a whole whatever its class is."""
    folder = getattr(model, "folder", None)
    return isinstance(model, Source) and isinstance(folder, Path) and pooling_of(folder) is not None


def _longest(model: nn.Module | Source) -> int | None:
    """The longest sequence that `model` takes; of a source, of its skeleton without weights."""
    if isinstance(model, Source):
        from lowbit.interchange.hf.models import meta_model

        return max_positions(meta_model(model.config)) if model.config is not None else None
    return max_positions(model)


def _tokenizer(tokenizer: Any, model: nn.Module | Source) -> Any:
    """`tokenizer`, else that of the source. TextError when there is none."""
    if tokenizer is not None:
        return tokenizer
    try:
        if isinstance(model, Source):
            return model.tokenizer()
        raise SourceError(f"{type(model).__name__} is a bare module; pass tokenizer=...")
    except SourceError as error:
        raise TextError(
            f"calibrating on text needs a tokenizer: {error}; or pass token ids as calibration data"
        ) from error


def _package_text(tokenizer: Any, model: nn.Module | Source, samples: int, length: int, chat: bool) -> Calibration:
    if chat:
        raise TextError(
            f"chat was asked for, but the conversations of {NAME} are in the model's chat template anyway: leave chat out"
        )
    frame = _frame(tokenizer, model)
    found = Calibration.of(NAME, package_windows(tokenizer, frame, length, samples), frame)
    for window in found.ids:
        check_vocabulary(model, window)  # type: ignore[arg-type]  # only `config` is looked at
    return found


def _own_text(
    tokenizer: Any, model: nn.Module | Source, samples: int, length: int, chat: bool, seed: int, on_token: OnToken
) -> Calibration:
    opening = opening_of(tokenizer, getattr(model, "config", None), chat=chat)
    module = model.load_float(fast_dtype()) if isinstance(model, Source) else model
    ids = write_windows(
        module, opening, count=samples, length=length, vocabulary=len(tokenizer), seed=seed, on_token=on_token
    )
    # Not the model's label, which is a path of this machine: the name goes into what is published.
    name = f"{'chat' if chat else 'text'} that the model wrote itself, seed {seed}"
    return Calibration.of(name, ids, Frame() if chat else Frame(opening.frame))


def _frame(tokenizer: Any, model: nn.Module | Source) -> Frame:
    """What the tokenizer puts around a text for `model`."""
    if not isinstance(model, Source):
        return Frame.of(tokenizer, model)
    from lowbit.interchange.hf.models import model_class

    kind = None if model.config is None else model_class(model.config)
    return Frame.of(tokenizer, kind, model.config, whole=_embeds(model))


def _spread(windows: Sequence[Tensor], samples: int) -> list[Tensor]:
    """`samples` of the windows spread evenly over the text, all when it has no more."""
    taken = min(samples, len(windows))
    return [windows[i * len(windows) // taken] for i in range(taken)]


def _kind_of(source: Any) -> tuple[str, Any]:
    """("text" | "ids", source) by the first item, which is put back in front of an iterator."""
    if isinstance(source, (str, Path)):
        return "text", source
    if isinstance(source, (Tensor, Mapping)):
        return "text" if kind_of(source) else "ids", [source]
    if not isinstance(source, Iterable):
        raise TextError(f"a {type(source).__name__} is no calibration data: {_ASIDE}")
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise TextError(f"the calibration data is empty: {_ASIDE}")
    source = source if isinstance(source, Sequence) else chain([first], items)
    return ("text", list(source)) if kind_of(first) else ("ids", source)


def _rows(source: Iterable[Any], samples: int, longest: int | None) -> Iterator[Tensor]:
    """The first `samples` rows of token ids that are not all padding, cut to `longest`."""
    left = samples
    for number, item in enumerate(source):
        for row in _unpadded(item, number):
            if len(row):
                yield row[:longest]
                left -= 1
            if left == 0:
                return


def _unpadded(item: Any, number: int) -> Iterator[Tensor]:
    """Rows [n] of one item: a tensor [n] or [rows, n], a list of ids, or a mapping with `input_ids`."""
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise TextError(f"item {number} of the calibration data has no 'input_ids' (it has {', '.join(item)})")
        item, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor):
        item = item[0]  # a TensorDataset gives its tensors as a list
    try:
        ids = torch.as_tensor(item)
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise TextError(f"item {number} of the calibration data is a {type(item).__name__}: {_ASIDE}") from None
    if ids.is_floating_point() or ids.dtype is torch.bool or ids.ndim not in (1, 2) or mask.shape != ids.shape:
        raise TextError(
            f"item {number} of the calibration data is {ids.dtype} {tuple(ids.shape)} with a mask {tuple(mask.shape)}: "
            "pass integer ids [n] or [rows, n] and a mask of the same shape"
        )
    for row, keep in zip(ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1])):
        yield row[keep.bool()]
