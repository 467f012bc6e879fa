"""Optuna's own plots of a study, in the house's style and at sizes where nothing overlaps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.sweep.record import short_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution
    from optuna.importance import BaseImportanceEvaluator
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from runner.sweep.search.study import Search

log = logging.getLogger("runner")

MOST_KEYS = 8  # side by side, the most important ones
MOST_CONTOURS = 4  # in a matrix of keys by keys
LABEL_LENGTH = 16  # of a choice on an axis
WORDS = {  # what Optuna's legends say, and what ours do
    "COMPLETE": "done",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
    "Best Value": "best so far",
    "Trial": "trial",
    "Best Trial": "not beaten",
    "Pareto Rank": "rank of the front",
}
STATES = {"COMPLETE": ("done", 0), "PRUNED": ("pruned", 1)}  # of curves, with the place in the palette

Plot = Callable[[], "Figure"]


def draw(search: Search, folder: Path) -> list[Path]:
    """Draw every plot that the study can have into `folder/figures/optuna_NAME.png`; the files drawn."""
    found = [draw_one(name, plot, folder) for name, plot in plots(search).items()]
    return [path for path in found if path is not None]


def draw_one(name: str, plot: Plot, folder: Path) -> Path | None:
    """One file, or none where Optuna cannot make the plot of this study."""
    import matplotlib as mpl
    from matplotlib import pyplot

    from runner.figures import save, style

    path = folder / "figures" / f"optuna_{name}.png"
    before = set(pyplot.get_fignums())
    # Optuna draws with pyplot, and changes its style for good; a colour bar wants to know the layout at once
    with style(), pyplot.ioff(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mpl.rcParams["figure.constrained_layout.use"] = True
        try:
            figure = plot()
            path.parent.mkdir(parents=True, exist_ok=True)
            save(figure, path)
            return path
        except Exception as error:  # whatever Optuna minds in a study so small or so odd
            log.debug("%s is left out: %s", path.name, error)
            return None
        finally:
            for number in set(pyplot.get_fignums()) - before:
                pyplot.close(number)


def plots(search: Search) -> dict[str, Plot]:
    """What draws each figure, by the figure's name."""
    study = readable(search)
    if len([trial for trial in study.trials if trial.state.name == "COMPLETE"]) < 2:
        return {}  # nothing to compare
    names = list(search.objectives)
    found: dict[str, Plot] = {"timeline": lambda: timeline(study)}
    if len(names) in (2, 3):
        found["pareto_front"] = lambda: pareto_front(study, names)
    if len(names) == 1:
        found["intermediate_values"] = lambda: intermediate_values(study, names[0])
    for place, name in enumerate(names):
        target = None if len(names) == 1 else partial(objective, place)
        end = "" if len(names) == 1 else f"_{name.replace('/', '_')}"
        keys = ranked_keys(study, target)
        found |= {
            f"history{end}": partial(history, study, name, target),
            f"importances{end}": partial(importances, study, name, target),
            f"slice{end}": partial(slices, study, keys[:MOST_KEYS], name, target),
            f"contour{end}": partial(contours, study, keys[:MOST_CONTOURS], name, target),
        }
        if place == 0:
            found["parallel_coordinate"] = partial(parallel_coordinate, study, keys[:MOST_KEYS], names)
    return found


def objective(place: int, trial: FrozenTrial) -> float:
    """One of several objectives of a trial."""
    return trial.values[place]


def readable(search: Search) -> Study:
    """A copy of the study in memory whose keys and choices are short enough to be labels."""
    import optuna

    study = optuna.create_study(directions=search.study.directions)
    short = short_keys(list(search.space))
    for trial in search.study.get_trials():
        known = {key: entry for key, entry in trial.distributions.items() if key in short}
        trial.params = {short[key]: label(trial.params[key], entry) for key, entry in known.items()}
        trial.distributions = {short[key]: labelled(entry) for key, entry in known.items()}
        study.add_trial(trial)
    return study


class Word(str):
    """A choice as Optuna is to label it, which it does with its repr."""

    def __repr__(self) -> str:
        return str(self)


def label(value: Any, distribution: BaseDistribution) -> Any:
    """A choice's text, cut where it is long; a number as it is."""
    choices = getattr(distribution, "choices", None)
    if choices is None:
        return value
    if len(value) <= LABEL_LENGTH:
        return Word(value)
    return Word(f"{value[: LABEL_LENGTH - 4]}… {choices.index(value)}")  # still unlike the others


def labelled(distribution: BaseDistribution) -> BaseDistribution:
    """A distribution with its choices as they are labelled."""
    from optuna.distributions import CategoricalDistribution

    if not isinstance(distribution, CategoricalDistribution):
        return distribution
    return CategoricalDistribution([label(choice, distribution) for choice in distribution.choices])


def ranked_keys(study: Study, target: Callable | None = None) -> list[str]:
    """The keys, the most important first; in their order where that cannot be told yet."""
    from optuna.importance import get_param_importances

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    keys = list(dict.fromkeys(key for trial in complete for key in trial.params))
    try:
        importance = get_param_importances(study, evaluator=evaluator(), target=target)
    except (ValueError, RuntimeError):
        return keys
    return sorted(keys, key=lambda key: -importance.get(key, 0.0))


def evaluator() -> BaseImportanceEvaluator:
    """fANOVA where scikit-learn is there, PED-ANOVA where it is not."""
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

    try:
        return FanovaImportanceEvaluator(seed=0)
    except ImportError:
        return PedAnovaImportanceEvaluator()


def history(study: Study, name: str, target: Callable | None) -> Figure:
    """Every trial's value, and the best so far."""
    from optuna.visualization.matplotlib import plot_optimization_history

    axes = plot_optimization_history(study, target=target, target_name=name)
    need(bool(axes.collections))
    axes.set(xlabel="trial")
    axes.locator_params(axis="x", integer=True)
    alone = target is not None  # Optuna knows the best of one objective alone
    return tidy(
        axes, (6.4, 3.8), f"{name} of each trial{'' if alone else ', and the best so far'}", not alone
    )


def intermediate_values(study: Study, name: str) -> Figure:
    """What each trial reported at each evaluation, by how the trial ended."""
    from matplotlib.lines import Line2D
    from optuna.visualization.matplotlib import plot_intermediate_values

    from runner.figures import PALETTE

    axes = plot_intermediate_values(study)
    need(bool(axes.lines))
    states = {f"Trial{trial.number}": trial.state.name for trial in study.trials}
    many = len(axes.lines) > 30
    for line in axes.lines:
        state = states.get(str(line.get_label()), "")
        line.set(color=PALETTE[STATES[state][1]] if state in STATES else "0.6", alpha=0.3 if many else 0.7)
    shown = dict.fromkeys(state for state in STATES if state in states.values())
    handles = [Line2D([], [], color=PALETTE[STATES[state][1]], label=STATES[state][0]) for state in shown]
    if set(states.values()) - set(STATES):
        handles.append(Line2D([], [], color="0.6", label="failed or not done"))
    axes.legend(handles=handles)
    axes.set(xlabel="evaluation", ylabel=name)
    axes.locator_params(axis="x", integer=True)
    return tidy(axes, (6.4, 3.8), f"{name} while the trials ran")


def importances(study: Study, name: str, target: Callable | None) -> Figure:
    """How much of the objective's variance each key explains."""
    from optuna.visualization.matplotlib import plot_param_importances

    axes = plot_param_importances(study, evaluator=evaluator(), target=target, target_name=name)
    need(len(axes.texts) > 1)
    axes.set(xlabel="importance (sum 1)", ylabel="")
    for text in axes.texts:
        text.set(text=f" {text.get_text()}", fontsize=8)
    axes.set_xlim(0, 1.12 * max(text.get_position()[0] for text in axes.texts))
    return tidy(axes, (6.4, 1.4 + 0.3 * len(axes.texts)), f"What {name} depends on", legend=False)


def slices(study: Study, keys: list[str], name: str, target: Callable | None) -> Figure:
    """The objective over each key, the later trials darker."""
    from optuna.visualization.matplotlib import plot_slice

    axes = plot_slice(study, params=keys, target=target, target_name=name)
    figure = tidy(axes, (2.2 * len(keys) + 1.6, 3.6), f"{name} by each key")
    figure.axes[-1].locator_params(axis="y", integer=True)  # the colour bar counts trials
    return figure


def contours(study: Study, keys: list[str], name: str, target: Callable | None) -> Figure:
    """The objective over each pair of the most important keys, between the trials interpolated."""
    from optuna.visualization.matplotlib import plot_contour

    need(len(keys) > 1)
    axes = plot_contour(study, params=keys, target=target, target_name=name)
    side = 5.0 if len(keys) == 2 else 2.3 * len(keys)
    figure = tidy(axes, (side + 1.4, side), f"{name} by pairs of keys (points: trials)")
    for each in figure.axes:
        each.grid(False)
    return figure


def parallel_coordinate(study: Study, keys: list[str], names: list[str]) -> Figure:
    """One line per trial through its values."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    from runner.figures import GREY

    axes = plot_parallel_coordinate(study, params=keys, target_name=names[0])
    lines = axes.collections[0]
    words = [*names, *(text.get_text() for text in axes.get_xticklabels()[len(names) :])]
    axes.set_xticks(axes.get_xticks(), words, rotation=0)
    # from white on, the palest lines would not be seen
    pale_last = lines.get_cmap().name.endswith("_r")
    shades = lines.get_cmap()(np.linspace(0, 0.75, 256) if pale_last else np.linspace(0.25, 1, 256))
    lines.set(cmap=ListedColormap(shades), alpha=0.8)
    figure = tidy(axes, (1.6 * len(words) + 1, 4.2), "Trials by their keys", legend=False)
    for each in figure.axes:  # one per key, over each other
        each.grid(False)
        each.spines["right"].set(visible=True, color=GREY)
        for text in each.get_yticklabels():
            text.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5})
    return figure


def pareto_front(study: Study, names: list[str]) -> Figure:
    """The trials that no other beats in every objective, among all."""
    from optuna.visualization.matplotlib import plot_pareto_front

    axes = plot_pareto_front(study, target_names=names)
    return tidy(axes, (6.0, 4.2), "Trials that no other beats in every objective")


def timeline(study: Study) -> Figure:
    """When each trial ran, and how it ended."""
    from optuna.visualization.matplotlib import plot_timeline

    axes = plot_timeline(study)
    need(bool(axes.patches))
    axes.set(xlabel="time of day", ylabel="trial")
    return tidy(axes, (6.4, 3.8), "When each trial ran")


def need(there: bool) -> None:
    """Optuna gives empty axes where it has nothing to draw."""
    if not there:
        raise ValueError("nothing to draw")


def tidy(axes: Any, size: tuple[float, float], title: str, legend: bool = True) -> Figure:
    """Optuna's figure at `size` inches in the house's style, its legend below or, where it says nothing, gone."""
    import numpy as np

    from runner.figures import FAINT, INK

    panels = np.ravel(axes)
    figure = panels[0].figure
    figure.set_size_inches(size)
    figure.set_layout_engine("constrained")
    figure.set_facecolor("white")
    if len(panels) > 1:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    else:
        panels[0].set_title(title, fontsize=10, loc="left", y=1.0)
    for each in figure.axes:
        each.set_facecolor("white")
        each.tick_params(colors=INK)
        for text in (each.xaxis.label, each.yaxis.label):
            text.set(color=INK, fontsize=9, text=WORDS.get(text.get_text(), text.get_text()))
        mark_powers(each)
        each.label_outer()
    for panel in panels:
        panel.grid(color=FAINT)
        move_legend(panel, figure, legend)
    return figure


def mark_powers(axes: Any) -> None:
    """Few plain numbers on logarithmic axes: matplotlib's for less than two decades run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def move_legend(axes: Any, figure: Figure, keep: bool) -> None:
    """Put a legend in one row below, in our words."""
    old = axes.get_legend()
    if old is None:
        return
    if keep:
        words = [WORDS.get(text.get_text(), text.get_text()) for text in old.get_texts()]
        figure.legend(old.legend_handles, words, loc="outside lower center", ncols=len(words))
    old.remove()
