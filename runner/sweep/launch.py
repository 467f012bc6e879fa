"""Where the jobs of a sweep run: in this process one after the other, or under one of Hydra's launchers."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from runner.config.command import Command
from runner.config.compose import launcher_config
from runner.engine import signals
from runner.errors import UserError
from runner.sweep.record import Record, read_record
from runner.sweep.work import POLL, PruneCallback, StopRequest, Work, record_failure

HAS_ENDED = ("done", "pruned", "failed")
DEATHS = 3  # starts of a job that ended without a word, after which it counts as failed

OnJobEnd = Callable[[Record], None]  # hears of every job that has ended


@dataclass
class Launcher:
    """What `hydra/launcher` says: its name, and Hydra's config with its settings."""

    name: str = "basic"
    hydra: DictConfig = field(default_factory=lambda: OmegaConf.create({}))

    @property
    def slots(self) -> int:
        """How many jobs run at the same time, as far as the launcher's settings tell."""
        if self.name == "basic":
            return 1
        node = self.hydra.hydra.launcher
        wanted = node.get("n_jobs") or node.get("array_parallelism") or 1
        return cores() if wanted < 0 else int(wanted)

    def settings(self) -> dict[str, Any]:
        """What was set, without classes: those are never taken from a folder."""
        if self.name == "basic":
            return {}
        node = OmegaConf.to_container(self.hydra.hydra.launcher, resolve=True)
        assert isinstance(node, dict)
        return {
            str(k): v for k, v in node.items() if k != "_target_" and isinstance(v, int | float | str | bool)
        }


def make_launcher(command: Command) -> Launcher:
    """The launcher that is typed or stands in an experiment's file.

    Raises:
        UserError: it is not installed, or takes no such setting.
    """
    typed = [o for o in command.overrides if o.key_or_group == "hydra/launcher"]
    if typed and typed[-1].value() == "basic":  # which takes none of the settings that a file may have
        return Launcher()
    composed = launcher_config(command)
    return Launcher(str(composed.hydra.runtime.choices.get("hydra/launcher", "basic")), composed)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(
    work: Work, jobs: list[tuple[Record, PruneCallback | None]], launcher: Launcher, told: OnJobEnd
) -> None:
    """Run the jobs, and tell of each as it ends.

    Raises:
        KeyboardInterrupt: the user wants no more; what ran is saved as far as it got.
        UserError: the launcher cannot be used.
    """
    if launcher.name == "basic":
        held = [job for job in jobs if not run_here(work, *job, told, wait=False)]  # another call runs these
        for record, judge in held:
            run_here(work, record, judge, told, wait=True)
        return
    before = {record.number: work.starts(record) for record, _ in jobs}
    pending = jobs
    while pending and not work.stop_file.exists():
        deaths = {record.number: work.starts(record) - before[record.number] for record, _ in pending}
        together = [job for job in pending if deaths[job[0].number] < DEATHS - 1]
        # some launchers end all processes when one dies: whose was it shows when a job is alone
        alone = [job for job in pending if job not in together]
        for group in filter(None, (together, *([job] for job in alone))):
            launch_group(work, group, launcher, told)
        pending = [job for job in pending if not has_ended(work, job[0], before[job[0].number], told)]
    if any(r.status == "interrupted" and written_at(r, work.sweep) for r, _ in pending):
        raise KeyboardInterrupt  # a signal reached a worker alone


def run_here(work: Work, record: Record, judge: PruneCallback | None, told: OnJobEnd, wait: bool) -> bool:
    """Run a job in this process and tell of it; False where another process runs it and `wait` is False."""
    if work.stop_file.exists():
        return True
    if not work(record, judge, wait):
        return False
    told(record)
    if record.status == "interrupted" or work.interrupt_file.exists():
        raise KeyboardInterrupt
    return True


def launch_group(
    work: Work, jobs: list[tuple[Record, PruneCallback | None]], launcher: Launcher, told: OnJobEnd
) -> None:
    """Run jobs side by side in other processes, and tell of each that ends."""
    if work.stop_file.exists():
        return
    started = sum(work.starts(record) for record, _ in jobs)
    with watched(work, [record for record, _ in jobs], told), graceful_stop(work):
        problem = launch_with_hydra(work, jobs, launcher)
    if problem and sum(work.starts(record) for record, _ in jobs) == started:
        raise UserError(f"hydra/launcher={launcher.name} has started no job: {problem}")


@contextlib.contextmanager
def graceful_stop(work: Work) -> Iterator[None]:
    """On the first signal let the workers' jobs save, then raise `KeyboardInterrupt`; on the second raise it at once.

    A launcher that is interrupted kills its workers.
    """
    received = False

    def handle(number: int, frame: Any) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True
        work.interrupt()
        with contextlib.suppress(RuntimeError):  # the signal came while something was being printed
            print("\nStopping: the running jobs end their step and save. Again to stop at once.", flush=True)

    with signals.handled_by(handle):
        yield
    if received:
        raise KeyboardInterrupt


def has_ended(work: Work, record: Record, before: int, told: OnJobEnd) -> bool:
    """Whether a job that came back needs no further start: one whose process died does, a few times.

    `before` is how often it was started by earlier calls.
    """
    told_before = record.status in HAS_ENDED
    record.refresh(work.sweep)  # it may have ended in a process that an earlier call left behind
    if record.status in HAS_ENDED:
        if not told_before:
            told(record)
        return True
    if work.starts(record) - before < DEATHS:
        return False
    error = f"its process died {DEATHS} times without a word, perhaps killed for want of memory"
    record_failure(record, record.folder(work.sweep), error, error)
    record.refresh(work.sweep)
    told(record)
    return True


@contextlib.contextmanager
def watched(work: Work, records: list[Record], told: OnJobEnd) -> Iterator[None]:
    """Tell of jobs that end in other processes while this one waits for all of them."""
    ended = threading.Event()
    waiting = list(records)
    before = {record.number: written_at(record, work.sweep) for record in records}  # what is no news

    def look() -> None:
        for record in list(waiting):
            if written_at(record, work.sweep) == before[record.number]:
                continue
            record.refresh(work.sweep)
            if record.status in HAS_ENDED:
                waiting.remove(record)
                told(record)

    def watch() -> None:
        while not ended.wait(POLL):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()


def written_at(record: Record, sweep: Path) -> int | None:
    """When the job's summary was written, in nanoseconds; None where it has none."""
    try:
        return (record.folder(sweep) / "summary.json").stat().st_mtime_ns
    except OSError:
        return None


class FrozenLoader(ConfigLoader):
    """Gives a launcher's worker the number of a frozen job, whatever the YAML files say by then."""

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        raise AssertionError("a sweep's configs are composed before it is launched")

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The launcher's own node with the job's number."""
        node = copy.deepcopy(master_config)
        with open_dict(node):
            node.job = int(sweep_overrides[0])
        return node

    def get_search_path(self) -> Any:
        raise AssertionError("no YAML is read while a sweep runs")

    get_sources = get_search_path
    compute_defaults_list = load_configuration

    def list_groups(self, parent_name: str) -> list[str]:
        return []

    def get_group_options(self, group_name: str, *args: Any, **kwargs: Any) -> list[str]:
        return []


@dataclass(frozen=True)
class Worker:
    """What a launcher calls in each of its processes."""

    work: Work
    judges: dict[int, PruneCallback]
    threads: int
    path: tuple[str, ...]
    parent: int = field(default_factory=os.getpid)  # process ID of the sweep

    def __call__(self, config: DictConfig) -> None:
        """Run the job whose number the config holds."""
        if os.getpid() == self.parent:  # joblib with n_jobs=1: the job handles signals as without a launcher
            with signals.delivered():
                self.run(config.job, None)
            return
        stop = StopRequest(self.work.interrupt_file)
        with signals.delivered_to(stop.signal):
            self.run(config.job, stop)

    def run(self, number: int, stop: StopRequest | None) -> None:
        """Run a job, until `stop` says otherwise."""
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # processes × threads never exceed the cores
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):  # bars of many jobs
            self.work(read_record(self.work.sweep, number), self.judges.get(number), stop=stop)


def launch_with_hydra(work: Work, jobs: list[tuple[Record, PruneCallback | None]], launcher: Launcher) -> str:
    """Hand the jobs to Hydra's launcher and wait; returns what it complains of, such as a process that died."""
    node = copy.deepcopy(launcher.hydra)
    with open_dict(node):
        node.hydra.sweep.dir, node.hydra.sweep.subdir = str(work.sweep), "."
        node.hydra.job.name = "runner"
        node.sweep = (
            None  # a file's may hold the password of a database, and launchers write configs to disks
        )
    worker = Worker(
        work,
        {record.number: judge for record, judge in jobs if judge is not None},
        max(1, cores() // max(1, min(launcher.slots, len(jobs)))),
        tuple(sys.path),
    )
    context = HydraContext(config_loader=FrozenLoader(), callbacks=callbacks())
    try:
        hydras = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=worker, config=node
        )
    except Exception as error:
        raise UserError(f"hydra/launcher={launcher.name}: {' '.join(str(error).split())}") from None
    numbers = [[str(record.number)] for record, _ in jobs]
    try:
        with signals.deferred():
            hydras.launch(numbers, initial_job_idx=0)
    except Exception as error:  # the jobs' folders say which have ended
        return f"{type(error).__name__}: {error}"
    return ""


def callbacks() -> Any:
    """Hydra's callbacks: none."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks()
