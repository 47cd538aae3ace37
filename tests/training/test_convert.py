"""A fake-quantized model and what is made of it give the same bits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import RecipeError, WeightError
from lowbit.nn.swap import packed_weights
from lowbit.training.attaching import quantizers
from tiers import mostly_nightly
from tiny import save_tiny, tiny_model

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
TEXT = [torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def train(model: Any, steps: int = 2, rate: float = 1e-3) -> list[float]:
    """A few steps on one batch; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **more).logits


def loaded(folder: Path) -> Any:
    """By transformers, with the reference kernel: a product in float32 of what the codes stand for."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    for build in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM):
        try:
            model = build.from_pretrained(folder)
        except ValueError:
            continue
        for _, weight in packed_weights(model):
            weight.dispatcher.only = "expand"
        return model
    raise AssertionError(f"no class loads {folder}")


def check(model: Any, folder: Path) -> Any:
    """Converted in memory and through the folder, the model answers the same bits; the result of converting."""
    wanted = logits(model)
    done = lowbit.convert(model, folder)
    assert torch.equal(logits(loaded(folder)), wanted)
    for _, weight in packed_weights(done.model):
        weight.dispatcher.only = "expand"
    assert torch.equal(logits(done.model), wanted)
    return done


WEIGHTS = [
    "int4:g32", "int3:g16:s=fp32", "int8:channel", "uint4:g32:asym", "uint4:g32:zero=fp16", "uint4:g32:min=fp16", "q4_k",
    "int4:g16:s=(int6:g16)", "nf4:g32", "nf4:g16:s=(uint8:g16:asym)", "mxfp4", "nvfp4", "kmeans3:channel", "kmeans4:g32:cb=tensor",
    "ternary:tensor", "absmean@ternary:tensor", "binary:channel", "fp8:channel", "e5m2:tensor", "int4:4x16",
]  # fmt: skip


SCALES = ["learned", "recomputed", "fixed"]


@pytest.mark.parametrize("recipe, scales", mostly_nightly(WEIGHTS, SCALES, every=lambda r, s: s == 0 or r % 5 == s))
def test_every_format_of_weights_is_converted_to_the_last_bit(recipe: str, scales: Any, tmp_path: Path) -> None:
    model = lowbit.prepare_qat(tiny_model("llama-tied"), recipe, scales=scales)
    start = logits(model)
    train(model)
    done = check(model, tmp_path / "out")
    assert not torch.equal(logits(model), start)
    assert done.plan.linear_bits_per_weight < 10 and done.report.tuning == {"method": "qat", "how": f"scales {scales}"}


INPUTS = [
    "int4:g32,a=int8:token", "int4:g32,a=int8:g16", "int8:channel,a=uint8:token:asym", "int8:channel,a=int8:token:outliers=2",
    "int8:channel,a=e4m3:token", "int8:channel,a=mxfp4", "int8:channel,a:*.down_proj=int8:token",
]  # fmt: skip
STATIC = [
    "absmax@int8:channel,a=int8:tensor:static", "absmax@int8:channel,a=uint8:tensor:asym:static",
    "absmax@int8:channel,a=mse@int8:tensor:static:outliers=2,fallback=never", "smooth@int8:channel,a=int8:tensor:static",
]  # fmt: skip


@pytest.mark.parametrize("recipe", INPUTS)
def test_every_kind_of_dynamic_inputs_is_converted_to_the_last_bit(recipe: str, tmp_path: Path) -> None:
    model = lowbit.prepare_qat(tiny_model("llama"), recipe)
    train(model)
    check(model, tmp_path / "out")


@pytest.mark.parametrize("ranges", ["lsq", "pact", "fixed"])
@pytest.mark.parametrize("recipe", STATIC)
def test_every_kind_of_static_inputs_is_converted_to_the_last_bit(recipe: str, ranges: Any, tmp_path: Path) -> None:
    model = lowbit.prepare_qat(tiny_model("llama"), recipe, ranges=ranges, calibration=TEXT)
    before = {n: i.parts() for n, _, i in quantizers(model) if i is not None}
    train(model)
    check(model, tmp_path / "out")
    moved = [
        not torch.equal(i.parts()["input_scale"], before[n]["input_scale"])
        for n, _, i in quantizers(model)
        if i is not None and i.inputs.static
    ]
    assert moved and any(moved) == (ranges != "fixed")


@pytest.mark.parametrize(
    "arch",
    ["gpt2", "falcon", "mixtral", "qwen3-moe", "t5", "bloom", "mamba", "bert", "gemma3", "opt", "phi", "gpt-neox"],
)
def test_every_architecture_is_converted_to_the_last_bit(arch: str, tmp_path: Path) -> None:
    model = lowbit.prepare_qat(tiny_model(arch), "int4:g32")
    train(model)
    check(model, tmp_path / "out")


@pytest.mark.parametrize("arch", ["gpt2", "mamba"])
def test_training_computes_with_rounded_weights_where_modules_read_those_of_others(arch: str) -> None:
    model = lowbit.prepare_qat(tiny_model(arch), "int4:g32").train()
    plain = lowbit.dequantize(copy.deepcopy(lowbit.convert(model).model), torch.float32).train()
    for each in (model, plain):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    assert torch.allclose(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "recipe", ["gptq@int4:g32", "awq@int4:g32", "w4", "gptq+distill(steps=2)@int4:g32", "gptq@q4_k"]
)
def test_training_starts_where_calibration_ended(recipe: str, tmp_path: Path) -> None:
    """In the first forward the codes and scales are those that were found with text, to the last bit."""
    found = lowbit.quantize(tiny_model("llama-tied"), recipe, calibration=TEXT)
    found.save(tmp_path / "calibrated")
    wanted = logits(loaded(tmp_path / "calibrated"))
    float_model = tiny_model("llama-tied")
    starts = {
        "text": lowbit.prepare_qat(tiny_model("llama-tied"), recipe, calibration=TEXT),
        "result": lowbit.prepare_qat(float_model, start=found),
        "folder": lowbit.prepare_qat(tmp_path / "calibrated"),
        "packed": lowbit.prepare_qat(lowbit.load(tmp_path / "calibrated")),
    }
    for name, model in starts.items():
        assert torch.equal(logits(model), wanted), name
        assert all(p.requires_grad for p in model.parameters())
    assert (starts["result"] is float_model) == (recipe != "awq@int4:g32")
    train(starts["text"])
    check(starts["text"], tmp_path / "out")


def test_float_weights_stay_where_they_round_to_the_codes_of_the_start() -> None:
    found = lowbit.quantize(tiny_model("llama"), "gptq@int4:g32", calibration=TEXT)
    model, float_model = lowbit.prepare_qat(tiny_model("llama"), start=found), tiny_model("llama")
    same = model.model.layers[0].mlp.up_proj.weight == float_model.model.layers[0].mlp.up_proj.weight
    assert 0.5 < float(same.float().mean()) < 1


@pytest.mark.parametrize("recipe", ["rotate@int4:g32", "fold@int4:g32"])
def test_transformed_models_train_and_are_converted(recipe: str, tmp_path: Path) -> None:
    given = tiny_model("llama-tied")
    model = lowbit.prepare_qat(given, recipe)
    assert model is not given
    assert torch.equal(logits(model), logits(_with_reference(lowbit.quantize(given, recipe).model)))
    train(model)
    check(model, tmp_path / "out")


def _with_reference(model: Any) -> Any:
    for _, weight in packed_weights(model):
        weight.dispatcher.only = "expand"
    return model


@pytest.mark.parametrize("scales", ["learned", "recomputed", "fixed"])
@pytest.mark.parametrize(
    "recipe",
    ["int4:g32", "w3", "nf4", "absmean@ternary:channel", "search@int4:g32,embed=keep,*.layers.0.*=int8:channel"],
)
def test_without_training_the_model_is_that_of_quantize(recipe: str, scales: Any) -> None:
    packed = lowbit.quantize(tiny_model("llama-tied"), recipe, effort="none" if recipe == "w3" else "auto").model
    trained = lowbit.convert(lowbit.prepare_qat(tiny_model("llama-tied"), recipe, scales=scales)).model
    for (name, a), (_, b) in zip(packed_weights(packed), packed_weights(trained), strict=True):
        assert a.format == b.format, name
        assert torch.equal(a.dequantize(torch.float32), b.dequantize(torch.float32)), name


def test_training_lowers_the_loss_and_converting_changes_nothing() -> None:
    model = lowbit.prepare_qat(tiny_model("llama-tied"), "int2:g32")
    losses = train(model, 30, 1e-2)
    assert losses[-1] < 0.6 * losses[0]
    before = {n: p.clone() for n, p in model.state_dict().items()}
    packed = lowbit.convert(model).model
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    kept = packed.model.norm.weight.detach().clone()
    train(model, 1, 1e-1)
    assert torch.equal(packed.model.norm.weight, kept)  # it shares no memory


def test_a_plain_module_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 33))

    x = torch.randn(5, 64)
    model = lowbit.prepare_qat(network(), "int3:g16,a=int8:token")
    y = model(x)
    y.square().sum().backward()
    lowbit.convert(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(_with_reference(lowbit.load_into(network(), tmp_path / "out"))(x), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        other[0].weight.data.zero_()
    assert torch.equal(model(x), y)
    compiled = torch.compile(model, backend="aot_eager")
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    z = compiled(x)
    z.square().sum().backward()
    assert torch.equal(z, y) and all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_ties_stay_ties_and_are_saved_once() -> None:
    model = lowbit.prepare_qat(tiny_model("llama-tied"), "int4:g32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [n for n, _ in model.named_parameters() if "embed_tokens" in n or "lm_head" in n]
    assert names == ["model.embed_tokens.weight", "model.embed_tokens.weight_quantizer.range"]
    assert [n for n in model.state_dict() if "lm_head" in n] == ["lm_head.weight"]


def test_parameters_are_back_after_a_forward_that_failed() -> None:
    model = lowbit.prepare_qat(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)), "int4:g16")
    weight = model[0].weight
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 31))
    assert model[0].weight is weight and isinstance(model[1].weight, nn.Parameter)
    assert model(torch.zeros(2, 32)).shape == (2, 16)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = lowbit.prepare_qat(nn.Sequential(nn.Linear(32, 16)), "int4:g16")
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(WeightError, match="0.weight"):
        model(torch.zeros(2, 32))
    assert isinstance(model[0].weight, nn.Parameter)


def test_what_contradicts_itself_or_would_be_ignored_is_an_error(tmp_path: Path) -> None:
    found = lowbit.quantize(tiny_model("llama"), "int4:g32")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("int4:g32", {"scales": "learnt"}, "did you mean 'learned'"),
        ("int4:g32", {"ranges": "clip"}, "known: lsq, pact, fixed"),
        ("int4:g32", {"ranges": "pact"}, "is for static inputs"),
        ("int4:g32", {"start": found, "scales": "recomputed"}, "would ignore those of the start"),
        ("int4:g32", {"start": found, "calibration": TEXT}, "calibration would be ignored"),
        ("int3:g32", {"start": found}, "leave the recipe out"),
        ("gptq@int4:g32", {"scales": "recomputed", "calibration": TEXT}, "would ignore what gptq"),
        ("int4:g32,embed=keep,*=keep", {}, "every tensor is kept"),
    ]
    for recipe, options, message in cases:
        with pytest.raises(RecipeError, match=message):
            lowbit.prepare_qat(tiny_model("llama"), recipe, **options)
    with pytest.raises(RecipeError, match="is its own start"):
        lowbit.prepare_qat(found, start=found)
    model = lowbit.prepare_qat(tiny_model("llama"), "int4:g32")
    with pytest.raises(RecipeError, match="prepared for training already"):
        lowbit.prepare_qat(model, "int4:g32")
    with pytest.raises(RecipeError, match=r"not a model that lowbit\.prepare_qat gave"):
        lowbit.convert(tiny_model("llama"))


def test_a_model_inside_a_wrapper_is_found() -> None:
    wrapper = nn.ModuleDict({"module": lowbit.prepare_qat(nn.Sequential(nn.Linear(32, 16)), "int4:g16")})
    assert [n for n, _ in packed_weights(lowbit.convert(wrapper).model)] == ["0.weight"]


def test_a_bfloat16_model_computes_what_its_packed_form_computes() -> None:
    model = lowbit.prepare_qat(tiny_model("llama").to(torch.bfloat16), "int4:g32")
    train(model)
    assert torch.equal(_with_reference(lowbit.convert(model).model)(input_ids=IDS).logits, logits(model))


def test_convert_is_a_function_and_the_room_of_that_name_a_package() -> None:
    import inspect

    import lowbit.convert.exporting

    assert callable(lowbit.convert) and callable(lowbit.convert.exporting.export)
    assert list(inspect.signature(lowbit.convert).parameters) == ["model", "out", "tokenizer", "overwrite"]


def saved_bytes(model: Any) -> int:
    """Bytes that autograd keeps from forward to backward, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        place = t.untyped_storage()
        if place.data_ptr() not in own:
            found[place.data_ptr()] = place.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(input_ids=IDS[:1, :2], labels=IDS[:1, :2]).loss
        loss.backward()
    return sum(found.values())


@pytest.mark.parametrize("scales", ["learned", "recomputed", "fixed"])
def test_training_keeps_one_more_copy_of_the_weights_and_no_second(scales: Any) -> None:
    plain = saved_bytes(tiny_model("llama").train())
    model = lowbit.prepare_qat(tiny_model("llama"), "int4:g32", scales=scales).train()
    weights = sum(4 * p.numel() for n, p in model.named_parameters() if n.endswith(".weight"))
    assert saved_bytes(model) - plain < 1.1 * weights


def test_scales_train_alone_where_weights_are_frozen() -> None:
    model = lowbit.prepare_qat(tiny_model("llama"), "int3:g32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_quantizer.range"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model, 8, 1e-2)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.endswith("_quantizer.range") for n in moved)


@pytest.mark.parametrize("by", ["name", "start", "packed"])
def test_the_tokenizer_of_a_folder_goes_into_the_trained_one(by: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int4:g32", tmp_path / "packed")
    model = {
        "name": lambda: lowbit.prepare_qat(tmp_path / "float", "int4:g32"),
        "start": lambda: lowbit.prepare_qat(tiny_model("llama"), start=tmp_path / "packed"),
        "packed": lambda: lowbit.prepare_qat(tmp_path / "packed"),
    }[by]()
    lowbit.convert(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
