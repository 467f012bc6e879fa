"""A sweep from its command to its leaderboard: plan, preview, save, launch, rank; new or resumed."""

from __future__ import annotations

import gc
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from runner.build.job import build_callbacks
from runner.config.command import Command, is_of_sweep, masked, text
from runner.config.hydra_job import HydraJob
from runner.engine import signals
from runner.errors import UserError
from runner.records.console import shown_path
from runner.sweep import display, grid, leaderboard, plan
from runner.sweep.figures.draw import draw
from runner.sweep.launch import LaunchItem, OnJobEnd, common_launcher, launch
from runner.sweep.record import (
    ENDED,
    Record,
    job_name,
    next_number,
    read_records,
    require_own_folders,
    saved_file,
)
from runner.sweep.store import SavedSweep, Sweep, require_sweep, resume_sweep, save_sweep
from runner.sweep.work import Work, record_failure

if TYPE_CHECKING:
    from runner.sweep.search.study import Search

_LEADERBOARD_EVERY = 5.0  # seconds, while jobs run


def run_sweep(command: Command) -> int:
    """Run a command with -m; return exit status 1 where a job failed, 130 when interrupted.

    Raises:
        UserError: a job's config does not fit; nothing has run and nothing was written.
    """
    sweep = _make_sweep(command)
    dry_run = _is_dry_run(command)

    # preview
    if sweep.search is None:
        print(f"{len(sweep.records)} jobs\n{display.preview(sweep.records)}", flush=True)
    else:
        print(display.space_preview(grid.texts(sweep.space), sweep.search.n_trials), flush=True)
    if dry_run:
        return 0

    save_sweep(sweep)
    print(f"\nSweep in {shown_path(sweep.home)}", flush=True)
    hydra = HydraJob.of(sweep.hydra, sweep.first.config, sweep.first.overrides, sweep=sweep.home.absolute())
    hydra.callbacks.callbacks = build_callbacks(hydra.callback_nodes(), command)
    with hydra.around():
        return _run(sweep, hydra.callbacks.callbacks)


def check_sweep(command: Command) -> None:
    """Check a command with -m without loading data, building networks or writing anything."""
    _make_sweep(command, dry_builds=False)
    _is_dry_run(command)


def _is_dry_run(command: Command) -> bool:
    typed = [override for override in command.overrides if override.key_or_group == "dry_run"]
    if typed and not isinstance(typed[-1].value(), bool):
        raise UserError(f"{text(typed[-1])}: dry_run takes true or false.")
    return bool(typed and typed[-1].value())


def _make_sweep(command: Command, dry_builds: bool = True) -> Sweep:
    """Return the sweep that a command describes, or that its resume= names."""
    plan.check_command(command)
    folder = command.options.get("resume")
    return _new_sweep(command, dry_builds) if folder is None else resume_sweep(command, Path(folder))


def _new_sweep(command: Command, dry_builds: bool) -> Sweep:
    """Return a new sweep, or one that `sweep.dir` names, with the jobs that the command adds."""
    planned = plan.Plan(command, grid.without_sweep(command.overrides), dry_builds=dry_builds)
    template = planned.first_template()
    composed = template.fill([])
    search, folder, space = plan.sweep_settings(composed, command)
    swept = grid.swept_overrides(command, space)
    on_error = plan.check_on_error(str(composed.sweep.get("on_error", "continue")))
    sweep = Sweep(planned, common_launcher(command, swept), template.hydra, on_error, search, folder=folder)

    # what the folder holds already
    if folder is not None and folder.exists():
        require_sweep(folder)
        saved = SavedSweep.read(folder)
        if saved is not None and (saved.search is None) != (search is None):
            kind = "grid" if saved.search is None else "search"
            raise UserError(f"{folder} holds a {kind}; give another sweep.dir.")
        sweep.records = read_records(folder)

    if search is None:
        _add_jobs(sweep, swept)
    else:
        sweep.space = swept
        _plan_search(sweep)
    return sweep


def _add_jobs(sweep: Sweep, swept: dict[str, Override]) -> None:
    """Add the jobs of a grid; those that the sweep has keep their numbers."""
    jobs = {record.digest: record for record in sweep.records}
    number = next_number(sweep.records)
    for combination in grid.combinations(swept):
        record = sweep.plan.record(number, combination)
        number += jobs.setdefault(record.digest, record) is record
    sweep.records = list(jobs.values())
    require_own_folders(sweep.records)


def _plan_search(sweep: Sweep) -> None:
    """Check the space and its corners: every job that a search may draw lies between them."""
    from runner.sweep.search.samplers import pruner_factory, sampler_factory
    from runner.sweep.space import corners, read_space

    if not sweep.space:
        raise UserError("A search needs a space: add KEY=interval(a,b), KEY=choice(a,b) or the like.")
    space = read_space(sweep.space)
    records = [sweep.plan.record(n, grid.parse_texts(texts)) for n, texts in enumerate(corners(space))]

    # the search's own settings
    sweep.search.directions(*records[0].ranked_by)
    sampler_factory(sweep.search, space)
    pruner_factory(sweep.search.pruner, sweep.search.pruner_options)

    sweep.plan.compose_all(sweep.space)

    objectives = {f"{record.objective} ({record.direction})" for record in records}
    if len(objectives) > 1:
        names = ", ".join(sorted(objectives))
        raise UserError(
            f"The trials of a search need one objective, got {names}: set objective and direction."
        )
    sweep.columns = tuple(plan.columns(records))
    sweep.corner = records[0]


def _run(sweep: Sweep, callbacks: list[Any]) -> int:
    """Run the jobs that have not ended; leave a leaderboard however this ends."""
    work = replace(_make_work(sweep), callbacks=callbacks)
    work.stop_file.unlink(missing_ok=True)

    # screen
    total = len(sweep.records) if sweep.search is None else sweep.search.n_trials
    ended = sum(record.status in ENDED for record in sweep.records)
    if ended:
        print(display.skipped(sweep.records, total), flush=True)
    screen = display.Display(sweep.home, total, ended)

    # SIGINT and SIGTERM end the sweep: running jobs save and end
    def handle_signal(number: int, frame: Any) -> None:
        work.interrupt()
        raise KeyboardInterrupt

    # jobs
    interrupted = False
    try:
        sweep.plan.release_data()
        gc.collect()
        gc.freeze()  # what exists now: the search for cycles after each job then takes no time
        with signals.handled_by(handle_signal):
            if sweep.search is None:
                left: list[LaunchItem] = [(job, None) for job in sweep.records if job.status not in ENDED]
                launch(work, left, sweep.launcher, _job_callback(sweep, screen))
            else:
                _run_search(sweep, work, screen)
    except KeyboardInterrupt:
        interrupted = True
        work.interrupt()
    finally:
        gc.unfreeze()
        screen.close()
        own = {record.number for record in sweep.records}
        _add_jobs_of_others(sweep, work)
        leaderboard.write_leaderboard(sweep.records, sweep.home)

    interrupted = interrupted or work.interrupt_file.exists()  # a library may have caught the exception
    _finish(sweep, trials_left=interrupted and sweep.search is not None)
    if interrupted:
        return 130
    return int(any(record.status not in ENDED for record in sweep.records if record.number in own))


def _make_work(sweep: Sweep) -> Work:
    action, _, retries = sweep.on_error.partition(":")
    # without the URL of a database: a launcher may write it to a disk
    overrides = [override for override in sweep.plan.command.overrides if not is_of_sweep(override)]
    return Work(
        sweep=sweep.home.resolve(),
        command=replace(sweep.plan.command, overrides=overrides),
        retries=int(retries or 0),
        stop_on_error=action == "stop",
        columns=sweep.columns,
        invocation=secrets.token_hex(3),
        hydra=sweep.hydra,
    )


def _add_jobs_of_others(sweep: Sweep, work: Work) -> None:
    """Add the jobs that other commands on this folder have added meanwhile, and may still be running."""
    records = {record.number: record for record in [*sweep.records, *read_records(sweep.home)]}
    sweep.records = [records[number] for number in sorted(records)]
    for record in sweep.records:
        if record.status == "interrupted" and work.is_held(record):
            record.status = "running"


def _job_callback(sweep: Sweep, screen: display.Display) -> OnJobEnd:
    """Return what is called when a job has ended: it prints a line, and now and then writes the leaderboard."""
    written = 0.0

    def on_job_end(record: Record) -> None:
        nonlocal written
        screen.job_ended(record)
        if time.monotonic() - written > _LEADERBOARD_EVERY:
            leaderboard.write_leaderboard(sweep.records, sweep.home)
            written = time.monotonic()

    return on_job_end


def _run_search(sweep: Sweep, work: Work, screen: display.Display) -> None:
    """Resume unfinished trials, then ask for new ones until there are enough."""
    from runner.sweep.search.study import Search
    from runner.sweep.space import read_space

    space = read_space(sweep.space)
    search = Search(sweep.search, space, sweep.home, sweep.first.ranked_by, sweep.study)
    on_job_end = _job_callback(sweep, screen)
    screen.resize(search.total)  # a grid may have fewer points than n_trials
    try:
        # unfinished trials
        records = {record.number: record for record in sweep.records}
        not_ended = [number for number, record in records.items() if record.status not in ENDED]
        unfinished = sorted({*search.unfinished(), *not_ended})
        for number in unfinished:
            texts = search.resume_trial(number)
            if number not in records:
                records[number] = _new_trial(sweep, number, texts)
        _run_trials(sweep, work, search, [records[number] for number in unfinished], on_job_end)

        # new ones, as many as run at the same time
        while search.count() < search.total and not work.stop_file.exists():
            count = min(sweep.launcher.slots, search.total - search.count())
            trials = [_new_trial(sweep, *search.ask()) for _ in range(count)]
            _run_trials(sweep, work, search, trials, on_job_end)

        if len(search.objectives) > 1:  # the leaderboard ranks by one of them
            print(f"Pareto-optimal jobs: {', '.join(map(str, search.best()))}")
    finally:
        _draw_study(search, sweep.home)
        search.close()


def _draw_study(search: Search, folder: Path) -> None:
    from runner.sweep.figures import optuna as study_plots

    try:
        study_plots.draw(search, folder)
    except Exception as error:  # a plot must not cost the leaderboard
        print(f"The study could not be drawn: {type(error).__name__}: {masked(str(error))}")


def _new_trial(sweep: Sweep, number: int, texts: dict[str, str]) -> Record:
    """Return the job of a trial, saved before it runs; one whose values do not go together has failed already."""
    try:
        record = sweep.plan.record(number, grid.parse_texts(texts))
        require_own_folders([*sweep.records, record])
        record.save(sweep.home)
    except UserError as error:
        record = replace(sweep.first, number=number, name=job_name(number, texts), swept=texts)
        record_failure(record, sweep.home, str(error))
    sweep.records.append(record)
    sweep.records.sort(key=lambda r: r.number)
    return record


def _run_trials(
    sweep: Sweep, work: Work, search: Search, records: list[Record], on_job_end: OnJobEnd
) -> None:
    """Run trials side by side, as many as the launcher has room for, and tell the study their outcomes."""
    slots = sweep.launcher.slots
    for start in range(0, len(records), slots):
        batch = records[start : start + slots]

        # those that failed when they were planned
        tasks: list[LaunchItem] = []
        for record in batch:
            if saved_file(sweep.home, record.number).exists():
                tasks.append((record, search.reporter(record.number)))
            else:
                on_job_end(record)

        try:
            launch(work, tasks, sweep.launcher, on_job_end)
        finally:
            for record in batch:
                record.refresh(sweep.home)
                search.tell(record.number, record)


def _finish(sweep: Sweep, trials_left: bool) -> None:
    """Draw the figures, and print the leaderboard and what to do next."""
    try:
        draw(sweep.records, sweep.home)
    except Exception as error:  # a figure must not cost the leaderboard
        print(f"The sweep's figures could not be drawn: {type(error).__name__}: {error}")
    print(f"\n{leaderboard.leaderboard_text(sweep.records)}\n")
    print(display.summary(sweep.records, sweep.home, sweep.resume, trials_left), flush=True)
