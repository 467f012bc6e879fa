"""Run folders: make, reopen, find."""

from __future__ import annotations

import contextlib
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import files
from runner.config.options import read_yaml
from runner.errors import UserError, did_you_mean, nearest

if TYPE_CHECKING:
    from runner.engine.job import Job

CONFIG_FILE = ".hydra/config.yaml"
# where runs and sweeps lie below an experiment's or the outputs' folder
RUNS_BELOW = ("*", "*/*", "sweeps/*/*", "*/sweeps/*/*")
SWEEPS_BELOW = ("*", "sweeps/*", "*/sweeps/*")
FOLDERS_LISTED = 5  # that a message names


def stored_config(folder: Path) -> dict[str, Any]:
    """The config that a run folder holds.

    Raises:
        UserError: the folder is not a run of this runner.
    """
    file = folder / CONFIG_FILE
    if file.is_file():
        return read_yaml(file)
    line = f"resume={folder}"
    there, close = runs_near(folder)
    if not folder.exists():
        raise UserError(f"{line}: there is no such folder.{there}", line, close and f"resume={close}")
    if (folder / ".sweep").is_dir():
        raise UserError(f"{line} is a sweep's folder: add -m.", line, "-m")
    home = enclosing_run(folder)
    runs = sorted(path.parent.parent for path in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    meant = home or (runs[-1] if runs else None)
    raise UserError(
        f"{line} is not a run folder: it holds no {CONFIG_FILE}.{there if home is None else ''}",
        line,
        f"resume={meant}" if meant else None,
    )


def require_checkpoint(path: Path) -> None:
    """Refuse a path that is no file, and name those that there are.

    Raises:
        UserError: there is no such file.
    """
    if path.is_file():
        return
    home = enclosing_run(path)
    there, close = runs_near(path, "checkpoints/best.pt")
    if home is not None:
        found = {file.name: str(file) for file in sorted(home.glob("checkpoints/*.pt"))}
        close = found.get(nearest(path.name, found) or "", next(iter(found.values()), None))
        there = f"{did_you_mean(close)} There are: {', '.join(found.values())}." if found else ""
    line = f"checkpoint={path}"
    what = "this is a folder; a checkpoint is a file in it" if path.is_dir() else "there is no such file"
    raise UserError(f"{line}: {what}.{there}", line, close and f"checkpoint={close}")


def enclosing_run(path: Path) -> Path | None:
    """The run's folder that a path is or lies in, be it a path that does not exist."""
    return next((place for place in (path, *path.parents) if (place / CONFIG_FILE).is_file()), None)


def runs_near(path: Path, file: str = "") -> tuple[str, str | None]:
    """The runs near a path that is none, or that `file` of each, as `folders_near` has them."""
    return folders_near(path, "runs", CONFIG_FILE, RUNS_BELOW, file)


def folders_near(
    path: Path, what: str, holding: str, below: tuple[str, ...], file: str = ""
) -> tuple[str, str | None]:
    """The newest of the folders near a path that hold something, as the end of a message, and the nearest."""
    places = [nearest_folder(path, holding), *([] if path.exists() else [Path("outputs")])]
    found: list[Path] = []
    for place in places:
        if not found:
            marks = {mark for pattern in below for mark in place.glob(f"{pattern}/{holding}")}
            newest = sorted(marks, key=lambda mark: (mark.stat().st_mtime, mark), reverse=True)
            folders = [mark.parents[holding.count("/")] / file for mark in newest]
            found = [folder for folder in folders if folder.exists()]
    if not found:
        return f" There are no {what} in {places[0].resolve()}.", None
    close = None if path.exists() else nearest(str(path), map(str, found[:1000]))
    names = ", ".join(map(str, found[:FOLDERS_LISTED]))
    more = f" and {len(found) - FOLDERS_LISTED} more" if len(found) > FOLDERS_LISTED else ""
    return f"{did_you_mean(close)} There are: {names}{more}.", close


def nearest_folder(path: Path, holding: str) -> Path:
    """The folder that a path leads to as far as it leads, misspelt parts respelt, up to one that holds something."""
    place = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        known = part if (place / part).is_dir() else nearest(part, folders_in(place))
        if known is None or (place / known / holding).exists():
            return place
        place /= known
    return place


def folders_in(place: Path) -> list[str]:
    """The names of the folders in one, none where it may not be read."""
    try:
        return [entry.name for entry in place.iterdir() if entry.is_dir()]
    except OSError:
        return []


CHANGES_FILE = ".hydra/changes.txt"


def open_folder(job: Job) -> Path:
    """Make the run's folder, without a race, and put the job's files in it."""
    if job.resume is not None:
        return reopen_folder(job, job.resume)
    if job.folder is not None:
        folder = job.folder
        folder.mkdir(parents=True, exist_ok=False)
    elif job.checkpoint is not None:
        folder = make_run_folder(eval_folder(job.checkpoint, job.outputs / job.name))
    else:
        folder = make_run_folder(job.outputs / job.name)
    for name, text in (job.files | {CHANGES_FILE: "\n".join(job.changes)}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def reopen_folder(job: Job, folder: Path) -> Path:
    """Take up the folder of a run that was stopped; what this resume changes, such as loop.epochs, stays."""
    files.remove_unfinished(folder)
    (folder / "summary.json").unlink(missing_ok=True)  # it may say `done`, which is no longer so
    stored = folder / CHANGES_FILE
    changes = stored.read_text(encoding="utf-8").splitlines() if stored.exists() else []
    job.changes = list({change.partition("=")[0]: change for change in (*changes, *job.changes)}.values())
    for name, text in (job.files | {CHANGES_FILE: "\n".join(job.changes)}).items():
        path = folder / name
        if name in (CONFIG_FILE, CHANGES_FILE) or not path.exists():  # it may have failed before it had them
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_file(path, text.encode())
    return folder


def eval_folder(saved: Path, otherwise: Path) -> Path:
    """Where looks at a checkpoint go: `eval/` of its run, or of the experiment where it lies alone."""
    return (saved.parent.parent if saved.parent.name == "checkpoints" else otherwise) / "eval"


def make_run_folder(parent: Path) -> Path:
    """A new folder named by the time; two that ask in the same second get two.

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
        raise UserError(f"No folder can be made in {parent}: {error.strerror}.") from None
    raise AssertionError("count() does not end")
