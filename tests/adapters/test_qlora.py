"""Adapters trained on packed weights: gradients beside those of the dense layer, memory, and peft from attaching to loading again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from handmade_adapters import llama_factors, write
from lowbit.errors import WeightError
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import packed_weights
from tiny import TINY, save_tiny

FORMATS = ("int4:g32", "int8:channel", "nf4:g64", "mxfp4", "uint4:g64:zero=fp16", "int3:g32")
IDS = torch.tensor([[1, 5, 9, 20, 3, 7]])
Packed = Callable[[str, str], Path]


def layer(fmt: str, bias: bool = False) -> tuple[nn.Linear, Tensor]:
    """A linear layer with a packed weight, and that weight dense."""
    torch.manual_seed(0)
    made = nn.Linear(128, 96, bias=bias)
    packed = PackedWeight.of(lowbit.quantize_tensor(made.weight.detach(), fmt))
    del made._parameters["weight"]
    made._modules["weight"] = packed
    return made, packed.dequantize()


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_are_those_of_the_dense_layer(fmt: str) -> None:
    linear, dense = layer(fmt, bias=True)
    x, a, b = (torch.randn(*size, requires_grad=True) for size in ((5, 128), (4, 128), (96, 4)))
    up = torch.randn(5, 96)
    y = linear(x) + 2 * F.linear(F.linear(x, a), b)
    y.backward(up)
    found = [t.grad.clone() for t in (x, a, b, linear.bias)]  # type: ignore[union-attr]
    for t in (x, a, b, linear.bias):
        t.grad = None
    F.linear(x, dense + 2 * b @ a, linear.bias).backward(up)
    for mine, other in zip(found, (x, a, b, linear.bias), strict=True):
        assert torch.linalg.vector_norm(mine - other.grad) < 1e-5 * torch.linalg.vector_norm(other.grad)  # type: ignore[operator]


@pytest.mark.parametrize("fmt", FORMATS)
def test_nothing_dense_is_kept_for_the_way_back(fmt: str) -> None:
    linear, dense = layer(fmt)
    kept: list[Tensor] = []
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x)
    assert sum(t.nbytes for t in kept) < dense.nbytes / 4
    y.sum().backward()
    assert x.grad is not None


def test_what_would_train_a_packed_weight_says_so(packed_folder: Packed) -> None:
    model = lowbit.load(packed_folder("llama", "int4:g32")).train()
    with pytest.raises(WeightError, match="takes no other values; `lowbit merge BASE ADAPTER -o OUT`"):
        model.lm_head.weight.data += 1
    for _, weight in packed_weights(model):
        weight.requires_grad_(True)
    with pytest.raises(WeightError, match="is not trained; train an adapter"):
        model(input_ids=IDS)
    model.eval()(input_ids=IDS)


def attached(model: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))


def opened(how: str, folder: Path) -> Any:
    import transformers

    return lowbit.load(folder) if how == "load" else transformers.AutoModelForCausalLM.from_pretrained(folder)


def steps(model: Any, count: int = 10) -> list[float]:
    """Losses of a few steps of training."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _nothing(folder: Path) -> Path:
    """An adapter that changes nothing."""
    return write(folder / "nothing", llama_factors(size=0.0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["load", "from_pretrained"])
@pytest.mark.parametrize("recipe", ["int4:g32", "nf4", "int8:channel,a=int8:token", "mxfp4"])
def test_from_attaching_to_merging(how: str, recipe: str, packed_folder: Packed, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = packed_folder("llama", recipe)
    model = attached(opened(how, base), target_modules="all-linear")
    before = {name: weight.qtensor().dequantize() for name, weight in packed_weights(model)}
    with torch.no_grad():
        plain = opened(how, base)(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, plain)
    losses = steps(model)
    in_float = steps(attached(lowbit.with_adapter(base, _nothing(tmp_path)).load_float(), target_modules="all-linear"))
    drop = in_float[0] - in_float[-1]
    assert drop > 0.1 and abs(losses[-1] - in_float[-1]) < 0.05 * drop
    assert all(torch.equal(before[name], weight.qtensor().dequantize()) for name, weight in packed_weights(model))
    model.eval().save_pretrained(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) < 40_000
    with torch.no_grad():
        apart = model(input_ids=IDS).logits
        again = peft.PeftModel.from_pretrained(opened(how, base), tmp_path / "adapter")(input_ids=IDS).logits
        assert torch.equal(again, apart)
        if ",a=" not in recipe:  # rounded inputs are no part of the float model
            merged = lowbit.with_adapter(base, tmp_path / "adapter").load_float()(input_ids=IDS).logits
            assert torch.linalg.vector_norm(merged - apart) < 1e-3 * torch.linalg.vector_norm(apart - plain)


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_a_whole_model(packed_folder: Packed) -> None:
    pytest.importorskip("peft")
    base = packed_folder("llama", "int4:g32")
    packed = attached(lowbit.load(base, kernel="expand"), target_modules="all-linear", init_lora_weights=False)
    dense = attached(lowbit.dequantize(lowbit.load(base)), target_modules="all-linear", init_lora_weights=False)
    for model in (packed, dense):
        model(input_ids=IDS, labels=IDS).loss.backward()
    mine, theirs = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (packed, dense))
    assert mine.keys() == theirs.keys() and len(mine) == 28
    for name, grad in mine.items():
        assert torch.linalg.vector_norm(grad - theirs[name]) < 1e-4 * torch.linalg.vector_norm(theirs[name]), name


@pytest.mark.filterwarnings("ignore")
def test_checkpointing_gives_the_same_gradients(packed_folder: Packed) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        model = lowbit.load(packed_folder("llama", "int4:g32"))
        if checkpointing:
            model = peft.prepare_model_for_kbit_training(model)
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model = attached(model, target_modules=["q_proj", "down_proj"], init_lora_weights=False).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == len(found[1]) == 8
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_peft_does_not_lose_an_adapter_by_merging(packed_folder: Packed) -> None:
    pytest.importorskip("peft")
    model = attached(
        lowbit.load(packed_folder("llama", "int4:g32")), target_modules=["q_proj"], init_lora_weights=False
    )
    with pytest.raises(WeightError, match="lowbit merge BASE ADAPTER"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_under_an_adapter(packed_folder: Packed, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = packed_folder("llama", "int4:g32")
    model = attached(lowbit.load(base), target_modules=["embed_tokens", "q_proj"])
    losses = steps(model)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")  # beside which peft puts the packed embedding
    merged = lowbit.with_adapter(base, tmp_path / "adapter").load_float()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers(packed_folder: Packed, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    model = attached(lowbit.load(packed_folder("llama", "int4:g32")), target_modules="all-linear")
    data: Any = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 8
    how: dict[str, Any] = {
        "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True,
    }  # fmt: skip
    Trainer(model, TrainingArguments(str(tmp_path / "runs"), max_steps=4, **how), train_dataset=data).train()
    whole = copy.deepcopy(model.state_dict())
    model = attached(lowbit.load(packed_folder("llama", "int4:g32")), target_modules="all-linear")
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "runs"), max_steps=4, **how), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items() if "lora_" in name)


@pytest.mark.filterwarnings("ignore")
def test_text_of_a_loaded_model_is_that_of_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an engine was made of the weights before the adapter was put on them."""
    make = TINY["llama"]

    def wide() -> Any:
        config = make()
        config.hidden_size, config.head_dim = 64, 16
        return config

    monkeypatch.setitem(TINY, "llama", wide)
    save_tiny("llama", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int4:g32", tmp_path / "packed")
    model = lowbit.load(tmp_path / "packed")
    before = model.generate("the hen", max_new_tokens=6).tokens
    tuned = attached(model, target_modules="all-linear", init_lora_weights=False, lora_alpha=400).eval()
    ids = model.generate.generator().tokenizer.encode("the hen")
    with torch.no_grad():
        wanted = tuned.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    after = model.generate("the hen", max_new_tokens=6).tokens
    assert list(after) == wanted.tolist() != list(before)
