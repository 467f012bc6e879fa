"""Arguments, help and printing: read the command line, run it, and return the exit status.

0 done; 1 the run failed; 2 the command is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import textwrap
from copy import copy
from pathlib import Path

from runner.app import config_text, is_accepted, run_command, say
from runner.config.command import CONF, Command, masked, quote
from runner.config.mistakes import find_key, word_error
from runner.config.options import experiments, groups
from runner.errors import UserError, did_you_mean, nearest, raise_first

_HYDRA_FLAGS = ("--info", "-i", "--shell-completion", "-sc", "--hydra-help")  # which Hydra answers
_FLAGS = ("--multirun", "--config-dir", "--cfg", "--help", "--info", "--shell-completion", "--hydra-help")
_USAGE = {  # what follows the program's name, and what it does
    "experiment=NAME [key=value ...]": "one run",
    "-m experiment=NAME key=a,b,c": "a sweep: one run per combination",
    "-m experiment=NAME sweep=optuna 'key=interval(a,b)'": "a search with Optuna",
    "mode=eval checkpoint=RUN_DIR/checkpoints/best.pt": "evaluate a checkpoint",
    "resume=RUN_DIR": "continue a run, bit-exactly",
    "-m resume=SWEEP_DIR": "continue a sweep",
    "mode=compare runs=[RUN_A,RUN_B]": "compare runs",
    "experiment=NAME --cfg job": "print the composed config; run nothing",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = _program()
    arguments = argparse.Namespace(overrides=[], config_dir=None, multirun=False, cfg=None)
    try:
        # flags
        if any(argument.partition("=")[0] in _HYDRA_FLAGS for argument in argv):
            return _run_hydra(argv)
        arguments = _read_arguments(argv)
        flags = Command([], arguments.config_dir, arguments.multirun, program)
        raise_first([_flag_error(flags, arguments, argv)])
        if arguments.help:
            say(_help_text(flags))
            return 0
        if not arguments.overrides:
            say(_welcome(flags))
            return 2

        # overrides
        raise_first([word_error(arguments.overrides, flags)])
        command = Command.parse(arguments.overrides, arguments.config_dir, arguments.multirun, program)
        if arguments.cfg is not None:
            say(config_text(command))
            return 0
        return run_command(command)
    except UserError as error:
        print(_message(error, arguments, program), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _read_arguments(argv: list[str]) -> argparse.Namespace:
    """Separate flags and overrides; `unknown` are the flags that do not exist."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-c", "--cfg")
    parser.add_argument("-h", "--help", action="store_true")
    try:
        arguments, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from None
    return argparse.Namespace(**vars(arguments), unknown=unknown)


def _flag_error(flags: Command, arguments: argparse.Namespace, argv: list[str]) -> UserError | None:
    """Return the error where a flag does not exist: another one misspelt, or an override with dashes."""
    if flags.config_dir is not None and not flags.config_dir.is_dir():
        return UserError(f"--config-dir {flags.config_dir}: no such folder.")
    if arguments.cfg not in (None, "job"):
        return UserError(f"expected --cfg job, got --cfg {arguments.cfg}.")
    if not arguments.unknown:
        return None

    # another flag
    flag = arguments.unknown[0]
    name, _, value = flag.partition("=")
    close = nearest(name, _FLAGS, 0.75)
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


def _program() -> str:
    """Return the program as it was called, so that proposed commands run where it does."""
    if Path(sys.argv[0]).name == "runner":
        installed = shutil.which("runner")
        same = installed is not None and Path(installed).samefile(sys.argv[0])
        return "runner" if same else shlex.quote(sys.argv[0])
    python, *module = sys.orig_argv[:3]
    return f"{shlex.quote(python)} -m runner" if module == ["-m", "runner"] else "python -m runner"


def _message(error: UserError, arguments: argparse.Namespace, program: str) -> str:
    """Return what the screen shows of an error, with the corrected command where that is accepted."""
    lines = [f"error: {error}"]
    proposal = _corrected(error, arguments)
    with contextlib.suppress(UserError):  # which the proposal has, too
        if proposal is not None:
            words = proposal.overrides
            command = Command.parse(words, proposal.config_dir, proposal.multirun, program)
            if is_accepted(command, proposal.cfg is not None):
                words = [*["-m"] * command.multirun, *words, *(["--cfg", "job"] if proposal.cfg else [])]
                lines.append(" ".join([f"  try: {command.flags()}", *map(quote, words)]))
    return masked("\n".join(lines))


def _corrected(error: UserError, arguments: argparse.Namespace) -> argparse.Namespace | None:
    """Return the arguments with what the error says is right in place of what is wrong."""
    proposal, words = copy(arguments), arguments.overrides
    if error.right is None or (error.right == "" and len(words) < 2):
        return None
    if error.right == "-m":
        proposal.multirun = True
        return proposal

    # the word that is wrong, or the last that sets its key: resume=RUN/ for resume=RUN, steps=1 for task.steps=1
    key = f"{error.wrong}".partition("=")[0]
    typed = [word for word in words if word.startswith((f"{key}=", f"{key.removeprefix('task.')}="))]
    wrong = error.wrong if error.wrong in words else next(reversed(typed), None)
    if wrong is not None:
        corrected = [error.right if word == wrong else word for word in words]
        proposal.overrides = [word for word in corrected if word]
    elif error.wrong and error.right:  # what is wrong stands in a file: the command line has the last word
        proposal.overrides = [*words, error.right]
    return None if proposal.overrides is words else proposal


def _welcome(command: Command) -> str:
    """Return the experiments and how to start."""
    return (
        f"Experiments:\n{_table(experiments(command))}\n\n"
        f"Usual commands, each after `{command.prefix}`:\n{_table(_USAGE)}\n\n"
        "All curves and figures: tensorboard --logdir outputs\nMore: --help"
    )


def _table(rows: dict[str, str]) -> str:
    """Return two columns, indented, within 100 characters."""
    width = max(map(len, rows), default=0)
    indent = " " * (width + 4)
    lines = []
    for left, right in rows.items():
        first = f"  {left.ljust(width)}  "
        lines += textwrap.wrap(right, 100, initial_indent=first, subsequent_indent=indent) or [first]
    return "\n".join(lines)


def _help_text(command: Command) -> str:
    """Return what `--help` prints: commands, experiments, groups, keys of every run, flags."""
    # groups, and the keys of config.yaml that have a default
    options = {name: ", ".join(files) for name, files in sorted(groups(command).items())}
    del options["experiment"]
    root = [line for line in (CONF / "config.yaml").read_text(encoding="utf-8").splitlines() if "#" in line]
    keys = "\n".join("  " + line for line in root[1:] if "???" not in line)

    welcome = _welcome(command).rpartition("\n")[0]  # without "More: --help"
    return f"""{welcome}

Groups (group=option):
{_table(options)}

Keys of every run (key=value; also every key of a group, such as optimizer.lr):
{keys}

Flags:
  -m, --multirun            a sweep over all comma-separated values
  --config-dir DIR          a folder with YAML (experiment/NAME.yaml) and modules of your own
  --cfg job                 print the composed config
  --shell-completion install=bash   for the command `runner`: eval "$(runner -sc install=bash)\""""


def _run_hydra(argv: list[str]) -> int:
    """Let Hydra answer its own flags: --info, --hydra-help, shell completion."""
    import hydra

    # shell completion, which Hydra answers with tracebacks where it is misspelt
    flag = next((n for n, a in enumerate(argv) if a.partition("=")[0] in ("-sc", "--shell-completion")), None)
    if flag is not None:
        value = argv[flag + 1] if flag + 1 < len(argv) else ""
        action, _, shell = value.partition("=")
        unknown = action not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish")
        if unknown or (action == "query" and "COMP_LINE" not in os.environ):  # which the shell alone asks
            install = 'eval "$(runner -sc install=bash)"'
            raise UserError(f"expected -sc install=bash (or zsh, fish), got -sc {value}: {install}")

    sys.argv = [sys.argv[0], *argv]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(lambda cfg: None)()
    return 0
