"""From the command line to one plain, resolved config, with a message for whatever does not fit.

Everything here answers without importing torch: misspelt groups, options and keys are found by composing
alone. Types and ranges are checked against the constructors, in `build.py`.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from runner.errors import UserError, did_you_mean, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
CONFIG_FILE = ".hydra/config.yaml"
RESUMABLE = ("loop.epochs", "loop.steps", "loop.patience", "device", "threads")  # what a resume may change
# where runs and sweeps lie below an experiment's or the outputs' folder
RUNS_BELOW = ("*", "*/*", "sweeps/*/*", "*/sweeps/*/*")
SWEEPS_BELOW = ("*", "sweeps/*", "*/sweeps/*")
FOLDERS_LISTED = 5  # that a message names
GLOBAL_GROUPS = ("experiment", "preset", "debug")  # their YAML speaks of the whole run
PATHS = ("checkpoint", "resume", "outputs")  # keys that name a file or a folder
OPEN_NODES = ("sweep.sampler_options.", "sweep.pruner_options.")  # whose keys are those of others
SWEEP_KEYS = ("sweep", "dry_run", "on_error")  # of a sweep, not of its jobs
DOOR_KEYS = {  # of the call, not of the run, and what they take
    "mode": "train, eval or a mode of the experiment's own",
    "checkpoint": "the path of a checkpoint, RUN_DIR/checkpoints/best.pt",
    "resume": "the path of a run's folder",
    "trust": "the name of a package",
    "outputs": "a folder",
    "runs": "the folders of two runs or more, [A,B]",
}


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
        kept = [o for o in self.overrides if o.startswith(("trust=", "outputs="))]
        return " ".join([self.flags(), *map(quote, kept)])

    def flags(self, multirun: bool = False) -> str:
        """Program and flags, without overrides."""
        folder = [] if self.config_dir is None else ["--config-dir", quote(str(self.config_dir))]
        return " ".join([self.program, *folder, *(["-m"] * multirun)])

    def corrected(self, wrong: str, right: str) -> str:
        """The whole command with one argument replaced; `-m` as `right` is put before the overrides."""
        if right == "-m":
            return " ".join([self.flags(True), *map(quote, self.overrides)])
        replaced = [right if override == wrong else override for override in self.overrides]
        return " ".join([self.flags(self.multirun), *(quote(o) for o in replaced if o)])

    def with_more(self, override: str) -> str:
        """The whole command with one argument more."""
        return " ".join([self.flags(self.multirun), *map(quote, [*self.overrides, override])])

    def folders(self) -> list[Path]:
        """Where YAML is looked for, the first that has a file wins."""
        return [CONF] if self.config_dir is None else [CONF, self.config_dir]


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
            if key.split(".")[0] in DOOR_KEYS or (key in theirs and theirs[key] == value):
                continue
            was = f" ({show(theirs[key])})" if key in theirs else ""
            found.append(f"{key}={show(value)}{was}")
        return found


def quote(argument: str) -> str:
    """An argument as it is typed in a shell; in double quotes where it holds single ones."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)


def masked(text: str) -> str:
    """A text for the screen or a file: the passwords of databases' URLs in it are ***."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"((?:password|passwd|pwd)=)[^&\s'\"]*", r"\1***", text)


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{show(item)}' for key, item in value.items())}}}"
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
    found: dict[str, dict[str, Path]] = {name: {} for name in declared_groups()}
    for folder in reversed(call.folders()):
        for file in sorted(folder.glob("*/*.yaml")):
            found.setdefault(file.parent.name, {})[file.stem] = file
    return found


@cache
def root_yaml() -> dict[str, Any]:
    """`config.yaml`, not composed."""
    return read_yaml(CONF / "config.yaml")


def declared_groups() -> dict[str, str | None]:
    """The groups that `config.yaml` combines, also those that have no option yet, with their defaults."""
    entries = [entry for entry in root_yaml()["defaults"] if isinstance(entry, dict)]
    return {group: default for entry in entries for group, default in entry.items()}


def experiments(call: Call) -> dict[str, str]:
    """The experiments there are, each with the `description` of its YAML."""
    return {name: description(file) for name, file in sorted(groups(call)["experiment"].items())}


def description(file: Path) -> str:
    """What a YAML file says that it is; one that cannot be read says so, and the others are still listed."""
    try:
        return str(read_yaml(file).get("description", ""))
    except UserError as error:
        return f"(cannot be used: {error})"


def read_yaml(file: Path) -> dict[str, Any]:
    """One YAML file as a dict.

    Raises:
        UserError: it is no YAML, or not a mapping; the message says the line.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: {error.problem or error.context}.") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{file} must hold keys and values; it holds {found}.")
    return content


def parse(overrides: list[str]) -> list[Override]:
    """Overrides in Hydra's grammar.

    Raises:
        UserError: one cannot be parsed.
    """
    parser = OverridesParser.create()
    parsed = []
    for number, line in enumerate(overrides):
        if "=" not in line and not line.startswith("~"):
            raise not_a_setting(overrides, number)
        try:
            override = parser.parse_override(grammar(line))
            override.input_line = line
        except HydraException:  # its text names tokens of a grammar
            raise unreadable(line) from None
        if not override.key_or_group:
            raise UserError(f"{line}: the key before the = is missing.", line, "")
        if override.is_sweep_override():
            check_values(override)
        parsed.append(override)
    return parsed


def grammar(line: str) -> str:
    """The override as Hydra reads it: a path that exists stands for itself, whatever its characters.

    The folders of a sweep's jobs are named by what is swept: `0_seed=0,optimizer.lr=0.1`.
    """
    key, _, value = line.partition("=")
    if key == "runs" and value.startswith("[") and value.endswith("]"):
        return f"runs=[{','.join(quoted(f'={path}')[1:] for path in paths_in(value[1:-1]))}]"
    if key.startswith(OPEN_NODES):
        return f"++{line}"  # any key may be there
    return quoted(line) if key in PATHS and value and Path(value).exists() else line


def paths_in(text: str) -> list[str]:
    """The paths of a list, of which those that exist may hold commas: `A/0_seed=0,lr=0.1,A/1_seed=1,lr=0.1`."""
    words = [word.strip() for word in text.split(",")]
    paths = []
    while words:
        lengths = (n for n in range(len(words), 0, -1) if Path(",".join(words[:n])).exists())
        length = next(lengths, 1)
        paths.append(",".join(words[:length]))
        del words[:length]
    return paths


def not_a_setting(overrides: list[str], number: int) -> UserError:
    """A word without `=`: often the shell has cut `key = value` in three."""
    word, after = overrides[number], "".join(overrides[number + 1 : number + 3])
    if after.startswith("="):
        value = after.removeprefix("=").partition(" ")[0]
        return UserError(f"A setting is one word, without spaces around the =: {word}={value}.")
    return UserError(f"{word} is not a setting. Settings are written key=value, such as seed=1.", word, "")


def check_words(call: Call) -> None:
    """The name of an experiment alone is what a newcomer types."""
    for before, word in zip(["", *call.overrides], call.overrides, strict=False):
        if word in groups(call)["experiment"]:
            right = f"experiment={word}"
            if before in ("experiment", "experiment=", "="):
                raise UserError(f"A setting is one word, without spaces: {right}.")
            raise UserError(f"{word} is an experiment; it is chosen as {right}.", word, right)


def unreadable(line: str) -> UserError:
    """What is wrong with an override that Hydra's grammar does not know, and what to type instead."""
    key, _, value = line.partition("=")
    open_ones = [a for a, b in ("[]", "{}", "()") if value.count(a) != value.count(b)]
    open_ones += [mark for mark in "'\"" if value.count(mark) % 2]
    if key != key.strip() or value.startswith(" "):
        reason, right = "there must be no spaces around the =", f"{key.strip()}={value.strip()}"
    elif value.startswith("="):
        reason, right = "there are two =", f"{key}={value.lstrip('=')}"
    elif re.search(r"\s[~+]*[\w.@/]+=", value):
        return UserError(f"{line}: these are two settings in one argument; write them without quotes around.")
    elif open_ones:
        return UserError(f"{line} cannot be read: {' and '.join(open_ones)} has no partner.", line, "")
    else:
        reason, right = "a value with special characters is put in quotes", quoted(line)
    return UserError(f"{line} cannot be read: {reason}.", line, right)


def quoted(text: str) -> str:
    """An override with its value as one quoted string."""
    key, _, value = text.partition("=")
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def check_values(override: Override) -> None:
    """A sweep names its values, and has some."""
    line, key = text(override), override.key_or_group
    if isinstance(override.value(), Glob):
        raise UserError(f"{line}: glob is not used here; name the values: {key}=a,b,c.", line, "")
    try:
        empty = not override.is_interval_sweep() and not any(True for _ in override.sweep_iterator())
    except (ValueError, HydraException) as error:  # range(1,5,0)
        raise UserError(f"{line} cannot be read: {error}.", line, "") from None
    if empty:
        raise UserError(f"{line} holds no value.", line, "")


@dataclass(frozen=True)
class Template:
    """A composition on which only single values are still to be set: the costly part, made once for many jobs."""

    call: Call
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
        call = replace(self.call, overrides=[*self.call.overrides, *lines])
        found = plain(config, call)
        sweep = {key: found.pop(key) for key in (*SWEEP_KEYS, "runs") if key in found}
        written = self.written | {o.key_or_group: text(o) for o in values}
        return Composed(found, call.overrides, self.defaults, self.options, written, sweep)

    def freeze(self) -> dict[str, Any]:
        """What a file keeps of it: the config, not yet resolved, and the experiment's defaults."""
        return {"config": OmegaConf.to_container(self.composed), "defaults": self.defaults}

    @staticmethod
    def thaw(kept: dict[str, Any], call: Call) -> Template:
        """The template that was kept, whatever the YAML files say by now."""
        config = OmegaConf.create(kept["config"])
        return Template(call, groups(call), config, config, kept["defaults"], kept["defaults"], {})


def compose_call(call: Call) -> Composed:
    """Compose a single run's config from the YAML files and the overrides.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    return compose_template(call).fill([])


def compose_template(call: Call) -> Template:
    """Compose the YAML files and the overrides, each of which has one value.

    Raises:
        UserError: a misspelt experiment, group, option or key; YAML that does not compose.
    """
    parsed = parse(call.overrides)
    known = groups(call)
    for override in parsed:
        check_sweep(override, call)
        check_plumbing(override)
    chosen = [o for o in parsed if o.key_or_group in known]
    for override in chosen:
        check_option(override, known)
        if override.key_or_group in GLOBAL_GROUPS and override.value() is not None:
            check_file(override.key_or_group, str(override.value()), known)
    base, choices = compose_hydra(chosen, call)
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
    defaults = base if chosen == experiment else compose_hydra(experiment, call)[0]
    composed = base if parsed == chosen else compose_hydra(parsed, call)[0]
    check_root(composed, known, call)
    where = written(parsed, choices, known)
    return Template(call, known, base, composed, plain(defaults, call), plain(base, call), where)


def is_launcher(override: Override) -> bool:
    """Whether it chooses or sets the launcher of a sweep: hydra/launcher=NAME, hydra.launcher.KEY=VALUE."""
    key = override.key_or_group
    return key == "hydra/launcher" or key.startswith("hydra.launcher.")


def launcher_config(call: Call) -> DictConfig:
    """Hydra's own node for a sweep's overrides: which launcher, whether typed or in an experiment's file.

    Raises:
        UserError: the launcher is not installed, or takes no such setting.
    """
    parsed = parse(call.overrides)
    known = groups(call)
    kept = [o for o in parsed if (o.key_or_group in known and not o.is_sweep_override()) or is_launcher(o)]
    lines = [text(o) for o in kept if o.value() is not None]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    search = [] if call.config_dir is None else [f"hydra.searchpath=['file://{call.config_dir.resolve()}']"]
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


def launcher_keys(kept: list[Override], search: list[str]) -> list[str]:
    """The settings that the chosen launcher takes, none where it cannot be had."""
    chosen = [text(o) for o in kept if not o.key_or_group.startswith("hydra.launcher.")]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = compose("config", [*search, *chosen], return_hydra_config=True).hydra.launcher
    except (HydraException, OmegaConfBaseException):
        return []
    return [str(key) for key in node if key != "_target_"]


LAUNCHERS = {  # the pip packages of Hydra's own launchers
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
    "ray_aws": "hydra-ray-launcher",
    "rq": "hydra-rq-launcher",
}


CHOOSING = f"hydra/launcher=NAME: {', '.join(['basic', *LAUNCHERS])}."


def launcher_refused(line: str, reason: str, takes: list[str]) -> UserError:
    """A launcher that is misspelt, not installed, or takes no such setting but these."""
    key, _, name = line.partition("=")
    if key != "hydra/launcher":
        if not line:
            told = " ".join(
                reason.partition("full_key:")[0].split()
            )  # after it OmegaConf names its own classes
            return UserError(f"The launcher of the experiment's file: {told}")
        wrong = key.removeprefix("hydra.launcher.")
        if wrong in takes:  # a value that does not fit
            return UserError(f"{line}: {' '.join(reason.partition('full_key:')[0].split())}", line)
        close = nearest(wrong, takes)
        hint = did_you_mean(close and f"hydra.launcher.{close}")
        there = f"It takes: {', '.join(takes)}." if takes else f"It is chosen with {CHOOSING}"
        right = f"hydra.launcher.{close}={name}" if close else ""
        return UserError(f"{line}: the launcher has no setting {wrong}.{hint} {there}", line, right)
    if name in LAUNCHERS:
        return UserError(f"{line}: this launcher is not installed: pip install {LAUNCHERS[name]}.")
    close = nearest(name, ["basic", *LAUNCHERS])
    hint = did_you_mean(close and f"hydra/launcher={close}")
    right = f"hydra/launcher={close}" if close else ""
    there = ", ".join(["basic", *LAUNCHERS])
    return UserError(f"{line}: there is no such launcher.{hint} Launchers: {there}.", line, right)


def text(override: Override) -> str:
    """The override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def compose_hydra(overrides: list[Override], call: Call) -> tuple[DictConfig, dict[str, str]]:
    """Hydra's composition of `config.yaml` with these overrides, and the option of each group in it."""
    search = [] if call.config_dir is None else [f"hydra.searchpath=['file://{call.config_dir.resolve()}']"]
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
    check_hidden(choices, call)
    return config, choices


def check_file(group: str, option: str, known: dict[str, dict[str, Path]]) -> None:
    """The YAML of an experiment, preset or debug option: its header, and the groups that it combines."""
    file = known[group][option]
    content = read_yaml(file)
    defaults = content.get("defaults") or []
    refuse_sweeper(file, content.get("hydra"))
    if "# @package _global_" not in file.read_text(encoding="utf-8"):
        raise UserError(f"{file} must begin with the line `# @package _global_`: it speaks of the whole run.")
    for entry in defaults:
        for key, choice in entry.items() if isinstance(entry, dict) else ():
            name = str(key).removeprefix("override ").strip().lstrip("/")
            where = f"{file}, defaults, `{key}: {choice}`"
            if name == "hydra/launcher":
                continue  # whether there is one is told by a sweep, which alone needs it
            if name == "hydra/sweeper":
                raise UserError(f"{where}: {NO_SWEEPER} write `override /sweep: optuna`.")
            if name not in known:
                raise UserError(f"{where}: there is no group {name}.{did_you_mean(nearest(name, known))}")
            if not str(key).startswith("override /"):
                raise UserError(f"{where}: write `override /{name}: {choice}`.")
            if choice is not None and choice not in known[name]:
                there = ", ".join(known[name]) or "none"
                hint = did_you_mean(nearest(str(choice), known[name]))
                raise UserError(f"{where}: there is no such {name}.{hint} There are: {there}.")


NO_SWEEPER = "Hydra's sweepers are not used here:"


def refuse_sweeper(file: Path, node: Any) -> None:
    """A sweep that is written for Hydra would be ignored in silence."""
    for key in node if isinstance(node, dict) else ():
        if key != "launcher":
            raise UserError(
                f"{file}, `hydra: {key}:`: {NO_SWEEPER} write what is swept as `sweep: {{space: {{KEY: VALUES}}}}`, "
                "or type it: -m KEY=VALUES. Of Hydra's own node a file may set `launcher:` alone."
            )


def check_hidden(choices: dict[str, str], call: Call) -> None:
    """A file of the user's with the name of one of ours would never be read."""
    if call.config_dir is None or call.config_dir.resolve() == CONF:
        return
    for group, option in choices.items():
        file = Path(group) / f"{option}.yaml"
        if (CONF / file).is_file() and (call.config_dir / file).is_file():
            raise UserError(f"{call.config_dir / file} has the name of the runner's own {file}: rename it.")


def plain(config: DictConfig, call: Call) -> dict[str, Any]:
    """The config as dicts and lists, every interpolation resolved."""
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        lines = [line for line in call.overrides if line.lstrip("+").startswith(f"{key}=")]
        if isinstance(error, MissingMandatoryValue):
            where = lines[-1] if lines else "the experiment's YAML"
            raise UserError(f"{where}: {key} needs a value.") from None
        reason = str(error).splitlines()[0]
        raise UserError(f"{' '.join(lines) or key} cannot be resolved: {reason}") from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def check_sweep(override: Override, call: Call) -> None:
    """Several values are a sweep, and a sweep is asked for with -m; so is what only a sweep knows."""
    if override.key_or_group.split(".")[0] in SWEEP_KEYS and not call.multirun:
        line = text(override)
        raise UserError(f"{line} is for a sweep: add -m.", line, "-m")
    if override.is_sweep_override() and not call.multirun:
        line = text(override)
        raise UserError(
            f"{line} names several values, which is a sweep: add -m. "
            f"(One value that holds a comma is quoted: {quote(quoted(line))}.)",
            line,
            "-m",
        )


def check_plumbing(override: Override) -> None:
    """Hydra's own node is not ours to set, and nothing is taken out of a config: a run records all of it."""
    key, line = override.key_or_group, text(override)
    if key.split(".")[0].split("/")[0] == "hydra":
        raise not_hydras(override)
    if override.is_delete():
        raise UserError(f"{line}: keys cannot be removed. Give {key} another value: {key}=VALUE.", line, "")


HYDRAS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")  # what a sweep may have set
SEARCH_KEYS = ("n_trials", "storage", "sampler", "pruner")  # Hydra's Optuna plugin has those as we do


def nearest_of_hydras(key: str) -> str | None:
    """`hydra.launcher.n_jobs` for `hydra.lancher.n_jobs` and the like; None where there is nothing to respell."""
    if key in HYDRAS:
        return key.replace(".", "/") if "." in key else None
    mark = "/" if "/" in key else "."
    first, *inner = key.split(mark)[1].split(".") if mark in key else [""]
    inner += key.split(mark)[2:]
    names = ("launcher", "sweeper", *(("sweep", "run", "job") if mark == "." else ()))
    close = nearest(first, names, 0.75)
    if close not in ("launcher", "sweeper"):
        return None
    right = ".".join(["hydra", close, *inner]) if inner else f"hydra/{close}"
    return right if right != key else None


def of_the_sweeper(setting: str) -> str:
    """What is set here instead of a setting of Hydra's Optuna plugin, nothing where there is none."""
    key, _, value = setting.partition("=")
    if key.startswith(("params.", "search_space.")):
        return setting.partition(".")[2]
    if key.startswith("sampler."):
        option = key.removeprefix("sampler.")
        return f"sweep.seed={value}" if option == "seed" else f"sweep.sampler_options.{option}={value}"
    here = {name: f"sweep.{name}" for name in SEARCH_KEYS}
    here |= {"direction": "direction", "n_jobs": "hydra.launcher.n_jobs"}
    close = nearest(key, here, 0.7)
    return f"{here[close]}={value}" if close else ""


def not_hydras(override: Override) -> UserError:
    """A setting of Hydra's own, with the one here that does the same where there is one."""
    key, line = override.key_or_group, text(override)
    close = nearest_of_hydras(key)
    if close is not None:
        right = line.replace(key, close, 1)
        return UserError(f"{line}: there is no key {key}. Did you mean {close}?", line, right)
    if is_launcher(override):
        return UserError(f"{line}: a launcher is for a sweep: add -m.", line, "-m")
    if key == "hydra/sweeper":
        value = override.value()
        right = "" if value == "basic" else "sweep=optuna"
        return UserError(
            f"{line}: {NO_SWEEPER} sweeps go through -m alone, and -m sweep=optuna "
            "searches with current Optuna, prunes, and can be taken up again.",
            line,
            right,
        )
    if key.startswith("hydra.sweeper."):
        right = of_the_sweeper(line.lstrip("+").removeprefix("hydra.sweeper."))
        return UserError(f"{line}: {NO_SWEEPER} write {right or 'what sweep=optuna takes'}.", line, right)
    here = {"hydra.sweep.dir": "sweep.dir", "hydra.run.dir": "outputs"}
    if key in here:
        right = f"{here[key]}={line.partition('=')[2]}"
        return UserError(f"{line}: Hydra's own settings are not used here: write {right}.", line, right)
    return UserError(
        f"{line}: Hydra's own settings are not used here. The runner makes the folders (outputs=DIR "
        "says where) and the log itself; a sweep takes hydra/launcher=NAME and its settings.",
        line,
        "",
    )


def check_option(override: Override, known: dict[str, dict[str, Path]]) -> None:
    """The option of a group must exist; every value of a sweep must."""
    group, line = override.key_or_group, text(override)
    options = known[group]
    if override.package is not None or override.is_add() or override.is_force_add():
        plainly = f"{group}={line.partition('=')[2]}"
        raise UserError(f"{line}: an option is chosen as {plainly}.", line, plainly)
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values:
        there = f"There are: {', '.join(options)}." if options else "There are none."
        if value is None or str(value) == "null":
            if declared_groups().get(group) is not None:
                raise UserError(f"{line}: every run needs one. {there}", line, "")
            continue
        if str(value) in options:
            continue
        if isinstance(value, list | dict):
            raise UserError(f"{line}: {group} takes one name. {there}", line, "")
        close = nearest(str(value), options)
        hint = did_you_mean(close and f"{group}={close}")
        right = line.replace(str(value), close) if close else None
        raise UserError(f"{group}={value}: there is no such {group}.{hint} {there}", line, right)


def check_key(override: Override, base: DictConfig, known: dict[str, dict[str, Path]]) -> None:
    """A key must exist, unless `+` adds one that is not a misspelling."""
    key, line = override.key_or_group, text(override)
    adding = override.is_add() or override.is_force_add()
    if key.startswith(OPEN_NODES):
        return
    if has_key(base, key):
        if override.is_add():
            raise UserError(
                f"{line}: {key} is there already; write it without the +.", line, line.lstrip("+")
            )
        if "." not in key and isinstance(OmegaConf.select(base, key), DictConfig):
            raise UserError(f"{line}: {key} holds several keys; set them one by one.{children(base, key)}")
        return
    group, _, option = key.partition("/")
    if option:
        right = f"{group}={option}"
        raise UserError(f"{line}: an option of a group is chosen as {right}.", line, right)
    close = nearest_key(key, base, known, 0.8 if adding else 0.6)
    if close is not None:
        right = line.replace(key, close, 1).lstrip("+")
        raise UserError(f"{line}: there is no key {key}. Did you mean {close}?", line, right)
    parent = key.rpartition(".")[0]
    if parent and isinstance(OmegaConf.select(base, parent), DictConfig):
        if adding:
            return  # whether the constructor takes it is told when it is built
        raise UserError(
            f"{line}: there is no key {key}.{elsewhere(key, known)}{children(base, parent)}", line, ""
        )
    if parent and has_key(base, parent):
        raise UserError(f"{line}: {parent} is one value; there are no keys below it.", line, "")
    names = ", ".join(sorted({*map(str, base), *known}))
    raise UserError(f"{line}: there is no key {key}. There are: {names}.", line, "")


def children(config: DictConfig, parent: str) -> str:
    """The keys below one, as the end of a message."""
    node = OmegaConf.select(config, parent)
    below = [f"{parent}.{name}" for name in node]
    if not below:
        return ""
    adding = f" What its class takes beyond these is added as +{parent}.KEY=VALUE." * ("_target_" in node)
    return f" Under {parent} there are: {', '.join(below)}.{adding}"


def elsewhere(key: str, known: dict[str, dict[str, Path]]) -> str:
    """Which other options of its group have the key, as a part of a message."""
    group, _, leaf = key.partition(".")
    having = [f"{group}={option}" for option, file in known.get(group, {}).items() if leaf in read_yaml(file)]
    return f" It is a key of {' and '.join(having)}." if having else ""


def has_key(config: DictConfig, key: str) -> bool:
    """Whether the dotted key is written anywhere in the config, be its value null."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and leaf in list(node.keys())  # `in node` leaves out what is ???


def nearest_key(key: str, base: DictConfig, known: dict[str, dict[str, Path]], cutoff: float) -> str | None:
    """The key that was meant: each part respelt in its place, else one elsewhere with the same last word."""
    respelt = respell(key.split("."), base, known, cutoff)
    keys = [path for path, _ in leaves(OmegaConf.to_container(base))]  # type: ignore[arg-type]
    last = key.rpartition(".")[2]
    same = [path for path in keys if path.rpartition(".")[2] == last]
    if "." not in key and same:  # `lr` is optimizer.lr before it is anything that looks like it
        return same[0]
    if respelt is not None or same:
        return respelt or same[0]
    if "." in key:
        return None
    ends = {path.rpartition(".")[2]: path for path in keys}
    close = nearest(key, ends, cutoff)
    return ends[close] if close else None


def find_key(word: str, call: Call) -> str | None:
    """The key, of any option, whose last word is nearest to `word`; nothing is composed."""
    ends = {str(key): str(key) for key in root_yaml() if key != "defaults"}
    ends |= {name: name for name in declared_groups()}
    for group, options in groups(call).items():
        for file in options.values() if group not in (*GLOBAL_GROUPS, "sweep") else []:
            ends |= {path.rpartition(".")[2]: f"{group}.{path}" for path, _ in leaves(read_yaml(file))}
    close = nearest(word, ends, 0.75)
    return ends[close] if close else None


def respell(
    parts: list[str], base: DictConfig, known: dict[str, dict[str, Path]], cutoff: float
) -> str | None:
    """The dotted key with every part replaced by the nearest that is there, or None where none is near."""
    node: Any = base
    found: list[str] = []
    for part in parts:
        if not isinstance(node, DictConfig):
            return None
        names = [str(name) for name in node] + ([] if found else list(known))
        close = part if part in names else nearest(part, names, cutoff)
        if close is None:
            return None
        found.append(close)
        node = OmegaConf.select(node, close) if close in node else None
    return ".".join(found)


def check_root(config: DictConfig, known: dict[str, dict[str, Path]], call: Call) -> None:
    """Keys at the root that no `config.yaml` declares are misspelt in a YAML file."""
    nodes = {*root_yaml(), *known}
    files = " ".join(o for o in call.overrides if o.partition("=")[0] in known)
    for key in map(str, config):
        if key not in nodes:
            hint = did_you_mean(nearest(key, nodes))
            raise UserError(f"{key}: a run has no such key (a YAML file of {files} has it).{hint}")


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


def stored_config(folder: Path) -> dict[str, Any]:
    """The config that a run folder holds.

    Raises:
        UserError: the folder is not a run of this runner.
    """
    file = folder / CONFIG_FILE
    if file.is_file():
        return read_yaml(file)
    line = f"resume={folder}"
    there, close = runs_near(folder)
    if not folder.exists():
        raise UserError(f"{line}: there is no such folder.{there}", line, close and f"resume={close}")
    if (folder / ".sweep").is_dir():
        raise UserError(f"{line} is a sweep's folder: add -m.", line, "-m")
    home = run_around(folder)
    runs = sorted(path.parent.parent for path in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    meant = home or (runs[-1] if runs else None)
    raise UserError(
        f"{line} is not a run folder: it holds no {CONFIG_FILE}.{there if home is None else ''}",
        line,
        f"resume={meant}" if meant else None,
    )


def require_checkpoint(path: Path) -> None:
    """Refuse a path that is no file, and name those that there are.

    Raises:
        UserError: there is no such file.
    """
    if path.is_file():
        return
    home = run_around(path)
    there, close = runs_near(path, "checkpoints/best.pt")
    if home is not None:
        found = {file.name: str(file) for file in sorted(home.glob("checkpoints/*.pt"))}
        close = found.get(nearest(path.name, found) or "", next(iter(found.values()), None))
        there = f"{did_you_mean(close)} There are: {', '.join(found.values())}." if found else ""
    line = f"checkpoint={path}"
    what = "this is a folder; a checkpoint is a file in it" if path.is_dir() else "there is no such file"
    raise UserError(f"{line}: {what}.{there}", line, close and f"checkpoint={close}")


def run_around(path: Path) -> Path | None:
    """The run's folder that a path is or lies in, be it a path that does not exist."""
    return next((place for place in (path, *path.parents) if (place / CONFIG_FILE).is_file()), None)


def runs_near(path: Path, file: str = "") -> tuple[str, str | None]:
    """The runs near a path that is none, or that `file` of each, as `folders_near` has them."""
    return folders_near(path, "runs", CONFIG_FILE, RUNS_BELOW, file)


def folders_near(
    path: Path, what: str, holding: str, below: tuple[str, ...], file: str = ""
) -> tuple[str, str | None]:
    """The newest of the folders near a path that hold something, as the end of a message, and the nearest."""
    places = [nearest_folder(path, holding), *([] if path.exists() else [Path("outputs")])]
    found: list[Path] = []
    for place in places:
        if not found:
            marks = {mark for pattern in below for mark in place.glob(f"{pattern}/{holding}")}
            newest = sorted(marks, key=lambda mark: (mark.stat().st_mtime, mark), reverse=True)
            folders = [mark.parents[holding.count("/")] / file for mark in newest]
            found = [folder for folder in folders if folder.exists()]
    if not found:
        return f" There are no {what} in {places[0].resolve()}.", None
    close = None if path.exists() else nearest(str(path), map(str, found[:1000]))
    names = ", ".join(map(str, found[:FOLDERS_LISTED]))
    more = f" and {len(found) - FOLDERS_LISTED} more" if len(found) > FOLDERS_LISTED else ""
    return f"{did_you_mean(close)} There are: {names}{more}.", close


def nearest_folder(path: Path, holding: str) -> Path:
    """The folder that a path leads to as far as it leads, misspelt parts respelt, up to one that holds something."""
    place = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        known = part if (place / part).is_dir() else nearest(part, folders_in(place))
        if known is None or (place / known / holding).exists():
            return place
        place /= known
    return place


def folders_in(place: Path) -> list[str]:
    """The names of the folders in one, none where it may not be read."""
    try:
        return [entry.name for entry in place.iterdir() if entry.is_dir()]
    except OSError:
        return []


def on_top(config: dict[str, Any], call: Call, allowed: tuple[str, ...] | None) -> Composed:
    """A stored config with the command line's values on top; `allowed` keys only, where given.

    Raises:
        UserError: a key that the stored config lacks, or that may not be changed.
    """
    known = groups(call)
    base = OmegaConf.create(config)
    changed = OmegaConf.create(config)
    kept = {}
    for override in parse(call.overrides):
        check_sweep(override, call)
        check_plumbing(override)
        key, line = override.key_or_group, text(override)
        if key in DOOR_KEYS or (key == "experiment" and override.value() == config.get("name")):
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
    return Composed(plain(changed, call), list(kept.values()), config, config, kept)


def of_the_task(overrides: list[str], stored: dict[str, Any]) -> list[str]:
    """The overrides of a mode of the task's own, in which a key that the task alone has may stand bare: `steps=50`.

    Nothing is trained in such a mode, so that no other `steps` can be meant.
    """
    own = stored["task"].keys() - stored.keys()
    return [f"task.{line}" if line.partition("=")[0] in own else line for line in overrides]


def door_values(call: Call) -> dict[str, Any]:
    """The values of the keys that say what to do, read before anything is composed.

    Raises:
        UserError: one of them is empty, or not a word.
    """
    found: dict[str, Any] = {}
    for override in parse(call.overrides):
        key, line = override.key_or_group, text(override)
        if key not in DOOR_KEYS or override.is_sweep_override() or override.is_delete():
            continue
        value = override.value()
        wrong = not isinstance(value, list) if key == "runs" else isinstance(value, bool | list | dict)
        if wrong or value == "":
            raise UserError(f"{line}: {key} takes {DOOR_KEYS[key]}.")
        found[key] = value if value is None or key == "runs" else str(value)
    return found


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
