"""A sweep from its call to its leaderboard: plan, preview, freeze, launch, rank; new or taken up again."""

from __future__ import annotations

import gc
import itertools
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from runner.config.command import Command, is_of_sweep, masked, text
from runner.config.options import GLOBAL_GROUPS
from runner.engine import signals
from runner.errors import UserError
from runner.files import read_json
from runner.records.console import shown_path
from runner.sweep import display, grid, leaderboard, plan
from runner.sweep.figures.draw import draw
from runner.sweep.launch import Launcher, OnJobEnd, launch, make_launcher
from runner.sweep.plan import Plan
from runner.sweep.record import ENDED, STATE_FOLDER, Record, job_name, read_records, saved_file
from runner.sweep.store import Sweep, freeze, launcher_lines, require_sweep, resume_sweep
from runner.sweep.work import PruneCallback, Work, record_failure

BOARD_EVERY = 5.0  # seconds between leaderboards while jobs run


def run_sweep(command: Command) -> int:
    """Run what a call with -m asks for; exit status 1 where a job failed, 130 when interrupted.

    Raises:
        UserError: a job's config does not fit; nothing has run and nothing was written.
    """
    made = plan.make_plan(command)
    sweep = make_sweep(made)
    dry = wants_dry_run(command)
    if sweep.search is None:
        print(f"{len(sweep.records)} jobs\n{display.preview(sweep.records)}", flush=True)
    else:
        print(display.space_preview(grid.texts(sweep.space), sweep.search.n_trials), flush=True)
    if dry:
        return 0
    freeze(sweep)
    print(f"\nSweep in {shown_path(sweep.home)}", flush=True)
    return run(sweep)


def check_sweep(command: Command) -> None:
    """Check a command with -m without loading data, building networks or writing anything.

    Raises:
        UserError: a job's config does not fit.
    """
    planned = plan.make_plan(command)
    planned.dry_builds = False
    make_sweep(planned)
    wants_dry_run(command)


def make_sweep(made: Plan) -> Sweep:
    """The sweep that the command line describes, or that a folder holds."""
    folder = made.command.options.get("resume")
    return new_sweep(made) if folder is None else resume_sweep(made, Path(folder))


def wants_dry_run(command: Command) -> bool:
    """Whether `dry_run=true` was typed."""
    typed = [o for o in command.overrides if o.key_or_group == "dry_run"]
    if typed and not isinstance(typed[-1].value(), bool):
        raise UserError(f"{text(typed[-1])}: dry_run takes true or false.")
    return bool(typed and typed[-1].value())


def new_sweep(made: Plan) -> Sweep:
    """The sweep that the command line describes: a new one, or one that `sweep.dir` names, with what it adds."""
    composed = made.first()
    settings, folder, written = plan.sweep_settings(composed, made.command)
    swept = grid.swept_overrides(made.command, written)
    launcher = one_launcher(made.command, swept)
    sweep = Sweep(made, launcher, plan.on_error(composed), settings, folder=folder)
    if folder is not None and folder.exists():
        require_sweep(folder)
        stored = read_json(folder / STATE_FOLDER / "sweep.json")
        if stored is not None and (stored["search"] is None) != (settings is None):
            kind = "grid" if stored["search"] is None else "search"
            raise UserError(f"{folder} holds a {kind}; give another sweep.dir.")
        sweep.study = stored["study"] if stored else ""
        sweep.records = read_records(folder)
    if settings is None:
        add_jobs(sweep, grid.combinations(swept))
    else:
        sweep.space = swept
        plan_search(sweep)
    return sweep


def one_launcher(command: Command, swept: dict[str, Any]) -> Launcher:
    """The launcher that was typed or stands in the files; where experiments are swept, all choose the same.

    Raises:
        UserError: there is no such launcher; the files choose different ones.
    """
    files = [grid.values(o) for key, o in swept.items() if key in GLOBAL_GROUPS]
    found = []
    for options in itertools.product(*files):
        found.append(make_launcher(replace(command, overrides=[*command.overrides, *options])))
    if any(launcher_lines(launcher) != launcher_lines(found[0]) for launcher in found):
        raise UserError(
            "These experiments' files choose different launchers: say which with hydra/launcher=NAME."
        )
    return found[0]


def add_jobs(sweep: Sweep, combinations: Iterator[dict[str, Override]]) -> None:
    """The jobs of a grid: those that the sweep has keep their numbers, known by their digests."""
    known = {record.digest for record in sweep.records}
    number = 1 + max((record.number for record in sweep.records), default=-1)
    for swept in combinations:
        record = sweep.plan.record(number, swept)
        if record.digest not in known:
            known.add(record.digest)
            sweep.records.append(record)
            number += 1


def plan_search(sweep: Sweep) -> None:
    """Check the space and its corners: every job that a search may draw lies between them."""
    from runner.sweep.search.samplers import pruner_factory, sampler_factory
    from runner.sweep.space import corners, read_space

    if not sweep.space:
        raise UserError("A search needs a space: add KEY=interval(a,b), KEY=choice(a,b) or the like.")
    space = read_space(sweep.space)
    found = [
        sweep.plan.record(number, grid.parse_texts(texts)) for number, texts in enumerate(corners(space))
    ]
    sweep.search.directions(found[0].objective, found[0].direction)
    sampler_factory(sweep.search, space)
    pruner_factory(sweep.search.pruner, sweep.search.pruner_options)
    for options in plan.option_pairs(sweep.plan, sweep.space):
        sweep.plan.compose(options)  # now, so that a file that is edited later changes no trial
    objectives = {record.ranked_by for record in found}
    if len(objectives) > 1:
        names = ", ".join(f"{name} ({direction})" for name, direction in sorted(objectives, key=str))
        raise UserError(
            f"The trials of a search have one objective, not {names}: set objective= and direction=."
        )
    sweep.columns = tuple(plan.columns(found))
    sweep.corner = found[0]


def run(sweep: Sweep) -> int:
    """Run what has not ended; leave a leaderboard however it ends."""
    word, retries = sweep.on_error
    ours = [o for o in sweep.plan.command.overrides if not is_of_sweep(o)]
    # without the URL of a database: a launcher may write it to a disk
    command = replace(sweep.plan.command, overrides=ours)
    work = Work(
        sweep.home.resolve(),
        command,
        sweep.plan.trust,
        retries,
        stop_on_error=word == "stop",
        columns=sweep.columns,
        invocation=secrets.token_hex(3),
    )
    work.stop_file.unlink(missing_ok=True)
    total = len(sweep.records) if sweep.search is None else sweep.search.n_trials
    ended = sum(record.status in ENDED for record in sweep.records)
    if ended:
        print(display.skipped(sweep.records, total), flush=True)
    sweep.shown = display.Display(sweep.home, total, ended)
    sweep.plan.loaded = ("", {})  # jobs load their own
    gc.collect()
    gc.freeze()  # what is there now stays: looking for cycles after each job then takes no time

    def interrupt(number: int, frame: Any) -> None:
        work.interrupt()
        raise KeyboardInterrupt

    interrupted = False
    try:
        with signals.handled_by(interrupt):
            run_search(sweep, work) if sweep.search is not None else run_grid(sweep, work)
    except KeyboardInterrupt:
        interrupted = True
        work.interrupt()
    finally:
        gc.unfreeze()
        sweep.shown.close()
        own = {record.number for record in sweep.records}
        # also those that another call on this folder has added meanwhile
        found = {record.number: record for record in [*sweep.records, *read_records(sweep.home)]}
        sweep.records = [found[number] for number in sorted(found)]
    for record in sweep.records:
        if record.status == "interrupted" and work.is_held(record):
            record.status = "running"  # in another call
    finish(sweep)
    if interrupted or work.interrupt_file.exists():  # a library may have caught the exception
        return 130
    return int(any(record.status not in ENDED for record in sweep.records if record.number in own))


def run_grid(sweep: Sweep, work: Work) -> None:
    """Every job that has not ended."""
    launch(work, [(r, None) for r in sweep.records if r.status not in ENDED], sweep.launcher, teller(sweep))


def teller(sweep: Sweep) -> OnJobEnd:
    """What hears of a job that has ended: the screen, and now and then the leaderboard."""

    def told(record: Record) -> None:
        assert sweep.shown is not None
        sweep.shown.job_ended(record)
        if time.monotonic() - sweep.board_written > BOARD_EVERY:
            leaderboard.write_leaderboard(sweep.records, sweep.home)
            sweep.board_written = time.monotonic()

    return told


def run_search(sweep: Sweep, work: Work) -> None:
    """Take up what is unfinished, then ask for trials until there are enough."""
    from runner.sweep.search.study import Search
    from runner.sweep.space import read_space

    first = sweep.first
    space = read_space(sweep.space)
    search = Search(sweep.search, space, sweep.home, first.objective, first.direction, sweep.study)
    told = teller(sweep)
    assert sweep.shown is not None
    sweep.shown.resize(search.total)  # a grid may have fewer points than there are to be trials
    try:
        known = {record.number: record for record in sweep.records}
        again = sorted({*search.unfinished(), *(n for n, r in known.items() if r.status not in ENDED)})
        for number in again:
            texts = search.resume_trial(number)
            if number not in known:
                known[number] = new_trial(sweep, number, texts)
        run_trials(sweep, work, search, [known[number] for number in again], told)
        while search.count() < search.total and not work.stop_file.exists():
            wanted = min(sweep.launcher.slots, search.total - search.count())
            asked = [new_trial(sweep, *search.ask()) for _ in range(wanted)]
            run_trials(sweep, work, search, asked, told)
        if (
            sweep.search.objectives and len(sweep.search.objectives) > 1
        ):  # the leaderboard ranks by one of them
            print(f"No other job beats these in every objective: {', '.join(map(str, search.best()))}")
    finally:
        draw_study(search, sweep.home)
        search.close()


def draw_study(search: Any, folder: Path) -> None:
    """Optuna's own plots; one that fails costs nothing else."""
    from runner.sweep.figures import optuna as study_plots

    try:
        study_plots.draw(search, folder)
    except Exception as error:
        print(f"The study could not be drawn: {type(error).__name__}: {masked(str(error))}")


def new_trial(sweep: Sweep, number: int, texts: dict[str, str]) -> Record:
    """The job of a trial, frozen before it runs; one whose values do not go together has failed already."""
    try:
        record = sweep.plan.record(number, grid.parse_texts(texts))
        record.save(sweep.home)
    except UserError as error:
        record = replace(sweep.first, number=number, name=job_name(number, texts), swept=texts)
        record_failure(record, record.folder(sweep.home), str(error), str(error))
        record.refresh(sweep.home)
    sweep.records.append(record)
    sweep.records.sort(key=lambda r: r.number)
    return record


def run_trials(sweep: Sweep, work: Work, search: Any, records: list[Record], told: OnJobEnd) -> None:
    """Run trials side by side, as many as the launcher has room for, and tell the study what they came to."""
    slots = max(1, sweep.launcher.slots)
    for start in range(0, len(records), slots):
        part = records[start : start + slots]
        refused = [r for r in part if not saved_file(sweep.home, r.number).exists()]
        for record in refused:
            told(record)
        jobs: list[tuple[Record, PruneCallback | None]] = [
            (r, search.reporter(r.number)) for r in part if r not in refused
        ]
        try:
            launch(work, jobs, sweep.launcher, told)
        finally:
            for record in part:
                record.refresh(sweep.home)
                search.tell(record.number, record)


def finish(sweep: Sweep) -> None:
    """Leaderboard, pictures, and what to do next."""
    leaderboard.write_leaderboard(sweep.records, sweep.home)
    try:
        draw(sweep.records, sweep.home)
    except Exception as error:  # a picture must not cost the leaderboard
        print(f"The sweep's pictures could not be drawn: {type(error).__name__}: {error}")
    print(f"\n{leaderboard.leaderboard_text(sweep.records)}\n")
    print(display.summary(sweep.records, sweep.home, sweep.resume), flush=True)
