"""A sweep on disk: `.sweep/`, written before its jobs run and read when it resumes."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from runner.config.command import Command, is_hydra, is_launcher, parse_override, quote, text
from runner.config.compose import Template, hydra_node
from runner.engine.folders import make_run_folder, newest_sweeps
from runner.errors import UserError, did_you_mean
from runner.files import read_json, replace_file
from runner.records.console import shown_path
from runner.sweep import grid, plan
from runner.sweep.launch import Launcher, make_launcher
from runner.sweep.plan import Plan
from runner.sweep.record import STATE_FOLDER, Record, next_number, read_records

# what a resume may change, beside the launcher
_RESUMABLE = ("dry_run", "on_error", "sweep.n_trials", "sweep.storage")


@dataclass
class Sweep:
    """One sweep: how its jobs are made, where they are, and how they run."""

    plan: Plan
    launcher: Launcher
    hydra: DictConfig  # Hydra's own node, as the caller has it
    on_error: str  # continue, stop or retry:N
    search: Any = None  # a SearchConfig, None for a grid
    space: dict[str, Override] = field(default_factory=dict)  # of a search: what each key is drawn from
    folder: Path | None = None
    records: list[Record] = field(default_factory=list)
    columns: tuple[str, ...] = ()  # of the HParams page
    study: str = ""  # a search's name in its database
    corner: Record | None = None  # of a search: a job of its space, before there is any other

    @property
    def home(self) -> Path:
        """Folder of the sweep, once it has one."""
        assert self.folder is not None
        return self.folder

    @property
    def first(self) -> Record:
        """Job of the sweep: its experiment, objective and outputs are those of all."""
        first = self.records[0] if self.records else self.corner
        assert first is not None
        return first

    @property
    def resume(self) -> str:
        """Command that resumes it."""
        return f"{self.plan.command.keeping('trust')} -m resume={quote(shown_path(self.home))}"


@dataclass
class SavedSweep:
    """`.sweep/sweep.json`: everything that a sweep needs to continue, whatever the YAML files say by now."""

    fixed: list[str]  # overrides that all jobs share
    on_error: str
    launcher: list[str]  # overrides that choose it
    search: dict[str, Any] | None  # arguments of SearchConfig, without a password; None: a grid
    space: dict[str, str]
    study: str
    columns: list[str]
    templates: list[dict[str, Any]]  # of a search: the compositions by their options

    @classmethod
    def read(cls, folder: Path) -> SavedSweep | None:
        """Read the file of a sweep's folder; None where the sweep was stopped before it was written."""
        content = read_json(_saved_file(folder))
        return None if content is None else cls(**content)

    @classmethod
    def of(cls, sweep: Sweep) -> SavedSweep:
        """Return what a sweep's folder must hold."""
        # the compositions of a search
        templates: list[dict[str, Any]] = []
        for options, template in sweep.plan.templates.items() if sweep.search is not None else ():
            parts = {
                name: part | {"sweep": _without_password(part["sweep"])}
                for name, part in template.to_dict().items()
            }
            templates.append({"options": options} | parts)

        return cls(
            fixed=list(map(text, sweep.plan.fixed)),
            on_error=sweep.on_error,
            launcher=sweep.launcher.overrides(),
            search=None if sweep.search is None else _without_password(asdict(sweep.search)),
            space=grid.texts(sweep.space),
            study=sweep.study,
            columns=list(sweep.columns),
            templates=templates,
        )

    def write(self, folder: Path) -> None:
        replace_file(_saved_file(folder), json.dumps(asdict(self), indent=1, ensure_ascii=False).encode())


def _saved_file(folder: Path) -> Path:
    return folder / STATE_FOLDER / "sweep.json"


def _without_password(settings: dict[str, Any]) -> dict[str, Any]:
    storage = settings.get("storage")
    if not isinstance(storage, str):
        return settings
    from runner.sweep.search.storage import hide_password

    return settings | {"storage": hide_password(storage)}


def require_sweep(folder: Path) -> None:
    """Raise a UserError where a folder is neither a sweep's nor empty."""
    if (folder / STATE_FOLDER).is_dir() or (folder.is_dir() and not any(folder.iterdir())):
        return
    sweep = next((parent for parent in folder.resolve().parents if (parent / STATE_FOLDER).is_dir()), None)
    hint = did_you_mean(shown_path(sweep)) if sweep else newest_sweeps(folder)
    problem = "is not a sweep's folder" if folder.exists() else "does not exist"
    raise UserError(f"{folder} {problem}.{hint}")


def resume_sweep(command: Command, folder: Path) -> Sweep:
    """Load a sweep from its folder, with the few settings that a resume may change."""
    require_sweep(folder)
    saved = SavedSweep.read(folder)
    if saved is None:
        raise UserError(f"{folder} was stopped before its first job; give the whole command again.")

    # what was typed: on_error, a launcher, and for a search its number of trials and database
    saved = replace(saved, **_changes(command, saved, folder))

    # jobs are rebuilt from the saved compositions, never from today's YAML
    fixed = list(map(parse_override, saved.fixed))
    chosen = {o.key_or_group: str(o.value()) for o in fixed}
    hydra = hydra_node(command, chosen.get("experiment"))
    templates = {}
    for row in saved.templates:
        overrides = [*fixed, *map(parse_override, row["options"])]
        template = Template.from_dict(row, replace(command, overrides=overrides), hydra)
        templates[tuple(row["options"])] = template

    sweep = Sweep(
        plan=Plan(command, fixed, templates),
        launcher=make_launcher(command, map(parse_override, saved.launcher)),
        on_error=saved.on_error,
        search=_load_search(saved.search),
        space=grid.parse_texts(saved.space),
        folder=folder,
        records=read_records(folder),
        columns=tuple(saved.columns),
        study=saved.study,
        hydra=hydra,
    )
    if sweep.search is not None and not sweep.records:  # stopped before its first trial
        from runner.sweep.space import corners, read_space

        sweep.corner = sweep.plan.record(0, grid.parse_texts(corners(read_space(sweep.space))[0]))
    return sweep


def _changes(command: Command, saved: SavedSweep, folder: Path) -> dict[str, Any]:
    """Return the fields that a resume's overrides change."""
    for override in command.overrides:
        if override.key_or_group not in (*_RESUMABLE, "resume", "trust") and not is_hydra(override):
            raise UserError(
                f"{text(override)}: a resume may change {', '.join(_RESUMABLE)} and the launcher. "
                f"To add jobs, give the whole command again with sweep.dir={folder}.",
                text(override),
                "",
            )

    typed = {override.key_or_group: override for override in command.overrides}
    changes: dict[str, Any] = {}
    if "on_error" in typed:
        changes["on_error"] = plan.check_on_error(str(typed["on_error"].value()))
    if any(map(is_launcher, command.overrides)):
        changes["launcher"] = []

    # of a search
    n_trials, storage = typed.get("sweep.n_trials"), typed.get("sweep.storage")
    if (first := n_trials or storage) is None:
        return changes
    if saved.search is None:
        raise UserError(f"{text(first)}: {folder} holds a grid, which has no such setting.", text(first), "")
    search = dict(saved.search)
    if n_trials is not None:
        if type(n_trials.value()) is not int:
            raise UserError(f"{text(n_trials)}: expected a whole number.")
        search["n_trials"] = n_trials.value()
    if storage is not None:
        from runner.sweep.search.storage import require_same_storage

        url, saved_url = str(storage.value()), search["storage"]
        search["storage"] = url
        _load_search(search)  # refuses what is no URL
        require_same_storage(url, saved_url, folder)
    return changes | {"search": search}


def _load_search(arguments: dict[str, Any] | None) -> Any:
    if arguments is None:
        return None
    from runner.sweep.search.settings import SearchConfig

    try:
        return SearchConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"sweep: {error}") from None


def save_sweep(sweep: Sweep) -> None:
    """Give the sweep its folder, and write everything that its jobs are made of."""
    # below its experiment; of several experiments, below what they share
    if sweep.folder is None:
        outputs = Path(sweep.first.config["outputs"])
        names = {record.experiment for record in sweep.records or [sweep.first]}
        sweep.folder = make_run_folder(outputs / (names.pop() if len(names) == 1 else "") / "sweeps")
    try:
        (sweep.folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"sweep.dir={sweep.folder}: no folder can be made there: {error.strerror}.") from None

    # one command at a time: each adds its jobs to those of the others
    with FileLock(sweep.folder / STATE_FOLDER / "freeze.lock"):
        saved = SavedSweep.read(sweep.folder)

        # new jobs are numbered after those that the folder has
        records = read_records(sweep.folder)
        first, digests = next_number(records), {record.digest for record in records}
        new = [record for record in sweep.records if record.digest not in digests]
        sweep.records = records
        for number, record in enumerate(new, first):
            if record.number != number:  # another command has added jobs since
                record = sweep.plan.record(number, grid.parse_texts(record.swept))
            record.save(sweep.folder)
            sweep.records.append(record)

        sweep.columns = sweep.columns or tuple(plan.columns(sweep.records))
        # two machines may start a sweep in the same second, and share a database
        name = f"{sweep.first.experiment}/{sweep.folder.name}-{secrets.token_hex(3)}"
        sweep.study = (saved.study if saved else sweep.study) or name
        SavedSweep.of(sweep).write(sweep.folder)
