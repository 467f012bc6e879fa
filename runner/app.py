"""What a command asks for: a run, a resume, an evaluation, a sweep, a comparison."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.command import Command, run_options
from runner.config.compose import RESUMABLE, Composed, compose_command, of_the_task, on_top, to_yaml
from runner.config.mistakes import check_words
from runner.config.options import read_yaml
from runner.engine.folders import require_checkpoint, stored_config
from runner.errors import UserError

if TYPE_CHECKING:
    from runner.engine.job import Job, Result


def say(text: str) -> None:
    """Print, also where whoever reads has seen enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def config_text(command: Command) -> str:
    """`--cfg job`: the composed config, every reference in it resolved; nothing runs."""
    if command.multirun:
        raise UserError("--cfg job shows the config of one run: write it without -m, one value per key.")
    check_words(command)
    return to_yaml(compose_command(command).config).rstrip()


def run_command(command: Command) -> int:
    """One run, a resume, a look at a checkpoint, or a sweep."""
    check_words(command)
    if command.multirun:
        from runner.sweep.run import run_sweep

        return run_sweep(command)
    door = run_options(command)
    if door.get("mode") == "compare":
        say(compared(door))
        return 0
    job = make_job(command)
    if job is None:
        return 0
    from runner.engine.session import execute

    return execute(job).exit_status


def compared(door: dict[str, Any]) -> str:
    """What two runs or more differ in."""
    from runner.compare import compare

    runs = [str(run) for run in door.get("runs") or []]
    if len(runs) < 2:
        raise UserError("mode=compare needs two runs or more: runs=[RUN_A,RUN_B].")
    return compare([Path(run) for run in runs])


def make_job(command: Command) -> Job | None:
    """The job that a call asks for; None where a finished run is asked to go on as it is."""
    door = run_options(command)
    given = [key for key in ("resume", "checkpoint") if door.get(key) is not None]
    if len(given) == 2:
        raise UserError("resume= goes on with a run, checkpoint= looks at one: give one of them.")
    if "resume" in given:
        return resume_job(command, door)
    if "checkpoint" in given:
        return checkpoint_job(command, door)
    composed = compose_command(command)
    if composed.sweep["sweep"].get("space"):
        print("This experiment's file holds a sweep; this is one run without it. With -m the sweep runs.")
    return build(composed, command, door)


def build(composed: Composed, command: Command, door: dict[str, Any]) -> Job:
    """Import torch, at last, and build."""
    from runner.build.builder import build_job

    return build_job(composed, command, door)


def resume_job(command: Command, door: dict[str, Any]) -> Job | None:
    """The job that goes on in a run's folder."""
    folder = Path(str(door["resume"]))
    stored = stored_config(folder)
    if door.get("mode", "train") != "train":
        raise UserError(
            f"resume={folder} trains on; for mode={door['mode']} give checkpoint={folder}/checkpoints/best.pt."
        )
    composed = on_top(stored, command, RESUMABLE)
    if finished(folder) and not any(o.startswith("loop.") for o in composed.overrides):
        key = "epochs" if stored["loop"].get("steps") is None else "steps"
        print(f"{folder} is finished. To train longer: {command.prefix} resume={folder} loop.{key}=N")
        return None
    job = build(composed, command, door)
    job.resume = folder
    job.outputs = folder.parent.parent
    return job


def finished(folder: Path) -> bool:
    """Whether the run's summary says that it is done."""
    summary = folder / "summary.json"
    return summary.is_file() and read_yaml(summary).get("status") == "done"


def checkpoint_job(command: Command, door: dict[str, Any]) -> Job:
    """The job that looks at a checkpoint: everything else comes from the config that it holds."""
    if door.get("mode", "train") == "train":
        raise UserError(
            f"checkpoint={door['checkpoint']} is for looking at a trained network: add mode=eval. "
            "To train on, give resume=RUN_DIR."
        )
    path = Path(str(door["checkpoint"]))
    require_checkpoint(path)
    from runner.engine import checkpoint

    stored = checkpoint.load(path)["config"]
    stored |= {key: door[key] for key in ("mode", "outputs") if key in door}
    if door["mode"] != "eval":
        command.overrides[:] = of_the_task(command.overrides, stored)
    composed = on_top(stored | {"checkpoint": str(path)}, command, None)
    return build(composed, command, door)


def run_overrides(overrides: list[str], config_dir: Path | None) -> Result:
    """One run, for `runner.run`."""
    command = Command(overrides, config_dir, program=f"{shlex.quote(sys.executable)} -m runner")
    check_words(command)
    job = make_job(command)
    if job is None:
        raise UserError("This run is finished. Give a larger loop.epochs, or loop.steps, to go on.")
    from runner.engine.session import execute

    return execute(job)
