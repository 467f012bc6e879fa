"""The `sweep` node of the YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from runner.errors import UserError, at_least, within
from runner.sweep.search.storage import check_storage


@dataclass
class SearchConfig:
    """The node of `sweep=optuna`."""

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
        at_least(1, n_trials=self.n_trials)
        within(0, 2**32, seed=self.seed)
        if self.storage is not None:
            check_storage(self.storage)

        # objectives: names that a run measures, and a direction for each
        if self.objectives is None:
            return
        entries = [f"{name}: {direction}" for name, direction in self.objectives.items()]
        pattern = re.compile(r"(seconds|[^/]+/(train|val|test)): (maximize|minimize)")
        if not entries or not all(map(pattern.fullmatch, entries)):
            raise ValueError(
                "objectives must be metrics such as accuracy/val, or seconds, each with maximize or minimize, "
                f"got {{{', '.join(entries)}}}"
            )

    def directions(self, objective: str | None, direction: str) -> dict[str, str]:
        """Return the direction of each objective: the run's own alone unless `objectives` says otherwise."""
        if self.objectives is None:
            if objective is None:
                raise UserError("A search needs an objective: set objective=METRIC/val.")
            return {objective: direction}
        own = self.objectives.get(objective or "", direction)
        if own != direction:
            raise UserError(
                f"sweep.objectives: the run has direction={direction} for {objective}, got {own}."
            )
        return dict(self.objectives)
