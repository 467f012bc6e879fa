"""Optuna's plots: what is drawn is what the study holds, and nothing of matplotlib's is left changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from runner.sweep.figures import optuna as study_plots
from runner.sweep.figures.optuna import draw, plots
from runner.sweep.grid import parse_texts
from runner.sweep.record import Record
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.study import Search
from runner.sweep.space import read_space

pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {
    "optimizer.lr": "tag(log,interval(1e-4,1))",
    "optimizer": "sgd,adam",
    "data.path": "'a text that is far too long for an axis','a text that is far too long, again'",
}
VALUES = [0.5, 0.7, None, 0.6, 0.9]  # None: the trial failed


def searched(folder: Path, values: list[float | None] = VALUES, **settings: Any) -> Search:
    """A search that has come to these values, each reported at two evaluations."""
    search = Search(
        SearchConfig(sampler="random", **settings),
        read_space(parse_texts(SPACE)),
        folder,
        "accuracy/val",
        "maximize",
        "toy",
    )
    for value in values:
        number, _ = search.ask()
        report = search.reporter(number)
        for evaluation in range(2 if report and value else 0):
            report(evaluation, value * (evaluation + 1) / 2)
        status = "failed" if value is None else "done"
        metrics = {"val": {"accuracy": value}}
        search.tell(
            number,
            Record(
                number, "", {}, {}, "", "accuracy/val", "maximize", [], [], status, None, value, metrics, 2.0
            ),
        )
    return search


@pytest.fixture
def search(tmp_path: Path) -> Iterator[Search]:
    found = searched(tmp_path)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    yield
    pyplot.close("all")


def test_every_plot_is_a_picture_and_the_callers_figures_and_style_stay(
    search: Search, tmp_path: Path
) -> None:
    mine, before = pyplot.figure(), dict(mpl.rcParams)
    files = draw(search, tmp_path)
    assert pyplot.get_fignums() == [mine.number]
    assert dict(mpl.rcParams) == before
    assert {path.stem.removeprefix("optuna_") for path in files} == {
        "contour",
        "history",
        "importances",
        "intermediate_values",
        "parallel_coordinate",
        "slice",
        "timeline",
    }
    for path in files:
        assert path.parent == tmp_path / "figures"
        assert imread(path)[..., :3].std() > 0.02


def test_the_pictures_of_several_objectives(tmp_path: Path) -> None:
    search = searched(tmp_path, objectives={"accuracy/val": "maximize", "seconds": "minimize"})
    names = {path.stem.removeprefix("optuna_") for path in draw(search, tmp_path)}
    search.close()
    assert {
        "pareto_front",
        "timeline",
        "parallel_coordinate",
        "history_seconds",
        "slice_accuracy_val",
    } <= names
    assert not {"intermediate_values", "history"} & names


def test_the_history_holds_the_values_and_the_best_so_far(search: Search) -> None:
    axes = plots(search)["history"]().axes[0]
    points = axes.collections[0].get_offsets()
    assert np.asarray(points).tolist() == [[n, v] for n, v in enumerate(VALUES) if v is not None]
    (line,) = axes.lines
    assert list(line.get_ydata()) == [0.5, 0.7, 0.7, 0.7, 0.9]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("accuracy/val", "trial")


def test_keys_and_choices_are_short_on_the_axes(search: Search) -> None:
    figure = plots(search)["slice"]()
    panels = {axes.get_xlabel(): axes for axes in figure.axes if axes.get_xlabel()}
    assert set(panels) == {"lr", "optimizer", "path"}
    figure.canvas.draw()
    words = {key: [text.get_text() for text in axes.get_xticklabels()] for key, axes in panels.items()}
    assert set(words["optimizer"]) <= {"sgd", "adam"}
    assert words["lr"] and all(
        float(word) > 0 for word in words["lr"]
    )  # 0.03, not a power that runs into the next
    assert all(len(word) <= study_plots.LABEL_LENGTH for word in words["path"])
    assert len(set(words["path"])) == len(words["path"])


def test_the_parallel_axes_are_named_by_what_they_show(search: Search) -> None:
    axes = plots(search)["parallel_coordinate"]().axes[0]
    first, *keys = [text.get_text() for text in axes.get_xticklabels()]
    assert (first, set(keys)) == ("accuracy/val", {"lr", "optimizer", "path"})
    assert len(axes.collections[0].get_segments()) == 4


def test_curves_are_coloured_by_how_the_trial_ended(tmp_path: Path) -> None:
    search = searched(tmp_path, pruner="median", pruner_options={"n_startup_trials": 1})
    number, _ = search.ask()
    assert search.reporter(number)(0, 0.01)
    search.tell(number, Record(number, "", {}, {}, "", "accuracy/val", "maximize", [], [], "pruned"))
    figure = plots(search)["intermediate_values"]()
    search.close()
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert len(colours) == 5
    assert colours[-1] != colours[0] and len(set(colours[:-1])) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "done",
        "pruned",
        "failed or not done",
    ]


@pytest.mark.parametrize("values", [[], [None], [0.5], [None, 0.5, None]])
def test_a_study_with_nothing_to_compare_has_no_pictures(tmp_path: Path, values: list[float | None]) -> None:
    search = searched(tmp_path, values)
    assert draw(search, tmp_path) == []
    search.close()


def test_equal_values_have_their_pictures(tmp_path: Path) -> None:
    search = searched(tmp_path, [0.5, 0.5])
    assert {"optuna_history.png", "optuna_slice.png"} <= {path.name for path in draw(search, tmp_path)}
    search.close()


def test_a_plot_that_fails_is_left_out(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise RuntimeError("no")

    kept = {"slice": fail, "history": plots(search)["history"]}
    monkeypatch.setattr(study_plots, "plots", lambda _: kept)
    assert [path.name for path in draw(search, tmp_path)] == ["optuna_history.png"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["optuna_history.png"]
