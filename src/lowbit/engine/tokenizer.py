"""Text to tokens and back: tokenizer.json read by `tokenizers` alone, or any tokenizer of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.engine.chat_template import ChatTemplate, Message, default_template, read_template
from lowbit.errors import SourceError
from lowbit.interchange.checks.words import check_tokenizer
from lowbit.interchange.files.settings import read_json
from lowbit.interchange.hf.calls import asking
from lowbit.interchange.hf.loading import load_tokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATE = "chat_template.jinja"


class TextTokenizer(ABC):
    """What the engine needs of a tokenizer."""

    has_template: bool
    eos_token_id: int | None = None

    @abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. special: with what the tokenizer puts around a text, such as a token for its beginning."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""

    @abstractmethod
    def template(self) -> ChatTemplate | None:
        """How the model was taught to read conversations, None where it was not. SourceError for what is no template."""

    def chat(self, messages: Sequence[Message]) -> str:
        """A conversation as the model was taught to read it, up to where its answer begins."""
        template = self.template()
        if template is None:
            raise SourceError("this model has no chat template; give the prompt raw")
        for message in messages:
            _whole(str(message.get("content", "")))
        return template.render(messages, answer=True)

    def prompt(self, text: str, raw: bool = False) -> list[int]:
        """Token ids of what a user says: in the chat template where there is one and `raw` is not asked for."""
        if raw or not self.has_template:
            return self.encode(text)
        written = self.chat([{"role": "user", "content": text}])
        if not written:
            raise SourceError("the chat template of this model writes nothing for this prompt; give the prompt raw")
        return self.encode(written, special=False)


class FolderTokenizer(TextTokenizer):
    """Reads tokenizer.json, tokenizer_config.json and the chat template of a folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._file = str(folder / "tokenizer.json")
        with asking("tokenizers", self._file, "make a tokenizer of it", "download it again"):
            self._tokenizer = Tokenizer.from_file(self._file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = _json(folder / "tokenizer_config.json")
        check_tokenizer(config, str(folder / "tokenizer_config.json"))
        given = {**_json(folder / "special_tokens_map.json"), **config}
        self._special = {name: _content(given[name]) for name in _SPECIAL if given.get(name) is not None}
        end = self._special.get("eos_token")
        self.eos_token_id = None if end is None else self._tokenizer.token_to_id(end)
        file, named = folder / _TEMPLATE, config.get("chat_template")
        self.has_template = file.exists() or bool(named)
        self._template: str | SourceError | None
        try:
            self._template = default_template(read_template(file) if file.exists() else named)
        except SourceError as error:  # for who asks for it: text can be read without
            self._template = error

    def encode(self, text: str, special: bool = True) -> list[int]:
        given = _whole(text)
        with asking("tokenizers", self._file, "take this text apart", "download it again"):
            found: list[int] = self._tokenizer.encode(given, add_special_tokens=special).ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        with asking("tokenizers", self._file, "make text of tokens", "download it again"):
            found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return found

    def template(self) -> ChatTemplate | None:
        """chat_template.jinja, or the entry of tokenizer_config.json, which may be several by name."""
        if isinstance(self._template, SourceError):
            raise self._template
        return None if self._template is None else ChatTemplate(self._template, self._special)


class AnyTokenizer(TextTokenizer):
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = getattr(tokenizer, "eos_token_id", None)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def encode(self, text: str, special: bool = True) -> list[int]:
        given = _whole(text)
        with asking("transformers", "the tokenizer of this model", "take this text apart", "download its files again"):
            found: list[int] = self._tokenizer(given, add_special_tokens=special)["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        with asking("transformers", "the tokenizer of this model", "make text of tokens", "download its files again"):
            found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return found

    def template(self) -> ChatTemplate | None:
        return ChatTemplate.of(self._tokenizer)


def tokenizer_of(folder: Path) -> TextTokenizer:
    """The tokenizer of a folder, by `tokenizers` alone where tokenizer.json is there. SourceError for none."""
    if (folder / "tokenizer.json").is_file():
        return FolderTokenizer(folder)
    return AnyTokenizer(load_tokenizer(folder, str(folder)))


def _whole(text: str) -> str:
    """`text`. SourceError where it is no Unicode, as what Python makes of bytes on a command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 10) : error.end + 10]
        raise SourceError(f"the text has bytes that are no UTF-8, near {near!r}; give it as UTF-8") from None
    return text


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """The text of a special token, which may be an object. SourceError for anything else."""
    found = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(found, str):
        raise SourceError(f"tokenizer_config.json gives a special token as {str(token)[:60]!r}; make it a text")
    return found
