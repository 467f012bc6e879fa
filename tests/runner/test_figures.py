"""Figures: text in any language, one style, pictures that say what the numbers say."""

from __future__ import annotations

import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image, ImageSequence

from runner import figures

LANGUAGES = """Grüße, señor Łukasz, Ærø
αβγδε ΣΩ ∂L/∂hₜ ‖∇‖ ≤ 1
Привет, мир
我爱你 混淆矩阵 训练 验证
日本語 ひらがな カタカナ
한국어 정확도"""


def test_text_in_any_language_has_its_glyphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    figure, grid = figures.new()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="matplotlib"):
        warnings.simplefilter("error")  # matplotlib warns of every glyph that it draws as a box
        grid[0, 0].set(title=LANGUAGES, xlabel=LANGUAGES)  # bold and plain
        figures.save(figure, tmp_path / "text.png")
    assert not caplog.records
    grid[0, 0].set_title("\U0001fae0")
    with pytest.warns(UserWarning, match="missing"):  # one that no font has would be noticed
        figures.save(figure, tmp_path / "text.png")


def test_style_is_for_our_figures_alone() -> None:
    before = dict(mpl.rcParams)
    figure, grid = figures.new()
    assert not grid[0, 0].spines["top"].get_visible()
    assert dict(mpl.rcParams) == before
    assert figure.canvas.manager is None  # no window, and not kept alive by pyplot


def test_save_leaves_a_whole_png_and_nothing_beside_it(tmp_path: Path) -> None:
    figure, grid = figures.new(size=(2, 1))
    grid[0, 0].plot([0, 1])
    for _ in range(2):  # the second time over the first
        figures.save(figure, tmp_path / "line.png")
    assert [path.name for path in tmp_path.iterdir()] == ["line.png"]
    assert matplotlib.image.imread(tmp_path / "line.png").shape == (150, 300, 4)


def history(suffixes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for step, split in itertools.product((0, 5, 10), ("train", "val")):
        row = {"step": step, "epoch": step / 5, "split": split}
        row |= {f"loss{suffix}": 1 / (1 + step + number) for number, suffix in enumerate(suffixes)}
        row |= {f"{metric}{suffix}": step / 10 for suffix in suffixes for metric in ("accuracy", "noise")}
        rows.append(row | ({"learning_rate": 0.1, "grad_norm": 1.0} if split == "train" else {}))
    return rows


@pytest.mark.parametrize("variants", [[""], [".narrow", ".wide"], [".none", ".absolute", ".rotary", ".own"]])
def test_curves_draw_what_was_measured(variants: list[str]) -> None:
    figure = figures.curves(history(variants), "toy, seed 0")
    panels = {title_of(axes): axes for axes in figure.axes}
    assert set(panels) - {""} == {"loss", "accuracy", "noise", "learning rate"}
    lines = panels["loss"].get_lines()
    assert len({line.get_color() for line in lines}) == (2 if variants == [""] else len(variants))
    expected = [[1 / (1 + step + number) for step in (0, 5, 10)] for number in range(len(variants))]
    assert sorted(list(line.get_ydata()) for line in lines) == sorted(2 * expected)
    assert all(list(line.get_xdata()) == [0, 1, 2] for line in lines)


def title_of(axes: Axes) -> str:
    return axes.get_title("left") or axes.get_title()


def test_curves_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    figures.curves([], "toy")
    figures.save(figures.curves(history([""])[:1], "toy"), tmp_path / "curves.png")


def test_confusion_matrices_show_shares_of_the_row() -> None:
    counts = torch.tensor([[3, 1], [0, 0]])
    figure = figures.confusion_matrices({"before": counts, "after": counts.flip(0)}, ["Hemd", "裙子"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert {text.get_text() for text in axes.texts} == {"75", "25"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Hemd", "裙子"]
    assert list(map(title_of, figure.axes)) == ["before", "after"]


def test_image_grids_place_images_and_captions() -> None:
    images = torch.arange(3 * 4 * 4).reshape(3, 4, 4)
    captions = [[(f"{panel}{number}", figures.INK) for number in range(3)] for panel in "ab"]
    figure = figures.image_grids({"before": images, "after": images + 1}, captions, columns=2)
    found = {title_of(axes): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert set(found) == {"a0", "a1", "a2", "b0", "b1", "b2"}
    assert np.array_equal(found["b2"], (images[2] + 1).numpy())


def test_per_class_scores_go_from_before_to_after() -> None:
    before = {"f1": torch.tensor([0.25, 0.5])}
    after = {"f1": torch.tensor([0.75, 1.0]), "support": torch.ones(2)}
    [axes] = figures.per_class_scores({"before": before, "after": after}, ["a", "b"]).axes
    assert [line.get_xdata().tolist() for line in axes.get_lines()] == [[0.25, 0.5], [0.75, 1.0]]
    assert {text.get_text() for text in axes.texts} == {"0.75", "1.00"}


def test_heat_map_shows_the_matrix_with_its_labels() -> None:
    matrix = torch.tensor([[0.25, -0.75], [-torch.inf, 0.5], [0.0, 1.0]])
    masked = torch.tensor([[False, True], [False, False], [False, False]])
    axes = figures.new()[1][0, 0]
    image = figures.heat_map(axes, matrix, list("我爱你"), ["a", "b"], (0, 1), numbers=True, masked=masked)
    assert np.array_equal(image.get_array().filled(-torch.inf), matrix.numpy())
    assert image.get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == list("我爱你")
    written = {text.get_position(): text.get_text() for text in axes.texts}  # by (column, row)
    assert written == {(0, 0): "0.25", (0, 1): "−∞", (1, 1): "0.50", (0, 2): "0.00", (1, 2): "1.00"}
    [hatched] = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert hatched.get_xy() == (0.5, -0.5)  # around column 1, row 0


def test_colours_diverge_from_zero_and_numbers_are_read_on_light_and_on_dark() -> None:
    _, [[left, right]] = figures.new(1, 2)
    image = figures.heat_map(left, torch.tensor([[-3.0, 1.0]]), diverging=True)
    assert image.get_clim() == (-3, 3)
    assert image.to_rgba(0.0)[:3] == pytest.approx([0.97] * 3, abs=0.02)
    figures.heat_map(right, torch.tensor([[0.0, 1.0]]), limits=(0, 1), numbers=True)
    assert [text.get_color() for text in right.texts] == [figures.INK, "white"]


def test_animation_is_a_gif_of_every_frame(tmp_path: Path) -> None:
    figure, grid = figures.new(size=(2, 2))
    [point] = grid[0, 0].plot([0], [0], "o", markersize=20)
    grid[0, 0].set(xlim=(-1, 4), ylim=(-1, 1))
    figures.save_animation(figure, lambda i: point.set_xdata([i]), 4, 10, tmp_path / "dot.gif")
    with Image.open(tmp_path / "dot.gif") as found:
        assert (found.n_frames, found.info["duration"], found.info["loop"]) == (4, 100, 0)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(found)]
    assert all((frames[0] != frame).any() for frame in frames[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["dot.gif"]
