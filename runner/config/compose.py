"""From overrides and YAML files to one plain, resolved dict."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from runner.config.command import (
    CONF,
    RUN_OPTIONS,
    SWEEP_KEYS,
    Command,
    is_hydra,
    is_launcher,
    is_of_sweep,
    parse_override,
    show,
    text,
)
from runner.config.hydra_errors import launcher_error, launcher_key_error, sweeper_error
from runner.config.hydra_job import HYDRA_FILE, HydraJob, chosen_options
from runner.config.mistakes import (
    composition_error,
    experiment_error,
    file_error,
    fixed_error,
    hidden_error,
    key_error,
    option_error,
    override_error,
    root_error,
)
from runner.config.options import (
    GLOBAL_GROUPS,
    declared_groups,
    groups,
    is_option,
    leaves,
    literal,
    option_files,
    read_yaml,
    with_later_keys,
)
from runner.config.values import resolve, with_values
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
    hydra: HydraJob | None = None  # of one run: a sweep's jobs get theirs where they run

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
    hydra: DictConfig  # Hydra's own node

    def fill(self, values: Iterable[Override], number: int | None = None) -> Composed:
        """Resolve the config with these values on top, as the job of this number in a sweep.

        Raises:
            UserError: a misspelt key; a value that is missing or cannot be resolved.
        """
        values = list(values)
        raise_first(key_error(override, self.base, self.available) for override in values)
        command = replace(self.command, overrides=[*self.command.overrides, *values])

        composed = with_values(self.composed, values)
        raise_first([root_error(composed, self.available, command)])
        typed = [text(o) for o in command.overrides if not (is_of_sweep(o) or is_hydra(o))]
        job = None
        if self.reads_hydra or not command.multirun:  # it takes longer than all the rest
            job = HydraJob.of(self.hydra, composed, typed, number)
        with job.active() if job is not None else contextlib.nullcontext():
            config = resolve(composed, command)
        sweep = {key: config.pop(key) for key in (*SWEEP_KEYS, "runs") if key in config}
        written = self.written | {o.key_or_group: text(o) for o in values}
        return Composed(config, typed, self.defaults, self.options, written, sweep, job)

    @cached_property
    def reads_hydra(self) -> bool:
        """Whether an interpolation of the config reads Hydra's own node."""
        return "${hydra:" in str(self.composed)

    def to_dict(self) -> dict[str, Any]:
        """Return what a file keeps of it: the config, not yet resolved, and the experiment's defaults."""
        return {"config": OmegaConf.to_container(self.composed), "defaults": self.defaults}

    @staticmethod
    def from_dict(saved: dict[str, Any], command: Command, hydra: DictConfig) -> Template:
        """Return the template that `to_dict` saved, whatever the YAML files say by now."""
        config, defaults = OmegaConf.create(saved["config"]), saved["defaults"]
        return Template(command, groups(command), config, config, defaults, defaults, {}, hydra)


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
    options, values, base, hydra = _compose_base(command, available)
    experiment = [o for o in options if o.key_or_group == "experiment"]
    raise_first([experiment_error(experiment, command, available)])

    # the slow part, 70 ms, is not repeated where nothing but the experiment is selected
    defaults = base if options == experiment else _compose_options(experiment, command, available)[0]
    composed = with_values(base, values)
    written = _where_written(command.overrides, chosen_options(hydra), available)
    with _reading(hydra, base):
        resolved = resolve(defaults, command), resolve(base, command)
    return Template(command, available, base, composed, *resolved, written, hydra)


def compose_unresolved(command: Command) -> tuple[DictConfig, list[str]]:
    """Return the config as Hydra composes it, its own node included, and the options as Hydra takes them.

    Raises:
        UserError: a misspelt group, option or key; YAML that does not compose.
    """
    available = groups(command)
    options, values, base, _ = _compose_base(command, available)
    composed = with_values(base, values)
    raise_first([root_error(composed, available, command)])

    # Hydra's own node, beside what it composes
    lines = _lines(options, command)
    config = _compose(lines, command)
    with open_dict(config):
        config.hydra.overrides.task = [text(o) for o in command.overrides if not is_hydra(o)]
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
    own = [
        text(o) for o in command.overrides if re.match(r"hydra(\.job\.|[./]hydra_logging)", o.key_or_group)
    ]
    quiet = [] if any("hydra_logging" in line for line in own) else ["hydra/hydra_logging=none"]
    quiet += ["hydra/job_logging=none", "hydra.output_subdir=null"]  # a job's own are set where it runs
    try:
        config = _compose([*quiet, *own, *(text(o) for o in options if o.value() is not None)], command)
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


def hydra_node(command: Command, experiment: str | None) -> DictConfig:
    """Compose Hydra's own node for what is stored: as typed now, and as the experiment's file says by now.

    A file that does not compose any more stops no resume, and says nothing.

    Raises:
        UserError: what was typed does not fit.
    """
    available = groups(command)
    own = replace(command, overrides=[o for o in command.overrides if is_hydra(o) and not is_launcher(o)])
    raise_first(override_error(override, own) for override in own.overrides)
    if experiment in available["experiment"]:
        with contextlib.suppress(UserError):
            return _compose_options([parse_override(f"experiment={experiment}")], own, available)[1]
    return _compose_options([], own, available)[1]


def on_top(
    config: dict[str, Any], command: Command, allowed: tuple[str, ...] | None, run: Path | None = None
) -> Composed:
    """Set the command line's values in the stored config of a run; only the `allowed` keys, where given.

    Raises:
        UserError: a key that the stored config lacks, or that may not be changed.
    """
    available = groups(command)
    config = with_later_keys(config)
    stored = OmegaConf.create(literal(config))
    raise_first(override_error(override, command) for override in command.overrides)

    # what may change
    same = ("experiment", config.get("name"))
    values = [o for o in command.overrides if o.key_or_group not in RUN_OPTIONS and not is_hydra(o)]
    values = [o for o in values if (o.key_or_group, o.value()) != same]
    raise_first(fixed_error(override, available, allowed) for override in values)
    raise_first(key_error(override, stored, available) for override in values)

    # as if it had been composed
    written = {o.key_or_group: text(o) for o in values}
    changed, typed = with_values(stored, values), list(written.values())
    choices = _stored_choices(run)
    hydra = hydra_node(command, choices.get("experiment"))
    job = HydraJob.of(hydra, changed, typed, choices=choices)
    with job.active():
        return Composed(resolve(changed, command), typed, config, config, written, hydra=job)


def _stored_choices(run: Path | None) -> dict[str, str]:
    """Return the options that a run's `hydra.yaml` says were chosen: names, from which nothing is built."""
    file = None if run is None else run / HYDRA_FILE
    content: Any = read_yaml(file) if file is not None and file.exists() else {}
    for key in ("hydra", "runtime", "choices"):
        content = content.get(key) if isinstance(content, dict) else None
    choices = content if isinstance(content, dict) else {}
    return {str(group): literal(name) for group, name in choices.items() if isinstance(name, str)}


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


def _compose(lines: list[str], command: Command) -> DictConfig:
    """Compose `config.yaml` with these overrides, by Hydra; its own node stands under `hydra`."""
    with hydra_of_conf():
        return compose("config", [*search_path(command), *lines], return_hydra_config=True)


def hydra_of_conf() -> initialize_config_dir:
    """Return the context in which Hydra reads the runner's files, as version 1.3 does; later ones know no other."""
    base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
    return initialize_config_dir(str(CONF), job_name="runner", **base)


def search_path(command: Command) -> list[str]:
    """Return what tells Hydra of the user's own folder."""
    if command.config_dir is None:
        return []
    return [f"hydra.searchpath=['file://{command.config_dir.resolve()}']"]


def _compose_base(
    command: Command, available: dict[str, dict[str, Path]]
) -> tuple[list[Override], list[Override], DictConfig, DictConfig]:
    """Return the overrides of options and of single keys, the config with these options, and Hydra's node."""
    raise_first(override_error(override, command) for override in command.overrides)

    # options of groups, then the keys that these have
    options = [o for o in command.overrides if is_option(o, available)]
    values = [o for o in command.overrides if not (is_option(o, available) or is_hydra(o))]
    raise_first(option_error(override, available) for override in options)
    files = [
        available[o.key_or_group].get(str(o.value())) for o in options if o.key_or_group in GLOBAL_GROUPS
    ]
    raise_first(file_error(file) for file in files if file is not None)
    base, hydra = _compose_options(options, command, available)
    raise_first(key_error(override, base, available) for override in values)
    return options, values, base, hydra


def _emptied(options: list[Override]) -> list[str]:
    """Return the groups that are set to null, for which Hydra's grammar has no option."""
    declared = declared_groups()
    return [
        o.key_or_group for o in options if o.get_key_element().lstrip("~") in declared and o.value() is None
    ]


def _lines(options: list[Override], command: Command) -> list[str]:
    """Return the options as Hydra takes them, without groups that are set to null, and what sets its node."""
    emptied, own = _emptied(options), [o for o in command.overrides if is_hydra(o)]
    return [text(o) for o in (*options, *own) if o.key_or_group not in emptied]


def _compose_options(
    options: list[Override], command: Command, available: dict[str, dict[str, Path]]
) -> tuple[DictConfig, DictConfig]:
    """Compose options of groups; return the config, and apart from it Hydra's own node."""
    try:
        config = _compose(_lines(options, command), command)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        own = [o for o in command.overrides if is_hydra(o)]
        raise composition_error(error, [*options, *own], available) from None
    hydra = OmegaConf.masked_copy(config, "hydra")
    raise_first([hidden_error(chosen_options(hydra), command), sweeper_error(hydra)])

    with open_dict(config):
        del config["hydra"]
        for group in _emptied(options):
            if group in config:
                config[group] = None
    return config, hydra


def _reading(hydra: DictConfig, config: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Let the interpolations of a config read Hydra's own node, where it has such."""
    if "${hydra:" not in str(config):
        return contextlib.nullcontext()
    return HydraJob.of(hydra, config, []).active()


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
