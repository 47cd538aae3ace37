"""Families are found by their files, one of them for each; what they state is what views of them read."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit.families
from lowbit.discovery import modules_of
from lowbit.families import decoder_of, families, family_of
from lowbit.families.fused import TOGETHER

ROOM = Path(lowbit.families.__file__).parent


def stated(file: Path) -> list[str]:
    """The model types of the families that a file makes: `Family("llama", ...)`."""
    calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    return [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "Family"]


def test_every_model_type_has_one_file() -> None:
    types = {file.name: stated(file) for file in sorted(ROOM.glob("*.py"))}
    every = sorted(kind for kinds in types.values() for kind in kinds)
    assert every == list(families()) and len(every) == len(set(every)) >= 19
    assert all(kind == family.model_type for kind, family in families().items())
    for name, kinds in types.items():  # where it is looked for first: gemma3_text in gemma.py
        assert not kinds or any(kind.startswith(name.removesuffix(".py")) for kind in kinds)


def test_every_family_is_of_use() -> None:
    for name, family in families().items():
        assert family.channels or family.gguf, name
        if family.decoder or family.gguf:
            assert family.config, f"{name} is read by its config, so what becomes of each field must be said"
        if family.decoder and family.graph:
            assert family.graph != family.decoder.graph, f"the graph of {name} follows from its decoder"


def test_reading_families_is_cheap_and_pulls_in_nothing_heavy() -> None:
    code = """
import json, sys
from lowbit.discovery import modules_of
from lowbit.families import families
families()
print(json.dumps([n for n in ("torch", "transformers", "numpy", "gguf", "huggingface_hub") if n in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_a_new_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text(
        "from lowbit.families.config_facts import LLAMA, ConfigFacts\n"
        "from lowbit.families.family import Decoder, Family\n"
        "FAMILY = Family('made_up', ConfigFacts(LLAMA), decoder=Decoder())\n"
    )
    monkeypatch.setattr(lowbit.families, "__path__", [*lowbit.families.__path__, str(tmp_path)])
    modules_of.cache_clear()
    families.cache_clear()
    try:
        assert decoder_of({"model_type": "made_up"}) == decoder_of({"model_type": "llama"})
    finally:
        sys.modules.pop("lowbit.families.made_up", None)
        modules_of.cache_clear()
        families.cache_clear()


@pytest.mark.parametrize("kind", ["family", "fused", "config_facts", "../llama", "", {}, ["llama"], None, 5])
def test_what_is_no_model_type_has_no_family(kind: object) -> None:
    assert family_of(kind) is None


def test_what_a_decoder_reads_as_one_is_stored_alike_for_servers() -> None:
    parts = [names for _, names in TOGETHER]
    for name, family in families().items():
        if family.decoder:
            for names in (family.decoder.qkv, family.decoder.gate_up):
                words = tuple(n.rpartition(".")[2] for n in names)
                assert len(words) == 1 or words in parts, name
