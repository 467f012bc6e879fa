"""An Optuna study over a sweep's space."""

from runner.sweep.search.settings import Settings

__all__ = ["Settings"]
