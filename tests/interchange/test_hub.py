"""Hugging Face ids, with the network replaced by a folder."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from handmade_adapters import llama_factors, write
from lowbit.adapters.source import with_adapter
from lowbit.errors import SourceError
from lowbit.interchange.files.safetensors_reader import DTYPES, read_header
from lowbit.interchange.hub import failures, hub
from lowbit.interchange.opening import open_headers, open_source
from tiny import save_tiny


class Hub:
    """Stands for huggingface.co: one repository in a folder, and a list of what was fetched."""

    def __init__(self, repo: Path, cache: Path) -> None:
        self.repo, self.cache, self.fetched = repo, cache, []

    def snapshot_download(
        self,
        repo_id: str,
        allow_patterns: list[str] | None,
        ignore_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        assert repo_id == "org/name"
        for file in filter(Path.is_file, self.repo.rglob("*")):
            name = file.relative_to(self.repo).as_posix()
            wanted = allow_patterns is None or any(fnmatch.fnmatch(name, p) for p in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                self.fetched.append(name)
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.cache / name)
        return str(self.cache)

    def get_safetensors_metadata(self, repo_id: str) -> Any:
        names = {dtype: name for name, dtype in DTYPES.items()}
        files = {}
        for file in self.repo.glob("*.safetensors"):
            entries = read_header(file).entries.values()
            tensors = {e.name: SimpleNamespace(dtype=names[e.dtype], shape=list(e.shape)) for e in entries}
            files[file.name] = SimpleNamespace(tensors=tensors)
        return SimpleNamespace(files_metadata=files)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for name in ("repo", "cache"):
        (tmp_path / name).mkdir()
    fake = Hub(tmp_path / "repo", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fake.get_safetensors_metadata)
    return fake


def test_an_id_is_downloaded_without_pickles_or_code(remote: Hub) -> None:
    model = save_tiny("qwen2", remote.repo)
    for name in (
        "pytorch_model.bin",
        "modeling_x.py",
        "tokenizer_x.py",
        "model.fp16.safetensors",
    ):
        (remote.repo / name).write_text("")
    source = open_source("org/name")
    assert source.label == "org/name"
    assert all(torch.equal(source.read(n), model.state_dict()[n]) for n in source.tensors)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(remote.fetched)
    assert not {name for name in remote.fetched if name.endswith((".bin", ".py", "fp16.safetensors"))}


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "t5"])
def test_a_plan_fetches_headers_only(name: str, remote: Hub) -> None:
    save_tiny(name, remote.repo)
    headers = open_headers("org/name")
    assert not [file for file in remote.fetched if file.endswith(".safetensors")]
    whole = open_source("org/name")
    assert dict(headers.tensors) == dict(whole.tensors) and headers.inventory == whole.inventory
    assert headers.tokenizer()("the").input_ids == whole.tokenizer()("the").input_ids
    assert json.loads(json.dumps(headers.identity())) == headers.identity()
    with pytest.raises(SourceError, match="only the headers"):
        headers.read(next(iter(headers.tensors)))


def test_headers_of_anything_else_are_the_source_itself(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    assert open_headers(tmp_path).read("lm_head.weight").shape == (128, 32)


def test_a_cached_model_can_be_planned_offline(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", remote.repo)

    def offline(repo_id: str) -> None:
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    assert open_headers("org/name").tensors["lm_head.weight"].shape == (128, 32)


def test_an_id_quantized_in_an_unknown_way_is_refused_before_its_weights_are_fetched(remote: Hub) -> None:
    save_tiny("llama", remote.repo)
    config = json.loads((remote.repo / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quip"}
    (remote.repo / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="already quantized with quip"):
        open_source("org/name")
    assert "model.safetensors" not in remote.fetched


def _http(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "server says\nno")
    return error


FAILURES = {
    "gated": (errors.GatedRepoError, "gated; accept its terms at https://huggingface.co/org/name"),
    "not found": (errors.RepositoryNotFoundError, "not found on Hugging Face; check the spelling"),
    "offline mode": (errors.OfflineModeIsEnabled, "cannot be reached.*go online"),
    "not cached": (errors.LocalEntryNotFoundError, "cannot be reached.*go online"),
    "no route": (ConnectionError, "cannot be reached.*go online"),
    "server error": (errors.HfHubHTTPError, "cannot be reached.*go online"),
    "pickles only": (errors.NotASafetensorsRepoError, "no safetensors weights; convert"),
    "disk full": (OSError, "could not be stored.*free some space"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_each_failure_says_what_to_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, said = FAILURES[case]

    def fail(*args: object, **kwargs: object) -> None:
        raise _http(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for call in (open_source, open_headers):
        with pytest.raises(SourceError, match=said) as caught:
            call("org/name")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("org/name")


def test_only_names_that_look_like_ids_use_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not hub.claims("org/name")  # a local folder has this name
    assert hub.claims("org/other") and hub.claims("meta-llama/Llama-3.2-1B")
    for name in (
        "name",
        "./org/other",
        "/org/other",
        "a/b/c",
        "org/m.gguf",
        "../up",
        "org/",
        Path("org/other"),
    ):
        assert not hub.claims(name)


def test_what_goes_with_the_weights_is_fetched_too(remote: Hub) -> None:
    """Pooling and dense layers of sentence-transformers, chat templates, licences; no other form of the weights."""
    save_tiny("qwen2", remote.repo)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    files = {
        "modules.json": json.dumps(modules), "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "x", "additional_chat_templates/rag.jinja": "x", "source.spm": "x", "LICENSE": "x",
    }  # fmt: skip
    others = (
        "onnx/model.onnx",
        "onnx/config.json",
        "tf_model.h5",
        "2_Dense/pytorch_model.bin",
        "custom.py",
        "x/model.safetensors",
    )
    for name, text in (files | dict.fromkeys(others, "x")).items():
        (remote.repo / name).parent.mkdir(exist_ok=True)
        (remote.repo / name).write_text(text)
    source = open_source("org/name")
    assert set(files) <= set(remote.fetched) and not set(others) & set(remote.fetched)
    (remote.cache.parent / "out").mkdir()
    source.save_assets(remote.cache.parent / "out")
    assert all((remote.cache.parent / "out" / name).read_text() == text for name, text in files.items())


def test_an_adapter_is_recognised_before_anything_large_is_fetched(remote: Hub) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M"}
    (remote.repo / "adapter_config.json").write_text(json.dumps(settings))
    (remote.repo / "adapter_model.safetensors").write_bytes(b"large")
    for opener in (open_source, open_headers):
        with pytest.raises(SourceError, match="^org/name is a LoRA adapter for the base model 'HuggingFaceTB/SmolLM2"):
            opener("org/name")
    assert remote.fetched and "adapter_model.safetensors" not in remote.fetched


@pytest.mark.parametrize("case", ["offline mode", "not cached", "no route", "server error"])
def test_nothing_of_the_library_shows(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    from huggingface_hub.utils import logging as theirs

    log = theirs.get_logger("huggingface_hub.utils._http")

    def fail(*args: object, **kwargs: object) -> None:
        log.warning("You are sending unauthenticated requests; Retrying in 1s")
        raise _http(FAILURES[case][0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    before = theirs.get_verbosity()
    with pytest.raises(SourceError) as found:
        open_source("org/name")
    assert theirs.get_verbosity() == before != logging.ERROR
    assert not any(word in str(found.value) for word in ("server says", "Error", "Errno", "snapshot", "revision"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("status", "words"), [(401, "hf auth login"), (429, "too many"), (503, "status 503"), (None, "an error")]
)
def test_an_answer_is_told_by_its_status(status: int | None, words: str) -> None:
    error = _http(errors.HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    assert words in str(failures.explained("org/name", error))


def test_a_misspelt_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my-model").mkdir(parents=True)
    (tmp_path / "models" / "small.gguf").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(ConnectionError()))
    for typed, meant in {
        "models/my-modle": "models/my-model", "./models/my_model": "./models/my-model", "smolm2": "smollm2",
        "models/smal.gguf": "models/small.gguf", f"{tmp_path}/models/mymodel/": f"{tmp_path}/models/my-model",
    }.items():  # fmt: skip
        with pytest.raises(SourceError, match=f"did you mean '{meant}'"):
            open_source(typed)
    with pytest.raises(SourceError, match="a model can be a local folder"):
        open_source("nothing-like-it")


def test_an_adapter_by_its_id_is_fetched_without_pickles(remote: Hub, tiny_folder: Callable[[str], Path]) -> None:
    write(remote.repo, llama_factors())
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "model.safetensors", "evil.py"):
        (remote.repo / name).write_bytes(b"large")
    both = with_adapter(tiny_folder("llama"), "org/name")
    assert sorted(remote.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    assert any("the adapter name (LoRA, rank 4" in line for line in both.merged)
