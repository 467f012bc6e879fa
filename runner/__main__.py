"""The only door: read the command line, compose, check, run, and give an exit status.

0 done; 1 the run failed; 2 something was wrong with the call; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner import config
from runner.config import Call
from runner.errors import UserError, nearest

if TYPE_CHECKING:
    from runner.engine import Job, Result

HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help")
USAGE = """{program} experiment=NAME [key=value ...]      one run
{program} -m experiment=NAME key=a,b,c          a sweep: one run per combination
{program} mode=eval checkpoint=RUN_DIR/checkpoints/best.pt
{program} resume=RUN_DIR                        go on with a run, exactly
{program} experiment=NAME --cfg job             the composed config; runs nothing
tensorboard --logdir outputs                        look at all of it"""


class Parser(argparse.ArgumentParser):
    """argparse, with its mistakes told as ours are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Settings are written key=value, without dashes.")


def read_arguments(argv: list[str], program: str) -> tuple[Call, argparse.Namespace]:
    """The command line as a call."""
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-h", "--help", action="store_true")
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = ["--multirun", "--config-dir", "--help", *HYDRA_FLAGS]
        close = nearest(unknown[0].partition("=")[0], flags)
        hint = f" Did you mean {close}?" if close else ""
        bare = unknown[0].lstrip("-")
        raise UserError(
            f"{unknown[0]} is not an option of {program}.{hint} Settings have no dashes: {bare.partition('=')[0]}=VALUE."
        )
    if known.config_dir is not None and not known.config_dir.is_dir():
        raise UserError(f"--config-dir {known.config_dir}: there is no such folder.")
    return Call(known.overrides, known.config_dir, known.multirun, program), known


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = "runner" if Path(sys.argv[0]).name == "runner" else "python -m runner"
    call = Call([], program=program)
    try:
        if any(argument.partition("=")[0] in HYDRA_FLAGS for argument in argv):
            return hydra_main(argv, program)
        call, arguments = read_arguments(argv, program)
        if arguments.help:
            print(help_text(call))
            return 0
        if not call.overrides:
            print(welcome(call))
            return 2
        return run_call(call)
    except UserError as error:
        print(message(error, call), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted before anything was written.", file=sys.stderr)
        return 130


def run_call(call: Call) -> int:
    """One run, a resume, a look at a checkpoint, or a sweep."""
    if call.multirun:
        from runner.sweep import run_sweep

        return run_sweep(call)
    job = make_job(call)
    if job is None:
        return 0
    from runner.engine import execute

    return execute(job).exit_status


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
    return build(config.compose_call(call), call, door)


def build(composed: config.Composed, call: Call, door: dict[str, Any]) -> Job:
    """Import torch, at last, and build."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads give their core away
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
        print(f"{folder} is finished. To train longer: {call.command} resume={folder} loop.epochs=N")
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
    from runner import checkpoint

    path = Path(str(door["checkpoint"]))
    stored = checkpoint.load(path)["config"]
    stored |= {key: door[key] for key in ("mode", "outputs") if key in door}
    composed = config.on_top(stored | {"checkpoint": str(path)}, call, None)
    return build(composed, call, door)


def run_overrides(overrides: list[str], config_dir: Path | None) -> Result:
    """One run, for `runner.run`."""
    job = make_job(Call(overrides, config_dir))
    if job is None:
        raise UserError("This run is finished. Give a larger loop.epochs to go on.")
    from runner.engine import execute

    return execute(job)


def message(error: UserError, call: Call) -> str:
    """A mistake as the screen shows it, with the corrected command where there is one."""
    lines = [f"error: {error}"]
    if error.wrong is not None and error.right is not None:
        lines.append(f"  try: {call.corrected(error.wrong, error.right)}")
    return "\n".join(lines)


def listing(call: Call) -> str:
    """The experiments, one line each."""
    found = config.experiments(call)
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name.ljust(width)}  {description}" for name, description in found.items())


def welcome(call: Call) -> str:
    """What there is, and how to start."""
    usage = USAGE.format(program=call.command)
    indented = "\n".join("  " + line for line in usage.splitlines())
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
    """What Hydra answers itself: --cfg, --info, completion. Mistakes are told by us, before it is asked."""
    import hydra

    asks_config = any(argument.partition("=")[0] in ("--cfg", "-c", "--info", "-i") for argument in argv)
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    if asks_config:
        folder = next(
            (Path(argv[i + 1]) for i, a in enumerate(argv[:-1]) if a in ("--config-dir", "-cd")), None
        )
        call = Call(overrides, folder, program=program)
        try:
            config.compose_call(call)
        except UserError as error:
            print(message(error, call), file=sys.stderr)
            return 2
    sys.argv = [sys.argv[0], *argv]
    hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")(lambda cfg: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
