"""How a run is run. From Python: `from runner import run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UserError

if TYPE_CHECKING:
    from runner.engine.job import Result

__all__ = ["UserError", "run"]


def run(*overrides: str, config_dir: str | Path | None = None) -> Result:
    """Run an experiment: `run("experiment=rnn_fashion", "loop.epochs=1").metrics["test"]["accuracy"]`.

    Takes what the command line takes, `-m` apart; `config_dir` is a folder of your own YAML and modules.

    Raises:
        UserError: something was wrong with the call; nothing was written.
    """
    from runner.app import run_overrides  # composing is imported by those who compose

    return run_overrides(list(overrides), None if config_dir is None else Path(config_dir))
