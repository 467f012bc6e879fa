"""Optuna's plots: they show what the study holds, and leave matplotlib as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from runner import figures
from runner.sweep.figures import optuna as study_plots
from runner.sweep.figures.optuna import draw, plots
from runner.sweep.search.study import Search
from tests.runner.sweep.helpers import tell

pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {"optimizer.lr": "tag(log,interval(1e-4,1))", "optimizer": "sgd,adam"}
VALUES = [0.5, 0.7, None, 0.6, 0.9]  # None: the trial failed
Searched = Callable[..., Search]


@pytest.fixture
def searched(make: Callable[..., Search]) -> Iterator[Searched]:
    """Return a function that runs a search whose trials get these values."""

    def run(values: list[float | None] = VALUES, **settings: Any) -> Search:
        search = make(SPACE, sampler="random", **settings)
        for value in values:
            tell(search, search.ask()[0], value, "failed" if value is None else "done")
        return search

    yield run
    pyplot.close("all")


def names(files: list[Path]) -> set[str]:
    return {path.stem.removeprefix("optuna_") for path in files}


def test_plots_show_the_study_and_matplotlib_stays(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes, save = {}, figures.save
    monkeypatch.setattr(
        figures, "save", lambda figure, path: (axes.update({path.stem: figure.axes[0]}), save(figure, path))
    )
    mine, before = pyplot.figure(), dict(mpl.rcParams)
    files = draw(searched(), tmp_path)
    assert (pyplot.get_fignums(), dict(mpl.rcParams)) == ([mine.number], before)
    assert names(files) == {"distribution", "history", "importances", "timeline"}
    assert {path.parent for path in files} == {tmp_path / "figures"}
    assert all(imread(path)[..., :3].std() > 0.02 for path in files)

    # what they show
    labels = axes["optuna_importances"].get_yticklabels()
    assert {label.get_text() for label in labels} == {"lr", "optimizer"}  # short keys
    history = axes["optuna_history"]
    points = np.asarray(history.collections[0].get_offsets())
    assert points.tolist() == [[n, v] for n, v in enumerate(VALUES) if v is not None]
    (line,) = history.lines
    assert list(line.get_ydata()) == [0.5, 0.7, 0.7, 0.7, 0.9]
    assert (history.get_ylabel(), history.get_xlabel()) == ("accuracy/val", "trial")


@pytest.mark.slow
def test_plots_of_several_objectives(searched: Searched, tmp_path: Path) -> None:
    search = searched(objectives={"accuracy/val": "maximize", "seconds": "minimize"})
    drawn = names(draw(search, tmp_path))
    assert {"pareto_front", "timeline", "history_seconds", "distribution_accuracy_val"} <= drawn
    assert "history" not in drawn


def test_nothing_to_compare_and_a_plot_that_fails_are_left_out(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ([], [None], [0.5], [None]):  # of one study
        assert draw(searched(more), tmp_path) == []
    available = {"importances": lambda: 1 / 0, "history": plots(searched([0.5]))["history"]}
    monkeypatch.setattr(study_plots, "plots", lambda _: available)
    assert names(draw(searched([]), tmp_path)) == {"history"}
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["optuna_history.png"]
