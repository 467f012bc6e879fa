"""Errors about keys and options that do not exist or do not fit: expected, given, what to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from runner.config.command import (
    CONF,
    OPEN_NODES,
    Command,
    is_launcher,
    is_of_sweep,
    quote,
    quoted,
    text,
    value_text,
)
from runner.config.hydra_errors import fixed_by_runner, hydra_error
from runner.config.options import (
    GLOBAL_GROUPS,
    declared_groups,
    groups,
    has_key,
    is_option,
    leaves,
    read_yaml,
    root_yaml,
)
from runner.errors import UserError, did_you_mean, nearest, unknown

Groups = dict[str, dict[str, Path]]  # name of a group → name of an option → its file


def word_error(words: list[str], command: Command) -> UserError | None:
    """Return the error where the name of an experiment was typed without its key."""
    experiments = groups(command)["experiment"]
    for before, word in zip(["", *words], words, strict=False):
        if word in experiments:
            right = f"experiment={word}"
            if before in ("experiment", "experiment=", "="):
                return UserError(f"write overrides without spaces around '=': {right}")
            return UserError(f"{word} is an experiment; select it with {right}.", word, right)
    return None


def override_error(override: Override, command: Command) -> UserError | None:
    """Return the error where a run is given what only a sweep has, or Hydra's own node is set."""
    # what only a sweep has
    key, line = override.key_or_group, text(override)
    if is_launcher(override) or (is_of_sweep(override) and not command.multirun):
        return UserError(f"{line} needs a sweep: add -m.", line, "-m")
    if override.is_sweep_override() and not command.multirun:
        hint = f"(To give one value with a comma, quote it: {quote(quoted(line))}.)"
        return UserError(f"{line} has several values, which needs a sweep: add -m. {hint}", line, "-m")

    # what the runner fixes
    fixed = fixed_by_runner(key)
    if fixed is not None and line != "hydra/sweeper=basic":
        return UserError(f"{line}: {fixed[0]}.", line, fixed[1].format(value_text(override)))
    return None


def option_error(override: Override, available: Groups) -> UserError | None:
    """Return the error unless every value of a group's override is an option of the group."""
    group, line = override.key_or_group, text(override)
    options = available[group]
    if override.is_sweep_override() and not override.is_choice_sweep():  # range(0,1e9) would never end
        return UserError(f"{line}: expected names, {group}=a,b. Available: {', '.join(options)}.", line, "")
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values:
        if value is None or value == "null":
            if declared_groups().get(group) is not None and override.package is None:
                return UserError(f"{line}: {group} is required. Available: {', '.join(options)}.", line, "")
        elif isinstance(value, list) and group == "experiment":
            return UserError(f"{line}: expected one name. Available: {', '.join(options)}.", line, "")
        else:
            names = map(str, value if isinstance(value, list) else [value])
            wrong = next((name for name in names if name not in options), None)
            if wrong is not None:
                return unknown(group, wrong, options, line)
    return None


def composition_error(error: Exception, options: list[Override], available: Groups) -> UserError:
    """Translate what Hydra says of a defaults list that does not compose: what was typed, or a file's."""
    if (of_hydra := hydra_error(error, options)) is not None:
        return of_hydra
    reasons = (" ".join(str(e).split()) for e in (error, error.__cause__, error.__context__))
    reason = next(filter(None, reasons), type(error).__name__)

    # what was typed
    typed = _typed_option_error(reason, options, available)
    if typed is not None:
        return typed

    # the file that it is about, else the first that was selected
    own, _, option = match[1].partition("/") if (match := re.match(r"In '(.+?)': ", reason)) else ("", "", "")
    files = [
        available[o.key_or_group].get(str(o.value())) for o in options if o.key_or_group in GLOBAL_GROUPS
    ]
    file = available.get(own, {}).get(option) or next(filter(None, files), None)

    # what is wrong in it: of a key of Hydra's own node, else of the defaults list
    if match := re.search(r"composing config: (.+?) full_key: (hydra\S*)?", reason):
        return UserError(f"{file}, {match[2] or 'hydra'}: {match[1]}.")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        problem = _missing_option(error, own, available)
    else:
        problem = _misplaced_option(reason, available)
    return UserError(f"{file or ' '.join(map(text, options))}, defaults: {problem}")


# as Hydra says that a group is selected twice, or that an override selects it for the first time
_SELECTED_TWICE = re.compile(r"Multiple values for .+ use 'override (.+?): (.+?)'")
_SELECTED_BY_NOTHING = re.compile(r"(?:Could not override|No earlier Group Default for) '(.+?)'")  # 1.3, 1.4


def _typed_option_error(reason: str, options: list[Override], available: Groups) -> UserError | None:
    """Return the error where the command line adds a group that is selected, or replaces one that is not."""
    if match := _SELECTED_TWICE.search(reason):
        added = (o for o in options if o.is_add() and o.get_key_element().lstrip("+") == match[1])
        if (option := next(added, None)) is not None:
            right = text(option).lstrip("+")
            return UserError(
                f"{text(option)}: {match[1]} is selected already; write {right}.", text(option), right
            )

    if match := _SELECTED_BY_NOTHING.search(reason):
        key = match[1]
        if (option := next((o for o in options if o.get_key_element() == key), None)) is not None:
            outer, _, inner = key.rpartition("/")
            nested = f"{inner}/{text(option).partition('=')[2]}"
            right = f"{outer}={nested}" if nested in available.get(outer, {}) else f"+{text(option)}"
            return UserError(
                f"{text(option)}: {key} is not selected yet; write {right}.", text(option), right
            )
    return None


def _missing_option(error: MissingConfigException, own: str, available: Groups) -> object:
    """Return what to write for an option or a group of a defaults list that does not exist."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    relative = group.removeprefix(f"{own}/")
    if group == "hydra/sweeper":
        return "Hydra's sweepers are not supported; write `override /sweep: optuna`."
    if relative != group and relative in available:
        return f"groups are named from the root; write `/{relative}: {name}`."
    if error.options:
        return unknown(group, name, available.get(group, error.options))
    return unknown("group", relative, available)


def _misplaced_option(reason: str, available: Groups) -> object:
    """Return what to write for an entry of a defaults list that stands in the wrong place."""
    if match := _SELECTED_TWICE.search(reason):
        return f"{match[1]} is selected already; write `override /{match[1]}: {match[2]}`."
    if match := _SELECTED_BY_NOTHING.search(reason):
        key = match[1]
        if key.partition("@")[0] not in available:
            return unknown("group", key, available)
        return f"{key} is not selected yet; write `/{key}: NAME`, without override."
    if match := re.search(r"Override '(.+?)' is defined before '(.+?)'", reason):
        return f"`override` comes last: write `{match[2]}` above `override /{match[1]}`."
    return reason


def experiment_error(selected: list[Override], command: Command, available: Groups) -> UserError | None:
    """Return the error where no experiment is selected."""
    if selected and selected[-1].value() is not None:
        return None
    mode = command.options.get("mode") or "train"
    if mode != "train":
        return UserError(f"mode={mode} needs a checkpoint: checkpoint=RUN_DIR/checkpoints/best.pt.")
    return UserError(f"expected experiment=NAME, one of: {', '.join(available['experiment'])}.")


def fixed_error(override: Override, available: Groups, allowed: tuple[str, ...] | None) -> UserError | None:
    """Return the error where an override changes what a stored run has fixed; `allowed` None: any single key."""
    key, line = override.key_or_group, text(override)
    if allowed is not None and key not in allowed:
        return UserError(f"{line}: a resume may only change {', '.join(allowed)}.", line, "")
    if override.is_delete():
        return UserError(
            f"{line}: keys of a stored run cannot be removed; set a value: {key}=VALUE.", line, ""
        )
    if is_option(override, available):
        return UserError(f"{line}: the stored run decides the {key}; set single keys instead.", line, "")
    return None


def key_error(override: Override, base: DictConfig, available: Groups) -> UserError | None:
    """Return the error unless the key exists, or `+` adds one that is no misspelling."""
    key, line = override.key_or_group, text(override)
    adding = override.is_add() or override.is_force_add()
    if key.startswith(OPEN_NODES):
        return None
    if override.package is not None:
        return UserError(f"{line}: a single key has no package; write {key}=VALUE.", line)

    # a key that exists
    if has_key(base, key):
        return _existing_key_error(override, base)

    # one that is close to another
    group, _, option = key.partition("/")
    if option:
        right = f"{group}={option}" if option in available.get(group, {}) else None
        return UserError(f"{line}: select an option with {right or 'GROUP=NAME'}.", line, right)
    parent, cutoff = key.rpartition(".")[0], 0.8 if adding else 0.6
    in_node = bool(parent) and isinstance(OmegaConf.select(base, parent), DictConfig)
    if adding and in_node:  # the class may take what another node has, too
        close = _respell_parts(key.split("."), base, available, cutoff)
    else:
        close = _nearest_key(key, base, available, cutoff)
    if close is not None:
        right = line.replace(key, close, 1).lstrip("+")
        return UserError(f"unknown key {key!r}; did you mean {close!r}?", line, right)

    # one that is close to none; whether a constructor takes an added one shows when it is called
    if in_node:
        group, _, leaf = key.partition(".")
        options = available.get(group, {}).items()
        others = " and ".join(f"{group}={name}" for name, file in options if leaf in read_yaml(file))
        hint = f" It is a key of {others}." if others else ""
        message = f"unknown key {key!r}.{hint}{_children(base, parent)}"
        return None if adding else UserError(message, line, "")
    if parent and has_key(base, parent):
        return UserError(f"unknown key {key!r}: {parent} is a single value.", line, "")
    if adding:
        return None  # another value may read it; what nothing reads is an error of the whole
    names = ", ".join(sorted({*map(str, base), *available}))
    return UserError(f"unknown key {key!r}. Available: {names}.", line, "")


def _existing_key_error(override: Override, base: DictConfig) -> UserError | None:
    """Return the error where `+` adds a key that exists, or a mapping gets keys that it lacks."""
    key, line = override.key_or_group, text(override)
    adding = override.is_add() or override.is_force_add()
    node, value = OmegaConf.select(base, key), override.value()

    if override.is_add() and not isinstance(value, dict):
        return UserError(f"{line}: {key} exists; write it without the +.", line, line.lstrip("+"))
    if not isinstance(node, DictConfig) or adding:
        return None

    # several keys of a mapping at once, or something else in its place
    if isinstance(value, dict):
        new = next((path for path, _ in leaves(value, key) if not has_key(base, path)), None)
        return UserError(f"{line}: unknown key {new!r}.{_children(base, key)}", line) if new else None
    if "." not in key and not override.is_delete():
        return UserError(f"{line}: {key} is a mapping; set its keys one by one.{_children(base, key)}")
    return None


def file_error(file: Path) -> UserError | None:
    """Return the error unless a file of a whole run has its header, and sets nothing that has no effect.

    Raises:
        UserError: it cannot be read.
    """
    content = read_yaml(file)
    for key, _ in leaves({"hydra": content["hydra"]} if isinstance(content.get("hydra"), dict) else {}):
        if key.startswith("hydra.sweeper"):
            return UserError(
                f"{file}, {key}: write what is swept as `sweep: {{space: {{KEY: VALUES}}}}`, "
                "or type it: -m KEY=VALUES."
            )
        if (fixed := fixed_by_runner(key)) is not None:
            return UserError(f"{file}, {key}: {fixed[0]}.")
    if file.is_file() and "# @package _global_" not in file.read_text(encoding="utf-8"):
        return UserError(
            f"{file} must begin with the line `# @package _global_`: it sets keys of the whole run."
        )
    return None


def hidden_error(choices: dict[str, str], command: Command) -> UserError | None:
    """Return the error where a file of the user's has the name of one of ours, and so is never read."""
    if command.config_dir is None or command.config_dir.resolve() == CONF:
        return None
    for file in (Path(group.partition("@")[0], f"{option}.yaml") for group, option in choices.items()):
        if (CONF / file).is_file() and (command.config_dir / file).is_file():
            return UserError(
                f"{command.config_dir / file} has the name of the runner's own {file}: rename it."
            )
    return None


def root_error(config: DictConfig, available: Groups, command: Command) -> UserError | None:
    """Return the error where the root has a key that `config.yaml` does not declare and no interpolation reads."""
    nodes = {*root_yaml(), *(name.partition("/")[0] for name in available)}
    own = [str(key) for key in config if key not in nodes]
    unread = [key for key in own if not re.search(rf"\$\{{[^{{}}]*(?<![\w.]){re.escape(key)}\b", str(config))]
    if not unread:
        return None
    key, *_ = unread
    reads = f"unknown key {key!r}: nothing reads it, neither the runner nor ${{{key}}}."
    typed = next((line for line in command.typed if re.match(rf"\+*{re.escape(key)}\b", line)), None)
    if typed is not None:
        return UserError(f"{reads}{did_you_mean(nearest(key, nodes))}", typed, "")
    files = " ".join(line for line in command.typed if line.partition("=")[0] in available)
    return UserError(f"{reads} It stands in a YAML file of {files}.{did_you_mean(nearest(key, nodes))}")


def find_key(word: str, command: Command) -> str | None:
    """Return the key, of any option, whose last word is nearest to `word`; nothing is composed."""
    ends = {str(key): str(key) for key in root_yaml() if key != "defaults"}
    ends |= {name: name for name in declared_groups()}
    for group, options in groups(command).items():
        for file in options.values() if group not in (*GLOBAL_GROUPS, "sweep") else []:
            ends |= {path.rpartition(".")[2]: f"{group}.{path}" for path, _ in leaves(read_yaml(file))}
    close = nearest(word, ends, 0.75)
    return ends[close] if close else None


def _children(config: DictConfig, parent: str) -> str:
    """Return the keys below one, as the end of a message."""
    node = OmegaConf.select(config, parent)
    keys = [f"{parent}.{name}" for name in node]
    if not keys:
        return ""
    adding = f" To add one that its class takes: +{parent}.KEY=VALUE." * ("_target_" in node)
    return f" Available: {', '.join(keys)}.{adding}"


def _nearest_key(key: str, base: DictConfig, available: Groups, cutoff: float) -> str | None:
    """Return the key that was meant: each part respelt in its place, else one with the same last word."""
    respelt = _respell_parts(key.split("."), base, available, cutoff)
    paths = [path for path, _ in leaves(OmegaConf.to_container(base))]
    last = key.rpartition(".")[2]
    same_end = [path for path in paths if path.rpartition(".")[2] == last]
    if "." not in key and same_end:  # `lr` is optimizer.lr before it is anything that looks like it
        return same_end[0]
    if respelt is not None or same_end:
        return respelt or same_end[0]
    if "." in key:
        return None
    ends = {path.rpartition(".")[2]: path for path in paths}
    close = nearest(key, ends, cutoff)
    return ends[close] if close else None


def _respell_parts(parts: list[str], base: DictConfig, available: Groups, cutoff: float) -> str | None:
    """Return the dotted key with every part replaced by the nearest that exists, or None."""
    node: Any = base
    respelt: list[str] = []
    for part in parts:
        if not isinstance(node, DictConfig):
            return None
        names = [str(name) for name in node] + ([] if respelt else list(available))
        close = part if part in names else nearest(part, names, cutoff)
        if close is None:
            return None
        respelt.append(close)
        node = OmegaConf.select(node, close) if close in node else None
    return ".".join(respelt)
