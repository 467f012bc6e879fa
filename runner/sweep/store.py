"""A sweep on disk: `.sweep/`, written before its jobs run and read when it resumes."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.types import Override

from runner.config.command import is_launcher, parse_override, show, text
from runner.config.compose import Composed, Template
from runner.engine.folders import make_run_folder, newest_sweeps
from runner.errors import UserError
from runner.files import read_json, replace_file
from runner.records.console import shown_path
from runner.sweep import display, grid, plan
from runner.sweep.launch import Launcher, make_launcher
from runner.sweep.plan import Plan
from runner.sweep.record import STATE_FOLDER, Record, job_name, read_records

RESUMABLE = (
    "resume",
    "dry_run",
    "on_error",
    "sweep.n_trials",
    "sweep.storage",
)  # what taking up a sweep may be given


@dataclass
class Sweep:
    """One sweep: how its jobs are made, where they are, and how they run."""

    plan: Plan
    launcher: Launcher
    on_error: tuple[str, int]
    search: Any = None  # search.Settings, None for a grid
    space: dict[str, Override] = field(default_factory=dict)  # of a search: what each key is drawn from
    folder: Path | None = None
    records: list[Record] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    study: str = ""  # a search's name in its database
    corner: Record | None = None  # of a search: a job of its space, before there is any other
    shown: display.Display | None = None
    board_written: float = 0.0

    @property
    def home(self) -> Path:
        """The sweep's folder, once it has one."""
        assert self.folder is not None
        return self.folder

    @property
    def first(self) -> Record:
        """A job of the sweep: its experiment, objective and outputs are those of all."""
        first = self.records[0] if self.records else self.corner
        assert first is not None
        return first

    @property
    def resume(self) -> str:
        """The command that goes on with it."""
        command = self.plan.command
        return display.resume_command(
            f"{command.flags()}{f' trust={self.plan.trust}' * bool(self.plan.trust)}", self.home
        )


def require_sweep(folder: Path) -> None:
    """Refuse a folder that is no sweep's."""
    if (folder / STATE_FOLDER).is_dir() or (folder.is_dir() and not any(folder.iterdir())):
        return
    home = next((p for p in folder.resolve().parents if (p / STATE_FOLDER).is_dir()), None)
    hint = f" Did you mean {shown_path(home)}?" if home else newest_sweeps(folder)
    what = "is not a sweep's folder" if folder.exists() else "does not exist"
    raise UserError(f"{folder} {what}.{hint}")


def resume_sweep(made: Plan, folder: Path) -> Sweep:
    """A sweep from its folder alone: every config as it was frozen.

    Raises:
        UserError: the folder is no sweep's; an override that would change its jobs.
    """
    for override in made.command.overrides:
        key = override.key_or_group
        if key not in (*RESUMABLE, "trust") and not is_launcher(override):
            raise UserError(
                f"{text(override)}: resume= takes a sweep up as it was frozen; it takes "
                f"{', '.join(RESUMABLE[1:])} and a launcher. To add jobs, give the whole command again with "
                f"sweep.dir={folder}.",
                text(override),
                "",
            )
    if not folder.exists() or not (folder / STATE_FOLDER).is_dir():
        require_sweep(folder)
    stored = read_json(folder / STATE_FOLDER / "sweep.json")
    if stored is None:
        raise UserError(f"{folder} was stopped before its first job; give the whole command again.")
    return load_sweep(made, folder, stored)


def load_sweep(made: Plan, folder: Path, stored: dict[str, Any]) -> Sweep:
    """The sweep that `sweep.json` describes, with what the call changes."""
    typed = {o.key_or_group: o for o in made.command.overrides}
    made.fixed = list(map(parse_override, stored["fixed"]))
    for row in stored["templates"]:
        command = replace(made.command, overrides=[*made.fixed, *map(parse_override, row["options"])])
        made.templates[tuple(row["options"])] = Template.thaw(row, command)
    launcher_lines = [] if any(is_launcher(o) for o in typed.values()) else stored["launcher"]
    launcher_command = replace(
        made.command, overrides=[*made.command.overrides, *map(parse_override, launcher_lines)]
    )
    on_error = typed["on_error"].value() if "on_error" in typed else stored["on_error"]
    settings = None
    of_search = [key for key in ("sweep.n_trials", "sweep.storage") if key in typed]
    if stored["search"] is None and of_search:
        key = of_search[0]
        name = key.removeprefix("sweep.")
        raise UserError(f"{folder} holds a grid, which has no {name}.", text(typed[key]), "")
    if stored["search"] is not None:
        from runner.sweep.search.settings import SearchConfig
        from runner.sweep.search.storage import require_same_storage

        if "sweep.n_trials" in typed:
            stored["search"]["n_trials"] = whole_number(typed["sweep.n_trials"])
        if "sweep.storage" in typed:
            url = str(typed["sweep.storage"].value())
            require_same_storage(url, stored["search"]["storage"], folder)
            stored["search"]["storage"] = url
        try:
            settings = SearchConfig(**stored["search"])
        except (TypeError, ValueError) as error:
            raise UserError(f"sweep: {error}") from None
    composed = Composed({}, [], sweep={"on_error": on_error})
    return Sweep(
        made,
        make_launcher(launcher_command),
        plan.on_error(composed),
        settings,
        grid.parse_texts(stored["space"]),
        folder,
        read_records(folder),
        tuple(stored["columns"]),
        stored["study"],
    )


def whole_number(override: Any) -> int:
    """The value of an override that counts something."""
    value = override.value()
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{text(override)}: a whole number is wanted.")
    return value


def freeze(sweep: Sweep) -> None:
    """Give the sweep its folder, and write everything that its jobs are made of."""
    if sweep.folder is None:
        names = {record.experiment for record in sweep.records} or {sweep.first.experiment}
        outputs = Path(sweep.first.config["outputs"])
        sweep.folder = make_run_folder(
            outputs / names.pop() / "sweeps" if len(names) == 1 else outputs / "sweeps"
        )
    folder = sweep.home
    try:
        (folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"sweep.dir={folder}: no folder can be made there: {error.strerror}.") from None
    with FileLock(folder / STATE_FOLDER / "freeze.lock"):
        take_numbers(sweep)
        sweep.columns = sweep.columns or tuple(plan.columns(sweep.records))
        write_sweep(sweep)


def take_numbers(sweep: Sweep) -> None:
    """Freeze the jobs that the folder has not yet, after the numbers that another call may have taken meanwhile."""
    stored = read_json(sweep.home / STATE_FOLDER / "sweep.json")
    sweep.study = stored["study"] if stored else sweep.study
    there = read_records(sweep.home)
    known = {record.digest for record in there}
    number = 1 + max((record.number for record in there), default=-1)
    fresh = [record for record in sweep.records if record.digest not in known]
    for record in fresh:
        record.number, record.name = number, job_name(number, record.swept)
        record.save(sweep.home)
        number += 1
    sweep.records = there + fresh


def write_sweep(sweep: Sweep) -> None:
    """`sweep.json`: what the folder alone must tell to go on."""
    # two machines may start a sweep in the same second, and share a database
    sweep.study = sweep.study or f"{sweep.first.experiment}/{sweep.home.name}-{secrets.token_hex(3)}"
    word, retries = sweep.on_error
    templates = sweep.plan.templates if sweep.search is not None else {}
    stored = {
        "fixed": list(map(text, sweep.plan.fixed)),
        "on_error": f"retry:{retries}" if retries else word,
        "launcher": launcher_lines(sweep.launcher),
        "search": None if sweep.search is None else without_password(vars(sweep.search)),
        "space": grid.texts(sweep.space),
        "study": sweep.study,
        "columns": sweep.columns,
        "templates": [frozen_template(options, template) for options, template in templates.items()],
    }
    replace_file(
        sweep.home / STATE_FOLDER / "sweep.json", json.dumps(stored, indent=1, ensure_ascii=False).encode()
    )


def frozen_template(options: tuple[str, ...], template: Template) -> dict[str, Any]:
    """A composition as `sweep.json` keeps it, by the options that it was made for."""
    kept = template.freeze()
    for part in kept.values():
        part["sweep"] = without_password(part["sweep"])
    return {"options": options} | kept


def without_password(settings: dict[str, Any]) -> dict[str, Any]:
    """The sweep's settings as a file keeps them."""
    storage = settings.get("storage")
    if not isinstance(storage, str):
        return settings
    from runner.sweep.search.storage import hide_password

    return settings | {"storage": hide_password(storage)}


def launcher_lines(launcher: Launcher) -> list[str]:
    """The overrides that choose the launcher as it is."""
    if launcher.name == "basic":
        return []
    settings = [f"hydra.launcher.{key}={show(value)}" for key, value in launcher.settings().items()]
    return [f"hydra/launcher={launcher.name}", *settings]
