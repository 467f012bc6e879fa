"""The `sweep` node of the YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from runner.config.command import masked
from runner.errors import UserError
from runner.sweep.search.storage import can_be_masked

DIRECTIONS = ("maximize", "minimize")


@dataclass
class SearchConfig:
    """The node of `sweep=optuna`.

    Raises:
        ValueError: an argument is out of range.
    """

    n_trials: int = 20  # in all, also over several calls
    sampler: str = "tpe"  # tpe, random, grid, nsga2, or a class of optuna.samplers
    sampler_options: dict = field(default_factory=dict)  # further arguments of its class
    pruner: str = "none"  # median, halving, hyperband, none, or a class of optuna.pruners
    pruner_options: dict = field(default_factory=dict)  # further arguments of its class
    storage: str | None = None  # a database's URL; None: study.db in the sweep's folder
    seed: int = 0  # of the sampler
    objectives: dict | None = (
        None  # metric/split or "seconds": maximize or minimize; None: the run's objective
    )
    dir: str | None = None  # the sweep's folder; None: a new one
    space: dict = field(default_factory=dict)  # override text by key, besides the command line's

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise ValueError(f"n_trials must be 1 or more, not {self.n_trials}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), not {self.seed}")
        if self.storage is not None and "://" not in self.storage:
            raise ValueError(
                "storage must be a database's URL, such as sqlite:////tmp/study.db or "
                f"postgresql+psycopg://USER@HOST/NAME, not {masked(self.storage)}"
            )
        if self.storage is not None and not can_be_masked(self.storage):
            raise ValueError(
                "storage: within a user's name, a password or a path, write @ as %40, a space as %20"
            )
        if self.objectives is not None:
            check_objectives(self.objectives)


def check_objectives(objectives: dict) -> None:
    """Names that a run measures, and directions that there are."""
    if not objectives:
        raise ValueError("objectives must name a metric, such as {accuracy/val: maximize}, not nothing")
    for name, direction in objectives.items():
        if name != "seconds" and not re.fullmatch(r"[^/]+/(train|val|test)", str(name)):
            raise ValueError(f"objectives must be metrics such as accuracy/val, or seconds, not {name}")
        if direction not in DIRECTIONS:
            raise ValueError(f"objectives: {name} must be maximize or minimize, not {direction}")


def goals(settings: SearchConfig, objective: str | None, direction: str) -> dict[str, str]:
    """What is searched for: direction by name of the objective."""
    if settings.objectives is None:
        if objective is None:
            raise UserError("A search needs something to search for: set objective=METRIC/val.")
        return {objective: direction}
    given = settings.objectives.get(objective, direction)
    if given != direction:
        raise UserError(f"sweep.objectives: {objective} is to {direction} in the run, not to {given}.")
    return dict(settings.objectives)
