"""Which classes `_target_` may name.

Those of `experiments`, of `torch.optim`, of the runner itself, and of files under a folder or in a package that
the *caller* named. A config that was stored with a run cannot widen that.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError

_HOME = Path(__file__).resolve().parents[2]

_OURS = ("experiments", "torch.optim", "runner.schedule", "runner.sweep.search")


@dataclass(frozen=True)
class Trust:
    """Decide which modules may be named: ours, torch.optim's, or the caller's own."""

    package: str | None  # of `trust=`
    folder: Path | None  # of `--config-dir`

    def allows(self, module: str) -> bool:
        """Return whether classes of the module may be named."""
        if lies_in(module, "experiments"):
            _require_ours()
        if any(lies_in(module, package) for package in (*_OURS, self.package) if package is not None):
            return True
        return self.folder is not None and _is_inside(module.split(".")[0], self.folder.resolve())

    def rule(self, module: str) -> str:
        """Say what may be named, and how to allow a module of the user's own."""
        package = module.split(".")[0]
        rule = "only classes of experiments, of torch.optim and of files under --config-dir may be."
        if package in sys.stdlib_module_names or package == "torch":
            return rule
        return f"{rule} If {package} is yours, give its folder as --config-dir, or add trust={package}."


def lies_in(module: str, package: str) -> bool:
    """Return whether a module is the package or lies in it."""
    return f"{module}.".startswith(f"{package}.")


def _require_ours() -> None:
    """Raise UserError where `experiments` of the current folder hides ours, as it does under `python -m`."""
    spec = importlib.util.find_spec("experiments")
    origins = list(spec.submodule_search_locations or []) if spec else []
    if spec is not None and _HOME / "experiments" not in [Path(place).resolve() for place in origins]:
        place = Path(origins[0]).parent if origins else Path.cwd()
        raise UserError(
            f"A folder or file called experiments in {place} hides the runner's own. "
            "Run from another folder, use the command `runner`, or rename it."
        )


def _is_inside(module: str, folder: Path) -> bool:
    """Return whether a top-level module is a file or package under the folder."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return True  # importing it then says that it does not exist
    places = [spec.origin] if spec.has_location and spec.origin else spec.submodule_search_locations or []
    return bool(places) and all(Path(place).resolve().is_relative_to(folder) for place in places)
