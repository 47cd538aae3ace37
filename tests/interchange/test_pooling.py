"""How a folder makes embeddings, beside the formulas written out."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import SourceError
from lowbit.interchange.pooling import Normalize, Pooling, pooling_of

H = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FORMULAS = {
    "cls": lambda: [H[0, j] for j in range(5)],
    "lasttoken": lambda: [H[6, j] for j in range(5)],
    "max": lambda: [max(H[i, j] for i in range(7)) for j in range(5)],
    "mean": lambda: [sum(H[i, j] for i in range(7)) / 7 for j in range(5)],
    "mean_sqrt_len_tokens": lambda: [sum(H[i, j] for i in range(7)) / 7**0.5 for j in range(5)],
    "weightedmean": lambda: [sum((i + 1) * H[i, j] for i in range(7)) / 28 for j in range(5)],
}
OLD = {
    "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip


def write(folder: Path, pooling: dict[str, Any], *more: tuple[str, str], longest: int | None = None) -> Path:
    kinds = [
        ("sentence_transformers.models.Transformer", ""),
        ("sentence_transformers.models.Pooling", "1_Pooling"),
        *more,
    ]
    parts = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(kinds)]
    folder.mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if longest is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return folder


def read(folder: Path) -> Pooling:
    found = pooling_of(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("mode", FORMULAS)
def test_modes_are_their_formulas(mode: str, tmp_path: Path) -> None:
    wanted = torch.tensor(FORMULAS[mode](), dtype=torch.float64)
    switches = {name: kind == mode for kind, name in OLD.items()}
    old = read(write(tmp_path / "old", {"word_embedding_dimension": 5, **switches}))
    new = read(write(tmp_path / "new", {"embedding_dimension": 5, "pooling_mode": mode}, longest=64))
    for found in (old, new):
        assert found.modes == (mode,) and torch.allclose(found(H), wanted, atol=1e-12)
    assert old.longest is None and new.longest == 64


def test_several_modes_stand_behind_one_another(tmp_path: Path) -> None:
    switches = {OLD["mean"]: True, OLD["cls"]: True}
    found = read(write(tmp_path / "a", switches))
    assert found.modes == ("cls", "mean") and torch.equal(found(H), torch.cat([H[0], H.mean(0)]))
    assert read(write(tmp_path / "b", {"pooling_mode": ["mean", "cls"]})).modes == ("mean", "cls")


def test_what_comes_after_pooling(tmp_path: Path) -> None:
    """A linear layer with tanh, then length 1, as LaBSE has them."""
    chain = [("sentence_transformers.models.Dense", "2_Dense"), ("x.Normalize", "3_Normalize")]
    folder = write(tmp_path / "m", {"pooling_mode": "cls"}, *chain)
    weight, bias = torch.randn(3, 5), torch.randn(3)
    (folder / "2_Dense").mkdir()
    config = {
        "in_features": 5,
        "out_features": 3,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    found = read(folder)
    y = torch.tanh(weight.double() @ H[0] + bias.double())
    assert torch.allclose(found(H), y / y.norm(), atol=1e-6)
    assert found.words == "first token, a linear layer, scaled to length 1"


def test_a_part_that_is_not_known_ends_the_chain(tmp_path: Path) -> None:
    found = read(write(tmp_path / "m", {"pooling_mode": "mean"}, ("x.Normalize", ""), ("mine.Whitening", "3_W")))
    assert isinstance(found.after[0], Normalize) and found.unknown == "Whitening"
    assert found.words == "mean over tokens, scaled to length 1, without Whitening, which lowbit does not know"


def test_folders_without_embeddings(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) is None
    (tmp_path / "modules.json").write_text('[{"type": "x.CLIPModel", "path": ""}]')
    assert pooling_of(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "7", "[1, 2]", '{"a": 1}', '[{"path": "1_Pooling"}]'])
def test_damaged_files_are_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(SourceError, match=r"modules.json.*copy the folder again"):
        pooling_of(tmp_path)


def test_any_damage_is_one_sentence(tmp_path: Path) -> None:
    """JSON that is damaged at random places: read as something, or refused."""
    sys.path.append(str(Path(__file__).parents[1] / "fuzz"))
    from damage import damaged_json, json_bytes

    folder = write(
        tmp_path / "m", {"pooling_mode": "mean", "embedding_dimension": 5}, ("x.Dense", "2_Dense"), longest=64
    )
    files = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
    whole = {name: (folder / name).read_bytes() for name in files}
    rng = random.Random(3)
    for _ in range(400):
        name = rng.choice(files)
        (folder / name).write_bytes(json_bytes(damaged_json(json.loads(whole[name]), rng)))
        with contextlib.suppress(SourceError):
            assert pooling_of(folder) is None or read(folder)(H).dim() == 1
        (folder / name).write_bytes(whole[name])


def test_a_mode_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="pooling_mode 'median' is none of cls, max"):
        pooling_of(write(tmp_path / "m", {"pooling_mode": "median"}))


def test_no_file_outside_of_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"pooling_mode": "max"}')
    folder = tmp_path / "m"
    folder.mkdir()
    parts = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../"}]
    (folder / "modules.json").write_text(json.dumps(parts))
    assert read(folder).modes == ("mean",)
