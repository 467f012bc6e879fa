"""Optuna's own plots of a study, in the house's style: what our figures of a sweep do not show."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.records.console import log
from runner.sweep.record import short_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.importance import BaseImportanceEvaluator
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from runner.sweep.search.study import Search

_WORDS = {  # of Optuna's legends and axes: ours
    "COMPLETE": "done",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
    "Best Value": "best so far",
    "Trial": "trial",
    "Best Trial": "not beaten",
}

_Plot = Callable[[], "Figure"]
_Target = Callable[["FrozenTrial"], float]


def draw(search: Search, folder: Path) -> list[Path]:
    """Draw every plot that the study allows into `folder/figures/optuna_NAME.png`; return the files."""
    import matplotlib as mpl
    from matplotlib import pyplot

    from runner.figures import save, style

    drawn, open_before = [], set(pyplot.get_fignums())
    for name, plot in plots(search).items():
        path = folder / "figures" / f"optuna_{name}.png"
        # Optuna draws with pyplot, and changes its style for good
        with style(), pyplot.ioff(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mpl.rcParams["figure.constrained_layout.use"] = True
            try:
                figure = plot()
                save(figure, path)
                drawn.append(path)
            except Exception as error:  # whatever Optuna refuses in a study so small or so odd
                log.debug("%s is left out: %s", path.name, error)
            finally:
                for number in set(pyplot.get_fignums()) - open_before:
                    pyplot.close(number)
    return drawn


def plots(search: Search) -> dict[str, _Plot]:
    """Return what draws each figure, by the figure's name; nothing where there is nothing to compare."""
    study = _with_short_keys(search)
    if len([trial for trial in study.trials if trial.state.name == "COMPLETE"]) < 2:
        return {}

    # of all objectives
    names = list(search.objectives)
    drawn: dict[str, _Plot] = {"timeline": partial(_timeline, study)}
    if len(names) in (2, 3):
        drawn["pareto_front"] = partial(_pareto_front, study, names)

    # of each
    for place, name in enumerate(names):
        target = None if len(names) == 1 else partial(_objective_value, place)
        suffix = "" if len(names) == 1 else f"_{name.replace('/', '_')}"
        drawn[f"history{suffix}"] = partial(_history, study, name, target)
        drawn[f"importances{suffix}"] = partial(_importances, study, name, target)
        drawn[f"distribution{suffix}"] = partial(_distribution, study, name, target)
    return drawn


def _objective_value(place: int, trial: FrozenTrial) -> float:
    return float(trial.values[place])


def _with_short_keys(search: Search) -> Study:
    """Copy the study into memory with keys that are short enough to be labels."""
    import optuna

    study = optuna.create_study(directions=search.study.directions)
    short = short_keys(list(search.space))
    for trial in search.study.get_trials():
        keys = [key for key in trial.distributions if key in short]
        trial.params, trial.distributions = (
            {short[key]: mapping[key] for key in keys} for mapping in (trial.params, trial.distributions)
        )
        study.add_trial(trial)
    return study


def _history(study: Study, name: str, target: _Target | None) -> Figure:
    """Draw every trial's value, and the best so far."""
    from optuna.visualization.matplotlib import plot_optimization_history

    axes = plot_optimization_history(study, target=target, target_name=name)
    _require(axes.collections)
    axes.set(xlabel="trial")
    axes.locator_params(axis="x", integer=True)
    single = target is None  # Optuna knows the best of a single objective
    return _restyle(axes, 3.8, f"{name} of each trial{', and the best so far' * single}", single)


def _importances(study: Study, name: str, target: _Target | None) -> Figure:
    """Draw how much of the objective's variance each key explains."""
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_param_importances

    try:
        evaluator: BaseImportanceEvaluator = FanovaImportanceEvaluator(seed=0)
    except ImportError:  # it needs scikit-learn
        evaluator = PedAnovaImportanceEvaluator()
    axes = plot_param_importances(study, evaluator=evaluator, target=target, target_name=name)
    _require(axes.texts[1:])
    axes.set(xlabel="importance (sum 1)", ylabel="")
    for text in axes.texts:
        text.set(text=f" {text.get_text()}", fontsize=8)
    axes.set_xlim(0, 1.12 * max(text.get_position()[0] for text in axes.texts))
    return _restyle(axes, 1.4 + 0.3 * len(axes.texts), f"What {name} depends on", legend=False)


def _distribution(study: Study, name: str, target: _Target | None) -> Figure:
    """Draw the share of trials that are at most as large as each value."""
    from optuna.visualization.matplotlib import plot_edf

    axes = plot_edf(study, target=target, target_name=name)
    axes.set(ylabel="share of trials")
    return _restyle(axes, 3.8, f"Empirical distribution of {name}", legend=False)


def _pareto_front(study: Study, names: list[str]) -> Figure:
    """Draw the Pareto-optimal trials among all."""
    from optuna.visualization.matplotlib import plot_pareto_front

    return _restyle(plot_pareto_front(study, target_names=names), 4.2, "Pareto-optimal trials")


def _timeline(study: Study) -> Figure:
    """Draw when each trial ran, and how it ended."""
    from optuna.visualization.matplotlib import plot_timeline

    axes = plot_timeline(study)
    _require(axes.patches)
    axes.set(xlabel="time of day", ylabel="trial")
    return _restyle(axes, 3.8, "When each trial ran")


def _require(artists: Any) -> None:
    """Raise where Optuna returned empty axes."""
    if not len(artists):
        raise ValueError("nothing to draw")


def _restyle(axes: Any, height: float, title: str, legend: bool = True) -> Figure:
    """Give Optuna's figure the house's style, its legend below or, where it says nothing, gone."""
    from runner.figures import FAINT, INK

    figure: Figure = axes.figure
    figure.set_size_inches(6.4, height)
    figure.set_layout_engine("constrained")
    figure.set_facecolor("white")
    axes.set_title(title, fontsize=10, loc="left", y=1.0)
    axes.set_facecolor("white")
    axes.tick_params(colors=INK)
    axes.grid(color=FAINT)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=INK, fontsize=9, text=_WORDS.get(text.get_text(), text.get_text()))

    # the legend in one row below, in our words
    old = axes.get_legend()
    if old is not None and legend:
        labels = [_WORDS.get(text.get_text(), text.get_text()) for text in old.get_texts()]
        handles = [handle for handle in old.legend_handles if handle is not None]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    if old is not None:
        old.remove()
    return figure
