"""Where the jobs of a sweep run: in this process one after the other, or under one of Hydra's launchers."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from runner.config.command import Command, show
from runner.config.compose import launcher_config
from runner.config.options import GLOBAL_GROUPS
from runner.device import num_cores
from runner.engine import signals
from runner.engine.state import PruneCallback
from runner.errors import UserError
from runner.sweep import grid
from runner.sweep.record import ENDED, Record, read_record
from runner.sweep.work import POLL, StopRequest, Work, record_failure

_HAS_ENDED = (*ENDED, "failed")
_MAX_DEATHS = 3  # starts of a job that ended without an error message, after which it counts as failed

OnJobEnd = Callable[[Record], None]
LaunchItem = tuple[Record, PruneCallback | None]


@dataclass
class Launcher:
    """The launcher of `hydra/launcher`: its name, and Hydra's config with its settings."""

    name: str = "basic"
    hydra: DictConfig = field(default_factory=lambda: OmegaConf.create({}))

    @property
    def slots(self) -> int:
        """Number of jobs that run at the same time, as far as the launcher's settings say."""
        if self.name == "basic":
            return 1
        node = self.hydra.hydra.launcher
        slots = int(node.get("n_jobs") or node.get("array_parallelism") or 1)
        return num_cores() if slots < 0 else slots

    def overrides(self) -> list[str]:
        """Return the overrides that choose the launcher as it is, without classes: a folder cannot name those."""
        if self.name == "basic":
            return []
        node = OmegaConf.to_container(self.hydra.hydra.launcher, resolve=True)
        assert isinstance(node, dict)
        simple = {str(key): value for key, value in node.items() if isinstance(value, int | float | str)}
        settings = [f"hydra.launcher.{k}={show(v)}" for k, v in simple.items() if k != "_target_"]
        return [f"hydra/launcher={self.name}", *settings]


def make_launcher(command: Command, more: Iterable[Override]) -> Launcher:
    """Return the launcher that is typed, in an experiment's file, or in `more` overrides."""
    command = replace(command, overrides=[*command.overrides, *more])
    chosen = [o for o in command.overrides if o.key_or_group == "hydra/launcher"]
    if chosen and chosen[-1].value() == "basic":  # which takes none of the settings that a file may have
        return Launcher()
    config = launcher_config(command)
    return Launcher(str(config.hydra.runtime.choices.get("hydra/launcher", "basic")), config)


def common_launcher(command: Command, swept: dict[str, Override]) -> Launcher:
    """Return the launcher of a new sweep; where experiments are swept, their files must choose the same."""
    options = [grid.values(override) for key, override in swept.items() if key in GLOBAL_GROUPS]
    first, *others = [make_launcher(command, combination) for combination in itertools.product(*options)]
    if any(launcher.overrides() != first.overrides() for launcher in others):
        raise UserError(
            "These experiments' files choose different launchers: choose one with hydra/launcher=NAME."
        )
    return first


def launch(work: Work, tasks: Sequence[LaunchItem], launcher: Launcher, on_job_end: OnJobEnd) -> None:
    """Run the jobs, and call `on_job_end` for each as it ends.

    Raises:
        KeyboardInterrupt: the user interrupts; jobs are saved as far as they got.
        UserError: the launcher cannot be used.
    """
    # in this process; last the jobs that another command runs meanwhile
    if launcher.name == "basic":
        held = [task for task in tasks if not _run_here(work, *task, on_job_end, wait=False)]
        for task in held:
            _run_here(work, *task, on_job_end, wait=True)
        return

    before = {record.number: work.starts(record) for record, _ in tasks}
    pending = tasks
    while pending and not work.stop_file.exists():
        # some launchers end all processes when one dies: whose it was shows when a job is alone
        deaths = {record.number: work.starts(record) - before[record.number] for record, _ in pending}
        together = [task for task in pending if deaths[task[0].number] < _MAX_DEATHS - 1]
        alone = [[task] for task in pending if task not in together]
        for group in filter(None, (together, *alone)):
            _launch_group(work, group, launcher, on_job_end)
        pending = [task for task in pending if not _has_ended(work, task[0], before, on_job_end)]
    if any(record.status == "interrupted" and _written_at(record, work.sweep) for record, _ in pending):
        raise KeyboardInterrupt  # a signal reached a worker alone


def _run_here(
    work: Work, record: Record, should_prune: PruneCallback | None, on_job_end: OnJobEnd, wait: bool
) -> bool:
    """Run a job in this process; return False where another process runs it and `wait` is False."""
    if work.stop_file.exists():
        return True
    if not work(record, should_prune, wait):
        return False
    on_job_end(record)
    if record.status == "interrupted" or work.interrupt_file.exists():
        raise KeyboardInterrupt
    return True


def _launch_group(work: Work, tasks: Sequence[LaunchItem], launcher: Launcher, on_job_end: OnJobEnd) -> None:
    """Run jobs side by side in other processes."""
    if work.stop_file.exists():
        return
    starts = sum(work.starts(record) for record, _ in tasks)
    with _watch_jobs(work, [record for record, _ in tasks], on_job_end), _graceful_stop(work):
        problem = _launch_with_hydra(work, tasks, launcher)
    if problem and sum(work.starts(record) for record, _ in tasks) == starts:
        raise UserError(f"hydra/launcher={launcher.name} has started no job: {problem}")


@contextlib.contextmanager
def _graceful_stop(work: Work) -> Iterator[None]:
    """On the first signal let the workers' jobs save, then raise `KeyboardInterrupt`; on the second raise it at once.

    A launcher that is interrupted kills its workers.
    """
    received = False

    def handle_signal(number: int, frame: Any) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True
        work.interrupt()
        # the signal may come while something is printed, or nobody may read any more
        with contextlib.suppress(RuntimeError, OSError):
            print("\nStopping: the running jobs end their step and save. Again to stop at once.", flush=True)

    with signals.handled_by(handle_signal):
        yield
    if received:
        raise KeyboardInterrupt


def _has_ended(work: Work, record: Record, before: dict[int, int], on_job_end: OnJobEnd) -> bool:
    """Return whether a job that came back needs no further start: one whose process died does, a few times.

    `before` is how often each was started by earlier commands.
    """
    reported = record.status in _HAS_ENDED
    record.refresh(work.sweep)  # it may have ended in a process that an earlier command left behind
    if record.status not in _HAS_ENDED:
        if work.starts(record) - before[record.number] < _MAX_DEATHS:
            return False
        error = f"the worker process died {_MAX_DEATHS} times without an error message (out of memory?)"
        record_failure(record, work.sweep, error)
    if not reported:
        on_job_end(record)
    return True


@contextlib.contextmanager
def _watch_jobs(work: Work, records: list[Record], on_job_end: OnJobEnd) -> Iterator[None]:
    """Call `on_job_end` for jobs that end in other processes while this one waits for all of them."""
    # jobs whose summary is written anew
    waiting = list(records)
    before = {record.number: _written_at(record, work.sweep) for record in records}

    def check() -> None:
        for record in list(waiting):
            if _written_at(record, work.sweep) == before[record.number]:
                continue
            record.refresh(work.sweep)
            if record.status in _HAS_ENDED:
                waiting.remove(record)
                on_job_end(record)

    # in a thread, and once more at the end
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL):
            check()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        check()


def _written_at(record: Record, sweep: Path) -> int | None:
    """Return when the job's summary was written, in nanoseconds; None where it has none."""
    try:
        return (record.folder(sweep) / "summary.json").stat().st_mtime_ns
    except OSError:
        return None


class _SavedLoader:
    """Hydra's loader, as far as launchers use it: give a worker the number of a saved job, whatever the YAML says."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the launcher's own node with the job's number."""
        node = copy.deepcopy(master_config)
        with open_dict(node):
            node.job = int(sweep_overrides[0])
        return node


@dataclass(frozen=True)
class _Worker:
    """What a launcher calls in each of its processes."""

    work: Work
    callbacks: dict[int, PruneCallback]  # by number of the job
    threads: int
    path: tuple[str, ...]  # sys.path of the sweep
    parent: int = field(default_factory=os.getpid)  # process ID of the sweep

    def __call__(self, config: DictConfig) -> None:
        """Run the job whose number the config holds."""
        # joblib with n_jobs=1: the job handles signals as without a launcher
        here = os.getpid() == self.parent
        stop = None if here else StopRequest(self.work.interrupt_file)
        delivery = signals.delivered() if stop is None else signals.delivered_to(stop.handle_signal)

        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # processes × threads never exceed the cores
        # without the bars of many jobs
        with delivery, Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            record = read_record(self.work.sweep, config.job)
            self.work(record, self.callbacks.get(record.number), stop=stop)


def _launch_with_hydra(work: Work, tasks: Sequence[LaunchItem], launcher: Launcher) -> str:
    """Hand the jobs to Hydra's launcher and wait; return its complaint, such as a process that died."""
    from hydra._internal.callbacks import Callbacks

    config = copy.deepcopy(launcher.hydra)
    with open_dict(config):
        config.hydra.sweep.dir, config.hydra.sweep.subdir = str(work.sweep), "."
        # what each job does itself, in its folder
        config.hydra.job.chdir, config.hydra.verbose, config.hydra.callbacks = False, False, {}
        # a file's may hold the password of a database, and launchers write configs to disks
        config.sweep = None

    threads = max(1, num_cores() // min(launcher.slots, len(tasks)))
    callbacks = {record.number: callback for record, callback in tasks if callback is not None}
    worker = _Worker(replace(work, callbacks=None), callbacks, threads, tuple(sys.path))
    context = HydraContext(config_loader=_SavedLoader(), callbacks=Callbacks())  # type: ignore[arg-type]
    try:
        hydra_launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=worker, config=config
        )
    except Exception as error:
        raise UserError(f"hydra/launcher={launcher.name}: {' '.join(str(error).split())}") from None

    try:
        with signals.deferred():
            hydra_launcher.launch([[str(record.number)] for record, _ in tasks], initial_job_idx=0)
    except Exception as error:  # the jobs' folders say which have ended
        return f"{type(error).__name__}: {error}"
    return ""
