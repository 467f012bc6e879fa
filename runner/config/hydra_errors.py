"""Errors about Hydra's own node: its launchers, its options, its keys, and what the runner fixes of it."""

from __future__ import annotations

import re

from hydra.conf import HydraConf
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from runner.config.command import is_hydra, is_launcher, text
from runner.errors import UserError, unknown

# of Hydra's own node what the runner fixes: why, and what to type instead of a value
_SEARCHES = ("searches resume here: use sweep=optuna sweep.n_trials=N", "sweep=optuna")
_FIXED = {
    "hydra.run.dir": ("two runs must not share a folder: use outputs=FOLDER", "outputs={}"),
    "hydra.sweep.dir": ("two sweeps must not share a folder: use sweep.dir=FOLDER", "sweep.dir={}"),
    "hydra.sweeper.n_trials": (_SEARCHES[0], "sweep.n_trials={}"),
    "hydra.sweeper": _SEARCHES,
    "hydra/sweeper": _SEARCHES,
    "hydra.output_subdir": ("a resume reads .hydra", ""),
    "hydra.mode": ("a sweep is started with -m", ""),
    "hydra.help": ("--help shows the runner's", ""),
    "hydra.hydra_help": ("--help shows the runner's", ""),
}


def fixed_by_runner(key: str) -> tuple[str, str] | None:
    """Return why the runner fixes a key of Hydra's own node, and what sets the same here."""
    return next((fixed for name, fixed in _FIXED.items() if key == name or key.startswith(f"{name}.")), None)


def sweeper_error(node: DictConfig) -> UserError | None:
    """Return the error where a defaults list selects one of Hydra's sweepers, which would have no effect."""
    if node.hydra.runtime.choices["hydra/sweeper"] == "basic":
        return None
    return UserError(f"hydra/sweeper: {_SEARCHES[0]}; in a defaults list, `override /sweep: optuna`.")


def hydra_error(error: Exception, options: list[Override]) -> UserError | None:
    """Translate what Hydra says of a typed option or key of its own node, if it is about one."""
    own = {o.get_key_element().lstrip("+~"): o for o in options if is_hydra(o)}

    # an option
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown(group, name, error.options or [], text(own[group])) if group in own else None

    # a key that does not exist, or a value of another type
    reason = " ".join(str(error).split())
    if match := re.search(
        r"Could not (?:override|append to|delete from) ?(?:config)?\W*'?(hydra\.[\w.]+)", reason
    ):
        return _key_error(own[match[1]]) if match[1] in own else None
    if match := re.search(r"Error merging override (\S+)", reason):
        return UserError(f"{match[1]}: {str(error.__cause__).splitlines()[0]}.", match[1], "")
    return None


def _key_error(override: Override) -> UserError:
    """Build the error for a key that Hydra's own node does not have."""
    node, path = OmegaConf.create({"hydra": HydraConf}), ""
    for part in override.key_or_group.split("."):
        longer = f"{path}.{part}".lstrip(".")
        if not isinstance(OmegaConf.select(node, longer), DictConfig):
            break
        path = longer
    names = [f"{path}.{name}" for name in OmegaConf.select(node, path)]
    line = text(override)
    if not names:  # which takes any key
        return UserError(f"{line}: {path} has no such key yet; write +{line}.", line, f"+{line}")
    return unknown("key", longer, names, line)


def launcher_error(error: Exception, options: list[Override]) -> UserError:
    """Build the error for a launcher that is misspelt or not installed."""
    line = next((text(o) for o in reversed(options) if is_launcher(o)), None)
    if not isinstance(error, MissingConfigException) or not error.missing_cfg_file:
        return UserError(f"{line or 'the launcher'}: {' '.join(str(error).split())}", line)
    name = error.missing_cfg_file.rpartition("/")[2]
    refused = unknown("launcher", name, error.options or [], line)
    if refused.right is None:  # no other is meant
        package = f"hydra-{name.partition('_')[0]}-launcher"
        return UserError(f"{refused} If it is one of Hydra's: pip install {package}.", line)
    return refused


def launcher_key_error(override: Override, node: DictConfig, error: Exception) -> UserError:
    """Build the error for a setting that the launcher does not have, or a value that does not fit."""
    name, line = override.key_or_group.removeprefix("hydra.launcher."), text(override)
    settings = [str(key) for key in node if key != "_target_"]
    if name in settings:
        return UserError(f"{line}: {str(error).splitlines()[0]}", line)
    if not settings:
        return UserError(
            f"{line}: this launcher has no settings; select another with hydra/launcher=NAME.", line
        )
    return unknown("setting of the launcher", name, settings, line)
