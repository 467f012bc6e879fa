"""The YAML files: groups, options, experiments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from runner.config.command import CONF, Command
from runner.errors import UserError

GLOBAL_GROUPS = ("experiment", "preset", "debug")  # their YAML speaks of the whole run


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts with its dotted key."""
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def groups(command: Command) -> dict[str, dict[str, Path]]:
    """Return the options of every config group, by name, with their files."""
    options: dict[str, dict[str, Path]] = {name: {} for name in declared_groups()}
    for folder in (command.config_dir, CONF):  # ours win
        for file in sorted(folder.glob("*/*.yaml")) if folder is not None else []:
            options.setdefault(file.parent.name, {})[file.stem] = file
    return options


@cache
def root_yaml() -> dict[str, Any]:
    """Return `config.yaml`, not composed."""
    return read_yaml(CONF / "config.yaml")


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


def read_yaml(file: Path) -> dict[str, Any]:
    """Return a YAML file as a dict.

    Raises:
        UserError: it is no YAML, or no mapping; the message names the line.
    """
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
