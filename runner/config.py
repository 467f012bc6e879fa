"""From the command line to one plain, resolved config, with a message for whatever does not fit.

Everything here answers without importing torch: misspelt groups, options and keys are found by composing
alone. Types and ranges are checked against the constructors, in `build.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.errors import UserError, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
CONFIG_FILE = ".hydra/config.yaml"
RESUMABLE = ("loop.epochs", "loop.steps", "device", "threads")  # what a resume may change
DOOR_KEYS = ("mode", "checkpoint", "resume", "trust", "outputs")  # of the call, not of the run


@dataclass(frozen=True)
class Call:
    """One call of the door: its overrides, and the folder of the user's own YAML and modules."""

    overrides: list[str]
    config_dir: Path | None = None
    multirun: bool = False
    program: str = "python -m runner"

    @property
    def command(self) -> str:
        """The call up to its overrides, for the commands that the screen proposes."""
        parts = [self.program]
        if self.config_dir is not None:
            parts += ["--config-dir", shlex.quote(str(self.config_dir))]
        parts += [shlex.quote(o) for o in self.overrides if o.startswith(("trust=", "outputs="))]
        return " ".join(parts)

    def corrected(self, wrong: str, right: str) -> str:
        """The whole command with one argument replaced; `-m` as `right` is put before the overrides."""
        if right == "-m":
            return " ".join([self.command_flags(True), *map(shlex.quote, self.overrides)])
        replaced = [right if override == wrong else override for override in self.overrides]
        return " ".join([self.command_flags(self.multirun), *(shlex.quote(o) for o in replaced if o)])

    def command_flags(self, multirun: bool) -> str:
        """Program and flags, without overrides."""
        folder = [] if self.config_dir is None else ["--config-dir", shlex.quote(str(self.config_dir))]
        return " ".join([self.program, *folder, *(["-m"] * multirun)])

    def folders(self) -> list[Path]:
        """Where YAML is looked for, the first that has a file wins."""
        return [CONF] if self.config_dir is None else [CONF, self.config_dir]


@dataclass(frozen=True)
class Composed:
    """One resolved config, the experiment's defaults, and what the command line changed."""

    config: dict[str, Any]
    overrides: list[str]
    defaults: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)  # where a dotted key was last written

    def changes(self) -> list[str]:
        """What differs from the experiment's defaults: `key=value (default)`."""
        theirs = dict(leaves(self.defaults))
        found = []
        for key, value in leaves(self.config):
            if key.split(".")[0] in DOOR_KEYS or (key in theirs and theirs[key] == value):
                continue
            was = f" ({show(theirs[key])})" if key in theirs else ""
            found.append(f"{key}={show(value)}{was}")
        return found


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts with its dotted key."""
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def groups(call: Call) -> dict[str, dict[str, Path]]:
    """The options of every config group, by name, with their files."""
    found: dict[str, dict[str, Path]] = {}
    for folder in reversed(call.folders()):
        for file in sorted(folder.glob("*/*.yaml")):
            found.setdefault(file.parent.name, {})[file.stem] = file
    return found


def experiments(call: Call) -> dict[str, str]:
    """The experiments there are, each with the `description` of its YAML."""
    files = groups(call).get("experiment", {})
    return {name: str(read_yaml(file).get("description", "")) for name, file in sorted(files.items())}


def read_yaml(file: Path) -> dict[str, Any]:
    """One YAML file as a dict.

    Raises:
        UserError: it is no YAML, or not a mapping; the message says the line.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold keys and values, not {type(content).__name__}.")
    return content


def parse(overrides: list[str]) -> list[Override]:
    """Overrides in Hydra's grammar.

    Raises:
        UserError: one cannot be parsed.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(
                f"{text} is not a setting: settings are written key=value, such as seed=1.", text, ""
            )
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{text} cannot be parsed: {reason}. Quote it: {shlex.quote(quoted(text))}",
                text,
                quoted(text),
            ) from None
    return parsed


def quoted(text: str) -> str:
    """An override with its value as one quoted string."""
    key, _, value = text.partition("=")
    return f"{key}='{value}'"


def compose_call(call: Call) -> Composed:
    """Compose a single run's config from the YAML files and the overrides.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    parsed = parse(call.overrides)
    known = groups(call)
    chosen = [o for o in parsed if o.key_or_group in known]
    for override in parsed:
        check_sweep(override, call)
        check_plumbing(override)
    for override in chosen:
        check_option(override, known, call)
    base = compose_hydra([text(o) for o in chosen], call)
    for override in parsed:
        if override.key_or_group not in known:
            check_key(override, base, known)
    experiment = [o for o in chosen if o.key_or_group == "experiment"]
    if not experiment or experiment[-1].value() is None:
        raise UserError(
            f"No experiment is chosen. Add experiment=NAME, one of: {', '.join(known['experiment'])}."
        )
    defaults = plain(compose_hydra([text(o) for o in experiment], call))
    config = plain(compose_hydra(call.overrides, call))
    check_root(config, call, chosen)
    return Composed(config, call.overrides, defaults, written(parsed, chosen, known))


def text(override: Override) -> str:
    """The override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def compose_hydra(overrides: list[str], call: Call) -> DictConfig:
    """Hydra's composition of `config.yaml` with these overrides."""
    search = [] if call.config_dir is None else [f"hydra.searchpath=['file://{call.config_dir.resolve()}']"]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", [*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError("The config does not compose: " + " ".join(lines)) from None


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as dicts and lists, every interpolation resolved."""
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The config cannot be resolved: {str(error).splitlines()[0]}") from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def check_sweep(override: Override, call: Call) -> None:
    """Several values are a sweep, and a sweep is asked for with -m."""
    if override.is_sweep_override() and not call.multirun:
        line = text(override)
        raise UserError(
            f"{line} names several values, which is a sweep: add -m. For one value that holds a comma: "
            f"{shlex.quote(quoted(line))}; for a list: {override.get_key_element()}=[a,b].",
            line,
            "-m",
        )


def check_plumbing(override: Override) -> None:
    """Hydra's own node is not ours to set: the runner makes folders and logs itself."""
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        raise UserError(
            f"{text(override)}: Hydra's own settings are not used here. The runner makes the folders (outputs=DIR "
            "says where) and the log itself, and runs sweeps with -m in this process.",
            text(override),
            "",
        )


def check_option(override: Override, known: dict[str, dict[str, Path]], call: Call) -> None:
    """The option of a group must exist; every value of a sweep must."""
    group, options = override.key_or_group, known[override.key_or_group]
    if override.is_delete():
        return
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values:
        if value is None or str(value) == "null" or str(value) in options:
            continue
        close = nearest(str(value), options)
        hint = f" Did you mean {group}={close}?" if close else ""
        line = text(override)
        right = line.replace(str(value), close) if close else None
        raise UserError(
            f"{group}={value}: there is no such {group}.{hint} There are: {', '.join(options)}.", line, right
        )


def check_key(override: Override, base: DictConfig, known: dict[str, dict[str, Path]]) -> None:
    """A key must exist, unless `+` adds one that is not a misspelling."""
    key, line = override.key_or_group, text(override)
    keys = [path for path, _ in leaves(OmegaConf.to_container(base))]  # type: ignore[arg-type]
    exists = has_key(base, key)
    adding = override.is_add() or override.is_force_add()
    if exists:
        if override.is_add():
            raise UserError(
                f"{line}: {key} is there already; write it without the +.", line, line.lstrip("+")
            )
        return
    close = nearest_key(key, [*keys, *known], 0.8 if adding else 0.6)
    if close is not None:
        right = line.replace(key, close, 1).lstrip("+")
        raise UserError(f"{line}: there is no key {key}. Did you mean {close}?", line, right)
    parent = key.rpartition(".")[0]
    if adding and parent and isinstance(OmegaConf.select(base, parent), DictConfig):
        return  # whether the constructor takes it is told when it is built
    siblings = [path for path in keys if path.startswith(parent + ".")] if parent else sorted(base)
    there = (
        f" Under {parent} there are: {', '.join(siblings)}."
        if parent and siblings
        else (
            f" There are: {', '.join(map(str, sorted({*base, *known})))}."  # type: ignore[type-var]
        )
    )
    raise UserError(f"{line}: there is no key {key}.{there}", line, "")


def has_key(config: DictConfig, key: str) -> bool:
    """Whether the dotted key is written anywhere in the config, be its value null."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and leaf in list(node.keys())  # `in node` leaves out what is ???


def nearest_key(key: str, keys: list[str], cutoff: float) -> str | None:
    """The key that is closest: a lone word is looked for among last words too (`lr` finds `optimizer.lr`)."""
    same_leaf = [path for path in keys if path.rpartition(".")[2] == key]
    return same_leaf[0] if same_leaf else nearest(key, keys, cutoff)


def check_root(config: dict[str, Any], call: Call, chosen: list[Override]) -> None:
    """Keys at the root that no `config.yaml` declares are misspelt in a YAML file."""
    declared = {key for key in read_yaml(CONF / "config.yaml") if key != "defaults"} | set(groups(call))
    for key in config:
        if key not in declared:
            close = nearest(key, declared)
            hint = f" Did you mean {close}?" if close else ""
            files = ", ".join(text(o) for o in chosen)
            raise UserError(f"{key}: no run has such a key (it is written in a YAML file of {files}).{hint}")


def written(
    parsed: list[Override], chosen: list[Override], known: dict[str, dict[str, Path]]
) -> dict[str, str]:
    """Where each key was last written: the command line, else the YAML file that has the last word."""
    found: dict[str, str] = {}
    layers = ["data", "model", "loop", "optimizer", "schedule", "experiment", "preset", "debug"]
    picks = {
        o.key_or_group: str(o.value()) for o in chosen if not o.is_sweep_override() and not o.is_delete()
    }
    for group in layers:
        file = known.get(group, {}).get(picks.get(group, ""))
        if file is None:
            continue
        is_global = "@package _global_" in file.read_text(encoding="utf-8")
        content = {k: v for k, v in read_yaml(file).items() if k != "defaults"}
        for key, _ in leaves(content if is_global else {group: content}):
            found[key] = f"in {file.parent.parent.name}/{group}/{file.name}"
    return found | {o.key_or_group: text(o) for o in parsed}


def stored_config(folder: Path) -> dict[str, Any]:
    """The config that a run folder holds.

    Raises:
        UserError: the folder is not a run of this runner.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"resume={folder} is not a run folder: it holds no {CONFIG_FILE}.")
    return read_yaml(file)


def on_top(config: dict[str, Any], call: Call, allowed: tuple[str, ...] | None) -> Composed:
    """A stored config with the command line's values on top; `allowed` keys only, where given.

    Raises:
        UserError: a key that the stored config lacks, or that may not be changed.
    """
    known = groups(call)
    base = OmegaConf.create(config)
    changed = OmegaConf.create(config)
    kept = []
    for override in parse(call.overrides):
        check_sweep(override, call)
        check_plumbing(override)
        key, line = override.key_or_group, text(override)
        if key in DOOR_KEYS:
            continue
        if key == "experiment" and override.value() == config["name"]:
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
        kept.append(line)
    return Composed(plain(changed), kept, config, {line.partition("=")[0]: line for line in kept})


def door_values(call: Call) -> dict[str, Any]:
    """The values of the keys that say what to do, read before anything is composed."""
    found = {o.key_or_group: o for o in parse(call.overrides) if o.key_or_group in DOOR_KEYS}
    return {key: override.value() for key, override in found.items() if not override.is_sweep_override()}


def to_yaml(config: Any) -> str:
    """The config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(config))
