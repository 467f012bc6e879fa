"""The user's own code that runs before anything is composed: `hydra_setup.py` under `--config-dir`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from functools import cache
from pathlib import Path

from runner.config.command import Command
from runner.errors import UserError

_NAME = "hydra_setup"


def import_own_code(command: Command) -> None:
    """Make the modules under `--config-dir` importable, and run its `hydra_setup.py` once in this process.

    It registers resolvers and ConfigStore nodes. The caller names the folder: no run, checkpoint or sweep does.

    Raises:
        UserError: it fails; the message names the line.
    """
    if command.config_dir is None:
        return
    folder = command.config_dir.resolve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    if (folder / f"{_NAME}.py").is_file():
        _run(folder / f"{_NAME}.py")


@cache
def _run(file: Path) -> None:
    """Run a file as the module `hydra_setup`, which other modules of its folder may import."""
    if getattr(sys.modules.get(_NAME), "__file__", None) == str(file):
        return  # a worker that was sent one of its classes has imported it
    spec = importlib.util.spec_from_file_location(_NAME, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_place(file, error)}: {type(error).__name__}: {_reason(error)}.") from None


def _place(file: Path, error: BaseException) -> str:
    """Return the line of the user's that raised: the last one in the file's folder."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(file.parent)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else str(file)


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(text.split()).rstrip(".")
