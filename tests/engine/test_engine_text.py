"""Tokenizers and chat templates without transformers, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowbit.engine.chat_template import ChatTemplate
from lowbit.engine.tokenizer import AnyTokenizer, FolderTokenizer, tokenizer_of
from lowbit.errors import SourceError
from tiny import tiny_tokenizer

Folder = Callable[..., Path]
CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "hi\nthere"},
    {"role": "assistant", "content": "  hello  "},
    {"role": "user", "content": 'a "quoted" é'},
]
# Templates as models have them: whitespace control, loops with break, tojson, blocks that mark the answer, dates.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trimmed": "{{ bos_token }}\n{% for m in messages %}\n    {%- if m.role == 'system' %}\n    S: {{ m.content | trim }}\n"
    "    {%- else %}\n  [{{ m.role }}] {{ m.content.strip() }}{{ eos_token }}\n    {% endif %}\n{% endfor %}\n",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    "names": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ strftime_now('%Y') }}{% if tools is defined and tools %}x{% endif %}",
    "macro": "{% macro say(m) %}<{{ m.role }}>{{ m['content'] }}{% endmacro %}{% for m in messages[1:] %}{{ say(m) }}{% endfor %}",
}


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(name: str, tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.chat_template = TEMPLATES[name]
    folder = save(words, tmp_path)
    right = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert FolderTokenizer(folder).chat(CHAT) == right == AnyTokenizer(words).chat(CHAT)


def test_a_template_inside_the_config(tmp_path: Path) -> None:
    folder = save(tiny_tokenizer(), tmp_path)
    config = folder / "tokenizer_config.json"
    stored = json.loads(config.read_text())
    for given in (
        TEMPLATES["chatml"],
        [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATES["chatml"]}],
    ):
        config.write_text(json.dumps({**stored, "chat_template": given, "bos_token": {"content": "<s>"}}))
        assert FolderTokenizer(folder).chat(CHAT).startswith("<|im_start|>system\nBe <brief>")
    config.write_text(json.dumps(stored))
    bare = FolderTokenizer(folder)
    assert not bare.has_template and bare.prompt("the cat") == bare.encode("the cat")
    with pytest.raises(SourceError, match="no chat template"):
        bare.chat(CHAT)


def test_templates_run_in_a_sandbox() -> None:
    for template in (
        "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}", "{{ raise_exception('only users') }}", "{% for %}",
    ):  # fmt: skip
        with pytest.raises(SourceError, match="chat template"):
            ChatTemplate(template, {}).render(CHAT, answer=True)


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save(tiny_tokenizer(), tmp_path)
    ours, theirs = FolderTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("", "the cat and the hen", "  two  spaces\n\nlines ", "<s>the</s>", "é"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        ids = ours.encode(text, special=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("bos,eos", [(True, False), (False, True), (True, True), (False, False)])
def test_tokenizer_json_decides_what_is_put_around_a_text(bos: bool, eos: bool, tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = save(words, tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": bos, "add_eos_token": eos}))
    ids = FolderTokenizer(folder).encode("the cat")
    assert ids == AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]


def test_folders_without_tokenizer_json_go_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_tokenizer(), tmp_path)
    assert isinstance(tokenizer_of(folder), FolderTokenizer)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        tokenizer_of(folder)
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr("lowbit.engine.tokenizer.load_tokenizer", lambda folder, label: tiny_tokenizer())
    assert isinstance(tokenizer_of(folder), AnyTokenizer)


@pytest.fixture(scope="module")
def chat_folder(packed_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(packed_folder("llama", "int4:g32"), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}a "
    )
    return folder


def test_a_conversation_reads_only_what_is_new(chat_folder: Path) -> None:
    from lowbit import Engine

    engine = Engine.open(chat_folder, threads=1)
    talk, text = engine.conversation("be kind"), ""
    for turn, words in enumerate(("the cat", "the hen and the hen", "in the tree")):
        text = engine.tokenizer.chat([*talk.messages, {"role": "user", "content": words}])
        alone = engine.generate(engine.tokenizer.encode(text, special=False), max_new_tokens=20)
        found = talk.ask(words, max_new_tokens=20)
        assert found.tokens == alone.tokens
        assert talk.read == alone.prompt_tokens if turn == 0 else talk.read < alone.prompt_tokens
        assert talk.messages[-1]["content"] == found.text
    talk.reset()
    assert [m["role"] for m in talk.messages] == ["system"]
    long = talk.ask("the cat " * 130, max_new_tokens=1000)  # grows its cache, ends where the positions do
    assert long.prompt_tokens + len(long.tokens) <= 1024


def test_an_interrupted_answer_stays(chat_folder: Path) -> None:
    from lowbit import Engine

    engine = Engine.open(chat_folder, threads=1)
    talk, shown = engine.conversation(), list[str]()

    def stop(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("the cat", stop, max_new_tokens=50)
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    text = engine.tokenizer.chat([*talk.messages, {"role": "user", "content": "go on"}])
    right = engine.generate(engine.tokenizer.encode(text, special=False), max_new_tokens=9)
    assert talk.ask("go on", max_new_tokens=9).tokens == right.tokens


def test_load_gives_generate_for_text(chat_folder: Path, tmp_path: Path, caplog: Any) -> None:
    import copy
    import inspect
    import pickle

    import torch

    import lowbit
    from lowbit import Engine

    model: Any = lowbit.load(chat_folder, kernel="expand")
    right = Engine.open(chat_folder).generate("the cat", max_new_tokens=12)
    assert model.generate("the cat", max_new_tokens=12).tokens == right.tokens
    assert model.generate(["the cat", "a hen"], max_new_tokens=12)[0].tokens == right.tokens
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert "generation_config" in inspect.signature(model.generate).parameters
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.generate.generator() is not model.generate.generator() and type(twin) is type(model)
        assert twin.generate._model is twin
        assert twin.generate("the cat", max_new_tokens=12).tokens == right.tokens
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not caplog.records
    model.generate.forget()
    dense: Any = lowbit.load(chat_folder, kernel="dense", dtype="float32")
    assert dense.generate("the cat", max_new_tokens=1).tokens == right.tokens[:1]


def _keep(shown: list[tuple[str, int]], text: str, index: int) -> None:
    shown.append((text, index))


def test_load_of_other_architectures_says_so(tmp_path: Path, caplog: Any) -> None:
    import lowbit
    from tiny import save_tiny

    for name in ("gpt2", "t5"):
        save_tiny(name, tmp_path / name)
        lowbit.quantize(tmp_path / name, "int8:channel", tmp_path / f"{name}-w8")
        model: Any = lowbit.load(tmp_path / f"{name}-w8")
        found = model.generate("the cat", max_new_tokens=12)
        assert f"models of type '{name}'" in caplog.text
        words = lowbit.load(tmp_path / f"{name}-w8").generate
        shown: list[tuple[str, int]] = []
        again = words(["the cat", "a hen"], max_new_tokens=12, stream=partial(_keep, shown))
        assert again[0].tokens == found.tokens and len(found.tokens) <= 12
        assert ["".join(p for p, i in shown if i == k) for k in (0, 1)] == [r.text for r in again]
        if len(found.text) > 4:
            cut = words("the cat", max_new_tokens=12, stop=found.text[3])
            assert cut.reason == "stop" and cut.text == found.text[: found.text.index(found.text[3])]
        drawn = [
            words("the cat", max_new_tokens=12, temperature=1.0, top_k=9, min_p=0.01, seed=s).tokens for s in (1, 1)
        ]
        assert drawn[0] == drawn[1]
