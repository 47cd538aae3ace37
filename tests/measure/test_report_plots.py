from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_models import full_card

from lowbit.errors import LowbitError, OutputError
from lowbit.measure.compare import CompareRow
from lowbit.report.plots import (
    FrontierPoint,
    WeightPanel,
    draw_frontier,
    draw_weights,
    frontier_points,
    pareto,
    save_figure,
)

matplotlib = pytest.importorskip("matplotlib")


def panels():
    torch.manual_seed(0)
    made = []
    for layer, width in (("model.layers.0.self_attn.q_proj.weight", 64), ("lm_head.weight", 32)):
        weight = torch.randn(40, width)
        for recipe, step in (("fine", 0.05), ("coarse", 1.0)):
            made.append(WeightPanel(layer, recipe, weight, (weight / step).round() * step))
    return made


def test_weight_panels_hold_the_shares_of_all_weights():
    figure = draw_weights(panels())
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    for axes in shown:
        before, after = (patch.get_data().values for patch in axes.patches)
        assert before.sum() == pytest.approx(1.0) and after.sum() == pytest.approx(1.0)
    counts = [int((axes.patches[1].get_data().values > 0).sum()) for axes in shown]
    assert counts[1] < 12 < counts[0]  # the coarse grid leaves a comb
    assert [axes.get_title() for axes in shown[:2]] == ["fine", "coarse"]
    error = ((panels()[1].original - panels()[1].dequantized).norm() / panels()[1].original.norm()).item()
    assert f"error {100 * error:.2g} %" in shown[1].texts[0].get_text()


def test_a_missing_combination_leaves_a_gap():
    figure = draw_weights(panels()[:3])
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]


def test_constant_weights_are_drawn(tmp_path):
    zero = torch.zeros(4, 4)
    assert save_figure(draw_weights([WeightPanel("a", "b", zero, zero)]), tmp_path / "zero.png").stat().st_size > 5000


points_strategy = st.lists(
    st.builds(
        FrontierPoint,
        st.text("abcdefgh", min_size=1, max_size=5),
        st.floats(1, 16),
        st.floats(1e-6, 10),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(points_strategy)
def test_pareto_by_brute_force(points):
    best = pareto(points)
    for point in points:
        beaten = any(
            other.size <= point.size and other.kl <= point.kl and (other.size, other.kl) != (point.size, point.kl)
            for other in points
        )
        assert beaten != ((point.size, point.kl) in {(p.size, p.kl) for p in best})
    assert best == sorted(best, key=lambda p: p.size)


def boxes(figure):
    """Pixel boxes of the labels and of the markers."""
    from matplotlib.collections import PathCollection
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [(note.get_text(), Text.get_window_extent(note, renderer)) for note in axes.texts]
    scatters = [each for each in axes.collections if isinstance(each, PathCollection)]
    markers = [axes.transData.transform(point) for each in scatters for point in each.get_offsets()]
    return labels, markers


@pytest.mark.parametrize("seed", range(4))
def test_labels_cover_neither_each_other_nor_a_point(seed):
    generator = np.random.default_rng(seed)
    sizes = np.concatenate([generator.uniform(2, 9, 10), np.full(7, 8.1)])
    kls = 10 ** generator.uniform(-3, 0.5, 17)
    made = [
        FrontierPoint(f"recipe-{i}@int4:g32", s, k, k / 20) for i, (s, k) in enumerate(zip(sizes, kls, strict=True))
    ]
    labels, markers = boxes(draw_frontier(made, title="a model"))
    assert sorted(name for text, _ in labels for name in text.split("\n")) == sorted(p.label for p in made)
    for (_, a), (_, b) in itertools.combinations(labels, 2):
        assert not a.overlaps(b)
    assert len(markers) == 17
    for _, box in labels:
        assert not any(box.contains(x, y) for x, y in markers)


def test_points_that_touch_share_a_label():
    made = [
        FrontierPoint("low", 8.1, 0.001),
        FrontierPoint("high", 8.1, 0.0011),
        FrontierPoint("far", 4.0, 1.0),
    ]
    labels, _ = boxes(draw_frontier(made))
    assert sorted(text for text, _ in labels) == ["far", "high\nlow"]


def test_points_of_a_comparison():
    rows = [
        CompareRow("float32", full_card(), is_base=True),
        CompareRow("w4", full_card()),
        CompareRow("bad", error="no"),
        CompareRow("unmeasured", full_card(quality=None)),
    ]
    assert frontier_points(rows) == [FrontierPoint("w4", full_card().parts.bits, 0.04126, 0.00072)]
    assert frontier_points(rows, "mib")[0].size == pytest.approx(87.5)
    with pytest.raises(LowbitError, match="bits"):
        frontier_points(rows, "bytes")


def test_nothing_to_draw_is_said():
    with pytest.raises(LowbitError, match="nothing to draw"):
        draw_frontier([])
    with pytest.raises(LowbitError, match="no weights"):
        draw_weights([])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LowbitError, match="pip install"):
        draw_frontier([FrontierPoint("a", 4, 0.1)])


def test_files_and_their_errors(tmp_path):
    figure = draw_frontier([FrontierPoint("a", 4, 0.1, 0.2)])
    assert save_figure(figure, tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in save_figure(figure, tmp_path / "a.svg").read_bytes()
    with pytest.raises(OutputError, match="docx"):
        save_figure(figure, tmp_path / "a.docx")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_figure(figure, tmp_path / "file" / "a.png")


def test_no_global_figure_is_made():
    draw_frontier([FrontierPoint("a", 4, 0.1)])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
