"""The YAML files: groups, options, experiments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from runner.config.command import CONF, Command
from runner.config.setup import import_own_code
from runner.errors import UserError

_STORE = Path("ConfigStore")  # where nodes of Hydra's ConfigStore are said to stand
_LATER = ("init", "freeze", "figures")  # root keys that runs of version 0.1 lack
GLOBAL_GROUPS = ("experiment", "preset", "debug")  # their YAML speaks of the whole run
_UNEXPLAINED = {"_target_", "defaults", "name", "description"}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts with its dotted key."""
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def literal(value: Any) -> Any:
    """Escape what OmegaConf would interpolate: what a run has stored is data, whoever wrote it."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


def has_key(config: DictConfig, key: str) -> bool:
    """Return whether the dotted key is written anywhere in the config, be its value null."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and leaf in list(node.keys())  # `in node` leaves out what is ???


def groups(command: Command) -> dict[str, dict[str, Path]]:
    """Return the options of every config group, by name, with their files.

    `data/cifar/small.yaml` is `small` of the group `data/cifar`, and `cifar/small` of `data`.
    """
    import_own_code(command)
    options: dict[str, dict[str, Path]] = {name: {} for name in declared_groups()}
    own = [] if command.config_dir is None else [command.config_dir]
    files = [(_STORE, file) for file in _stored_files(ConfigStore.instance().repo, _STORE)]
    files += [(folder, file) for folder in (*own, CONF) for file in _yaml_files(folder)]  # ours win
    for folder, file in files:
        *parts, name = file.relative_to(folder).with_suffix("").parts
        if parts[0] == "hydra":  # Hydra knows its own better
            continue
        for depth in range(1, len(parts) + 1):
            option = "/".join([*parts[depth:], name])
            options.setdefault("/".join(parts[:depth]), {})[option] = file
    return options


def is_option(override: Override, available: dict[str, dict[str, Path]]) -> bool:
    """Return whether it selects options of a group, rather than setting keys of the group's node."""
    return override.key_or_group in available and not isinstance(override.value(), dict)


@cache
def root_yaml() -> dict[str, Any]:
    """Return `config.yaml`, not composed."""
    return read_yaml(CONF / "config.yaml")


def with_later_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config with the root keys that its version did not have, at their defaults."""
    return config | {key: root_yaml()[key] for key in _LATER if key not in config}


def declared_groups() -> dict[str, str | None]:
    """Return the groups that `config.yaml` combines, with their defaults; some have no option yet."""
    entries = [entry for entry in root_yaml()["defaults"] if isinstance(entry, dict)]
    return {group: default for entry in entries for group, default in entry.items()}


def experiments(command: Command) -> dict[str, str]:
    """Return the experiments, each with the `description` of its YAML."""
    descriptions = {}
    for name, file in sorted(groups(command)["experiment"].items()):
        try:
            descriptions[name] = str(read_yaml(file).get("description", ""))
        except UserError as error:  # the others are still listed
            descriptions[name] = f"(cannot be used: {error})"
    return descriptions


def option_files(
    choices: dict[str, str], available: dict[str, dict[str, Path]]
) -> Iterator[tuple[Path, str]]:
    """Yield the file of each chosen option and the node that it fills; those of the whole run last."""
    for selected in (*(key for key in choices if key not in GLOBAL_GROUPS), *GLOBAL_GROUPS):
        group, _, package = selected.partition("@")
        file = available.get(group, {}).get(choices.get(selected, ""))
        if file is not None:
            yield file, "" if group in GLOBAL_GROUPS else package or group.replace("/", ".")


def explained_keys(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each key of a YAML file with the value and the comment on its line."""
    if file.is_relative_to(_STORE):
        return iter(())
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, f"{prefix}{key.value}.")
            elif key.value not in _UNEXPLAINED:
                source = text[value.start_mark.index : value.end_mark.index]
                yield prefix + key.value, source, lines[value.end_mark.line].partition(" # ")[2]

    root = yaml.compose(text)
    return walk(root, "") if root is not None else iter(())


def _yaml_files(folder: Path) -> Iterator[Path]:
    """Yield the YAML files below the folders of a folder; runs hold some that are no options."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")) and name != "outputs")
        if Path(parent) != folder:
            yield from (Path(parent, name) for name in sorted(names) if name.endswith(".yaml"))


def _stored_files(group: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Yield a path for every node of groups in Hydra's ConfigStore."""
    for name, node in group.items():
        if isinstance(node, dict):
            yield from _stored_files(node, folder / name)
        elif folder != _STORE:
            yield folder / name


def read_yaml(file: Path) -> dict[str, Any]:
    """Return a YAML file, or a node of the ConfigStore, as a dict.

    Raises:
        UserError: it is no YAML, or no mapping; the message names the line.
    """
    if file.is_relative_to(_STORE):
        node = ConfigStore.instance().load(file.relative_to(_STORE).as_posix()).node
        return cast(dict[str, Any], OmegaConf.to_container(node))
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: {error.problem or error.context}.") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{file}: expected keys and values, got {kind}.")
    return content


def to_yaml(config: Any) -> str:
    """Return the plain config as YAML text."""
    return str(yaml.dump(config, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """YAML as Hydra reads it: `1e-3` is a number there too, so a text that looks like one is quoted."""


_NUMBER = re.compile(r"([-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)(e[-+]?\d+)?|[-+]?\.?(inf|nan))$", re.IGNORECASE)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789iInN"))
