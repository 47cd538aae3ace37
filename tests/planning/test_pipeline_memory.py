"""A module in memory is quantized beside itself: the original stays as it was, and what is saved is the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.errors import LowbitError, OutputError, SourceError
from lowbit.kernels.dispatch import Dispatcher
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import packed_weights
from tiny import TINY, save_tiny, tiny_model, tiny_tokenizer


class Experts(nn.Module):
    """A stack of matrices [experts, out, in] used by index."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 48, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(x @ self.up[i].T for i in range(3))


class Custom(nn.Module):
    """No config, no transformers: a Linear, a Conv1D, an embedding with its head tied, experts, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.first = nn.Linear(32, 48)
        self.second = Conv1D(32, 48)
        self.experts = Experts()
        self.third = nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.second(torch.relu(self.first(x)))
        return self.head(self.third(self.experts(x)) * self.scale)


@pytest.fixture()
def custom() -> Custom:
    torch.manual_seed(0)
    return Custom().eval()


IDS = torch.arange(24).view(2, 12)


def test_the_original_is_not_touched(custom: Custom) -> None:
    state = {name: (tensor, tensor.clone()) for name, tensor in custom.state_dict(keep_vars=True).items()}
    before = custom(IDS)
    result = lowbit.quantize(custom, "w4")
    result.model.to(torch.bfloat16)
    for name, tensor in custom.state_dict(keep_vars=True).items():
        assert tensor is state[name][0] and torch.equal(tensor, state[name][1])
        assert tensor.dtype == torch.float32
    assert torch.equal(custom(IDS), before) and not list(packed_weights(custom))


def test_what_is_kept_is_shared_and_what_is_packed_is_the_solver_s(custom: Custom) -> None:
    result = lowbit.quantize(custom, "absmax@int8:g32")
    model = result.model
    assert model is result.model and model is not custom
    packed = dict(packed_weights(model))
    assert set(packed) == {"embed.weight", "first.weight", "second.weight", "experts.up", "third.weight"}
    assert model.head.weight is model.embed.weight
    for name in ("conv.weight", "conv.bias", "first.bias"):
        assert model.get_parameter(name).data_ptr() == custom.get_parameter(name).data_ptr()
    whole = copy.deepcopy(custom)
    for name, weight in packed.items():
        recipe = "absmax@int8:g32" if name != "embed.weight" else "absmax@int8:channel"
        x = custom.get_parameter(name).detach()
        dense = lowbit.quantize_tensor(x.T.contiguous() if name == "second.weight" else x, recipe).dequantize()
        assert torch.equal(weight.dequantize(), dense.T if name == "second.weight" else dense), name
        whole.get_parameter(name).data.copy_(weight.dequantize())
    with torch.no_grad():
        expected = whole(IDS)
        assert float((model(IDS) - expected).norm() / expected.norm()) < 2e-4  # 15 bits of activations
        for weight in packed.values():
            weight.dispatcher = Dispatcher("expand")
        assert float((model(IDS) - expected).norm() / expected.norm()) < 1e-5
    assert result.report.coverage == result.plan.coverage > 0.7
    errors = {layer.name: layer.error for layer in result.report.layers}
    for name, weight in packed.items():
        x = custom.get_parameter(name).detach()
        assert errors[name] == pytest.approx(float((x - weight.dequantize()).norm() / x.norm()), rel=1e-4)


def test_a_module_without_config_is_saved_but_names_what_it_lacks(custom: Custom, tmp_path: Path) -> None:
    result = lowbit.quantize(custom, "w8")
    out = result.save(tmp_path / "out")
    from safetensors.torch import load_file

    state = load_file(out / "model.safetensors")
    for name, weight in packed_weights(result.model):
        for part, tensor in weight.qtensor().parts().items():
            assert torch.equal(state[f"{name}.{part}"], tensor)
    assert not (out / "config.json").exists() and (out / "lowbit.json").is_file()
    with pytest.raises(SourceError, match="config.json"):
        lowbit.load(out)


@pytest.mark.parametrize("name", TINY)
def test_in_memory_and_from_file_give_the_same(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "float")
    files = lowbit.quantize(tmp_path / "float", "search@int4:g32", tmp_path / "files")
    result = lowbit.quantize(model, "search@int4:g32", tokenizer=tiny_tokenizer())
    assert type(result.model) is type(model)
    loaded = dict(packed_weights(files.model))
    mine = dict(packed_weights(result.model))
    assert mine.keys() == loaded.keys()
    for key, weight in mine.items():
        assert torch.equal(weight.dequantize(), loaded[key].dequantize())
    result.save(tmp_path / "memory")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("memory", "files")]
    assert weights[0] == weights[1]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "memory").get_vocab() == tiny_tokenizer().get_vocab()


def test_a_packed_model_in_memory_is_like_a_loaded_one(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    packed = lowbit.quantize(model, "w4").model
    assert packed.config is not model.config and not hasattr(model.config, "quantization_config")
    packed.tie_weights()
    assert isinstance(packed.lm_head.weight, PackedWeight)
    packed.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again.eval()(IDS).logits, packed(IDS).logits)
    dense = lowbit.dequantize(packed)
    assert not list(packed_weights(dense)) and dense.lm_head.weight is dense.model.embed_tokens.weight
    assert list(packed_weights(again))


def test_saving_again_and_over_something(custom: Custom, tmp_path: Path) -> None:
    result = lowbit.quantize(custom, "w8")
    first = result.save(tmp_path / "a")
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    with pytest.raises(OutputError, match="not empty"):
        result.save(tmp_path / "a")
    result.save(tmp_path / "a", overwrite=True)
    result.save(tmp_path / "b")
    names = {p.name for p in first.iterdir()}
    assert names == {p.name for p in (tmp_path / "b").iterdir()}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_a_result_in_a_temporary_folder_lives_as_long_as_it_does(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "float")
    result = lowbit.quantize(tmp_path / "float", "w8")
    folder = result.folder
    assert folder is not None and (folder / "model.safetensors").is_file()
    saved = result.save(tmp_path / "out")
    assert (saved / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        result.save(saved)
    del result
    assert not folder.exists() and not folder.with_name(folder.name + ".partial").exists()


def test_a_nan_in_memory_is_named(custom: Custom) -> None:
    with torch.no_grad():
        custom.second.weight[3, 4] = float("nan")
    with pytest.raises(LowbitError, match=r"'second.weight' has 1 NaN"):
        lowbit.quantize(custom, "w4")


def test_a_module_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(LowbitError, match="nothing in"):
        lowbit.quantize(nn.Sequential(nn.LayerNorm(8)), "w4")


def test_a_plain_module_is_loaded_back(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(3)
        first, last = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64, bias=False)
        return torch.nn.Sequential(torch.nn.Embedding(40, 64), first, torch.nn.LayerNorm(96), last, torch.nn.Tanh())

    ids = torch.arange(40)[None]
    result = lowbit.quantize(make(), "w4")
    result.save(tmp_path / "plain")
    fresh = make()
    torch.nn.init.zeros_(fresh[2].weight)
    loaded = lowbit.load_into(fresh, tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(loaded(ids), result.model(ids))
    with pytest.raises(SourceError, match="no module|does not fit|no parameter"):
        lowbit.load_into(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "plain")
