"""Messages about keys and options that do not exist or do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.command import CONF, OPEN_NODES, SWEEP_KEYS, Command, is_launcher, quote, quoted, text
from runner.config.options import GLOBAL_GROUPS, declared_groups, groups, leaves, read_yaml, root_yaml
from runner.errors import UserError, did_you_mean, nearest


def check_words(command: Command) -> None:
    """The name of an experiment alone is what a newcomer types."""
    for before, word in zip(["", *command.overrides], command.overrides, strict=False):
        if word in groups(command)["experiment"]:
            right = f"experiment={word}"
            if before in ("experiment", "experiment=", "="):
                raise UserError(f"A setting is one word, without spaces: {right}.")
            raise UserError(f"{word} is an experiment; it is chosen as {right}.", word, right)


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


def check_hidden(choices: dict[str, str], command: Command) -> None:
    """A file of the user's with the name of one of ours would never be read."""
    if command.config_dir is None or command.config_dir.resolve() == CONF:
        return
    for group, option in choices.items():
        file = Path(group) / f"{option}.yaml"
        if (CONF / file).is_file() and (command.config_dir / file).is_file():
            raise UserError(
                f"{command.config_dir / file} has the name of the runner's own {file}: rename it."
            )


def check_sweep(override: Override, command: Command) -> None:
    """Several values are a sweep, and a sweep is asked for with -m; so is what only a sweep knows."""
    if override.key_or_group.split(".")[0] in SWEEP_KEYS and not command.multirun:
        line = text(override)
        raise UserError(f"{line} is for a sweep: add -m.", line, "-m")
    if override.is_sweep_override() and not command.multirun:
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


def find_key(word: str, command: Command) -> str | None:
    """The key, of any option, whose last word is nearest to `word`; nothing is composed."""
    ends = {str(key): str(key) for key in root_yaml() if key != "defaults"}
    ends |= {name: name for name in declared_groups()}
    for group, options in groups(command).items():
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


def check_root(config: DictConfig, known: dict[str, dict[str, Path]], command: Command) -> None:
    """Keys at the root that no `config.yaml` declares are misspelt in a YAML file."""
    nodes = {*root_yaml(), *known}
    files = " ".join(o for o in command.overrides if o.partition("=")[0] in known)
    for key in map(str, config):
        if key not in nodes:
            hint = did_you_mean(nearest(key, nodes))
            raise UserError(f"{key}: a run has no such key (a YAML file of {files} has it).{hint}")
