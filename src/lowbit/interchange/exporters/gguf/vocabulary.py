"""A tokenizer as GGUF metadata: tokens, their kinds, merges or scores, special tokens, chat template.

Two kinds of tokenizer can be written, both of the BPE model of the `tokenizers` package: on bytes (`gpt2` to
llama.cpp), which needs the name of its pre-tokenizer, and on characters with a fallback to bytes (`llama`).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.errors import SourceError
from lowbit.interchange.end_tokens import LLAMA_CPP_ENDS
from lowbit.interchange.exporters.gguf.pretokenizers import pretokenizer_name

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "\u2581"
_IDS = {
    "bos_token_id": "add_bos_token_id", "eos_token_id": "add_eos_token_id", "unk_token_id": "add_unk_token_id",
    "pad_token_id": "add_pad_token_id", "sep_token_id": "add_sep_token_id", "mask_token_id": "add_mask_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer. `scores` for `llama`, `merges` and `pre` for `gpt2`."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    space_first: bool
    adds_bos: bool
    adds_eos: bool
    ids: dict[str, int]
    chat_template: str | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Put it into the file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for method, value in self.ids.items():
            getattr(writer, method)(value)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def refusal(tokenizer: Any, size: int) -> str | None:
    """Why a tokenizer cannot be written for a model of `size` tokens, or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"a {type(tokenizer).__name__} has no tokenizer.json; save it as a fast tokenizer first"
    spec = json.loads(backend.to_str())
    kind = spec["model"].get("type")
    if kind != "BPE":
        return f"its tokenizer is of the kind {kind}; BPE on bytes or on characters can be written"
    top = max((int(i) for i in tokenizer.get_vocab().values()), default=-1)
    if top >= size:
        return f"its tokenizer has token {top}, and the model {size} tokens"
    if spec["model"].get("byte_fallback"):
        return None
    name, why = pretokenizer_name(spec)
    return why if name is None else None


def vocabulary(tokenizer: Any, size: int, ends: Collection[int] = ()) -> Vocabulary:
    """The vocabulary of a tokenizer that `refusal` has passed, filled up to `size` tokens. ends: what ends a text."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    characters = bool(spec["model"].get("byte_fallback"))
    tokens, kinds = _tokens(tokenizer, spec, size, characters)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["model"]["merges"]]
    probe = list(tokenizer("a")["input_ids"])
    ids = {m: i for key, m in _IDS.items() if isinstance(i := getattr(tokenizer, key, None), int)}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(
        model="llama" if characters else "gpt2",
        pre="default" if characters else str(pretokenizer_name(spec)[0]),
        tokens=tokens,
        kinds=kinds,
        scores=_scores(tokens, merges) if characters else None,
        merges=None if characters else [" ".join(pair) for pair in merges],
        space_first=_space_first(spec),
        adds_bos=len(probe) > 1 and probe[0] == tokenizer.bos_token_id,
        adds_eos=len(probe) > 1 and probe[-1] == tokenizer.eos_token_id,
        ids={**ids, **_ends(tokenizer, ends)},
        chat_template=template if isinstance(template, str) else None,
    )


def _ends(tokenizer: Any, ends: Collection[int]) -> dict[str, int]:
    """Ends of text, turn and message: GGUF has a place for one of each, and llama.cpp knows others by their text.

    SourceError for ends that would be lost. The tokenizer's own end of text stays that.
    """
    eos = tokenizer.eos_token_id
    if eos not in ends:
        eos = min(ends, default=None)
    names = tokenizer.convert_ids_to_tokens(sorted(ends))
    others = [i for i, name in zip(sorted(ends), names, strict=True) if i != eos and name not in LLAMA_CPP_ENDS]
    if len(others) > 2:
        raise SourceError(
            f"{len(ends)} tokens end a text and GGUF has room for three: llama.cpp would write on past token {others[2]}; "
            "leave some out of eos_token_id in generation_config.json"
        )
    places = ("add_eos_token_id", "add_eot_token_id", "add_eom_token_id")
    return dict(zip(places, [eos, *others], strict=False)) if eos is not None else {}


def _tokens(tokenizer: Any, spec: dict[str, Any], size: int, characters: bool) -> tuple[list[str], list[int]]:
    """(text, llama.cpp's kind) of every token; ids without one are filled with unused ones."""
    from gguf import TokenType

    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    for text, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = text, int(TokenType.NORMAL)
        if characters and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[i] = int(TokenType.BYTE)
    unknown = spec["model"].get("unk_token")
    for added in spec.get("added_tokens", ()):
        i, text = int(added["id"]), str(added["content"])
        kinds[i] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        tokens[i] = text if added["special"] else text.replace(_SPACE, " ")
        if characters and text == unknown:
            kinds[i] = int(TokenType.UNKNOWN)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """llama.cpp joins the pair whose token has the highest score, `tokenizers` the pair of the earliest merge: so the
    score of a token is minus the number of the first merge that makes it."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, 0)) if token in first else 0.0 for token in tokens]


def _space_first(spec: dict[str, Any]) -> bool:
    """Whether text gets a space in front."""
    steps = _steps(spec.get("normalizer"), "normalizers") + _steps(spec.get("pre_tokenizer"), "pretokenizers")
    prepends = any(step["type"] == "Prepend" for step in steps)
    return prepends or any(step.get("prepend_scheme") in ("always", "first") for step in steps)


def _steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inside]) if part["type"] == "Sequence" else [part]
