"""Figures hold the sweep's numbers: lines, cells and points are read back from them."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from runner.figures import VERMILION
from runner.sweep.figures import draw
from runner.sweep.figures.curves import curves
from runner.sweep.figures.scales import ValueAxis, scale
from runner.sweep.figures.settings import heat_map, parallel_coordinates, value_panels
from runner.sweep.leaderboard import fold
from runner.sweep.record import Record
from tests.runner.sweep.helpers import make_record

RATES, INITS = ("0.01", "0.1", "1.0"), ("xavier", "identity")
LOSSES = {"objective": "loss/val", "direction": "minimize"}


def value_of(lr: str, init: str, seed: int) -> float:
    """Return a made-up accuracy."""
    return 0.8 - 0.1 * abs(math.log10(float(lr)) + 1) + 0.02 * INITS.index(init) + seed / 100


def grid(seeds: int = 2) -> list[Record]:
    """Return three learning rates × two initialisations × seeds; the best is 0.1, identity."""
    return [
        make_record(n, {"optimizer.lr": lr, "model.init": init, "seed": str(seed)}, value_of(lr, init, seed))
        for n, (lr, init, seed) in enumerate(itertools.product(RATES, INITS, range(seeds)))
    ]


def search(count: int) -> list[Record]:
    """Return a search over a logarithmic, a linear and a categorical key, a third of it without a value."""
    draw = random.Random(0)
    records = []
    for number in range(count):
        swept = {"optimizer.lr": repr(10 ** draw.uniform(-4, 0)), "optimizer.momentum": repr(draw.random())}
        value, status = (None, "pruned") if number % 3 == 2 else (draw.random(), "done")
        records.append(make_record(number, swept | {"model.init": draw.choice(INITS)}, value, status))
    return records


def write_metrics(folder: Path, run: Record, text: str) -> None:
    run.folder(folder).mkdir()
    (run.folder(folder) / "metrics.csv").write_text(text)


def metrics(*values: float) -> str:
    """Return a `metrics.csv` with training rows among those of val, one epoch of ten steps apart."""
    rows = [f"{10 * n},{n},train,1.0,0.123\n{10 * n},{n},val,2.0,{value}\n" for n, value in enumerate(values)]
    return "step,epoch,split,loss,accuracy\n" + "".join(rows)


def segments(figure: Figure) -> list[np.ndarray]:
    """Return the lines of the line collections, one after the other."""
    found = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    return [np.asarray(line) for item in found for line in item.get_segments()]


def texts_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_parallel_coordinates_end_at_the_means_or_below_them() -> None:
    figure = parallel_coordinates(fold(grid()))
    lines = segments(figure)
    means = np.sort([value_of(lr, init, 0) + 0.005 for lr in RATES for init in INITS])
    assert np.allclose(sorted(line[-1, 1] for line in lines), (means - means[0]) / np.ptp(means))
    assert {line[-1, 0] for line in lines} == {2.0}
    best = lines[-1]
    assert abs(best[0, 1] - 0.5) < 0.1 and best[-1, 1] == 1.0  # 0.1 is the middle of 0.01 … 1, as powers
    [drawn] = [item for item in figure.axes[0].collections if len(item.get_segments())]
    assert to_hex(drawn.get_colors()[-1]).upper() == VERMILION
    texts = {"lr", "init", "accuracy/val", "0.01", "0.1", "1", *INITS}
    assert texts <= set(texts_of(figure.axes[0]))

    # a third of them without a value
    figure = parallel_coordinates(fold(search(30)))
    ends = [line[-1, 1] for line in segments(figure)]
    assert len(ends) == 30 and sum(end < 0 for end in ends) == 10
    assert "no value: 10" in texts_of(figure.axes[0])


@pytest.mark.parametrize(
    ("texts", "ordered", "places", "log"),
    [
        ("1e-3 1e-1 1e-2", "1e-3 1e-2 1e-1", [0, 0.5, 1], True),
        ("10 1 5.5", "1 5.5 10", [0, 0.5, 1], False),
        ("null 5.0 1.0", "1.0 5.0 null", [0, 0.5, 1], False),
        ("0 1e-4 1e-3 1e-2", "0 1e-4 1e-3 1e-2", [0, 1 / 3, 2 / 3, 1], False),
        ("0 1 10", "0 1 10", [0, 0.5, 1], False),
        ("a", "a", [0], False),
    ],
)
def test_scale_of_few_values(texts: str, ordered: str, places: list[float], log: bool) -> None:
    few = scale(texts.split())
    assert (list(few.places), [label for _, label in few.ticks]) == (ordered.split(), ordered.split())
    assert list(few.places.values()) == pytest.approx(places) and few.log == log


def test_scale_of_many_values() -> None:
    many = scale([repr(10 ** (k / 10 - 4)) for k in range(41)])
    assert many.log and not many.few
    for place, label in many.ticks:
        assert place == pytest.approx((math.log10(float(label)) + 4) / 4, abs=1e-9)
    words = scale([f"word{k}" for k in range(60)])
    assert len(words.places) == 60 and len(words.ticks) <= 16


def test_heat_map_of_two_keys() -> None:
    records = grid()
    records[-1].status = records[-2].status = "failed"  # lr 1, identity
    figure = heat_map(fold(records))
    axes, bar = figure.axes
    assert bar.get_ylabel() == "accuracy/val"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.01", "0.1", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(INITS)  # as they were typed
    expected = [[value_of(lr, init, 0) + 0.005 for lr in RATES] for init in INITS]
    expected[1][2] = -1
    assert np.allclose(axes.images[0].get_array().filled(-1), expected)
    edges = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    assert [edge.get_xy() for edge in edges] == [(0.5, 0.5)]  # around column 0.1, row identity
    # the deviation is that of two values 0.01 apart
    assert {f"{expected[1][1]:.4f}", "failed", f"± {0.01 / math.sqrt(2):.4f}"} <= set(texts_of(axes))


def test_heat_map_of_three_keys() -> None:
    records = [
        make_record(n, run.swept | {"loop.clip_norm": clip}, run.value, direction="minimize")
        for n, (clip, run) in enumerate(itertools.product(("null", "1.0"), grid(seeds=1)))
    ]
    figure = heat_map(fold(records))
    panels = {axes.get_title("left"): axes for axes in figure.axes if axes.images}
    assert len(panels) == 2 and all(axes.images[0].cmap.name == "Blues_r" for axes in panels.values())
    low, high = (panels[f"init={init}"].images[0].get_array() for init in INITS)
    assert np.allclose(high - low, 0.02)
    assert len({axes.images[0].get_clim() for axes in panels.values()}) == 1


def test_no_heat_map_of_too_many_values_or_one_key_that_varies() -> None:
    assert heat_map(fold(search(60))) is None
    for more in ({}, {"init": "xavier"}):
        assert heat_map(fold([make_record(n, {"lr": str(n)} | more, 0.5) for n in range(3)])) is None


def test_value_panels() -> None:
    records = search(30)
    panels = {axes.get_xlabel(): axes for axes in value_panels(fold(records)).axes if axes.axison}
    assert set(panels) == {"lr", "momentum", "init"}
    numbers = np.array([float(run.swept["optimizer.momentum"]) for run in records])
    places = (numbers - numbers.min()) / np.ptp(numbers)
    expected = sorted((x, r.value) for x, r in zip(places, records, strict=True) if r.value is not None)
    shown = np.asarray(panels["momentum"].collections[-1].get_offsets())
    assert len(expected) == 20 and np.allclose(sorted(shown.tolist()), expected, atol=1e-5)


@pytest.mark.parametrize(("more", "goodness"), [({}, [0.0, 1.0]), (LOSSES, [1.0, 0.0])])
def test_value_axis_holds_all_and_its_better_end_is_dark(more: dict[str, str], goodness: list[float]) -> None:
    records = [make_record(n, {"lr": str(n)}, n / 10, **more) for n in range(4)]
    axis = ValueAxis.of(fold([*records, make_record(4, {"lr": "4"}, None, "failed", **more)]))
    assert (axis.low, axis.high) == (0.0, pytest.approx(0.3))
    assert [axis.goodness(value) for value in (0.0, 0.3)] == goodness
    assert len(axis.ticks()) > 2
    for value, label in axis.ticks():
        assert float(label) == value and axis.place(value) == pytest.approx(value / 0.3)


def test_curves_show_the_best_in_colour(tmp_path: Path) -> None:
    records = [make_record(n, {"lr": str(n // 2), "seed": str(n % 2)}, 0.9 - n / 100) for n in range(20)]
    for run in records:
        write_metrics(tmp_path, run, metrics(0.1, 0.5 + run.number / 100, run.value or 0))
    figure = curves(fold(records), tmp_path)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "accuracy/val")
    best = [line for line in axes.get_lines() if to_hex(line.get_color()).upper() == VERMILION]
    drawn = {tuple(np.asarray(line.get_ydata(), float).round(6)) for line in best}
    assert drawn == {(0.1, 0.5, 0.9), (0.1, 0.51, 0.89), (0.1, 0.505, 0.895)}  # two seeds and their mean
    assert {tuple(line.get_xdata()) for line in best} == {(0.0, 1.0, 2.0)}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "lr=0: 0.8950 ± 0.0071" and labels[-1] == "8 others" and len(labels) == 7
    assert len(segments(figure)) == 8
    low, high = axes.get_ylim()
    assert low > 0.1 and high > 0.9  # the untrained network's value presses nobody


def test_curves_of_unfinished_runs(tmp_path: Path) -> None:
    statuses = ["done", "failed", "interrupted", "done", "not run"]
    records = [make_record(n, {"lr": str(n)}, 0.9, status) for n, status in enumerate(statuses)]
    cut_by_a_kill = metrics(0.1, 0.4) + "20,2.0,val,2.0,0."
    texts = [metrics(0.1, 0.5), metrics(0.1, math.nan), cut_by_a_kill, "no table\n\n,,\n"]
    for run, text in zip(records, texts, strict=False):
        write_metrics(tmp_path, run, text)
    figure = curves(fold(records), tmp_path)
    [crosses] = [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]
    assert (list(crosses.get_xdata()), crosses.get_ydata()[1]) == ([1.0, 1.0], 0.4)
    assert crosses.get_label() == "1 failed, 1 interrupted"


def test_curves_over_steps(tmp_path: Path) -> None:
    run = make_record(0, {"lr": "1"}, 2.0, objective=None)
    write_metrics(tmp_path, run, "step,epoch,split,loss\n0,0.0,val,3.0\n50,0.0,val,2.0\n")
    figure = curves(fold([run]), tmp_path)
    [line] = figure.axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 50], [3.0, 2.0])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("step", "loss/val")


def names(written: list[Path]) -> set[str]:
    return {path.name for path in written}


def test_draw_writes_files(tmp_path: Path) -> None:
    written = draw.draw(grid(), tmp_path)
    assert set(written) == {tmp_path / "figures" / f"{n}.png" for n in ("parallel_coordinates", "heat_map")}
    assert all(matplotlib.image.imread(path).std() > 0.01 for path in written)
    more = [*grid(), *search(40)]  # the sweep has grown, and is no grid any more
    for number, run in enumerate(more):
        run.number = number
    assert names(draw.draw(more, tmp_path)) == {"parallel_coordinates.png", "values.png"}
    assert not (tmp_path / "figures" / "heat_map.png").exists()


def test_draw_separates_objectives(tmp_path: Path) -> None:
    records = [make_record(n, {"lr": str(n), "experiment": "a"}, n / 10) for n in range(2)]
    records += [make_record(2 + n, {"lr": str(n), "experiment": "b"}, n / 10, **LOSSES) for n in range(2)]
    drawn = itertools.product(("parallel_coordinates", "values"), ("accuracy-val", "loss-val"))
    assert names(draw.draw(records, tmp_path)) == {f"{name}_{aim}.png" for name, aim in drawn}


def test_draw_nothing(tmp_path: Path) -> None:
    failures = [make_record(n, {"lr": str(n)}, None, "failed") for n in range(3)]
    seeds = [make_record(n, {"seed": str(n)}, 0.5) for n in range(3)]
    for records in ([], [make_record(0, {}, None, "not run")], failures, seeds):
        assert draw.draw(records, tmp_path) == []
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.5], [1e-12, 3e8], [-1e300, 1e300, 0.0]])
def test_draw_odd_values(values: list[float], tmp_path: Path) -> None:
    notes, numbers = ["日本 語" * 30, "$a_{$ & \\", "[1,2,3]"], ["1e-300", "-5", "nan"]
    records = [make_record(n, {"note": notes[n], "x": numbers[n]}, value) for n, value in enumerate(values)]
    records.append(make_record(len(values), {"note": "null", "x": "1_000"}, None, "failed"))
    assert {"parallel_coordinates.png"} <= names(draw.draw(records, tmp_path))
