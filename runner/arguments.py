"""The arguments of a command: its flags, read and checked, and its overrides, still words."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from runner.config.command import Command
from runner.config.mistakes import find_key
from runner.config.options import groups
from runner.errors import UserError, did_you_mean, nearest

CHOICES = {
    "cfg": ("job", "hydra", "all"),
    "info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_SWITCH = {"action": "store_true"}
FLAGS: dict[tuple[str, ...], tuple[dict[str, Any], str]] = {  # names: how they are read, and what they do
    ("--multirun", "-m"): (_SWITCH, "a sweep over all comma-separated values"),
    ("--run", "-r"): (_SWITCH, "one run, as without it"),
    ("--config-dir", "-cd"): (
        {"type": Path, "metavar": "DIR"},
        "a folder with YAML (experiment/NAME.yaml) and modules of your own",
    ),
    ("--cfg", "-c"): ({"metavar": "|".join(CHOICES["cfg"])}, "print the composed config; run nothing"),
    ("--resolve",): (_SWITCH, "with --cfg: every interpolation replaced by its value"),
    ("--package", "-p"): ({"metavar": "KEY"}, "with --cfg: this node alone"),
    ("--info", "-i"): (
        {"nargs": "?", "const": "all", "metavar": "TOPIC"},
        f"print how the config is composed: {', '.join(CHOICES['info'])}",
    ),
    ("--help", "-h"): (_SWITCH, "print this, or with experiment=NAME every key of the experiment"),
    ("--hydra-help",): (_SWITCH, "print the flags, and Hydra's own groups"),
    ("--version",): (_SWITCH, "print the versions of the runner and of Hydra"),
    ("--shell-completion", "-sc"): (
        {"metavar": "install=SHELL"},
        'for bash, zsh or fish: eval "$(runner -sc install=bash)"; uninstall=bash',
    ),
}
_REFUSED = ("--config-name", "--config-path", "--experimental-rerun")  # of Hydra's, with their short names
_SHORT = {"-cn": "--config-name", "-cp": "--config-path"}
_SHOWING = ("cfg", "info", "help")  # which print something about a config and run nothing


def read_arguments(argv: list[str]) -> Namespace:
    """Separate flags and overrides; `unknown` are the flags that do not exist.

    Raises:
        UserError: a flag lacks its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("overrides", nargs="*")
    for names, (options, _) in FLAGS.items():
        parser.add_argument(*names, **options)
    for name in _REFUSED:
        parser.add_argument(name, *(short for short, long in _SHORT.items() if long == name))
    try:
        arguments, unknown = parser.parse_known_intermixed_args(_complete_info(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from None

    # the mode of a run, which Hydra has in its config
    modes = [word for word in arguments.overrides if word.startswith("hydra.mode=")]
    arguments.overrides = [word for word in arguments.overrides if word not in modes]
    for word in modes:
        mode = word.partition("=")[2].upper()
        if mode not in ("RUN", "MULTIRUN"):
            raise UserError(f"expected hydra.mode=RUN or hydra.mode=MULTIRUN, got {word}.")
        arguments.multirun |= mode == "MULTIRUN"

    # the one word that is a command
    if arguments.overrides[:1] == ["rerun"]:
        arguments.overrides[:2] = [f"rerun={''.join(arguments.overrides[1:2])}"]
    return Namespace(**vars(arguments), unknown=unknown)


def shows(arguments: Namespace) -> bool:
    """Return whether the flags ask to print something about a config, rather than to run it."""
    return any(getattr(arguments, name, None) for name in _SHOWING)


def showing_flags(arguments: Namespace) -> list[str]:
    """Return the flags that print something, as they are typed."""
    given = {name: getattr(arguments, name, None) for name in ("cfg", "package", "info", "resolve", "help")}
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items() if value]


def flag_error(flags: Command, arguments: Namespace, argv: list[str]) -> UserError | None:
    """Return the error where a flag does not exist, does not fit, or is an override with dashes."""
    if flags.config_dir is not None and not flags.config_dir.is_dir():
        return UserError(f"--config-dir {flags.config_dir}: no such folder.")
    for name, choices in CHOICES.items():
        value = getattr(arguments, name)
        if value not in (None, *choices):
            close = nearest(value, choices)
            right = f"--{name}={close}" if close else None
            return UserError(f"expected --{name} {'|'.join(choices)}, got --{name} {value}.", None, right)
    if arguments.run and arguments.multirun:
        return UserError("expected one of --run and --multirun, got both.")
    for name in ("resolve", "package"):
        if getattr(arguments, name) and not arguments.cfg:
            return UserError(f"--{name} goes with --cfg: --cfg job --{name}.", None, "--cfg=job")
    return _refused_error(flags, arguments) or _unknown_error(flags, arguments, argv)


def without_refused(arguments: Namespace) -> Namespace:
    """Return the arguments without the flags that are refused or unknown."""
    refused = {name.removeprefix("--").replace("-", "_"): None for name in _REFUSED}
    return Namespace(**vars(arguments) | refused | {"unknown": []})


def with_flag(arguments: Namespace, flag: str) -> Namespace:
    """Return the arguments with one flag more, written --name=value; `-m` is --multirun."""
    name, _, value = flag.removeprefix("--").partition("=")
    typed: Any = Path(value) if name == "config-dir" else value or True
    key = "multirun" if flag == "-m" else name.replace("-", "_")
    return Namespace(**vars(arguments) | {"run": False, key: typed})


def _complete_info(argv: list[str]) -> list[str]:
    """Return the words with `--info=all` for an --info without a topic, which takes no override for one."""
    return [
        "--info=all" if word in ("--info", "-i") and "=" in after else word
        for word, after in zip(argv, [*argv[1:], ""], strict=False)
    ]


def _refused_error(flags: Command, arguments: Namespace) -> UserError | None:
    """Return the error where a flag of Hydra's is given that has no meaning here, with what has."""
    if arguments.config_path is not None:
        message = f"--config-path {arguments.config_path}: a folder of your own is added to the runner's"
        return UserError(f"{message} with --config-dir DIR.", None, f"--config-dir={arguments.config_path}")
    if arguments.config_name is not None:
        name = Path(arguments.config_name).stem
        right = f"experiment={name}" if name in groups(flags)["experiment"] else None
        message = f"--config-name {arguments.config_name}: every run begins with the runner's config.yaml"
        return UserError(f"{message}; select an experiment with experiment=NAME.", "--config-name", right)
    if arguments.experimental_rerun is not None:
        return UserError("--experimental-rerun: write rerun RUN_DIR, or resume=RUN_DIR to continue a run.")
    return None


def _unknown_error(flags: Command, arguments: Namespace, argv: list[str]) -> UserError | None:
    """Return the error where a flag does not exist: another one misspelt, or an override with dashes."""
    if not arguments.unknown:
        return None

    # another flag
    flag = arguments.unknown[0]
    name, _, value = flag.partition("=")
    close = nearest(name, [names[0] for names in FLAGS], 0.75)
    if close is not None:
        return UserError(f"unknown option {flag}.{did_you_mean(close)}")

    # an override: its value may be the next word
    following = argv[argv.index(flag) + 1 :]
    if not value and following and "=" not in following[0] and not following[0].startswith("-"):
        value = following[0]
        arguments.overrides = [word for word in arguments.overrides if word != value]
    key = find_key(name.lstrip("-").replace("-", "_"), flags)
    arguments.overrides.append(flag)
    example = f"{key}={value or 'VALUE'}" if key else "seed=1"
    right = example if key and value else ""
    return UserError(f"unknown option {flag}; overrides are written key=value, e.g. {example}", flag, right)
