"""Which classes `_target_` may name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from runner.errors import UserError

HOME = Path(__file__).resolve().parents[2]


def is_class_of(value: Any, module: str) -> bool:
    """Whether the value is a class that the module, or one below it, defines."""
    return isinstance(value, type) and f"{value.__module__}.".startswith(f"{module}.")


def require_ours(package: str) -> None:
    """`experiments` in the current folder hides ours under `python -m`: say so instead of running it."""
    spec = importlib.util.find_spec(package)
    origins = list(spec.submodule_search_locations or []) if spec else []
    if spec is not None and HOME / package not in [Path(place).resolve() for place in origins]:
        place = Path(origins[0]).parent if origins else Path.cwd()
        raise UserError(
            f"A folder or file called {package} in {place} hides the runner's own. "
            "Run from another folder, use the command `runner`, or rename it."
        )


def is_inside(module: str, folder: Path) -> bool:
    """Whether a top-level module is a file or package under the folder."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return True  # importing it then says that there is none
    places = (
        [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or [])
    )
    return bool(places) and all(Path(place).resolve().is_relative_to(folder) for place in places)
