"""From overrides and YAML files to one plain, resolved dict."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from runner.config.command import (
    CONF,
    RUN_OPTIONS,
    SWEEP_KEYS,
    Command,
    grammar,
    is_launcher,
    parse,
    show,
    text,
)
from runner.config.mistakes import (
    check_file,
    check_hidden,
    check_key,
    check_option,
    check_plumbing,
    check_root,
    check_sweep,
    launcher_keys,
    launcher_refused,
)
from runner.config.options import GLOBAL_GROUPS, declared_groups, groups, leaves, read_yaml
from runner.errors import UserError

RESUMABLE = ("loop.epochs", "loop.steps", "loop.patience", "device", "threads")  # what a resume may change


@dataclass(frozen=True)
class Composed:
    """One resolved config, the experiment's defaults, and what the command line changed."""

    config: dict[str, Any]
    overrides: list[str]
    defaults: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)  # with the options, but not the keys, of the call
    written: dict[str, str] = field(default_factory=dict)  # where a dotted key was last written
    sweep: dict[str, Any] = field(default_factory=dict)  # the SWEEP_KEYS, which no run has

    def changes(self) -> list[str]:
        """What differs from the experiment's defaults: `key=value (default)`."""
        theirs = dict(leaves(self.defaults))
        found = []
        for key, value in leaves(self.config):
            if key.split(".")[0] in RUN_OPTIONS or (key in theirs and theirs[key] == value):
                continue
            was = f" ({show(theirs[key])})" if key in theirs else ""
            found.append(f"{key}={show(value)}{was}")
        return found


@dataclass(frozen=True)
class Template:
    """A composition on which only single values are still to be set: the costly part, made once for many jobs."""

    command: Command
    known: dict[str, dict[str, Path]]  # the groups and their options
    base: DictConfig  # with the options, but not the keys, of the call
    composed: DictConfig  # with its keys, not resolved
    defaults: dict[str, Any]  # of the experiment, resolved
    options: dict[str, Any]  # `base`, resolved
    written: dict[str, str]  # where each key was last written

    def fill(self, values: list[Override]) -> Composed:
        """The resolved config with these values on top.

        Raises:
            UserError: a misspelt key; a value that is missing or cannot be resolved.
        """
        config = copy.deepcopy(self.composed) if values else self.composed
        for override in values:
            check_key(override, self.base, self.known)
            adding = override.is_add() or override.is_force_add()
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=adding)
        lines = [text(override) for override in values]
        command = replace(self.command, overrides=[*self.command.overrides, *lines])
        found = plain(config, command)
        sweep = {key: found.pop(key) for key in (*SWEEP_KEYS, "runs") if key in found}
        written = self.written | {o.key_or_group: text(o) for o in values}
        return Composed(found, command.overrides, self.defaults, self.options, written, sweep)

    def freeze(self) -> dict[str, Any]:
        """What a file keeps of it: the config, not yet resolved, and the experiment's defaults."""
        return {"config": OmegaConf.to_container(self.composed), "defaults": self.defaults}

    @staticmethod
    def thaw(kept: dict[str, Any], command: Command) -> Template:
        """The template that was kept, whatever the YAML files say by now."""
        config = OmegaConf.create(kept["config"])
        return Template(command, groups(command), config, config, kept["defaults"], kept["defaults"], {})


def compose_command(command: Command) -> Composed:
    """Compose a single run's config from the YAML files and the overrides.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    return compose_template(command).fill([])


def compose_template(command: Command) -> Template:
    """Compose the YAML files and the overrides, each of which has one value.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    parsed = parse(command.overrides)
    known = groups(command)
    for override in parsed:
        check_sweep(override, command)
        check_plumbing(override)
    chosen = [o for o in parsed if o.key_or_group in known]
    for override in chosen:
        check_option(override, known)
        if override.key_or_group in GLOBAL_GROUPS and override.value() is not None:
            check_file(override.key_or_group, str(override.value()), known)
    base, choices = compose_hydra(chosen, command)
    for override in parsed:
        if override.key_or_group not in known:
            check_key(override, base, known)
    experiment = [o for o in chosen if o.key_or_group == "experiment"]
    if not experiment or experiment[-1].value() is None:
        mode = next((o.value() for o in parsed if o.key_or_group == "mode"), "train")
        if mode != "train":
            raise UserError(
                f"mode={mode} looks at a trained network: add checkpoint=RUN_DIR/checkpoints/best.pt, "
                "which knows its experiment."
            )
        names = ", ".join(known["experiment"])
        raise UserError(f"No experiment is chosen. Add experiment=NAME, one of: {names}.")
    # one composition takes 70 ms: those that would be the same are not made again
    defaults = base if chosen == experiment else compose_hydra(experiment, command)[0]
    composed = base if parsed == chosen else compose_hydra(parsed, command)[0]
    check_root(composed, known, command)
    where = written(parsed, choices, known)
    return Template(command, known, base, composed, plain(defaults, command), plain(base, command), where)


def launcher_config(command: Command) -> DictConfig:
    """Hydra's own node for a sweep's overrides: which launcher, whether typed or in an experiment's file.

    Raises:
        UserError: the launcher is not installed, or takes no such setting.
    """
    parsed = parse(command.overrides)
    known = groups(command)
    kept = [o for o in parsed if (o.key_or_group in known and not o.is_sweep_override()) or is_launcher(o)]
    lines = [text(o) for o in kept if o.value() is not None]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    search = (
        [] if command.config_dir is None else [f"hydra.searchpath=['file://{command.config_dir.resolve()}']"]
    )
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", [*search, *quiet, *lines], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        typed = [o for o in kept if is_launcher(o)]
        missing = "Could not find 'hydra/launcher" in str(error)
        blamed = [o for o in typed if (o.key_or_group == "hydra/launcher") == missing]
        named = [o for o in blamed if o.key_or_group.rpartition(".")[2] in str(error)] or blamed
        raise launcher_refused(
            text(named[0]) if named else "", str(error.__cause__ or error), launcher_keys(kept, search)
        ) from None


def compose_hydra(overrides: list[Override], command: Command) -> tuple[DictConfig, dict[str, str]]:
    """Hydra's composition of `config.yaml` with these overrides, and the option of each group in it."""
    search = (
        [] if command.config_dir is None else [f"hydra.searchpath=['file://{command.config_dir.resolve()}']"]
    )
    known = declared_groups()
    emptied = [o.key_or_group for o in overrides if o.key_or_group in known and o.value() is None]
    lines = [text(o) for o in overrides if o.key_or_group not in emptied]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*search, *map(grammar, lines)], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        told = (" ".join(str(e).split()) for e in (error, error.__cause__, error.__context__))
        reason = next(filter(None, told), type(error).__name__)
        raise UserError(f"{' '.join(lines)}: the YAML files do not compose: {reason}") from None
    choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items() if v is not None}
    with open_dict(config):
        del config["hydra"]
        for group in emptied:  # Hydra has no words for "none of these"
            if group in config:
                config[group] = None
    check_hidden(choices, command)
    return config, choices


def plain(config: DictConfig, command: Command) -> dict[str, Any]:
    """The config as dicts and lists, every interpolation resolved."""
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        lines = [line for line in command.overrides if line.lstrip("+").startswith(f"{key}=")]
        if isinstance(error, MissingMandatoryValue):
            where = lines[-1] if lines else "the experiment's YAML"
            raise UserError(f"{where}: {key} needs a value.") from None
        reason = str(error).splitlines()[0]
        raise UserError(f"{' '.join(lines) or key} cannot be resolved: {reason}") from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def written(
    parsed: list[Override], choices: dict[str, str], known: dict[str, dict[str, Path]]
) -> dict[str, str]:
    """Where each key was last written: the command line, else the YAML file that has the last word."""
    found: dict[str, str] = {}
    layers = ["data", "model", "loop", "optimizer", "schedule", "sweep", *GLOBAL_GROUPS]
    for group in layers:
        file = known[group].get(choices.get(group, ""))
        if file is None:
            continue
        content = {k: v for k, v in read_yaml(file).items() if k != "defaults"}
        for key, _ in leaves(content if group in GLOBAL_GROUPS else {group: content}):
            found[key] = f"in {Path('conf', file.relative_to(CONF)) if CONF in file.parents else file}"
    return found | {o.key_or_group: text(o) for o in parsed}


def on_top(config: dict[str, Any], command: Command, allowed: tuple[str, ...] | None) -> Composed:
    """A stored config with the command line's values on top; `allowed` keys only, where given.

    Raises:
        UserError: a key that the stored config lacks, or that may not be changed.
    """
    known = groups(command)
    base = OmegaConf.create(config)
    changed = OmegaConf.create(config)
    kept = {}
    for override in parse(command.overrides):
        check_sweep(override, command)
        check_plumbing(override)
        key, line = override.key_or_group, text(override)
        if key in RUN_OPTIONS or (key == "experiment" and override.value() == config.get("name")):
            continue
        if allowed is not None and key not in allowed:
            raise UserError(f"{line}: a resume may change {', '.join(allowed)} alone.", line, "")
        if key in known:
            raise UserError(
                f"{line}: the network and its data come from the checkpoint; set single keys instead.",
                line,
                "",
            )
        check_key(override, base, known)
        OmegaConf.update(changed, key, override.value(), force_add=True)
        kept[key] = line
    return Composed(plain(changed, command), list(kept.values()), config, config, kept)


def of_the_task(overrides: list[str], stored: dict[str, Any]) -> list[str]:
    """The overrides of a mode of the task's own, in which a key that the task alone has may stand bare: `steps=50`.

    Nothing is trained in such a mode, so that no other `steps` can be meant.
    """
    own = stored["task"].keys() - stored.keys()
    return [f"task.{line}" if line.partition("=")[0] in own else line for line in overrides]


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """YAML as Hydra writes and reads it: also `1e-3` is a number there, so a text that looks so is quoted."""


NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)(e[-+]?\d+)?|[-+]?\.?(inf|nan)", re.IGNORECASE)


def represent_text(dumper: Any, text: str) -> yaml.ScalarNode:
    """A text, in quotes where it would be read as a number; PyYAML knows of the other words."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, "'" if NUMBER.fullmatch(text) else None)


Dumper.add_representer(str, represent_text)


def to_yaml(config: Any) -> str:
    """The plain config as YAML text."""
    return yaml.dump(config, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
