"""Methods at work: each trace against a loop of its own in float64, and its results against the method itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import lowbit
from lowbit.errors import RecipeError, WeightError
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.report.at_work.case import Case, made_up
from lowbit.report.at_work.feedback import EXAMPLE, steps
from lowbit.report.at_work.kmeans import rounds, start
from lowbit.report.at_work.trace import Trace, registered
from lowbit.report.explain import Explanation, explain, parse_array
from lowbit.solvers.methods.kmeans import lloyd
from lowbit.solvers.ranges.estimator import estimators
from lowbit.solvers.registry import methods
from lowbit.solvers.rounding import with_values
from lowbit.solvers.stats import StatsBuilder

X = "[[1, 2, -1, 0.5], [0.5, 3, -1.5, 0], [-1, -2, 1, 0.5], [2, 4, -1, 1], [0, 1, 0, -1]]"
W = "[[0.31, -0.14, 0.52, -0.68], [0.23, 0.07, -0.45, 0.36]]"


def trace_of(found: Explanation, name: str) -> Trace:
    return next(t for t in found.at_work if t.method.startswith(name))


def listing(trace: Trace, name: str) -> dict[str, list]:
    part = trace.to_dict()[name]
    return {head: [row[i] for row in part["rows"]] for i, head in enumerate(part["columns"])}


def case_of(recipe: str, weight: torch.Tensor, x: torch.Tensor) -> Case:
    wanted = Recipe.parse(recipe)
    return Case.of(weight, x, wanted, wanted.format, True)


@pytest.mark.parametrize("name", [*PRESETS, *methods(), *estimators()])
def test_every_name_that_recipes_lists_is_shown_and_fits_80_columns(name: str) -> None:
    found = explain(name)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    json.dumps(found.to_dict(), allow_nan=False)
    recipe = Recipe.parse(PRESETS[name].text) if name in PRESETS else None
    if recipe is not None and recipe.transforms:
        assert f"{recipe.transforms[0]} at work" in text
    if name in methods() and registered(lowbit_call(name)) is not None:
        assert f"{name} at work" in text


def lowbit_call(name: str):
    from lowbit.solvers import Call

    return Call(name)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.calibrated])
def test_given_inputs_mean_the_recipe_with_calibration_text(name: str) -> None:
    found = explain(EXAMPLE, name, inputs=made_up(6))
    assert found.at_work and found.recipe.endswith(str(Recipe.parse(name).calibrated()))


@pytest.mark.parametrize("name", ["gptq@int4:g64", "qronos@int4:g32", "gptaq@int4:g32", "awq", "smoothquant", "rotate"])
def test_the_method_is_no_worse_than_round_to_nearest_on_its_own_example(name: str) -> None:
    found = explain(name)
    errors = trace_of(found, name.partition("@")[0].replace("smoothquant", "smooth")).outcome.errors
    assert errors[-1][1] < 0.6 * errors[0][1]


@pytest.mark.parametrize("name", ["hqq", "mse", "search", "kmeans"])
def test_a_fit_is_no_worse_than_the_whole_range_on_its_own_example(name: str) -> None:
    errors = trace_of(explain(name), name).outcome.errors
    assert errors[-1][1] < 0.9 * errors[0][1]


def test_gptq_columns_are_those_of_a_loop_in_float64() -> None:
    """GPTQ, Algorithm 1, written with an explicit inverse that shrinks by one column at a time."""
    weight, x = parse_array(W), parse_array(X)
    case = case_of("gptq@int4:g64", weight, x)
    found = steps(case, case.recipe.solver)
    h = (x.double().T @ x.double() / len(x)).numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(4)
    order = sorted(range(4), key=lambda k: -float(h[k, k]))
    scale = found.start.scales()[0, :, 0].double().numpy()
    w, left = weight.double().numpy().copy(), list(order)
    for k in order:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        at = left.index(k)
        now = w[:, k].copy()
        np.testing.assert_allclose(found.now[:, k].numpy(), now, rtol=2e-3, atol=2e-5)
        q = np.clip(np.round(now / scale), -8, 7) * scale
        np.testing.assert_allclose(found.value[:, k].numpy(), q, rtol=1e-5, atol=1e-6)
        for j in left:
            if j != k:
                move = -(now - q) * inverse[at, left.index(j)] / inverse[at, at]
                np.testing.assert_allclose(found.moves[:, k, j].numpy(), move, rtol=5e-3, atol=2e-5)
                w[:, j] += move
        left.remove(k)


@pytest.mark.parametrize("recipe", ["gptq@int4:g64", "gptq(order=0)@uint3:g2:min=fp16", "gptaq@int4:g32",
                                    "qronos@int4:g32", "gptq@nf4:g64:s=(uint8:g256:s=fp32)"])  # fmt: skip
def test_feedback_stores_what_the_solver_stores(recipe: str) -> None:
    weight, x = parse_array(W), parse_array(X)
    trace = trace_of(explain(weight, recipe, inputs=x), recipe.partition("@")[0])
    case = case_of(recipe, weight, x)
    wanted = case.recipe
    builder = StatsBuilder(4, drift=True)
    builder.add(case.inputs, x)
    q = wanted.solver(weight, wanted.format, wanted.fit_for(wanted.format), builder.stats())
    assert trace.outcome.codes == tuple(map(tuple, q.unpacked().tolist()))
    assert torch.equal(torch.tensor(trace.outcome.values), q.dequantize())
    off = x.double() @ weight.double().T - case.inputs.double() @ q.dequantize().double().T
    assert trace.outcome.errors[-1][1] == pytest.approx(float(off.square().sum(1).mean()), rel=1e-5)
    # Without polish the shown columns are the solver's own.
    found = steps(case, wanted.solver)
    options = {k: 0 for k in ("polish",) if k in wanted.solver.method.options}
    bare = replace(wanted.solver, options=tuple({**dict(wanted.solver.options), **options}.items()))
    plain = bare.solve(weight, wanted.format, wanted.fit_for(wanted.format), builder.stats())
    said = [said for said in trace.to_dict()["said"] if "kept instead of them" in said]
    stored, nearest = plain.weight.dequantize(), with_values(found.start, found.target).dequantize()
    if wanted.solver.name == "gptaq":
        assert not said
    for row in range(len(weight)):  # which of the two a row has is said
        kept = bool(said) and (said[0].startswith("Here") or str(row) in said[0].partition(" each")[0])
        torch.testing.assert_close((nearest if kept else found.value)[row], stored[row], rtol=1e-6, atol=1e-7)


def test_the_moves_add_up_to_what_the_columns_were() -> None:
    for recipe in ("gptq@int4:g64", "gptaq@int4:g32", "qronos@int4:g32"):
        case = case_of(recipe, parse_array(W), parse_array(X))
        found = steps(case, case.recipe.solver)
        torch.testing.assert_close(found.target + found.moves.sum(1), found.now, rtol=1e-4, atol=1e-6)


def test_awq_errors_are_the_output_errors_of_each_exponent() -> None:
    weight, x = parse_array(EXAMPLE)[None], made_up(6)
    trace = trace_of(explain(weight, "awq+absmax@int4:g64", inputs=x), "awq")
    shown, mean = listing(trace, "alphas"), x.double().abs().mean(0)
    for alpha, error in zip(shown["alpha"], shown["output error"], strict=True):
        s = mean**alpha
        s = s / (s.max() * s.min()).sqrt()
        scaled = weight.double() * s
        step = (scaled.abs().max() / 7).half().double()
        q = (scaled / step).round().clamp(-8, 7) * step / s
        exact = float((x.double() @ (q - weight.double()).T).square().sum(1).mean())
        assert error == pytest.approx(exact, rel=1e-3)
    best = shown["alpha"][trace.to_dict()["alphas"]["best"]]
    assert dict(trace.outcome.errors)["awq, then round-to-nearest"] == pytest.approx(min(shown["output error"]))
    case = case_of("awq+absmax@int4:g64", weight, x)
    from lowbit.report.at_work.awq import chosen

    real = chosen(case, case.recipe.transforms[0])
    assert real.alpha == best
    np.testing.assert_allclose(listing(trace, "columns")["s"], real.scale.tolist())


@pytest.mark.parametrize("recipe", ["gptq@int4:g64", "qronos@int4:g32", "mse+qronos@int4:g32"])
def test_the_scale_that_the_fit_ends_at_is_the_one_that_the_solver_uses(recipe: str) -> None:
    found = explain(EXAMPLE, recipe, inputs=made_up(6))
    case = case_of(recipe, parse_array(EXAMPLE)[None], made_up(6))
    used = float(steps(case, case.recipe.solver).start.scales())
    trace = found.at_work[0]
    name = "candidates" if trace.method.startswith("search") else "clip_ratios"
    shown = trace.to_dict()[name]
    row = shown["rows"][shown["best"]]
    assert row[2 if name == "candidates" else 1] == pytest.approx(used, rel=1e-3)
    assert ("`w corrected`" in " ".join(trace.to_dict()["said"])) == ("qronos" in recipe)


@pytest.mark.parametrize("name", ["gptq", "awq", "qronos"])
def test_methods_are_compared_with_the_rounding_of_the_first_table(name: str) -> None:
    found = explain(name)
    x, (block,) = torch.tensor(found.inputs).double(), found.blocks
    if name == "qronos":
        x_f, x = x, case_of("qronos@int4:g32", parse_array(EXAMPLE)[None], x.float()).inputs.double()
    else:
        x_f = x
    w, q = (torch.tensor(v).double() for v in (block.values, block.dequantized))
    errors = trace_of(found, name).outcome.errors
    assert errors[0] == ("round-to-nearest, without inputs", pytest.approx(float(((x_f @ w - x @ q) ** 2).mean())))
    said = " ".join(trace_of(found, name).to_dict()["said"])
    if name != "qronos":
        assert errors[1][1] > errors[0][1] and "counts each column's error by itself" in said


def test_awq_says_how_its_scales_follow() -> None:
    trace = trace_of(explain("awq"), "awq")
    shown, said = listing(trace, "columns"), " ".join(trace.to_dict()["said"])
    assert "s_k = mean|x_k|^alpha / sqrt(a b)" in said and "10 of the 20 lines are shown" in said
    alpha = float(said.partition("alpha = ")[2].split()[0])
    power = np.array(shown["mean|x|"]) ** alpha
    np.testing.assert_allclose(shown["s"], power / np.sqrt(power.max() * power.min()), rtol=1e-5)


def test_the_errors_of_the_polish_say_that_they_are_of_the_damped_matrix() -> None:
    trace = trace_of(explain("gptq"), "gptq")
    said = " ".join(trace.to_dict()["said"])
    w, q = parse_array(EXAMPLE).double(), torch.tensor(trace.outcome.values[0]).double()
    h = torch.tensor([row[1:] for row in trace.to_dict()["hessian"]["rows"]]).double()
    assert f"to {float((w - q) @ h @ (w - q)):.4g}. These two count what was added to the diagonal of H" in said


def test_smoothquant_scales_are_equation_4() -> None:
    weight, x = parse_array(EXAMPLE)[None], made_up(6)
    trace = trace_of(explain(weight, "smoothquant", inputs=x), "smooth")
    most, least = x.double().abs().amax(0), weight.double().abs().amax(0)
    assert "s_k = max|x_k|^alpha / max|w_k|^(1 - alpha), with alpha = 0.5" in " ".join(trace.to_dict()["said"])
    shown = listing(trace, "columns")
    np.testing.assert_allclose(shown["s"], (most**0.5 / least**0.5).numpy(), rtol=1e-5)
    np.testing.assert_allclose(shown["max|x/s|"], shown["max|w s|"], rtol=1e-5)
    step = x.double().abs().amax(1, keepdim=True) / 127
    rounded = (x.double() / step).round() * step
    q = lowbit.quantize_tensor(weight, "absmax@int8:channel").dequantize().double()
    exact = float((x.double() @ weight.double().T - rounded @ q.T).square().sum(1).mean())
    assert dict(trace.outcome.errors)["both rounded as they are"] == pytest.approx(exact, rel=1e-2)


def test_hqq_iterations_end_at_the_zero_point_of_the_fit() -> None:
    found = explain("hqq")
    trace = trace_of(found, "hqq")
    rows, best = trace.to_dict()["iterations"]["rows"], trace.to_dict()["iterations"]["best"]
    assert len(rows) > 3
    q = lowbit.quantize_tensor(torch.tensor(found.blocks[0].values), "hqq@uint4:g32:zero=fp16")
    assert rows[best][1] == pytest.approx(float(q.offsets()), rel=2e-3)
    assert rows[best][2] == pytest.approx(found.mean_error, rel=1e-3)
    assert trace.outcome.values == (found.blocks[0].dequantized,)


def test_clip_ratios_end_at_the_scale_of_the_fit() -> None:
    found = explain("mse")
    shown = trace_of(found, "mse").to_dict()["clip_ratios"]
    best = shown["rows"][shown["best"]]
    assert best[1] == pytest.approx(found.blocks[0].steps[0].value) and best[0] < 1 and best[2] > 0
    x = np.array(found.blocks[0].values)
    for _, s, clipped, error in shown["rows"]:
        level = np.clip(np.round(x / s), -8, 7)
        assert error == pytest.approx(float(((level * s - x) ** 2).sum()), rel=1e-4)
        assert clipped == int(((x / s > 7.0001) | (x / s < -8.0001)).sum())


@pytest.mark.parametrize("fmt", ["int4:g32", "iq4nl:g32", "e4m3:channel", "uint4:g32:min=fp16", "uint4:g32:asym",
                                 "e2m1:g32:s=e8m0", "uint3:g32:s=(uint6:g8):min=(int6:g8)"])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_the_best_candidate_of_search_is_the_scale_of_the_fit(fmt: str, seed: int) -> None:
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed))
    found = explain(x, f"search@{fmt}")
    shown = trace_of(found, "search").to_dict()["candidates"]
    row = shown["rows"][shown["best"]]
    scale = row[shown["columns"].index("s refitted" if "s refitted" in shown["columns"] else "s")]
    assert scale == pytest.approx(found.blocks[0].steps[0].value, rel=1e-6)


@pytest.mark.parametrize("fmt", ["int4:g32", "int8:channel", "e4m3:channel", "uint8:g32:min=fp16"])
@pytest.mark.parametrize("array", ["[-0.3, 0, 0.1, 0.7]", "[0.5, 0.25, -0.125, 1]", EXAMPLE])
def test_errors_of_search_are_sums_of_squares_in_float64(fmt: str, array: str) -> None:
    shown = trace_of(explain(array, f"search@{fmt}"), "search").to_dict()["candidates"]
    x, grid = parse_array(array)[None], Recipe.parse(fmt).format.grid
    for name, *numbers, error in shown["rows"]:
        assert error >= 0
        if "min" in fmt:
            s, m = numbers
            level = grid.round((x - m) / s).double() + m / s
        else:
            s, level = numbers[1], grid.round(x * (1 / torch.tensor(numbers[0]))).double()
        exact = float((x.double().abs() * (x.double() - s * level).square()).sum())
        assert error == pytest.approx(exact, rel=1e-6, abs=1e-15), name


def test_counts_are_those_of_what_is_drawn() -> None:
    for name, said in (("awq", "10 of the 20 lines"), ("rotate", "4 of the 8 inputs"), ("w4", "6 of the 28 lines")):
        assert f"{said}" in " ".join(str(explain(name)).split())
    few = " ".join(str(explain("[-0.3, 0, 0.1, 0.7]", "kmeans")).split())
    assert "after 1 iteration." in few and "lines are shown" not in few and "as fp16 holds it" in few


def test_search_says_which_range_is_refitted_and_how_its_scale_is_kept() -> None:
    trace = trace_of(explain("[-0.3, 0, 0.1, 0.7]", "search@int4:g32"), "search")
    assert [name for name, _ in trace.outcome.errors] == ["absmax: the whole range, not refitted", "search"]
    assert listing(trace, "candidates")["tried"][0] == "whole range, refitted"
    assert "Its scale is kept in fp16 as 0.09997559" in " ".join(trace.to_dict()["said"])
    assert "found without inputs; here it is found anew" in " ".join(
        trace_of(explain("gptq"), "search").to_dict()["said"]
    )
    assert "nothing to refit" in " ".join(trace_of(explain(EXAMPLE, "search@mxfp4"), "search").to_dict()["said"])
    q = explain(EXAMPLE, "search@uint4:g32:min=fp16")
    shown = listing(trace_of(q, "search"), "candidates")
    best = trace_of(q, "search").to_dict()["candidates"]["best"]
    assert shown["m"][best] == pytest.approx(q.blocks[0].steps[1].value, rel=1e-5)


def test_kmeans_levels_move_as_lloyd_says() -> None:
    x = parse_array(registered(lowbit_call("kmeans")).example).double().sort().values
    found = rounds(x, torch.ones_like(x), start(x, torch.ones_like(x), 4), 30)
    errors = [error for _, error in found]
    assert errors == sorted(errors, reverse=True)
    real = lloyd(x.float()[None], None, 4, 30)[0].double()
    last = float(((x[:, None] - real).abs().amin(1) ** 2).sum())
    assert last <= errors[-1] * (1 + 1e-6)
    trace = trace_of(explain("kmeans2:channel"), "kmeans")
    kept = trace.to_dict()["levels"]["rows"][-1]
    np.testing.assert_allclose(kept[2:], real.tolist(), rtol=1e-3)


def test_a_rotation_keeps_the_product_and_lowers_the_largest_value() -> None:
    found = explain("rotate+absmax@int4:g32")
    shown = listing(trace_of(found, "rotate"), "rotated")
    assert np.linalg.norm(shown["w"]) == pytest.approx(np.linalg.norm(shown["w turned"]), rel=1e-5)
    assert max(map(abs, shown["w turned"])) < max(map(abs, shown["w"]))


def test_static_ranges_are_those_of_the_estimators() -> None:
    x = made_up(6)
    trace = trace_of(explain(EXAMPLE, "absmax@int8:channel,a=average@int8:tensor", inputs=x), "a=")
    shown = listing(trace, "ranges")
    assert shown["estimator"] == list(estimators())
    at = shown["estimator"].index("minmax")
    assert shown["highest"][at] == pytest.approx(float(x.abs().max()))
    average = None
    for row in x.double():
        ends = (float(row.min()), float(row.max()))
        average = ends if average is None else tuple(0.9 * a + 0.1 * b for a, b in zip(average, ends, strict=True))
    at = shown["estimator"].index("average")
    assert shown["highest"][at] == pytest.approx(max(-average[0], average[1]), rel=1e-6)
    assert trace.to_dict()["ranges"]["best"] == at


def test_outliers_stay_float() -> None:
    trace = trace_of(explain("llm-int8"), "a=")
    assert listing(trace, "first_input")["level"].count("float") == 1


def test_training_says_what_it_would_change() -> None:
    for name, word in (("distill", "next-token"), ("lkd", "rounded in every step"), ("reconstruct", "up or down")):
        text = " ".join(str(explain(name)).split())
        assert "trains on calibration text" in text and word in text


def test_inputs_that_nothing_looks_at_are_an_error() -> None:
    with pytest.raises(RecipeError, match="looks at no inputs"):
        explain("[1, 2]", "absmax", inputs=[[1, 2]])


@pytest.mark.parametrize(
    ("inputs", "word"), [("[[1, 2, 3]]", "needs 2 numbers"), ("[[1, 1e999]]", "infinite"), ("[1", "array")]
)
def test_wrong_inputs_are_an_error(inputs: str, word: str) -> None:
    with pytest.raises(WeightError, match=word):
        explain("[1, 2]", "gptq", inputs=inputs)


def test_made_up_inputs_are_the_same_everywhere() -> None:
    assert made_up(2)[:2].tolist() == torch.tensor(MADE_UP).tolist()


MADE_UP = [[1.3, 10.1], [-0.8, -4.6]]


@pytest.mark.parametrize("array", ["[0, 0, 0, 0]", "[0.5]", "[[1e-30, 2e-30], [3e-30, 1e-30]]", "[[[1, 2]], [[3, 4]]]",
                                   "[3, 3, 3]", "[1e30, -2e30, 3e28]"])  # fmt: skip
@pytest.mark.parametrize(
    "recipe", ["gptq", "qronos@int4:g32", "awq", "smoothquant", "hqq", "kmeans", "w4", "nf4", "rotate", "mse"]
)
def test_odd_arrays_are_shown_too(array: str, recipe: str) -> None:
    found = explain(array, recipe)
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found)
