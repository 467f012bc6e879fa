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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runner.app import is_accepted, run_command, say, shown
from runner.arguments import (
    FLAGS,
    flag_error,
    read_arguments,
    showing_flags,
    shows,
    with_flag,
    without_refused,
)
from runner.config.command import CONF, Command, masked, quote
from runner.config.mistakes import word_error
from runner.config.options import experiments, groups
from runner.errors import UserError, raise_first

_USAGE = {  # what follows the program's name, and what it does
    "experiment=NAME [key=value ...]": "one run",
    "-m experiment=NAME key=a,b,c": "a sweep: one run per combination",
    "-m experiment=NAME sweep=optuna 'key=interval(a,b)'": "a search with Optuna",
    "mode=eval checkpoint=RUN_DIR/checkpoints/best.pt": "evaluate a checkpoint",
    "resume=RUN_DIR": "continue a run, bit-exactly",
    "rerun RUN_DIR": "run it again, in a new folder",
    "-m resume=SWEEP_DIR": "continue a sweep",
    "mode=compare runs=[RUN_A,RUN_B]": "compare runs",
    "experiment=NAME --cfg job": "print the composed config; run nothing",
    "new NAME [--template T] [--dir DIR]": "write an experiment of your own (new --help)",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = _program()
    arguments = argparse.Namespace(overrides=[], config_dir=None, multirun=False)
    try:
        if argv[:1] == ["new"]:
            from runner.new import write_experiment

            say(write_experiment(argv[1:], program))
            return 0

        # flags
        arguments = read_arguments(argv)
        flags = Command([], arguments.config_dir, arguments.multirun, program)
        raise_first([flag_error(flags, arguments, argv)])
        answer = _answer(arguments, flags)
        if answer is not None:
            say(answer)
            return 0
        if not arguments.overrides and not shows(arguments):
            say(_welcome(flags))
            return 2

        # overrides
        raise_first([word_error(arguments.overrides, flags)])
        command = Command.parse(arguments.overrides, arguments.config_dir, arguments.multirun, program)
        if shows(arguments):
            say(_show(arguments, command))
            return 0
        return run_command(command)
    except UserError as error:
        print(_message(error, arguments, program), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _answer(arguments: argparse.Namespace, flags: Command) -> str | None:
    """Return what the flags alone ask for, whatever the overrides are, or None."""
    if arguments.version:
        return _version_text()
    if arguments.hydra_help:
        from runner.config.show import hydra_groups

        return f"Flags:\n{_flags_text()}\n\nHydra's groups, for a sweep:\n  {hydra_groups()}"
    if arguments.shell_completion is not None:
        from runner.completion import candidates, completion_script

        action, _, shell = arguments.shell_completion.partition("=")
        if action == "query" and "COMP_LINE" in os.environ:  # as the installed script asks
            return "\n".join(candidates(os.environ["COMP_LINE"]))
        return completion_script(action, shell, flags.program)
    return _help_text(flags) if arguments.help and not arguments.overrides else None


def _show(arguments: argparse.Namespace, command: Command) -> str:
    """Return what --cfg, --info and --help print of a config."""
    from runner.config.show import config_text, info_text

    package, resolve = arguments.package, arguments.resolve
    if arguments.cfg:
        return shown(command, lambda one: config_text(one, arguments.cfg, package, resolve))
    if arguments.info:
        return shown(command, lambda one: info_text(one, arguments.info))
    return shown(command, _keys_text)


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
            raise_first([flag_error(Command([], proposal.config_dir), proposal, [])])
            command = Command.parse(words, proposal.config_dir, proposal.multirun, program)
            if is_accepted(command, shows(proposal)):
                words = [*["-m"] * command.multirun, *map(quote, words), *showing_flags(proposal)]
                lines.append(" ".join([f"  try: {command.flags()}", *words]))
    return masked("\n".join(lines))


def _corrected(error: UserError, arguments: argparse.Namespace) -> argparse.Namespace | None:
    """Return the arguments with what the error says is right in place of what is wrong."""
    proposal, words = without_refused(arguments), arguments.overrides
    if error.right is None or (error.right == "" and len(words) < 2):
        return None
    if error.right.startswith("-"):
        return with_flag(proposal, error.right)

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
{_flags_text()}"""


def _keys_text(command: Command) -> str:
    """Return what `--help` prints of an experiment: every key, its value and the comment of the YAML."""
    from runner.config.show import explained

    sections = [
        f"{title or 'Keys of the run'}:\n{_table(rows)}" for title, rows in explained(command).items() if rows
    ]
    named = next((o for o in command.overrides if o.key_or_group == "experiment"), None)
    description = "" if named is None else experiments(command).get(str(named.value()), "")
    return "\n\n".join([*filter(None, [description]), *sections])


def _flags_text() -> str:
    """Return the flags and what they do."""
    rows = {}
    for names, (options, about) in FLAGS.items():
        short = ", ".join(reversed(names))
        rows[f"{short} {options.get('metavar', '')}".rstrip()] = about
    return _table(rows)


def _version_text() -> str:
    """Return the versions of the runner and of Hydra."""
    from runner.config.show import hydra_version

    try:
        own = version("formula-runner")
    except PackageNotFoundError:  # its files alone are on the path
        own = "(not installed)"
    return f"formula-runner {own}, Hydra {hydra_version()}"
