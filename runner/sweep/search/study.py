"""A search: Optuna proposes settings and is told their results; the jobs are those of any sweep.

The study is a database that parent and workers reach by its URL: `study.db` in the sweep's folder, or a
server's. Whatever the processes know lies there, so a killed search resumes by opening it again. The
password of a URL is written nowhere, neither to a file nor into what launchers pickle. The draw of trial k
comes from a sampler that is seeded by (seed, k): it depends on those and on the trials that have ended, and
on no process's past.

A job's number is its trial's. A failed job that is tried again is a new attempt in the study, with the job's
number as an attribute, because Optuna never changes a trial that has ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import UserError, unknown
from runner.records.console import log
from runner.sweep.record import RankedBy, Record
from runner.sweep.search.samplers import ignore_experimental, pruner_factory, sampler_factory
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.storage import (
    database_errors,
    export_password,
    hide_password,
    open_storage,
    restore_password,
)
from runner.sweep.space import import_optuna, texts

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_JOB, _PRUNED_AT, _STARTED_WITH = "job", "pruned at evaluation", "started with"  # attributes in the study


class Search:
    """The parent's side of a study: asks for settings, and tells their results."""

    def __init__(
        self, config: SearchConfig, space: dict[str, BaseDistribution], folder: Path, own: RankedBy, name: str
    ):
        """Open the study `name`, or create it; `own` is the run's own objective and direction.

        Raises:
            UserError: a name or option that Optuna does not have; a database that cannot be opened; a study
                of that name with another space or other directions.
        """
        optuna = import_optuna()
        self.config, self.space, self.name = config, space, name
        self.objectives = config.directions(*own)

        # only the run's own objective is reported while it runs
        self.prunes = list(self.objectives) == [own[0]]
        self.make_pruner = pruner_factory(config.pruner, config.pruner_options)
        if config.pruner != "none" and not self.prunes:
            raise UserError(
                f"sweep.pruner={config.pruner} needs the run's own objective alone: use "
                "sweep.objectives=null or sweep.pruner=none."
            )
        self.make_sampler, self._points = sampler_factory(config, space)

        # the study
        saved_url = config.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
        self.url = restore_password(saved_url)
        with database_errors(saved_url):
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
        """Refuse a study that was created with another space or other objectives."""
        from optuna.distributions import distribution_to_json

        space = {key: json.loads(distribution_to_json(entry)) for key, entry in self.space.items()}
        expected = {"space": space, "objectives": list(map(list, self.objectives.items()))}
        stored = self.study.user_attrs.get(_STARTED_WITH)
        if stored is None and not self._trials():
            self.study.set_user_attr(_STARTED_WITH, expected)
        elif stored != expected:
            same_space = stored and stored["space"] == space
            raise self._wrong_study(f"has {'other objectives' if same_space else 'another search space'}")

    def _wrong_study(self, problem: str) -> UserError:
        return UserError(
            f"The study {self.name} in {hide_password(self.url)} {problem}. Use the study that the search "
            "began with, or begin another search in a new folder."
        )

    @property
    def total(self) -> int:
        """Number of trials in all: `n_trials`, or all points of a smaller grid."""
        return min(self.config.n_trials, self._points or self.config.n_trials)

    def _trials(self) -> list[FrozenTrial]:
        with database_errors(self.url):
            return self.study.get_trials(deepcopy=False)

    def count(self) -> int:
        """Return how many trials were asked for; further attempts at one do not count."""
        return sum(_JOB not in trial.user_attrs for trial in self._trials())

    def ask(self) -> tuple[int, dict[str, str]]:
        """Return a new trial: its number and its setting as override texts."""
        with database_errors(self.url):
            waiting = [trial.number for trial in self._trials() if trial.state.name == "WAITING"]
            self._seed(waiting[0] if waiting else len(self._trials()))
            trial = self._sample(lambda: self.study.ask(self.space))
            return trial.number, texts(trial.params, self.space)  # another process may have asked meanwhile

    def _seed(self, number: int) -> None:
        """Give the study a fresh sampler for one trial, and its place among those that were asked for."""
        place = sum(_JOB not in trial.user_attrs for trial in self._trials()[:number])
        self.study.sampler = self.make_sampler(number, place)

    def _sample(self, draw: Callable[[], Any]) -> Any:
        """Return what a sampler draws, its refusal as one message."""
        try:
            with ignore_experimental():
                return draw()
        # Optuna's, for an option or a space that a sampler does not have, or a package that it needs
        except (ValueError, NotImplementedError, ImportError) as error:
            raise UserError(f"sweep.sampler={self.config.sampler}: {error}") from None

    def resume_trial(self, number: int) -> dict[str, str]:
        """Make a job ready to run, however it ended, and return its setting.

        A trial that was left while it was drawn is drawn to the end; one that failed gets a new attempt.
        """
        from optuna.trial import Trial, TrialState

        with database_errors(self.url):
            trial = self._attempt(number)
            if trial.state.name == "FAIL":
                self._try_again(trial, number)
            elif not trial.state.is_finished():
                if trial.state.name == "WAITING":
                    self.study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                self._seed(trial.number)
                again = Trial(self.study, trial._trial_id)
                self._sample(lambda: [again._suggest(key, entry) for key, entry in self.space.items()])
            return texts(self._attempt(number).params, self.space)

    def _try_again(self, trial: FrozenTrial, number: int) -> None:
        """Add a new attempt at the setting of a trial that has ended."""
        from optuna.trial import TrialState, create_trial

        attempt = create_trial(
            state=TrialState.RUNNING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={_JOB: number},
        )
        self.study.add_trial(attempt)

    def _attempt(self, number: int) -> FrozenTrial:
        """Return the latest trial of a job."""
        attempts = [trial for trial in self._trials() if _job_number(trial) == number]
        if not attempts:
            raise self._wrong_study(f"has no trial {number}, but the sweep's folder has a job {number}")
        return attempts[-1]

    def unfinished(self) -> list[int]:
        """Return the jobs that were begun and have not ended."""
        return sorted({_job_number(trial) for trial in self._trials() if not trial.state.is_finished()})

    def tell(self, number: int, record: Record) -> None:
        """Record how a job ended; ignore one that has not ended, or was recorded before."""
        from optuna.trial import TrialState

        # its state; of a job that is done also its values, which must be finite
        states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        state, values = states.get(record.status), None
        if state is None:
            return
        if state == TrialState.COMPLETE:
            values = [_measured(name, record) for name in self.objectives]
            if not all(map(math.isfinite, values)):
                state, values = TrialState.FAIL, None

        with database_errors(self.url):
            trial = self._attempt(number)
            if trial.state == TrialState.FAIL and state != TrialState.FAIL:
                self._try_again(trial, number)
                trial = self._attempt(number)
            if not trial.state.is_finished():
                self.study.tell(trial.number, values, state)

    def reporter(self, number: int) -> TrialReporter | None:
        """Return what reports the job while it runs; None where its objective is not what is searched for."""
        if not self.prunes:
            return None
        trial = self._attempt(number).number
        export_password(self.url)
        return TrialReporter(self.url, self.name, trial, self.config.pruner, dict(self.config.pruner_options))

    def best(self) -> list[int]:
        """Return the number of the best job, or those of the Pareto front; none where no job is done."""
        from optuna.trial import TrialState

        if not any(trial.state == TrialState.COMPLETE for trial in self._trials()):
            return []
        best = [self.study.best_trial] if len(self.objectives) == 1 else self.study.best_trials
        return sorted(_job_number(trial) for trial in best)

    def close(self) -> None:
        """Close the database's connections."""
        self.storage.remove_session()
        self.storage.engine.dispose()


@dataclass
class TrialReporter:
    """A worker's side of a study, in whatever process the job runs: reports evaluations, asks whether to stop.

    It pickles, without the password; the database is opened with the first report.
    """

    url: str = field(repr=False)
    study: str
    trial: int
    pruner: str = "none"
    pruner_options: dict[str, Any] = field(default_factory=dict)
    _opened: Study | None = field(default=None, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "url": hide_password(self.url)}

    def __call__(self, evaluation: int, value: float) -> bool:
        """Report the objective at an evaluation; return whether the run should end here.

        A resumed job gets the answers that it had before. Where the database cannot be reached, the run goes on.
        """
        if not math.isfinite(value):
            return False
        try:
            with database_errors(self.url), ignore_experimental():
                return self._report(evaluation, value)
        except UserError as error:
            if not self._warned:
                log.warning("%s The run goes on, and is not pruned meanwhile.", error)
            self._warned = True
            return False

    def _report(self, evaluation: int, value: float) -> bool:
        study = self._opened = self._opened or import_optuna().load_study(
            study_name=self.study,
            storage=open_storage(restore_password(self.url), in_worker=True),
            pruner=pruner_factory(self.pruner, self.pruner_options)(),
        )
        storage = study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, self.trial)
        trial = storage.get_trial(trial_id)

        # a resumed run comes past evaluations that were reported before
        if trial.state.is_finished():
            return False
        if _PRUNED_AT in trial.user_attrs:
            return bool(evaluation >= trial.user_attrs[_PRUNED_AT])
        reported = trial.intermediate_values
        if evaluation < max(reported, default=evaluation):
            return False

        if evaluation not in reported:
            storage.set_trial_intermediate_value(trial_id, evaluation, value)
        pruned = bool(study.pruner.prune(study, storage.get_trial(trial_id)))  # it may be NumPy's
        if pruned:
            storage.set_trial_user_attr(trial_id, _PRUNED_AT, evaluation)
        return pruned


def _measured(name: str, record: Record) -> float:
    """Return one objective among what a run has measured, NaN where it has no finite value."""
    measured: dict[str, float | None] = {
        f"{metric}/{split}": value
        for split in ("train", "val", "test")
        for metric, value in (record.metrics.get(split) or {}).items()
    }
    measured["seconds"] = record.seconds
    if record.objective is not None:
        measured[record.objective] = record.value
    if name not in measured:
        raise unknown("metric of sweep.objectives", name, measured)
    value = measured[name]
    return math.nan if value is None else value


def _job_number(trial: FrozenTrial) -> int:
    """Return the number of the job that a trial is an attempt at."""
    return int(trial.user_attrs.get(_JOB, trial.number))
