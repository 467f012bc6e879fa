"""What a command does: run, resume, evaluate, sweep, compare; torch is imported when something is built."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import compose
from runner.config.command import Command, quote
from runner.config.mistakes import word_error
from runner.config.options import leaves
from runner.engine.folders import OVERRIDES_FILE, enclosing_run, require_checkpoint, stored_config
from runner.errors import UserError, raise_first
from runner.files import read_json

if TYPE_CHECKING:
    from runner.engine.job import Job, Result


def run_command(command: Command) -> int:
    """Run what the command says and return the exit status."""
    # several runs
    if command.multirun:
        from runner.sweep.run import run_sweep

        return run_sweep(command)
    if command.options.get("mode") == "compare":
        from runner.compare import compare

        say(compare([Path(str(run)) for run in command.options.get("runs") or []]))
        return 0

    # one run
    job = make_job(command)
    if job is None:
        return 0
    from runner.engine.session import execute

    return execute(job).exit_status


def run_overrides(overrides: list[str], config_dir: Path | None) -> Result:
    """Run one experiment for `runner.run`."""
    program = f"{shlex.quote(sys.executable)} -m runner"
    raise_first([word_error(overrides, Command([], config_dir))])
    job = make_job(Command.parse(overrides, config_dir, program=program))
    if job is None:
        raise UserError("this run is finished; to continue, set a larger loop.epochs or loop.steps.")
    from runner.engine.session import execute

    return execute(job)


def make_job(command: Command) -> Job | None:
    """Compose and build the job of a single run; None where a finished run is resumed as it is."""
    options = command.options
    if sum(options.get(key) is not None for key in ("resume", "checkpoint", "rerun")) > 1:
        raise UserError("expected one of resume= (train on), checkpoint= (evaluate) and rerun (train anew).")
    if options.get("rerun") is not None:
        return _rerun_job(command)
    if options.get("resume") is not None:
        return _resume_job(command)
    if options.get("checkpoint") is not None:
        return _checkpoint_job(command)

    composed = compose.compose_command(command)
    if composed.sweep["sweep"].get("space"):
        print("This experiment defines a sweep; add -m to run it (running a single job now).")
    return _build(composed, command)


def shown(command: Command, show: Callable[[Command], str]) -> str:
    """Return what `show` says of a command; of a sweep's first options, with a line that says so."""
    if not command.multirun:
        return show(command)
    from runner.sweep import grid

    one = grid.of_one(command, grid.without_sweep(command.overrides), grid.first_options(command))
    try:
        text = show(one)
    except UserError as error:
        raise grid.as_typed(error, command) from None
    swept = " ".join(line for line in command.typed if line not in one.typed)
    return f"# the first options, before the values that are swept: {swept}\n{text}" if swept else text


def is_accepted(command: Command, shows: bool = False) -> bool:
    """Return whether a command composes, and builds where torch is imported already; nothing is written."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if shows:
                from runner.config.show import config_text

                shown(command, config_text)
            elif "torch" not in sys.modules:
                _check_without_torch(command)
            elif command.multirun:
                from runner.sweep.run import check_sweep

                check_sweep(command)
            elif command.options.get("mode") != "compare":
                make_job(command)
    except Exception:  # also a bug in a constructor of the user's
        return False
    return True


def say(message: str) -> None:
    """Print, also where the reader has closed the pipe (`| head`)."""
    try:
        print(message, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit


def _check_without_torch(command: Command) -> None:
    """Compose a command, and compare the values' types with those of the defaults."""
    options = command.options
    resume, checkpoint, rerun = map(options.get, ("resume", "checkpoint", "rerun"))
    if checkpoint is not None:
        require_checkpoint(Path(checkpoint))
    elif rerun is not None:
        compose.on_top(_rerun_config(command), command, None)
    elif resume is not None and not command.multirun:
        compose.on_top(stored_config(Path(resume)), command, compose.RESUMABLE)
    elif resume is None and options.get("mode") != "compare":
        composed = _compose_sweep(command) if command.multirun else compose.compose_command(command)
        defaults = dict(leaves(composed.base))
        for key, value in leaves(composed.config):
            if isinstance(value, str) and isinstance(defaults.get(key), int | float):
                raise UserError(f"{key}: expected a number or true or false, got {value!r}.")


def _compose_sweep(command: Command) -> compose.Composed:
    """Compose the first combination of a sweep's options, and its launcher."""
    from runner.sweep import grid

    fixed = grid.without_sweep(command.overrides)
    composed = grid.compose_options(command, fixed, grid.first_options(command)).fill([])
    compose.launcher_config(command)
    sweep = composed.sweep["sweep"]
    if "_target_" in sweep and not (sweep.get("space") or command.swept):
        raise UserError("a search needs a space.")
    return composed


def _build(composed: compose.Composed, command: Command) -> Job:
    from runner.build.job import build_callbacks, build_job  # imports torch

    if composed.hydra is not None:
        composed.hydra.callbacks.callbacks = build_callbacks(composed.hydra.callback_nodes(), command)
    return build_job(composed, command)


def _require_training(key: str, folder: Path, mode: str | None, checkpoint: str | None = None) -> None:
    """Raise UserError where a folder is to be trained on, or anew, in a mode that does not train."""
    if mode not in (None, "train"):
        best = checkpoint or folder / "checkpoints" / "best.pt"
        raise UserError(f"{key}={folder} trains; for mode={mode} use checkpoint={best}.")


def _resume_job(command: Command) -> Job | None:
    """Return the job that continues in a run folder; None where the run is finished."""
    folder = Path(command.options["resume"])
    stored = stored_config(folder)
    _require_training("resume", folder, command.options.get("mode"))

    # a finished run has nothing to continue, unless the loop is changed
    composed = compose.on_top(stored, command, compose.RESUMABLE, folder)
    is_finished = (read_json(folder / "summary.json") or {}).get("status") == "done"
    if is_finished and not any(line.startswith("loop.") for line in composed.overrides):
        key = "epochs" if stored["loop"].get("steps") is None else "steps"
        print(f"{folder} is finished. To train longer: {command.prefix} resume={folder} loop.{key}=N")
        return None

    job = _build(composed, command)
    job.resume = folder
    job.outputs = folder.parent.parent
    return job


def _rerun_job(command: Command) -> Job:
    """Return the job that runs a run folder's config again, in a new folder, with the caller's code."""
    folder = Path(command.options["rerun"])
    job = _build(compose.on_top(_rerun_config(command), command, None, folder), command)
    job.rerun = folder

    # what was typed then, and now
    file = folder / OVERRIDES_FILE
    lists = [file.read_text(encoding="utf-8") if file.is_file() else "", job.files[OVERRIDES_FILE]]
    job.files[OVERRIDES_FILE] = "".join(text for text in lists if text.strip() != "[]") or lists[1]
    return job


def _rerun_config(command: Command) -> dict[str, Any]:
    """Return the stored config to run again.

    Raises:
        UserError: the folder is not that of a training run, or needs code that the caller has not named.
    """
    folder, options = Path(command.options["rerun"]), command.options
    stored = stored_config(folder, "rerun")
    _require_training("rerun", folder, options.get("mode"))
    _require_training("rerun", folder, stored.get("mode"), stored.get("checkpoint"))

    from runner.records.provenance import kept_code

    # a folder's code runs only where the caller names it; to try the proposal would run it
    code = kept_code(folder)
    if command.config_dir is None and options.get("trust") is None and code and any(code.rglob("*.py")):
        words = [line for line in command.typed if not line.startswith("rerun=")]
        typed = " ".join(map(quote, ["--config-dir", f"{code}", "rerun", f"{folder}", *words]))
        needs = f"rerun={folder} needs modules of your own: give their folder as --config-dir."
        raise UserError(f"{needs} As they were then: {command.program} {typed}")
    return stored | ({"outputs": options["outputs"]} if "outputs" in options else {})


def _checkpoint_job(command: Command) -> Job:
    """Return the job that evaluates a checkpoint, with the config that the checkpoint holds."""
    options = command.options
    path, mode = Path(options["checkpoint"]), options.get("mode") or "train"
    if mode == "train":
        raise UserError(f"checkpoint={path} needs mode=eval; to continue training: resume=RUN_DIR.")
    require_checkpoint(path)
    from runner.engine import checkpoint

    stored = checkpoint.load(path)["config"]
    stored |= {key: options[key] for key in ("mode", "outputs") if key in options}
    if mode != "eval":
        command = compose.of_the_task(command, stored)
    stored |= {"checkpoint": str(path)}
    return _build(compose.on_top(stored, command, None, enclosing_run(path)), command)
