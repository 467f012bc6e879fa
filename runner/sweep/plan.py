"""The plan of a sweep: every job composed, checked and built without weights, before the first one runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from runner.build.builder import Builder
from runner.build.job import build_job
from runner.build.trust import Trust
from runner.config.command import RUN_OPTIONS, Command, is_hydra, is_launcher, is_of_sweep, show, text
from runner.config.compose import Composed, Template
from runner.config.hydra_job import chosen_options, lasting_settings, subfolder
from runner.config.mistakes import override_error
from runner.config.options import groups, is_option
from runner.data import Split
from runner.engine.job import Job
from runner.engine.prepare import dry_build
from runner.engine.report import main_settings
from runner.errors import UserError, raise_first
from runner.sweep import grid
from runner.sweep.isolation import isolated
from runner.sweep.record import Record, digest, job_name

# keys on which neither data nor networks depend
_NOT_BUILT = ("seed", "optimizer", "schedule", "name", "description", "outputs")


@dataclass
class Plan:
    """How a sweep turns swept values into jobs; what is alike is composed and built once."""

    command: Command
    fixed: list[Override]  # that every job has
    templates: dict[tuple[str, ...], Template] = field(default_factory=dict)
    dry_builds: bool = True  # whether data are loaded and networks built before the first job runs
    _built: set[str] = field(default_factory=set, init=False)  # configs that were dry-built
    # of the last one, by its config
    _data: tuple[str, dict[str, Split]] = field(default=("", {}), init=False)

    def record(self, number: int, swept: dict[str, Override]) -> Record:
        """Compose, check and dry-build one job; nothing is written.

        Raises:
            UserError: its config does not fit; the correction is one of what was typed.
        """
        # the job, with any error as one of what was typed
        try:
            composed = self.compose(swept, number)
            job = build_job(composed, replace(self.command, multirun=False))
            if self.dry_builds:
                self._dry_build(job)
        except UserError as error:
            raise self._job_error(error, number, swept) from None
        except Exception as error:  # a bug of the task's or a value that its author did not think of
            raise self._job_error(UserError(f"{type(error).__name__}: {error}"), number, swept) from error

        # its record
        texts, hydra = grid.texts(swept), self._template(self._options(swept)).hydra
        same = job.config if composed.hydra is None else self.compose(swept).config  # whatever its number
        return Record(
            number=number,
            name=subfolder(hydra, job.config, composed.overrides, number) or job_name(number, texts),
            swept=texts,
            config=job.config,
            digest=digest(same, texts),
            objective=job.objective.name,
            direction=job.objective.direction,
            overrides=composed.overrides,
            changes=job.changes,
            choices=chosen_options(hydra),
        )

    def _job_error(self, error: UserError, number: int, swept: dict[str, Override]) -> UserError:
        """Return one job's error as a correction of what was typed, with the job where it names no swept value."""
        typed = grid.as_typed(error, self.command)
        lines = list(map(text, swept.values()))
        if typed.wrong is None and lines and not any(line in str(typed) for line in lines):
            return UserError(f"job {number} ({', '.join(lines)}): {typed}")
        return typed

    def compose(self, swept: dict[str, Override], number: int | None = None) -> Composed:
        """Compose the config of one combination; YAML is composed once for each combination of options."""
        options = self._options(swept)
        return self._template(options).fill((o for o in swept.values() if o not in options), number)

    def _options(self, swept: dict[str, Override]) -> list[Override]:
        return [o for o in swept.values() if is_option(o, self._available)]

    @cached_property
    def _available(self) -> dict[str, dict[str, Path]]:
        return groups(self.command)

    def compose_all(self, space: dict[str, Override]) -> None:
        """Compose every combination of the options of groups now: a file that is edited later changes no job."""
        swept = {key: o for key, o in space.items() if is_option(o, self._available)}
        for options in grid.combinations(swept):
            self.compose(options)

    def first_template(self) -> Template:
        """Return the first combination of options, in which the sweep's own settings stand."""
        return self._template(grid.first_options(self.command))

    def _template(self, options: list[Override]) -> Template:
        key = tuple(map(text, options))
        if key in self.templates:
            return self.templates[key]

        # of files that hold different sweeps only one would run
        template = grid.compose_options(self.command, self.fixed, options)
        first = next(iter(self.templates.values()), template)
        if template.fill([]).sweep["sweep"] != first.fill([]).sweep["sweep"]:
            raise UserError(
                f"{' '.join(key)}: its file holds another sweep than the options before it; "
                "run them one after the other, or choose with sweep=NAME."
            )
        if lasting_settings(template.hydra) != lasting_settings(first.hydra):
            raise UserError(f"{' '.join(key)}: its file has another `hydra:`; run them one after the other.")
        self.templates[key] = template
        return template

    def _dry_build(self, job: Job) -> None:
        """Build a job without its weights, to find what only data and network show; once for all that is alike."""
        config = {key: value for key, value in job.config.items() if key not in _NOT_BUILT}
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self._built:
            self._built.add(key)
            data = json.dumps(job.config.get("data"), sort_keys=True, default=str)
            loaded = self._data[1] if self._data[0] == data else None
            with isolated():
                self._data = (data, dry_build(job, loaded))

    def release_data(self) -> None:
        """Forget the data of the last dry build: jobs load their own."""
        self._data = ("", {})


def check_command(command: Command) -> None:
    """Raise a UserError where a command with -m asks for something of a single run, or gives a key twice."""
    # options of a single run
    for key, default in (("checkpoint", None), ("rerun", None), ("mode", "train")):
        if (value := command.options.get(key, default)) != default:
            raise UserError(f"{key}={value} is for a single run: remove -m.")

    # overrides
    swept = {o.key_or_group: text(o) for o in command.overrides if o.is_sweep_override()}
    for override in command.overrides:
        key, line, problem = override.key_or_group, text(override), None
        single = is_of_sweep(override) or key in RUN_OPTIONS or is_hydra(override)
        if override.is_sweep_override() and single:
            problem = f"{line}: {key} has one value for the whole sweep."
        elif swept.get(key, line) != line:
            problem = f"{key} is set twice: {swept[key]} and {line}."
        elif key.startswith("sweep.space"):
            problem = f"{line}: on the command line write KEY=VALUES; sweep.space is for YAML files."
        if problem is not None:
            raise UserError(problem, line, "")
        if not is_launcher(override):
            raise_first([override_error(override, command)])


def columns(records: Iterable[Record]) -> list[str]:
    """Return the settings that the HParams page gets from every job: those that any of them has."""
    return list(dict.fromkeys(key for record in records for key in main_settings(record.config)))


def sweep_settings(composed: Composed, command: Command) -> tuple[Any, Path | None, dict[str, str]]:
    """Return the search's settings (None: a grid), the sweep's folder (None: a new one), and its space."""
    build = Builder(composed, Trust(None, command.config_dir))
    node = dict(composed.sweep["sweep"])
    name = node.pop("dir", None)
    name = build.value("sweep.dir", str(name) if isinstance(name, int | float) else name, str | None)
    folder = None if name is None else Path(name)
    space = build.value("sweep.space", node.pop("space", {}), dict | None) or {}
    texts = {key: show(value) for key, value in space.items()}

    if "_target_" in node:
        return build.node("sweep", node), folder, texts
    for key in node:
        raise UserError(f"sweep.{key}: a grid takes dir and space alone; a search is sweep=optuna.")
    return None, folder, texts


def check_on_error(value: str) -> str:
    """Return `value` where it is continue, stop or retry:N, else raise a UserError."""
    if value in ("continue", "stop") or (value.startswith("retry:") and value[6:].isdigit()):
        return value
    right = "on_error=retry:1" if value.startswith("retry") else None
    raise UserError(f"on_error={value}: expected continue, stop or retry:N.", f"on_error={value}", right)
