"""What a sweep will do: every job composed, checked and built without its weights, before the first one runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from runner.build.builder import Builder, build_job
from runner.config.command import RUN_OPTIONS, Command, is_launcher, show, text
from runner.config.compose import Composed, Template
from runner.config.mistakes import check_plumbing
from runner.config.options import groups
from runner.data import Split
from runner.engine.job import Job
from runner.engine.prepare import dry_build
from runner.engine.report import main_settings
from runner.errors import UserError
from runner.sweep import grid
from runner.sweep.isolation import isolated
from runner.sweep.record import Record, digest, job_name


@dataclass
class Plan:
    """How a sweep turns swept values into jobs; templates and rehearsals are made once for what is alike."""

    command: Command
    fixed: list[Override]  # that every job has
    trust: str | None
    templates: dict[tuple[str, ...], Template] = field(default_factory=dict)
    dry_builds: bool = True  # whether data are loaded and networks built before the first job runs
    rehearsed: set[str] = field(default_factory=set)
    loaded: tuple[str, dict[str, Split]] = ("", {})  # the data of the last rehearsal, by its settings

    def record(self, number: int, swept: dict[str, Override]) -> Record:
        """One job, composed, checked and rehearsed; nothing is written.

        Raises:
            UserError: its config does not fit; the correction is one of what was typed.
        """
        try:
            composed = self.compose(swept)
            job = build_job(composed, replace(self.command, multirun=False), {"trust": self.trust})
            if self.dry_builds:
                self.dry_build(job)
        except UserError as error:
            raise self.of_job(error, number, swept) from None
        except Exception as error:  # a bug of the task's or a value that its author did not think of
            raise self.of_job(UserError(f"{type(error).__name__}: {error}"), number, swept) from error
        texts = grid.texts(swept)
        return Record(
            number,
            job_name(number, texts),
            texts,
            job.config,
            digest(job.config, texts),
            job.objective.name,
            job.objective.direction,
            composed.overrides,
            job.changes,
        )

    def of_job(self, error: UserError, number: int, swept: dict[str, Override]) -> UserError:
        """One job's error: as a correction of what was typed, and with the job where it names no swept value."""
        found = grid.as_typed(error, self.command)
        if found.wrong is None and swept and not any(line in str(found) for line in grid.lines(swept)):
            return UserError(f"job {number} ({', '.join(grid.lines(swept))}): {found}")
        return found

    def compose(self, swept: dict[str, Override]) -> Composed:
        """The config of one combination; YAML is composed once for each combination of options."""
        available = groups(self.command)
        template = self.template([o for o in swept.values() if o.key_or_group in available])
        return template.fill(o for o in swept.values() if o.key_or_group not in available)

    def first(self) -> Composed:
        """The first combination of options, in which the sweep's own settings stand."""
        return self.template(grid.first_options(self.command)).fill([])

    def template(self, options: list[Override]) -> Template:
        """The composition of some options of groups, made once."""
        key = tuple(map(text, options))
        if key not in self.templates:
            self.templates[key] = grid.compose_options(self.command, self.fixed, options)
            self.require_one_sweep(key)
        return self.templates[key]

    def require_one_sweep(self, options: tuple[str, ...]) -> None:
        """Refuse options whose files hold different sweeps: only one of them would be heard."""
        first, *_ = written = [template.fill([]).sweep["sweep"] for template in self.templates.values()]
        if any(node != first for node in written):
            raise UserError(
                f"{' '.join(options)}: its file holds another sweep than the options before it; "
                "run them one after the other, or say which with sweep=NAME."
            )

    def dry_build(self, job: Job) -> None:
        """Find what only shows when the data is there and the network is built; once for all that is alike."""
        free = ("seed", "optimizer", "schedule", "name", "description", "outputs")
        alike = json.dumps(
            {k: v for k, v in job.config.items() if k not in free}, sort_keys=True, default=str
        )
        if alike not in self.rehearsed:
            self.rehearsed.add(alike)
            data = json.dumps(job.config.get("data"), sort_keys=True, default=str)
            known = self.loaded[1] if self.loaded[0] == data else None
            with isolated():
                self.loaded = (data, dry_build(job, known))


def make_plan(command: Command) -> Plan:
    """The plan of a call.

    Raises:
        UserError: it asks for one run's things, or sweeps what cannot be.
    """
    door = command.options
    if door.get("checkpoint") is not None:
        raise UserError("checkpoint= looks at one run; write it without -m.")
    if door.get("mode", "train") != "train":
        raise UserError(f"mode={door['mode']} is for one run; write it without -m.")
    swept = {o.key_or_group: text(o) for o in command.overrides if o.is_sweep_override()}
    for override in command.overrides:
        key, line = override.key_or_group, text(override)
        of_sweep = grid.is_of_sweep(override) or key in RUN_OPTIONS or is_launcher(override)
        if override.is_sweep_override() and of_sweep:
            raise UserError(f"{line}: {key} has one value for the whole sweep.")
        if swept.get(key, line) != line:
            raise UserError(f"{key} is set twice: {swept[key]} and {line}.", line, "")
        if key.startswith("sweep.space"):
            raise UserError(
                f"{line}: what is swept is typed as KEY=VALUES; sweep.space is for YAML files.", line, ""
            )
        if not is_launcher(override):
            check_plumbing(override)
    return Plan(command, grid.without_sweep(command.overrides), door.get("trust"))


def option_pairs(made: Plan, space: dict[str, Override]) -> Iterator[dict[str, Override]]:
    """Every combination of the options of groups that a space draws from, none where it draws from none."""
    available = groups(made.command)
    drawn = {key: override for key, override in space.items() if key in available}
    return grid.combinations(drawn) if drawn else iter(())


def columns(records: Iterable[Record]) -> list[str]:
    """The settings that the HParams page gets from every job: those that any of them has."""
    found: dict[str, None] = {}
    for record in records:
        found |= dict.fromkeys(main_settings(record.config))
    return list(found)


def sweep_settings(composed: Composed, command: Command) -> tuple[Any, Path | None, dict[str, str]]:
    """The search's settings (None: a grid), the sweep's folder (None: a new one), and its space.

    Raises:
        UserError: a setting of the wrong type.
    """
    build = Builder(composed, command, None)
    node = dict(composed.sweep["sweep"])
    folder = node.pop("dir", None)
    folder = build.value("sweep.dir", str(folder) if isinstance(folder, int | float) else folder, str | None)
    space = build.value("sweep.space", node.pop("space", {}), dict | None) or {}
    flat = {key: show(value) for key, value in space.items()}
    if "_target_" in node:
        return build.node("sweep", node), None if folder is None else Path(folder), flat
    for key in node:
        raise UserError(f"sweep.{key}: a grid takes no {key}; it takes dir and space.")
    return None, None if folder is None else Path(folder), flat


def on_error(composed: Composed) -> tuple[str, int]:
    """What a failed job does to the sweep: (continue or stop, how often it is tried again).

    Raises:
        UserError: it is none of the three words.
    """
    value = str(composed.sweep.get("on_error", "continue"))
    word, _, times = value.partition(":")
    if word == "retry" and times.isdigit():
        return "continue", int(times)
    if value in ("continue", "stop"):
        return value, 0
    raise UserError(
        f"on_error={value}: it takes continue, stop, or retry:N.",
        f"on_error={value}",
        "on_error=retry:1" if word == "retry" else None,
    )
