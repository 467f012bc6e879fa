"""Arguments, help and printing: read the command line, run it, and return the exit status.

0 done; 1 the run failed; 2 something was wrong with the call; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from runner.app import config_text, run_command, say
from runner.config.command import CONF, Command, masked
from runner.config.mistakes import find_key
from runner.config.options import experiments, groups
from runner.errors import UserError, nearest

HYDRA_FLAGS = ("--info", "-i", "--shell-completion", "-sc", "--hydra-help")  # which Hydra answers
FLAGS = ("--multirun", "--config-dir", "--cfg", "--help", "--info", "--shell-completion", "--hydra-help")
USAGE = {  # what follows the program's name, and what it does
    "experiment=NAME [key=value ...]": "one run",
    "-m experiment=NAME key=a,b,c": "a sweep: one run per combination",
    "-m experiment=NAME sweep=optuna 'key=interval(a,b)'": "a search with Optuna",
    "mode=eval checkpoint=RUN_DIR/checkpoints/best.pt": "look at a trained network",
    "resume=RUN_DIR": "go on with a run, exactly",
    "-m resume=SWEEP_DIR": "go on with a sweep: what is left of it",
    "mode=compare runs=[RUN_A,RUN_B]": "what two runs differ in",
    "experiment=NAME --cfg job": "the composed config; runs nothing",
}


class Parser(argparse.ArgumentParser):
    """argparse, with its mistakes told as ours are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def read_arguments(argv: list[str], program: str) -> tuple[Command, argparse.Namespace]:
    """The command line as a call, and its flags; `unknown` are those that there are not."""
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-c", "--cfg")
    parser.add_argument("-h", "--help", action="store_true")
    known, unknown = parser.parse_known_intermixed_args(argv)
    known.unknown = unknown
    return Command(known.overrides, known.config_dir, known.multirun, program), known


def check_flags(command: Command, known: argparse.Namespace, argv: list[str]) -> None:
    """A flag that there is not is another one misspelt, or a setting written with dashes."""
    if command.config_dir is not None and not command.config_dir.is_dir():
        raise UserError(f"--config-dir {command.config_dir}: there is no such folder.")
    if known.cfg not in (None, "job"):
        raise UserError(f"--cfg {known.cfg}: what can be shown is the run's config: --cfg job.")
    if not known.unknown:
        return
    flag = known.unknown[0]
    name, _, value = flag.partition("=")
    what = f"{flag} is not an option of {command.program}."
    close = nearest(name, FLAGS, 0.75)
    if close is not None:
        raise UserError(f"{what} Did you mean {close}?")
    after = argv[argv.index(flag) + 1 :]
    if not value and after and "=" not in after[0] and not after[0].startswith("-"):
        value = after[0]
        command.overrides[:] = [override for override in command.overrides if override != value]
    key = find_key(name.lstrip("-").replace("-", "_"), command)
    command.overrides.append(flag)
    right = f"{key}={value}" if key and value else ""
    raise UserError(f"{what} Settings have no dashes: {key or 'KEY'}={value or 'VALUE'}.", flag, right)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = as_called()
    command = Command([], program=program)
    try:
        if any(argument.partition("=")[0] in HYDRA_FLAGS for argument in argv):
            return hydra_main(argv, program)
        command, arguments = read_arguments(argv, program)
        check_flags(command, arguments, argv)
        if arguments.help:
            say(help_text(command))
            return 0
        if not command.overrides:
            say(welcome(command))
            return 2
        if arguments.cfg is not None:
            say(config_text(command))
            return 0
        return run_command(command)
    except UserError as error:
        print(message(error, command), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def as_called() -> str:
    """The program as it was typed, so that the commands which we propose run where it does."""
    if Path(sys.argv[0]).name == "runner":
        found = shutil.which("runner")
        return (
            "runner" if found is not None and Path(found).samefile(sys.argv[0]) else shlex.quote(sys.argv[0])
        )
    python, *module = sys.orig_argv[:3]
    return f"{shlex.quote(python)} -m runner" if module == ["-m", "runner"] else "python -m runner"


def message(error: UserError, command: Command) -> str:
    """A mistake as the screen shows it, with the corrected command where there is one."""
    lines = [f"error: {error}"]
    key = f"{error.wrong}".partition("=")[0]
    typed = [
        o for o in command.overrides if o == error.wrong or o.startswith(f"{key}=")
    ]  # resume=RUN/ for resume=RUN
    wrong = error.wrong if error.wrong in typed else next(reversed(typed), None)
    if wrong is not None and (error.right or (error.right == "" and len(command.overrides) > 1)):
        lines.append(f"  try: {command.corrected(wrong, error.right)}")
    elif error.wrong and error.right:  # what is wrong stands in a file: the command line has the last word
        lines.append(f"  try: {command.with_more(error.right)}")
    return masked("\n".join(lines))


def listing(command: Command) -> str:
    """The experiments, one line each."""
    found = experiments(command)
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name.ljust(width)}  {description}" for name, description in found.items())


def welcome(command: Command) -> str:
    """What there is, and how to start."""
    commands = {f"{command.prefix} {rest}": what for rest, what in USAGE.items()}
    commands["tensorboard --logdir outputs"] = "look at all of it"
    width = max(map(len, commands))
    indented = "\n".join(f"  {command.ljust(width)}  {what}" for command, what in commands.items())
    return f"Experiments:\n{listing(command)}\n\nUsual commands:\n{indented}\n\n{command.prefix} --help says more."


def help_text(command: Command) -> str:
    """`--help`: the commands, the experiments, the groups and their options, the keys of every run."""
    known = {name: options for name, options in groups(command).items() if name != "experiment"}
    width = max(map(len, known))
    options = "\n".join(f"  {name.ljust(width)}  {', '.join(found)}" for name, found in sorted(known.items()))
    root = [line for line in (CONF / "config.yaml").read_text(encoding="utf-8").splitlines() if "#" in line]
    keys = "\n".join("  " + line for line in root[1:] if "???" not in line)
    return "\n\n".join(
        [
            welcome(command).rsplit("\n\n", 1)[0],
            f"Groups (group=option):\n{options}",
            f"Keys of every run (key=value; also every key of a group, such as optimizer.lr):\n{keys}",
            "Flags:\n"
            "  -m, --multirun            a sweep over all comma-separated values\n"
            "  --config-dir DIR          a folder with YAML (experiment/NAME.yaml) and modules of your own\n"
            "  --cfg job                 print the composed config\n"
            '  --shell-completion install=bash   for the command `runner`: eval "$(runner -sc install=bash)"',
        ]
    )


def hydra_main(argv: list[str], program: str) -> int:
    """What Hydra answers itself: --info, --hydra-help, shell completion."""
    import hydra

    asked = next(
        (n for n, a in enumerate(argv) if a.partition("=")[0] in ("-sc", "--shell-completion")), None
    )
    if asked is not None:
        wanted = argv[asked + 1] if asked + 1 < len(argv) else ""
        command, _, shell = wanted.partition("=")
        if command not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
            raise UserError(
                f'-sc {wanted}: write -sc install=bash (or zsh, fish): eval "$(runner -sc install=bash)"'
            )
        if command == "query" and "COMP_LINE" not in os.environ:
            raise UserError(
                f"-sc {wanted} is what the shell asks when Tab is pressed. You want -sc install={shell}."
            )
    sys.argv = [sys.argv[0], *argv]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(lambda cfg: None)()
    return 0
