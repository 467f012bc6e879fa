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

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.command import masked
from runner.errors import UserError, did_you_mean, nearest
from runner.sweep.record import Record
from runner.sweep.search.samplers import pruner_maker, quiet, sampler_maker
from runner.sweep.search.settings import SearchConfig, goals
from runner.sweep.search.storage import (
    leave_password,
    no_password,
    open_storage,
    reached,
    visit_storage,
    with_password,
)
from runner.sweep.space import import_optuna, texts

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial


log = logging.getLogger("runner")
JOB, PRUNED_AT, STARTED_WITH = "job", "pruned at evaluation", "started with"  # attributes in the study


class Search:
    """The parent's side of a study: asks for settings, and tells what they came to."""

    def __init__(
        self,
        settings: SearchConfig,
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

    def reporter(self, number: int) -> TrialReporter | None:
        """What judges the job while it runs; None where its objective is not what is searched for."""
        if not self.judged:
            return None
        trial = self._attempt(number).number
        leave_password(self.url)
        return TrialReporter(
            self.url, self.name, trial, self.settings.pruner, dict(self.settings.pruner_options)
        )

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
class TrialReporter:
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
