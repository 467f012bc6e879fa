"""Run folders: make, reopen, find; without torch, which takes seconds to import."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.options import read_yaml
from runner.errors import UserError, did_you_mean, nearest
from runner.files import remove_unfinished, replace_file

if TYPE_CHECKING:
    from runner.engine.job import Job

CONFIG_FILE = ".hydra/config.yaml"
OVERRIDES_FILE = ".hydra/overrides.yaml"
_CHANGES_FILE = ".hydra/changes.txt"
_FOLDERS_LISTED = 5  # in a message


def stored_config(folder: Path, key: str = "resume") -> dict[str, Any]:
    """Return the config that a run folder holds, which was typed as `key`.

    Raises:
        UserError: the folder is not a run of this runner.
    """
    file, line = folder / CONFIG_FILE, f"{key}={folder}"
    if file.is_file():
        return read_yaml(file)
    if not folder.exists():
        raise UserError(f"{line} does not exist.{newest_runs(folder)}")
    if (folder / ".sweep").is_dir() and key == "resume":
        raise UserError(f"{line} is a sweep's folder: add -m.", line, "-m")

    # the run that the path lies in, or the newest in it
    run = enclosing_run(folder)
    hint = newest_runs(folder) if run is None else ""
    runs = sorted(path.parent.parent for path in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    meant = run or next(reversed(runs), None)
    right = f"{key}={meant}" if meant else None
    raise UserError(f"{line} is not a run folder: it holds no {CONFIG_FILE}.{hint}", line, right)


def require_checkpoint(path: Path, key: str = "checkpoint") -> None:
    """Raise unless the path, which `key` names, is a file; name the checkpoints that exist.

    Raises:
        UserError: there is no such file.
    """
    if path.is_file():
        return

    # those of the run that the path lies in, or of the newest runs
    run, right = enclosing_run(path), None
    files = {file.name: str(file) for file in sorted(run.glob("checkpoints/*.pt"))} if run else {}
    hint = newest_runs(path, "checkpoints/best.pt")
    if files:
        close = files[nearest(path.name, files) or next(iter(files))]
        right = f"{key}={close}"
        hint = f"{did_you_mean(close)} Available: {', '.join(files.values())}."

    line = f"{key}={path}"
    reason = "expected a file, got a folder" if path.is_dir() else "no such file"
    raise UserError(f"{line}: {reason}.{hint}", line, right)


def enclosing_run(path: Path) -> Path | None:
    """Return the run folder that a path is or lies in, be it a path that does not exist."""
    return next((place for place in (path, *path.parents) if (place / CONFIG_FILE).is_file()), None)


def newest_runs(path: Path, file: str = "") -> str:
    """Name the newest runs below a path, or `file` of each, as the end of a message."""
    return _newest(path, "runs", CONFIG_FILE, ("*", "*/*", "sweeps/*/*", "*/sweeps/*/*"), file)


def newest_sweeps(path: Path) -> str:
    """Name the newest sweeps below a path, as the end of a message."""
    return _newest(path, "sweeps", ".sweep", ("*", "sweeps/*", "*/sweeps/*"))


def _newest(path: Path, kind: str, marker: str, below: tuple[str, ...], file: str = "") -> str:
    """Name the newest folders with a marker below the first parent that exists, or below `outputs`."""
    parents = [place for place in (path, *path.parents) if place.is_dir() and place != Path(place.anchor)]
    for place in [*parents[:1], *([] if path.is_dir() else [Path("outputs")])]:
        markers = {path for pattern in below for path in place.glob(f"{pattern}/{marker}")}
        newest = sorted(markers, key=lambda path: (path.stat().st_mtime, path), reverse=True)
        named = [path.parents[marker.count("/")] / file for path in newest]
        names = [str(path) for path in named if path.exists()]
        if names:
            return f" The newest {kind}: {', '.join(names[:_FOLDERS_LISTED])}."
    return f" There are no {kind} in {(path if path.is_dir() else Path('outputs')).resolve()}."


def open_folder(job: Job) -> Path:
    """Make the run's folder, or reopen that of the run to resume, and write the job's files to it."""
    if job.resume is not None:
        folder = job.resume
        remove_unfinished(folder)
        (folder / "summary.json").unlink(missing_ok=True)  # it may say `done`, which is no longer so
    elif job.folder is not None:
        folder = job.folder
        folder.mkdir(parents=True, exist_ok=False)
    else:
        parent = job.outputs / job.name
        if job.checkpoint is not None:  # in its run's folder
            place = job.checkpoint.parent
            parent = (place.parent if place.name == "checkpoints" else parent) / "eval"
        folder = make_run_folder(parent)

    # what an earlier start changed, such as loop.epochs, stays changed
    stored = (job.resume or job.rerun or folder) / _CHANGES_FILE
    changes = stored.read_text(encoding="utf-8").splitlines() if stored.exists() else []
    job.changes = list({change.partition("=")[0]: change for change in (*changes, *job.changes)}.values())

    # its files
    for name, text in (job.files | {_CHANGES_FILE: "\n".join(job.changes)}).items():
        # a resume leaves the others as the run's start wrote them, unless it failed before
        if name in (CONFIG_FILE, _CHANGES_FILE) or not (folder / name).exists():
            replace_file(folder / name, text.encode())
    return folder


def make_run_folder(parent: Path) -> Path:
    """Make a new folder named by the time; two that ask in the same second get two.

    Raises:
        UserError: the folder cannot be made there.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder, number = parent / stamp, 1
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(exist_ok=False)
                return folder
            number += 1
            folder = parent / f"{stamp}_{number}"
    except OSError as error:
        raise UserError(f"cannot make a folder in {parent}: {error.strerror}") from None
