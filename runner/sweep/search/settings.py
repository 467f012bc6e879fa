"""The `sweep` node of the YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from runner.errors import UserError
from runner.sweep.search.storage import check_storage


@dataclass
class SearchConfig:
    """The node of `sweep=optuna`.

    Raises:
        ValueError: an argument is out of range.
    """

    n_trials: int = 20  # in all, also over several commands
    sampler: str = "tpe"  # tpe, random, grid, nsga2, or a class of optuna.samplers
    sampler_options: dict[str, Any] = field(default_factory=dict)  # further arguments of its class
    pruner: str = "none"  # median, halving, hyperband, none, or a class of optuna.pruners
    pruner_options: dict[str, Any] = field(default_factory=dict)  # further arguments of its class
    storage: str | None = None  # a database URL; None: study.db in the sweep's folder
    seed: int = 0  # of the sampler
    objectives: dict[str, Any] | None = None  # metric/split or seconds: direction; None: the run's objective
    dir: str | None = None  # the sweep's folder; None: a new one
    space: dict[str, Any] = field(default_factory=dict)  # override text by key, besides the command line's

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise ValueError(f"n_trials must be at least 1, got {self.n_trials}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}")
        if self.storage is not None:
            check_storage(self.storage)

        # objectives: names that a run measures, and a direction for each
        if self.objectives is not None and not self.objectives:
            raise ValueError("objectives must name a metric, such as {accuracy/val: maximize}")
        for name, direction in (self.objectives or {}).items():
            if name != "seconds" and not re.fullmatch(r"[^/]+/(train|val|test)", str(name)):
                raise ValueError(f"objectives must be metrics such as accuracy/val, or seconds, got {name}")
            if direction not in ("maximize", "minimize"):
                raise ValueError(f"objectives: {name} must be maximize or minimize, got {direction}")

    def directions(self, objective: str | None, direction: str) -> dict[str, str]:
        """Return the direction of each objective, of which the run's own is one unless `objectives` says otherwise.

        Raises:
            UserError: there is no objective, or one with two directions.
        """
        if self.objectives is None:
            if objective is None:
                raise UserError("A search needs an objective: set objective=METRIC/val.")
            return {objective: direction}
        own = self.objectives.get(objective or "", direction)
        if own != direction:
            raise UserError(
                f"sweep.objectives: the run has direction={direction} for {objective}, not {own}."
            )
        return dict(self.objectives)
