"""The only door: read the command line, compose, check, run, and give an exit status.

0 done; 1 the run failed; 2 something was wrong with the call; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner import config
from runner.config import Call
from runner.errors import UserError, nearest

if TYPE_CHECKING:
    from runner.job import Job, Result

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


def read_arguments(argv: list[str], program: str) -> tuple[Call, argparse.Namespace]:
    """The command line as a call, and its flags; `unknown` are those that there are not."""
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-c", "--cfg")
    parser.add_argument("-h", "--help", action="store_true")
    known, unknown = parser.parse_known_intermixed_args(argv)
    known.unknown = unknown
    return Call(known.overrides, known.config_dir, known.multirun, program), known


def check_flags(call: Call, known: argparse.Namespace, argv: list[str]) -> None:
    """A flag that there is not is another one misspelt, or a setting written with dashes."""
    if call.config_dir is not None and not call.config_dir.is_dir():
        raise UserError(f"--config-dir {call.config_dir}: there is no such folder.")
    if known.cfg not in (None, "job"):
        raise UserError(f"--cfg {known.cfg}: what can be shown is the run's config: --cfg job.")
    if not known.unknown:
        return
    flag = known.unknown[0]
    name, _, value = flag.partition("=")
    what = f"{flag} is not an option of {call.program}."
    close = nearest(name, FLAGS, 0.75)
    if close is not None:
        raise UserError(f"{what} Did you mean {close}?")
    after = argv[argv.index(flag) + 1 :]
    if not value and after and "=" not in after[0] and not after[0].startswith("-"):
        value = after[0]
        call.overrides[:] = [override for override in call.overrides if override != value]
    key = config.find_key(name.lstrip("-").replace("-", "_"), call)
    call.overrides.append(flag)
    right = f"{key}={value}" if key and value else ""
    raise UserError(f"{what} Settings have no dashes: {key or 'KEY'}={value or 'VALUE'}.", flag, right)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = as_called()
    call = Call([], program=program)
    try:
        if any(argument.partition("=")[0] in HYDRA_FLAGS for argument in argv):
            return hydra_main(argv, program)
        call, arguments = read_arguments(argv, program)
        check_flags(call, arguments, argv)
        if arguments.help:
            say(help_text(call))
            return 0
        if not call.overrides:
            say(welcome(call))
            return 2
        if arguments.cfg is not None:
            say(config_text(call))
            return 0
        return run_call(call)
    except UserError as error:
        print(message(error, call), file=sys.stderr)
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


def say(text: str) -> None:
    """Print, also where whoever reads has seen enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def config_text(call: Call) -> str:
    """`--cfg job`: the composed config, every reference in it resolved; nothing runs."""
    if call.multirun:
        raise UserError("--cfg job shows the config of one run: write it without -m, one value per key.")
    config.check_words(call)
    return config.to_yaml(config.compose_call(call).config).rstrip()


def run_call(call: Call) -> int:
    """One run, a resume, a look at a checkpoint, or a sweep."""
    config.check_words(call)
    if call.multirun:
        from runner.sweep.run import run_sweep

        return run_sweep(call)
    door = config.door_values(call)
    if door.get("mode") == "compare":
        say(compared(door))
        return 0
    job = make_job(call)
    if job is None:
        return 0
    from runner.engine import execute

    return execute(job).exit_status


def compared(door: dict[str, Any]) -> str:
    """What two runs or more differ in."""
    from runner.compare import compare

    runs = [str(run) for run in door.get("runs") or []]
    if len(runs) < 2:
        raise UserError("mode=compare needs two runs or more: runs=[RUN_A,RUN_B].")
    return compare([Path(run) for run in runs])


def make_job(call: Call) -> Job | None:
    """The job that a call asks for; None where a finished run is asked to go on as it is."""
    door = config.door_values(call)
    given = [key for key in ("resume", "checkpoint") if door.get(key) is not None]
    if len(given) == 2:
        raise UserError("resume= goes on with a run, checkpoint= looks at one: give one of them.")
    if "resume" in given:
        return resume_job(call, door)
    if "checkpoint" in given:
        return checkpoint_job(call, door)
    composed = config.compose_call(call)
    if composed.sweep["sweep"].get("space"):
        print("This experiment's file holds a sweep; this is one run without it. With -m the sweep runs.")
    return build(composed, call, door)


def build(composed: config.Composed, call: Call, door: dict[str, Any]) -> Job:
    """Import torch, at last, and build."""
    from runner.build import build_job

    return build_job(composed, call, door)


def resume_job(call: Call, door: dict[str, Any]) -> Job | None:
    """The job that goes on in a run's folder."""
    folder = Path(str(door["resume"]))
    stored = config.stored_config(folder)
    if door.get("mode", "train") != "train":
        raise UserError(
            f"resume={folder} trains on; for mode={door['mode']} give checkpoint={folder}/checkpoints/best.pt."
        )
    composed = config.on_top(stored, call, config.RESUMABLE)
    if finished(folder) and not any(o.startswith("loop.") for o in composed.overrides):
        key = "epochs" if stored["loop"].get("steps") is None else "steps"
        print(f"{folder} is finished. To train longer: {call.command} resume={folder} loop.{key}=N")
        return None
    job = build(composed, call, door)
    job.resume = folder
    job.outputs = folder.parent.parent
    return job


def finished(folder: Path) -> bool:
    """Whether the run's summary says that it is done."""
    summary = folder / "summary.json"
    return summary.is_file() and config.read_yaml(summary).get("status") == "done"


def checkpoint_job(call: Call, door: dict[str, Any]) -> Job:
    """The job that looks at a checkpoint: everything else comes from the config that it holds."""
    if door.get("mode", "train") == "train":
        raise UserError(
            f"checkpoint={door['checkpoint']} is for looking at a trained network: add mode=eval. "
            "To train on, give resume=RUN_DIR."
        )
    path = Path(str(door["checkpoint"]))
    config.require_checkpoint(path)
    from runner import checkpoint

    stored = checkpoint.load(path)["config"]
    stored |= {key: door[key] for key in ("mode", "outputs") if key in door}
    if door["mode"] != "eval":
        call.overrides[:] = config.of_the_task(call.overrides, stored)
    composed = config.on_top(stored | {"checkpoint": str(path)}, call, None)
    return build(composed, call, door)


def run_overrides(overrides: list[str], config_dir: Path | None) -> Result:
    """One run, for `runner.run`."""
    call = Call(overrides, config_dir, program=f"{shlex.quote(sys.executable)} -m runner")
    config.check_words(call)
    job = make_job(call)
    if job is None:
        raise UserError("This run is finished. Give a larger loop.epochs, or loop.steps, to go on.")
    from runner.engine import execute

    return execute(job)


def message(error: UserError, call: Call) -> str:
    """A mistake as the screen shows it, with the corrected command where there is one."""
    lines = [f"error: {error}"]
    key = f"{error.wrong}".partition("=")[0]
    typed = [
        o for o in call.overrides if o == error.wrong or o.startswith(f"{key}=")
    ]  # resume=RUN/ for resume=RUN
    wrong = error.wrong if error.wrong in typed else next(reversed(typed), None)
    if wrong is not None and (error.right or (error.right == "" and len(call.overrides) > 1)):
        lines.append(f"  try: {call.corrected(wrong, error.right)}")
    elif error.wrong and error.right:  # what is wrong stands in a file: the command line has the last word
        lines.append(f"  try: {call.with_more(error.right)}")
    return config.masked("\n".join(lines))


def listing(call: Call) -> str:
    """The experiments, one line each."""
    found = config.experiments(call)
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name.ljust(width)}  {description}" for name, description in found.items())


def welcome(call: Call) -> str:
    """What there is, and how to start."""
    commands = {f"{call.command} {rest}": what for rest, what in USAGE.items()}
    commands["tensorboard --logdir outputs"] = "look at all of it"
    width = max(map(len, commands))
    indented = "\n".join(f"  {command.ljust(width)}  {what}" for command, what in commands.items())
    return f"Experiments:\n{listing(call)}\n\nUsual commands:\n{indented}\n\n{call.command} --help says more."


def help_text(call: Call) -> str:
    """`--help`: the commands, the experiments, the groups and their options, the keys of every run."""
    known = {name: options for name, options in config.groups(call).items() if name != "experiment"}
    width = max(map(len, known))
    options = "\n".join(f"  {name.ljust(width)}  {', '.join(found)}" for name, found in sorted(known.items()))
    root = [
        line for line in (config.CONF / "config.yaml").read_text(encoding="utf-8").splitlines() if "#" in line
    ]
    keys = "\n".join("  " + line for line in root[1:] if "???" not in line)
    return "\n\n".join(
        [
            welcome(call).rsplit("\n\n", 1)[0],
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
    hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")(lambda cfg: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
