"""A search: Optuna is asked for settings and told what they came to; the jobs are those of any sweep.

The study is a database that parent and workers reach by its URL: `study.db` in the sweep's folder, or a
server's. Whatever the processes know lies there, so a killed search is taken up by opening it again. The
password of a URL is written nowhere, neither to a file nor into what launchers pickle. The draw of trial k
comes from a sampler that is seeded by (seed, k): it depends on those and on the trials that have ended, and
on no process's past.

A job's number is its trial's. A failed job that is tried again is a new attempt in the study, with the job's
number as an attribute, because Optuna never changes a trial that has ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from runner.config import masked
from runner.errors import UserError, did_you_mean, nearest
from runner.sweep.record import Record
from runner.sweep.space import import_optuna, points, texts

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

log = logging.getLogger("runner")

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"}
PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}
# what cannot be made from a config's values, and grids, of which there is one of our own
NOT_SAMPLERS = ("BaseSampler", "BaseGASampler", "PartialFixedSampler", "GridSampler", "BruteForceSampler")
NOT_PRUNERS = ("BasePruner", "PatientPruner", "NopPruner")
DIRECTIONS = ("maximize", "minimize")
JOB, PRUNED_AT, STARTED_WITH = "job", "pruned at evaluation", "started with"  # attributes in the study
PACKAGES = {  # what installs the module that a URL's driver is
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "sqlalchemy": "sqlalchemy",
}
PASSWORD = (
    "RUNNER_STORAGE_PASSWORD"  # the environment's variable: the password of a URL that is kept without it
)
HIDDEN = re.compile(r":\*\*\*(?=@)|[?&]\w+=\*\*\*")  # where `masked` has left its stars in a URL
LOCK_SECONDS = 60  # that a process waits for the others to let go of an SQLite file


@dataclass
class Settings:
    """The node of `sweep=optuna`.

    Raises:
        ValueError: an argument is out of range.
    """

    n_trials: int = 20  # in all, also over several calls
    sampler: str = "tpe"  # tpe, random, grid, nsga2, or a class of optuna.samplers
    sampler_options: dict = field(default_factory=dict)  # further arguments of its class
    pruner: str = "none"  # median, halving, hyperband, none, or a class of optuna.pruners
    pruner_options: dict = field(default_factory=dict)  # further arguments of its class
    storage: str | None = None  # a database's URL; None: study.db in the sweep's folder
    seed: int = 0  # of the sampler
    objectives: dict | None = (
        None  # metric/split or "seconds": maximize or minimize; None: the run's objective
    )
    dir: str | None = None  # the sweep's folder; None: a new one
    space: dict = field(default_factory=dict)  # override text by key, besides the command line's

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise ValueError(f"n_trials must be 1 or more, not {self.n_trials}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), not {self.seed}")
        if self.storage is not None and "://" not in self.storage:
            raise ValueError(
                "storage must be a database's URL, such as sqlite:////tmp/study.db or "
                f"postgresql+psycopg://USER@HOST/NAME, not {masked(self.storage)}"
            )
        if self.storage is not None and not can_be_masked(self.storage):
            raise ValueError(
                "storage: within a user's name, a password or a path, write @ as %40, a space as %20"
            )
        if self.objectives is not None:
            check_objectives(self.objectives)


def check_objectives(objectives: dict) -> None:
    """Names that a run measures, and directions that there are."""
    if not objectives:
        raise ValueError("objectives must name a metric, such as {accuracy/val: maximize}, not nothing")
    for name, direction in objectives.items():
        if name != "seconds" and not re.fullmatch(r"[^/]+/(train|val|test)", str(name)):
            raise ValueError(f"objectives must be metrics such as accuracy/val, or seconds, not {name}")
        if direction not in DIRECTIONS:
            raise ValueError(f"objectives: {name} must be maximize or minimize, not {direction}")


class Search:
    """The parent's side of a study: asks for settings, and tells what they came to."""

    def __init__(
        self,
        settings: Settings,
        space: dict[str, BaseDistribution],
        folder: Path,
        objective: str | None,
        direction: str,
        name: str,
    ):
        """Open the study `name`, or create it; `objective` and `direction` are the run's own.

        Raises:
            UserError: a name or option that Optuna does not have; a database that cannot be opened; a study
                of that name with another space or other directions.
        """
        optuna = import_optuna()
        self.settings, self.space, self.name = settings, space, name
        self.objectives = goals(settings, objective, direction)
        self.judged = objective is not None and list(self.objectives) == [objective]
        self.make_pruner = pruner_maker(settings.pruner, settings.pruner_options)
        if settings.pruner != "none" and not self.judged:
            raise UserError(
                f"sweep.pruner={settings.pruner} judges a run by its own objective alone: take "
                "sweep.objectives=null, or sweep.pruner=none."
            )
        self.make_sampler = sampler_maker(settings, space)
        self.url = with_password(settings.storage or f"sqlite:///{(folder / 'study.db').resolve()}")
        with reached(self.url, no_password(settings.storage or "")):
            self.storage = open_storage(self.url)
            self.study: Study = optuna.create_study(
                study_name=name,
                storage=self.storage,
                directions=list(self.objectives.values()),
                sampler=self.make_sampler(0, 0),
                pruner=self.make_pruner(),
                load_if_exists=True,
            )
            self._check_study()

    def _check_study(self) -> None:
        """A study that was there before searches the same space for the same ends."""
        from optuna.distributions import distribution_to_json

        ours = {key: json.loads(distribution_to_json(entry)) for key, entry in self.space.items()}
        wanted = {"space": ours, "objectives": list(map(list, self.objectives.items()))}
        found = self.study.user_attrs.get(STARTED_WITH)
        if found is None and not self._trials():
            self.study.set_user_attr(STARTED_WITH, wanted)
        elif found != wanted:
            what = "other objectives" if found and found["space"] == ours else "another search space"
            raise UserError(
                f"The study {self.name} in {masked(self.url)} has {what}. A search is taken up with "
                "what it began with; begin another in a new folder."
            )

    @property
    def total(self) -> int:
        """How many trials there are to be: `n_trials`, or all points of a smaller grid."""
        return min(self.settings.n_trials, self.make_sampler.points or self.settings.n_trials)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def count(self) -> int:
        """How many trials were asked for; further attempts at one do not count."""
        return sum(JOB not in trial.user_attrs for trial in self._trials())

    def ask(self) -> tuple[int, dict[str, str]]:
        """A new trial: its number and its setting as override texts."""
        with reached(self.url):
            waiting = [trial.number for trial in self._trials() if trial.state.name == "WAITING"]
            number = waiting[0] if waiting else len(self._trials())
            self._seed(number)
            asked = []

            def draw() -> dict[str, Any]:
                asked.append(self.study.ask(self.space))
                return asked[-1].params

            setting = self._drawn(draw)
            return asked[-1].number, texts(setting, self.space)  # another process may have asked meanwhile

    def _seed(self, number: int) -> None:
        """A fresh sampler for one trial; a grid wants to know how many were asked for before it."""
        place = sum(JOB not in trial.user_attrs for trial in self._trials()[:number])
        self.study.sampler = self.make_sampler(number, place)

    def _drawn(self, draw: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a sampler draws, or its refusal as one message."""
        try:
            with quiet():
                return draw()
        # so do Optuna's samplers refuse: an option or a space that they have not, a package that they want
        except (ValueError, NotImplementedError, ImportError) as error:
            raise UserError(f"sweep.sampler={self.settings.sampler}: {error}") from None

    def take_up(self, number: int) -> dict[str, str]:
        """Make a job ready to run, whatever became of it, and give its setting.

        A trial that was left while it was drawn is drawn to the end; one that failed gets a new attempt.
        """
        with reached(self.url):
            trial = self._attempt(number)
            if trial.state.name == "FAIL":
                self._again(trial, number)
            elif not trial.state.is_finished():
                self._complete(trial)
            return texts(self._attempt(number).params, self.space)

    def _complete(self, trial: FrozenTrial) -> None:
        """Draw what a trial still lacks."""
        import optuna

        if trial.state.name == "WAITING":
            self.study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.RUNNING)
        self._seed(trial.number)
        again = optuna.Trial(self.study, trial._trial_id)
        self._drawn(lambda: {key: again._suggest(key, entry) for key, entry in self.space.items()})

    def _again(self, trial: FrozenTrial, number: int) -> None:
        """A new attempt at the setting of a trial that has ended."""
        from optuna.trial import TrialState, create_trial

        attempt = create_trial(
            state=TrialState.RUNNING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={JOB: number},
        )
        self.study.add_trial(attempt)

    def _attempt(self, number: int) -> FrozenTrial:
        """The latest trial of a job."""
        found = [trial for trial in self._trials() if job_number(trial) == number]
        if not found:
            raise UserError(
                f"The study {self.name} in {masked(self.url)} has no trial {number}, which the sweep's folder "
                "has a job for: it is not the study that the sweep began with."
            )
        return found[-1]

    def unfinished(self) -> list[int]:
        """The jobs that were begun and have not ended."""
        return sorted({job_number(trial) for trial in self._trials() if not trial.state.is_finished()})

    def tell(self, number: int, record: Record) -> None:
        """Record how a job ended; one that has not ended, or was told before, is left.

        Raises:
            UserError: an objective is not measured by the run.
        """
        from optuna.trial import TrialState

        state = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}.get(
            record.status
        )
        if state is None:
            return
        values = self._values(record) if state == TrialState.COMPLETE else None
        if state == TrialState.COMPLETE and values is None:
            state = TrialState.FAIL  # no finite value
        with reached(self.url):
            trial = self._attempt(number)
            if trial.state == TrialState.FAIL and state != TrialState.FAIL:
                self._again(trial, number)
                trial = self._attempt(number)
            if not trial.state.is_finished():
                self.study.tell(trial.number, values, state)

    def _values(self, record: Record) -> list[float] | None:
        """The objectives' values of a run that is done; None where one is no finite number."""
        values = [
            record.value if name == record.objective else measured(name, record) for name in self.objectives
        ]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        return finite if len(finite) == len(values) else None

    def reporter(self, number: int) -> Reporter | None:
        """What judges the job while it runs; None where its objective is not what is searched for."""
        if not self.judged:
            return None
        trial = self._attempt(number).number
        leave_password(self.url)
        return Reporter(self.url, self.name, trial, self.settings.pruner, dict(self.settings.pruner_options))

    def best(self) -> list[int]:
        """The number of the best job, or those of the Pareto front; none where no job is done."""
        from optuna.trial import TrialState

        if not any(trial.state == TrialState.COMPLETE for trial in self._trials()):
            return []
        if len(self.objectives) == 1:
            return [job_number(self.study.best_trial)]
        return sorted(job_number(trial) for trial in self.study.best_trials)

    def value(self, number: int) -> tuple[float, ...] | None:
        """The objectives' values of a job that is done."""
        from optuna.trial import TrialState

        trial = self._attempt(number)
        return tuple(trial.values) if trial.state == TrialState.COMPLETE else None

    def close(self) -> None:
        """Give the database's connections back."""
        self.storage.remove_session()
        self.storage.engine.dispose()


@dataclass
class Reporter:
    """A worker's side of a study, in whatever process the job runs: reports evaluations, asks for a verdict.

    It pickles, without the password; the database is opened with the first report.
    """

    url: str = field(repr=False)
    study: str
    trial: int
    pruner: str = "none"
    pruner_options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._opened: Study | None = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "url": masked(self.url)}

    def __call__(self, evaluation: int, value: float) -> bool:
        """Report the objective at an evaluation; whether the run should end here.

        A job that was taken up again gets the answers that it had before. Where the database cannot be
        reached, the run goes on.
        """
        if not math.isfinite(value):
            return False
        try:
            with reached(self.url), quiet():
                return self._judge(self._open(), evaluation, value)
        except UserError as error:
            if not self._warned:
                log.warning("%s The run goes on; it is not judged while that is so.", error)
            self._warned = True
            return False

    def _open(self) -> Study:
        optuna = import_optuna()
        if self._opened is None:
            self._opened = optuna.load_study(
                study_name=self.study,
                storage=visit_storage(with_password(self.url)),
                sampler=optuna.samplers.RandomSampler(),
                pruner=pruner_maker(self.pruner, self.pruner_options)(),
            )
        return self._opened

    def _judge(self, study: Study, evaluation: int, value: float) -> bool:
        """Write the value where it is not known yet, and the verdict where it ends the run."""
        storage = study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, self.trial)
        trial = storage.get_trial(trial_id)
        if trial.state.is_finished():
            return False
        if PRUNED_AT in trial.user_attrs:
            return evaluation >= trial.user_attrs[PRUNED_AT]
        known = trial.intermediate_values
        if evaluation < max(known, default=evaluation):
            return False  # the run went on from here before
        if evaluation not in known:
            storage.set_trial_intermediate_value(trial_id, evaluation, value)
        pruned = bool(study.pruner.prune(study, storage.get_trial(trial_id)))  # it may be NumPy's
        if pruned:
            storage.set_trial_user_attr(trial_id, PRUNED_AT, evaluation)
        return pruned


def goals(settings: Settings, objective: str | None, direction: str) -> dict[str, str]:
    """What is searched for: direction by name of the objective."""
    if settings.objectives is None:
        if objective is None:
            raise UserError("A search needs something to search for: set objective=METRIC/val.")
        return {objective: direction}
    given = settings.objectives.get(objective, direction)
    if given != direction:
        raise UserError(f"sweep.objectives: {objective} is to {direction} in the run, not to {given}.")
    return dict(settings.objectives)


def measured(name: str, record: Record) -> float | None:
    """One objective's value among what a run has measured."""
    if name == "seconds":
        return record.seconds
    there = {
        f"{metric}/{split}": value
        for split in ("train", "val", "test")
        for metric, value in (record.metrics.get(split) or {}).items()
    }
    if name not in there:
        hint = did_you_mean(nearest(name, there))
        raise UserError(
            f"sweep.objectives: {name} is not measured.{hint} There are: {', '.join([*there, 'seconds'])}."
        )
    return there[name]


def job_number(trial: FrozenTrial) -> int:
    """The number of the job that a trial is an attempt at."""
    return trial.user_attrs.get(JOB, trial.number)


@dataclass
class SamplerMaker:
    """Makes the sampler of one trial: seeded by the search's seed and the trial's number."""

    make: Callable[[int, int], BaseSampler]
    points: int | None = None  # of a grid

    def __call__(self, number: int, place: int) -> BaseSampler:
        with quiet():
            return self.make(number, place)


def sampler_maker(settings: Settings, space: dict[str, BaseDistribution]) -> SamplerMaker:
    """What makes samplers of the given name.

    Raises:
        UserError: there is no such sampler, or it does not take an option.
    """
    import optuna

    if settings.sampler == "grid":
        return grid_maker(settings, space)
    known = classes(optuna.samplers, "Sampler", NOT_SAMPLERS)
    cls = choose("sampler", settings.sampler, SAMPLERS, known, ["grid"])
    check_options("sampler", cls, settings.sampler_options, ["seed"])
    whole = cls is optuna.samplers.QMCSampler  # its points are one sequence, which has one seed

    def make(number: int, place: int) -> BaseSampler:
        seed = settings.seed if whole else trial_seed(settings.seed, number)
        return construct("sampler", cls, settings.sampler_options | {"seed": seed})

    return SamplerMaker(make)


def grid_maker(settings: Settings, space: dict[str, BaseDistribution]) -> SamplerMaker:
    """Every setting once, in an order that the seed gives, so that the first few lie anywhere in the grid."""
    from optuna.samplers import PartialFixedSampler, RandomSampler

    if settings.sampler_options:
        raise UserError("sweep.sampler_options: sampler=grid takes none.")
    settings_in_order = points(space)
    random.Random(settings.seed).shuffle(settings_in_order)

    def make(number: int, place: int) -> BaseSampler:
        fixed = settings_in_order[place % len(settings_in_order)]
        return PartialFixedSampler(fixed, RandomSampler(trial_seed(settings.seed, number)))

    return SamplerMaker(make, len(settings_in_order))


def trial_seed(seed: int, number: int) -> int:
    """A seed of 32 bits that is as good as independent for every (seed, number)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


def pruner_maker(name: str, options: dict) -> Callable[[], BasePruner]:
    """What makes pruners of the given name.

    Raises:
        UserError: there is no such pruner, or it does not take an option.
    """
    import optuna

    if name == "none":
        if options:
            raise UserError("sweep.pruner_options: pruner=none takes none.")
        return optuna.pruners.NopPruner
    cls = choose("pruner", name, PRUNERS, classes(optuna.pruners, "Pruner", NOT_PRUNERS), ["none"])
    check_options("pruner", cls, options, [])
    construct("pruner", cls, options)
    return lambda: construct("pruner", cls, options)


def classes(module: Any, ending: str, left_out: tuple[str, ...]) -> dict[str, type]:
    """The classes of one of Optuna's modules that a config can make."""
    names = [name for name in module.__all__ if name.endswith(ending) and name not in left_out]
    return {name: getattr(module, name) for name in names}


def choose(what: str, name: str, short: dict[str, str], known: dict[str, type], ours: list[str]) -> type:
    """A class by its short or its own name."""
    cls = known.get(short.get(name, name))
    if cls is None:
        names = [*ours, *short, *(full for full in known if full not in short.values())]
        close = nearest(name, [*names, *known])
        raise UserError(
            f"sweep.{what}={name}: there is no such {what}.{did_you_mean(close)} There are: {', '.join(names)}.",
            f"sweep.{what}={name}",
            f"sweep.{what}={close}" if close else None,
        )
    return cls


def check_options(what: str, cls: type, options: dict, ours: list[str]) -> None:
    """Every option is an argument of the class, and none that the search gives itself."""
    takes = [name for name in inspect.signature(cls).parameters if name not in ours]
    for name in options:
        if name in ours:
            raise UserError(f"sweep.{what}_options.{name}: this is what sweep.{name} says.")
        if name not in takes:
            raise UserError(
                f"sweep.{what}_options.{name}: {cls.__name__} takes no {name}."
                f"{did_you_mean(nearest(name, takes))} It takes: {', '.join(takes)}."
            )


def construct(what: str, cls: type, options: dict) -> Any:
    """One object of Optuna's, or its refusal as one message."""
    try:
        with quiet():
            return cls(**options)
    except ImportError as error:
        raise UserError(f"sweep.{what}: {cls.__name__} needs a package more: {first_line(error)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"sweep.{what}_options: {cls.__name__}: {first_line(error)}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings that an interface may change."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def open_storage(url: str) -> RDBStorage:
    """The database behind a URL, with its tables; `close_storage` gives its connections back."""
    from optuna.storages import RDBStorage

    return RDBStorage(url, engine_kwargs=connecting(url) | {"pool_pre_ping": True})


def visit_storage(url: str) -> RDBStorage:
    """A worker's way to a database that the parent has opened: no connection outlives its use."""
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import NullPool

    options = connecting(url) | {"poolclass": NullPool}
    return RDBStorage(url, options, skip_compatibility_check=True, skip_table_creation=True)


def connecting(url: str) -> dict[str, Any]:
    """How to connect: the processes of a search write to one SQLite file, one after the other."""
    return {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}


@contextlib.contextmanager
def reached(url: str, hint: str = "") -> Iterator[None]:
    """Turn what a database can go wrong with into one message, without its password; `hint` ends it."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    where = f"sweep.storage={masked(url)}"
    try:
        yield
    except ImportError as error:
        raise UserError(f"{where}: {driver_missing(error)}") from None
    except ArgumentError as error:
        raise UserError(f"{where} is no database's URL: {first_line(error)}") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = masked(first_line(getattr(cause, "orig", None) or cause))
        raise UserError(f"{where} cannot be used: {reason}{hint}") from None


def can_be_masked(url: str) -> bool:
    """Whether the part of a URL that SQLAlchemy takes for the password is what `masked` hides."""
    return url.startswith("sqlite") or (url.count("@") < 2 and not re.search(r"\s", url))


def password_of(url: str) -> str | None:
    """The password that stands in a URL, be it as a part of the query."""
    found = re.search(r"://[^:/@]*:([^@]*)@|[?&](?:password|passwd|pwd)=([^&]*)", url)
    return unquote(found[1] or found[2] or "") if found else None


def leave_password(url: str) -> None:
    """Put a URL's password where the processes of a launcher find it: what is pickled may lie on a disk."""
    password = password_of(url)
    if password and os.environ.get(PASSWORD) != password:
        os.environ[PASSWORD] = password
        loky = sys.modules.get("joblib.externals.loky")
        if (
            loky is not None
        ):  # the processes that joblib keeps from an earlier sweep have the environment of then
            loky.get_reusable_executor().shutdown()


def with_password(url: str) -> str:
    """A URL that was kept with stars, with the password of the environment.

    Where there is none the driver looks for itself, as PostgreSQL's does in PGPASSWORD and ~/.pgpass.
    """
    password = os.environ.get(PASSWORD)
    if password and HIDDEN.search(url):
        return url.replace("***", quote(password, safe=""))
    return without_password(url)


def without_password(url: str) -> str:
    """A URL that was kept with stars, without them."""
    bare = HIDDEN.sub("", url)
    return bare if "?" in bare else bare.replace("&", "?", 1)


def no_password(url: str) -> str:
    """What to do where a database wants a password and the URL was kept without, as the end of a message."""
    if os.environ.get(PASSWORD) or not HIDDEN.search(url):
        return ""
    return (
        " A sweep's folder keeps no password: give sweep.storage= again with the whole URL, or set "
        f"{PASSWORD}; PostgreSQL also reads PGPASSWORD and ~/.pgpass."
    )


def same_storage(typed: str, kept: str | None, folder: Path) -> str:
    """The URL that is typed to go on with a search: the kept one, with a password.

    Raises:
        UserError: it is another database.
    """
    if kept is None or without_password(masked(typed)) != without_password(masked(kept)):
        there = "study.db in its folder" if kept is None else masked(kept)
        raise UserError(
            f"sweep.storage={masked(typed)}: the search in {folder} lies in {there}; "
            "a resume may add the password alone."
        )
    return typed


def driver_missing(error: ImportError) -> str:
    """What to install for a database."""
    missing = next((e.name for e in (error, error.__cause__) if isinstance(e, ImportError) and e.name), None)
    if missing is None:
        return first_line(error)
    package = PACKAGES.get(missing.split(".")[0], missing)
    return f"the driver {missing} is not installed: pip install '{package}'."


def first_line(error: object) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "")
