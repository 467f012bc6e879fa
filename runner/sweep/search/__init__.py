"""An Optuna study over a sweep's space."""

from runner.sweep.search.settings import SearchConfig

__all__ = ["SearchConfig", "Settings"]

Settings = SearchConfig  # the name that sweeps of version 0.1 hold
