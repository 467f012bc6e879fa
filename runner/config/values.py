"""Single values of a composed config: set, removed, and at last resolved into plain ones."""

from __future__ import annotations

import copy
import re
from pathlib import PurePath
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, UnsupportedInterpolationType

from runner.config.command import OPEN_NODES, Command, show, text
from runner.config.options import has_key
from runner.errors import UserError


def with_values(config: DictConfig, values: list[Override]) -> DictConfig:
    """Return the config with single keys set, as Hydra would set them."""
    if not values:
        return config
    config = copy.deepcopy(config)
    for override in values:
        key, line = override.key_or_group, text(override)
        if override.is_delete():
            _remove(config, override)
            continue
        adding = override.is_add() or override.is_force_add() or key.startswith(OPEN_NODES)
        try:
            OmegaConf.update(config, key, override.value(), force_add=adding)
        except OmegaConfBaseException as error:
            raise UserError(f"{line}: {str(error).splitlines()[0]}", line) from None
    return config


def _remove(config: DictConfig, override: Override) -> None:
    """Remove the key of `~key`, or of `~key=value` if it has that value."""
    key, line = override.key_or_group, text(override)
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not has_key(config, key):
        raise UserError(f"{line}: {key} is removed already.", line, "")
    if override.value() is not None and override.value() != node[leaf]:
        raise UserError(f"{line}: {key} is {show(node[leaf])}.", line, f"~{key}")
    with open_dict(node):
        del node[leaf]


def resolve(config: DictConfig, command: Command) -> dict[str, Any]:
    """Return the config as dicts and lists, every interpolation resolved."""
    if match := re.search(r"\$\{hydra:(runtime\.output_dir|run\.dir|sweep\.\w+)\}", str(config)):
        raise UserError(
            f"{match[0]} has no value yet: a run's folder is made when everything is checked. "
            "A task finds it as self.run.folder."
        )
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        lines = [line for line in command.typed if line.lstrip("+").startswith(f"{key}=")]
        if isinstance(error, MissingMandatoryValue):
            where = lines[-1] if lines else "the experiment's YAML"
            raise UserError(f"{where}: {key} needs a value.") from None
        reason = str(error).splitlines()[0]
        if isinstance(error, UnsupportedInterpolationType):
            reason += "; register a resolver of that name in hydra_setup.py under --config-dir."
        raise UserError(f"{' '.join(lines) or key} cannot be resolved: {reason}") from None
    assert isinstance(content, dict)
    return {str(key): _plain_value(str(key), value) for key, value in content.items()}


def _plain_value(key: str, value: Any) -> Any:
    """Return a value as YAML and JSON have it; a resolver or a structured config may hold any object."""
    if isinstance(value, dict):
        return {name: _plain_value(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(f"{key}[{number}]", item) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, PurePath):
        return str(value)
    for kind in (int, float, str):  # also numpy's float, which is one
        if isinstance(value, kind):
            return kind(value)
    expected = "a number, a text, a list or a mapping"
    raise UserError(f"{key} cannot be resolved: expected {expected}, got {type(value).__name__}.")
