"""Run folders: make, reopen, find; without torch, which takes seconds to import."""

from __future__ import annotations

import contextlib
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.options import read_yaml
from runner.errors import UserError, did_you_mean, nearest
from runner.files import remove_unfinished, replace_file

if TYPE_CHECKING:
    from runner.engine.job import Job

CONFIG_FILE = ".hydra/config.yaml"
_CHANGES_FILE = ".hydra/changes.txt"

# where runs and sweeps lie below an experiment's folder or that of the outputs
_RUNS_BELOW = ("*", "*/*", "sweeps/*/*", "*/sweeps/*/*")
SWEEPS_BELOW = ("*", "sweeps/*", "*/sweeps/*")
_FOLDERS_LISTED = 5  # in a message


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the config that a run folder holds.

    Raises:
        UserError: the folder is not a run of this runner.
    """
    file = folder / CONFIG_FILE
    if file.is_file():
        return read_yaml(file)

    override = f"resume={folder}"
    hint, close = runs_near(folder)
    if not folder.exists():
        raise UserError(f"{override}: no such folder.{hint}", override, close and f"resume={close}")
    if (folder / ".sweep").is_dir():
        raise UserError(f"{override} is a sweep: add -m", override, "-m")

    # a folder in a run, or one with runs in it
    run = enclosing_run(folder)
    inside = sorted(path.parent.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    close = str(run or inside[-1]) if run or inside else None
    raise UserError(
        f"{override} is not a run folder: no {CONFIG_FILE} in it.{'' if run else hint}",
        override,
        close and f"resume={close}",
    )


def require_checkpoint(path: Path) -> None:
    """Raise a UserError that names the checkpoints that there are, unless `path` is a file."""
    if path.is_file():
        return
    hint, close = runs_near(path, "checkpoints/best.pt")

    # in a run: its checkpoints alone
    run = enclosing_run(path)
    checkpoints = {file.name: str(file) for file in sorted(run.glob("checkpoints/*.pt"))} if run else {}
    if checkpoints:
        close = checkpoints[nearest(path.name, checkpoints) or next(iter(checkpoints))]
        hint = f"{did_you_mean(close)} Available: {', '.join(checkpoints.values())}."

    override = f"checkpoint={path}"
    problem = "expected a file, got a folder" if path.is_dir() else "no such file"
    raise UserError(f"{override}: {problem}.{hint}", override, close and f"checkpoint={close}")


def enclosing_run(path: Path) -> Path | None:
    """Return the run folder that a path, which need not exist, is or lies in."""
    return next((place for place in (path, *path.parents) if (place / CONFIG_FILE).is_file()), None)


def runs_near(path: Path, file: str = "") -> tuple[str, str | None]:
    """Do as `folders_near` for runs, or for `file` in each."""
    return folders_near(path, "runs", CONFIG_FILE, _RUNS_BELOW, file)


def folders_near(
    path: Path, kind: str, marker: str, below: tuple[str, ...], file: str = ""
) -> tuple[str, str | None]:
    """Describe the newest folders close to `path`, for an error message; also return the closest match.

    They hold `marker`, and lie below the nearest parent of `path` that exists, or below outputs/.
    """
    nearest_parent = next((place for place in (path, *path.parents) if place.is_dir()), Path())
    places = [nearest_parent] if path.exists() else [nearest_parent, Path("outputs")]
    for place in places:
        markers = {mark for pattern in below for mark in place.glob(f"{pattern}/{marker}")}
        newest = sorted(markers, key=lambda mark: (mark.stat().st_mtime, mark), reverse=True)
        paths = [mark.parents[marker.count("/")] / file for mark in newest]
        matches = [str(match) for match in paths if match.exists()]
        if matches:
            break
    else:
        return f" There are no {kind} in {nearest_parent.resolve()}.", None

    close = None if path.exists() else nearest(str(path), matches[:1000])
    more = f" and {len(matches) - _FOLDERS_LISTED} more" if len(matches) > _FOLDERS_LISTED else ""
    return f"{did_you_mean(close)} Available: {', '.join(matches[:_FOLDERS_LISTED])}{more}.", close


def open_folder(job: Job) -> Path:
    """Make the run's folder, or reopen that of the run to resume, and write the job's files to it."""
    if job.resume is not None:
        return _reopen(job, job.resume)
    if job.folder is not None:
        folder = job.folder
        folder.mkdir(parents=True, exist_ok=False)
    elif job.checkpoint is not None:
        folder = make_run_folder(_eval_folder(job.checkpoint, job.outputs / job.name))
    else:
        folder = make_run_folder(job.outputs / job.name)
    for name, text in _files(job).items():
        _write(folder / name, text)
    return folder


def _reopen(job: Job, folder: Path) -> Path:
    remove_unfinished(folder)
    (folder / "summary.json").unlink(missing_ok=True)  # it may say `done`, which is no longer so

    # what an earlier resume changed, such as loop.epochs, stays changed
    stored = folder / _CHANGES_FILE
    changes = stored.read_text(encoding="utf-8").splitlines() if stored.exists() else []
    job.changes = list({change.partition("=")[0]: change for change in (*changes, *job.changes)}.values())

    for name, text in _files(job).items():
        # the others stay as the run's start wrote them, unless it failed before
        if name in (CONFIG_FILE, _CHANGES_FILE) or not (folder / name).exists():
            _write(folder / name, text)
    return folder


def _files(job: Job) -> dict[str, str]:
    return job.files | {_CHANGES_FILE: "\n".join(job.changes)}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def _eval_folder(checkpoint: Path, otherwise: Path) -> Path:
    return (checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else otherwise) / "eval"


def make_run_folder(parent: Path) -> Path:
    """Make a new folder named by the time; two that ask in the same second get two.

    Raises:
        UserError: the folder cannot be made there.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(exist_ok=False)
                return folder
    except OSError as error:
        raise UserError(f"cannot make a folder in {parent}: {error.strerror}") from None
    raise AssertionError("count() does not end")
