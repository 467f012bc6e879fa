"""From overrides and YAML files to one plain, resolved dict."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, UnsupportedInterpolationType

from runner.config.command import (
    CONF,
    OPEN_NODES,
    RUN_OPTIONS,
    SWEEP_KEYS,
    Command,
    is_launcher,
    is_of_sweep,
    show,
    text,
)
from runner.config.mistakes import (
    composition_error,
    experiment_error,
    file_error,
    fixed_error,
    hidden_error,
    key_error,
    launcher_error,
    launcher_key_error,
    option_error,
    override_error,
    root_error,
)
from runner.config.options import (
    GLOBAL_GROUPS,
    declared_groups,
    groups,
    has_key,
    is_option,
    leaves,
    option_files,
    read_yaml,
    with_later_keys,
)
from runner.errors import UserError, raise_first

# what a resume may change
RESUMABLE = ("loop.epochs", "loop.steps", "loop.patience", "device", "threads", "figures")


@dataclass(frozen=True)
class Composed:
    """One resolved config, the experiment's defaults, and what the command line changed."""

    config: dict[str, Any]
    overrides: list[str]  # as typed
    defaults: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)  # with the selected options, without single keys
    written: dict[str, str] = field(default_factory=dict)  # where a dotted key was last written
    sweep: dict[str, Any] = field(default_factory=dict)  # the SWEEP_KEYS, which no run has

    def changes(self) -> list[str]:
        """Return what differs from the experiment's defaults: `key=value (default)`."""
        defaults = dict(leaves(self.defaults))
        changes = []
        for key, value in leaves(self.config):
            if key.split(".")[0] in RUN_OPTIONS or (key in defaults and defaults[key] == value):
                continue
            default = f" ({show(defaults[key])})" if key in defaults else ""
            changes.append(f"{key}={show(value)}{default}")
        return changes


@dataclass(frozen=True)
class Template:
    """A composition in which only single values are still to be set, made once for many jobs."""

    command: Command
    available: dict[str, dict[str, Path]]  # the groups and their options
    base: DictConfig  # with the selected options, without single keys
    composed: DictConfig  # with single keys, not resolved
    defaults: dict[str, Any]  # of the experiment, resolved
    options: dict[str, Any]  # `base`, resolved
    written: dict[str, str]  # where each key was last written

    def fill(self, values: Iterable[Override]) -> Composed:
        """Resolve the config with these values on top.

        Raises:
            UserError: a misspelt key; a value that is missing or cannot be resolved.
        """
        values = list(values)
        raise_first(key_error(override, self.base, self.available) for override in values)
        command = replace(self.command, overrides=[*self.command.overrides, *values])

        composed = _with_values(self.composed, values)
        raise_first([root_error(composed, self.available, command)])
        config = _plain(composed, command)
        sweep = {key: config.pop(key) for key in (*SWEEP_KEYS, "runs") if key in config}
        written = self.written | {o.key_or_group: text(o) for o in values}
        typed = [text(o) for o in command.overrides if not is_of_sweep(o)]
        return Composed(config, typed, self.defaults, self.options, written, sweep)

    def to_dict(self) -> dict[str, Any]:
        """Return what a file keeps of it: the config, not yet resolved, and the experiment's defaults."""
        return {"config": OmegaConf.to_container(self.composed), "defaults": self.defaults}

    @staticmethod
    def from_dict(saved: dict[str, Any], command: Command) -> Template:
        """Return the template that `to_dict` saved, whatever the YAML files say by now."""
        config = OmegaConf.create(saved["config"])
        return Template(command, groups(command), config, config, saved["defaults"], saved["defaults"], {})


def compose_command(command: Command) -> Composed:
    """Compose the config of a single run from the YAML files and the overrides.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    return compose_template(command).fill([])


def compose_template(command: Command) -> Template:
    """Compose the YAML files and the overrides, each of which has one value.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    available = groups(command)
    options, values, base, choices = _compose_base(command, available)
    experiment = [o for o in options if o.key_or_group == "experiment"]
    raise_first([experiment_error(experiment, command, available)])

    # the slow part, 70 ms, is not repeated where nothing but the experiment is selected
    defaults = base if options == experiment else _compose_options(experiment, command, available)[0]
    composed = _with_values(base, values)
    written = _where_written(command.overrides, choices, available)
    return Template(
        command, available, base, composed, _plain(defaults, command), _plain(base, command), written
    )


def compose_unresolved(command: Command) -> tuple[DictConfig, list[str]]:
    """Return the config as Hydra composes it, its own node included, and the options as Hydra takes them.

    Raises:
        UserError: a misspelt group, option or key; YAML that does not compose.
    """
    available = groups(command)
    options, values, base, _ = _compose_base(command, available)
    composed = _with_values(base, values)
    raise_first([root_error(composed, available, command)])

    # Hydra's own node, beside what it composes
    lines = _option_lines(options)
    config = _compose(lines, command)
    with open_dict(config):
        config.hydra.overrides.task = [text(o) for o in command.overrides]
        for key in [key for key in config if key != "hydra"]:
            del config[key]
        for key in composed:
            config[key] = composed._get_node(key)
    return config, lines


def launcher_config(command: Command) -> DictConfig:
    """Compose Hydra's own node for a sweep: its launcher, typed or from the experiment's file.

    Raises:
        UserError: the launcher is not installed, or has no such setting.
    """
    available = groups(command)
    options = [o for o in command.overrides if is_option(o, available) and not o.is_sweep_override()]
    options += [o for o in command.overrides if o.key_or_group == "hydra/launcher"]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    try:
        config = _compose([*quiet, *(text(o) for o in options if o.value() is not None)], command)
    except (HydraException, OmegaConfBaseException) as error:
        raise launcher_error(error, options) from None

    for override in command.overrides:
        if is_launcher(override) and override not in options:
            try:
                key = override.key_or_group
                OmegaConf.update(config, key, override.value(), force_add=override.is_add())
            except OmegaConfBaseException as error:
                raise launcher_key_error(override, config.hydra.launcher, error) from None
    return config


def on_top(config: dict[str, Any], command: Command, allowed: tuple[str, ...] | None) -> Composed:
    """Set the command line's values in a stored config; only the `allowed` keys, where given.

    Raises:
        UserError: a key that the stored config lacks, or that may not be changed.
    """
    available = groups(command)
    config = with_later_keys(config)
    stored = OmegaConf.create(config)
    raise_first(override_error(override, command) for override in command.overrides)

    # what may change
    same = ("experiment", config.get("name"))
    values = [o for o in command.overrides if o.key_or_group not in RUN_OPTIONS]
    values = [o for o in values if (o.key_or_group, o.value()) != same]
    raise_first(fixed_error(override, available, allowed) for override in values)
    raise_first(key_error(override, stored, available) for override in values)

    written = {o.key_or_group: text(o) for o in values}
    changed = _plain(_with_values(stored, values), command)
    return Composed(changed, list(written.values()), config, config, written)


def of_the_task(command: Command, stored: dict[str, Any]) -> Command:
    """Return the command with `task.` before the bare keys that only the task has: `steps=50`.

    For modes of the task's own, which train nothing, so that no other `steps` can be meant.
    """
    own = stored["task"].keys() - stored.keys()
    overrides = [
        replace(o, key_or_group=f"task.{o.key_or_group}", input_line=f"task.{text(o)}")
        if o.key_or_group in own
        else o
        for o in command.overrides
    ]
    return replace(command, overrides=overrides)


def to_yaml(config: Any) -> str:
    """Return the plain config as YAML text."""
    return str(yaml.dump(config, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


def _compose(lines: list[str], command: Command) -> DictConfig:
    """Compose `config.yaml` with these overrides, by Hydra; its own node stands under `hydra`."""
    with hydra_of_conf():
        return compose("config", [*search_path(command), *lines], return_hydra_config=True)


def hydra_of_conf() -> initialize_config_dir:
    """Return the context in which Hydra reads the runner's files, as version 1.3 does; later ones know no other."""
    base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
    return initialize_config_dir(str(CONF), **base)


def search_path(command: Command) -> list[str]:
    """Return what tells Hydra of the user's own folder."""
    if command.config_dir is None:
        return []
    return [f"hydra.searchpath=['file://{command.config_dir.resolve()}']"]


def _compose_base(
    command: Command, available: dict[str, dict[str, Path]]
) -> tuple[list[Override], list[Override], DictConfig, dict[str, str]]:
    """Return the overrides of options and of single keys, the config with these options, and its choices."""
    raise_first(override_error(override, command) for override in command.overrides)

    # options of groups, then the keys that these have
    options = [o for o in command.overrides if is_option(o, available)]
    values = [o for o in command.overrides if not is_option(o, available)]
    raise_first(option_error(override, available) for override in options)
    files = [
        available[o.key_or_group].get(str(o.value())) for o in options if o.key_or_group in GLOBAL_GROUPS
    ]
    raise_first(file_error(file) for file in files if file is not None)
    base, choices = _compose_options(options, command, available)
    raise_first(key_error(override, base, available) for override in values)
    return options, values, base, choices


def _emptied(options: list[Override]) -> list[str]:
    """Return the groups that are set to null, for which Hydra's grammar has no option."""
    declared = declared_groups()
    return [
        o.key_or_group for o in options if o.get_key_element().lstrip("~") in declared and o.value() is None
    ]


def _option_lines(options: list[Override]) -> list[str]:
    """Return the options as Hydra takes them: those of a group that is set to null are left out."""
    emptied = _emptied(options)
    return [text(o) for o in options if o.key_or_group not in emptied]


def _compose_options(
    options: list[Override], command: Command, available: dict[str, dict[str, Path]]
) -> tuple[DictConfig, dict[str, str]]:
    """Compose options of groups; return the config and the option of each group in it."""
    try:
        config = _compose(_option_lines(options), command)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise composition_error(error, options, available) from None
    choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items() if v is not None}
    raise_first([hidden_error(choices, command)])

    with open_dict(config):
        del config["hydra"]
        for group in _emptied(options):
            if group in config:
                config[group] = None
    return config, choices


def _with_values(config: DictConfig, values: list[Override]) -> DictConfig:
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


def _plain(config: DictConfig, command: Command) -> dict[str, Any]:
    """Return the config as dicts and lists, every interpolation resolved."""
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


def _where_written(
    overrides: list[Override], choices: dict[str, str], available: dict[str, dict[str, Path]]
) -> dict[str, str]:
    """Return where each key was last written: the command line, else the last YAML file."""
    written: dict[str, str] = {}
    for file, node in option_files(choices, available):
        content = {k: v for k, v in read_yaml(file).items() if k != "defaults"}
        for key, _ in leaves(content, node):
            written[key] = f"in {Path('conf', file.relative_to(CONF)) if CONF in file.parents else file}"
    return written | {o.key_or_group: text(o) for o in overrides}


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """YAML as Hydra reads it: `1e-3` is a number there too, so a text that looks like one is quoted."""


_NUMBER = re.compile(r"([-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)(e[-+]?\d+)?|[-+]?\.?(inf|nan))$", re.IGNORECASE)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789iInN"))
