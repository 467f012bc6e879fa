"""A search against Optuna's own reading of the study, in SQLite files and in a PostgreSQL server."""

from __future__ import annotations

import math
import os
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UserError
from runner.sweep.grid import parse_texts
from runner.sweep.record import Record
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.study import Search
from runner.sweep.space import read_space
from tests.runner.sweep.helpers import make_record
from tests.runner.sweep.processes import FORKS, LIMIT

optuna = pytest.importorskip("optuna")
sqlalchemy = pytest.importorskip("sqlalchemy")

SPACE = {"optimizer.lr": "tag(log,interval(1e-4,1))", "model.layers": "range(1,5)", "optimizer": "sgd,adam"}
ENQUEUED = {"optimizer.lr": 0.5, "model.layers": 2, "optimizer": "adam"}
Make = Callable[..., Search]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that opens the test's one study."""
    opened = []

    def open_search(
        space: dict[str, str] = SPACE,
        objective: str | None = "accuracy/val",
        direction: str = "maximize",
        folder: str = "",
        **settings: Any,
    ) -> Search:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = SearchConfig(**settings)
        search = Search(
            config, read_space(parse_texts(space)), tmp_path / folder, objective, direction, "toy"
        )
        opened.append(search)
        return search

    yield open_search
    for search in opened:
        search.close()


def record(number: int, status: str = "done", value: float | None = None, **more: Any) -> Record:
    """Return a job that ended so."""
    given = {"metrics": {"val": {"accuracy": value}}, "seconds": 1.0}
    return make_record(number, {}, value, status, **(given | more))


def quality(texts: dict[str, str]) -> float:
    """Return a smooth accuracy with its best at a learning rate of 0.03, 3 layers and adam."""
    distance = abs(math.log10(float(texts["optimizer.lr"])) + 1.5) + abs(int(texts["model.layers"]) - 3)
    return 1 / (1 + distance) - 0.1 * (texts["optimizer"] == "sgd")


def run_trials(search: Search, stop: int) -> list[dict[str, str]]:
    """Ask and tell until there are `stop` trials; return their settings."""
    asked = []
    while search.count() < stop:
        number, texts = search.ask()
        asked.append(texts)
        search.tell(number, record(number, value=quality(texts)))
    return asked


def study_of(search: Search) -> Any:
    """Return the search's study, read by Optuna alone."""
    return optuna.load_study(study_name="toy", storage=search.url)


def report(search: Search, number: int, values: list[float]) -> list[bool]:
    """Report a job's evaluations by a reporter that has travelled; return the answers."""
    assert search.reporter(number) is not None
    reporter = pickle.loads(pickle.dumps(search.reporter(number)))
    return [reporter(evaluation, value) for evaluation, value in enumerate(values)]


def run_job(search: Search, values: list[float], status: str = "done") -> int:
    """Ask for a job that reports these values and is not pruned; return its number."""
    number, _ = search.ask()
    assert not any(report(search, number, values))
    search.tell(number, record(number, status, values[-1]))
    return number


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("tpe", {"n_startup_trials": 4}),
        pytest.param("random", {}, marks=pytest.mark.slow),
        pytest.param("nsga2", {"population_size": 4}, marks=pytest.mark.slow),
        pytest.param("QMCSampler", {"scramble": True}, marks=pytest.mark.slow),
        pytest.param("grid", {}, marks=pytest.mark.slow),
    ],
)
def test_reopened_search_asks_what_an_undisturbed_one_would(make: Make, sampler: str, options: Any) -> None:
    space = SPACE | ({"optimizer.lr": "0.1,0.01,0.001,0.0001"} if sampler == "grid" else {})
    settings = {"sampler": sampler, "seed": 3, "sampler_options": options}
    whole = run_trials(make(space, folder="undisturbed", **settings), 7)
    pieces = []
    for stop in (1, 5, 7):
        pieces += run_trials(make(space, **settings), stop)
    assert pieces == whole
    assert len({tuple(texts.items()) for texts in whole}) > 4
    for key in space:
        assert len({texts[key] for texts in whole[1:]}) > 1
    other = make(space, folder="undisturbed", **settings | {"seed": 4})
    assert other.ask()[1] != make(space, **settings).ask()[1]


def test_study_holds_settings_and_outcomes_of_the_jobs(make: Make) -> None:
    search = make()
    asked = [search.ask() for _ in range(6)]
    trials = study_of(search).trials
    assert [number for number, _ in asked] == [trial.number for trial in trials] == list(range(6))
    for (_, texts), trial in zip(asked, trials, strict=True):
        assert texts == {key: str(trial.params[key]) for key in SPACE}

    outcomes = [
        record(0, value=0.5),
        record(1, value=0.9),
        record(2, "failed"),
        record(3, "pruned", 0.95),
        record(4, value=None),  # not finite
        record(5, "interrupted"),
    ]
    for outcome in [*outcomes, record(1, value=0.1)]:  # the second time changes nothing
        search.tell(outcome.number, outcome)
    study = study_of(search)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", "FAIL", "RUNNING"]
    assert (study.best_trial.number, study.best_value) == (1, 0.9)
    assert (search.best(), search.unfinished(), search.count()) == ([1], [5], 6)


def test_minimised_objective(make: Make) -> None:
    search = make(objective="loss/val", direction="minimize")
    for number, value in enumerate((0.5, 0.2, 0.9)):
        search.ask()
        search.tell(number, record(number, value=value, objective="loss/val"))
    assert search.best() == [1]


def test_failed_job_keeps_its_number(make: Make) -> None:
    search = make(n_trials=4)
    texts = dict(search.ask() for _ in range(2))
    search.tell(0, record(0, "failed"))
    search.tell(1, record(1, value=0.3))
    assert search.resume_trial(0) == texts[0]
    assert (search.unfinished(), search.count()) == ([0], 2)
    assert search.resume_trial(0) == texts[0]  # once more: no third attempt
    search.tell(0, record(0, value=0.8))
    assert (search.unfinished(), search.count(), search.best()) == ([], 2, [0])
    assert study_of(search).best_value == 0.8
    number, _ = search.ask()
    assert (number, search.count()) == (3, 3)  # the attempt has the 2
    search.tell(3, record(3, "failed"))
    search.tell(3, record(3, value=0.9))  # tried again unseen
    assert (search.best(), search.count()) == ([3], 3)


def test_trial_killed_while_drawn_is_drawn_to_the_end(make: Make) -> None:
    whole = make(folder="undisturbed")
    run_trials(whole, 2)
    expected = whole.ask()[1]
    search = make()
    run_trials(search, 2)
    study = study_of(search)
    study._storage.create_new_trial(study._study_id)  # and then came the kill
    search = make()
    assert search.unfinished() == [2]
    assert search.resume_trial(2) == expected
    assert search.resume_trial(2) == expected


def test_setting_enqueued_with_optuna_is_asked_next(make: Make) -> None:
    search = make()
    study = study_of(search)
    study.enqueue_trial(ENQUEUED)
    expected = {key: str(value) for key, value in ENQUEUED.items()}
    assert search.unfinished() == [0] and search.resume_trial(0) == expected
    study.enqueue_trial(ENQUEUED)
    assert search.ask() == (1, expected)


def test_grid_has_every_point_once(make: Make) -> None:
    space = {"a": "range(1,4)", "b": "x,y"}
    search = make(space, sampler="grid", n_trials=50)
    assert search.total == 6
    asked = []
    while search.count() < search.total:
        number, texts = search.ask()
        asked.append(tuple(texts.values()))
        search.tell(number, record(number, "failed" if len(asked) == 2 else "done", 0.5))
        if len(asked) == 2:  # a job that is tried again is no other point
            search.resume_trial(number)
            search.tell(number, record(number, value=0.1))
    assert sorted(asked) == sorted((str(a), b) for a in (1, 2, 3) for b in "xy")
    assert make(space, sampler="grid", n_trials=4).total == 4


def test_several_objectives_have_a_front(make: Make) -> None:
    search = make(sampler="nsga2", objectives={"accuracy/val": "maximize", "seconds": "minimize"})
    for number, (value, seconds) in enumerate([(0.5, 1.0), (0.9, 3.0), (0.8, 9.0)]):
        search.ask()
        search.tell(number, record(number, value=value, seconds=seconds))
    assert search.best() == [0, 1]
    assert study_of(search).trials[2].values == [0.8, 9.0]
    assert search.reporter(0) is None


def test_objective_that_no_run_measures(make: Make) -> None:
    search = make(objectives={"acuracy/val": "maximize"})
    search.ask()
    with pytest.raises(UserError, match=r"acuracy/val.*Did you mean accuracy/val\?"):
        search.tell(0, record(0, value=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": None}, "objective=METRIC/val"),
        ({"sampler": "tpee"}, r"sweep.sampler=tpee.*Did you mean tpe\?"),
        ({"sampler": "TPESamplr"}, r"Did you mean TPESampler\?"),
        ({"pruner": "medain"}, r"sweep.pruner=medain.*Did you mean median\?"),
        ({"sampler_options": {"n_start": 3}}, r"n_start: TPESampler.*Did you mean n_startup_trials\?"),
        ({"sampler_options": {"seed": 3}}, "sweep.seed"),
        ({"sampler": "nsga2", "sampler_options": {"population_size": 1}}, "sampler_options: NSGAIISampler"),
        ({"pruner": "median", "pruner_options": {"n_warmup": 1}}, r"Did you mean n_warmup_steps\?"),
        ({"pruner": "median", "pruner_options": {"n_startup_trials": -1}}, "pruner_options: MedianPruner"),
        ({"pruner": "ThresholdPruner"}, "sweep.pruner_options: ThresholdPruner"),
        ({"pruner": "median", "objectives": {"loss/val": "minimize"}}, "sweep.objectives=null"),
        ({"objectives": {"accuracy/val": "minimize"}}, "direction=maximize for accuracy/val"),
        ({"sampler": "grid"}, "optimizer.lr: an interval|optimizer.lr.*interval"),
        ({"storage": "nosuchdb://localhost/x"}, "nosuchdb://localhost/x is not a database URL"),
        ({"storage": "sqlite:////no/such/folder/study.db"}, "unable to open database file"),
        ({"storage": "mysql+pymysql://me:secret@localhost/x"}, r"pip install 'pymysql'"),
        ({"storage": "postgresql+psycopg://me:secret@127.0.0.1:1/x"}, r"me:\*\*\*@127.0.0.1:1/x cannot be used"),
    ],
)  # fmt: skip
def test_search_that_optuna_cannot_do(make: Make, settings: Any, message: str) -> None:
    pytest.importorskip("psycopg") if "psycopg" in str(settings) else None
    with pytest.raises(UserError, match=message) as caught:
        make(**settings)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_trials": 0}, "n_trials.* 0"),
        ({"seed": -1}, "seed.* -1"),
        ({"storage": "study.db"}, "storage must be a database URL.* study.db"),
        ({"storage": "postgresql://me:se@cret@host/x"}, "@ as %40"),  # else a part would be shown
        ({"storage": "postgresql://me:sec ret@host/x"}, "@ as %40"),
        ({"objectives": {}}, "objectives must name a metric"),
        ({"objectives": {"accuracy": "maximize"}}, "accuracy/val.* accuracy"),
        ({"objectives": {"accuracy/val": "up"}}, "accuracy/val must be maximize or minimize"),
    ],
)
def test_settings_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SearchConfig(**settings)
    assert "ret" not in str(caught.value)


def test_study_of_another_search(make: Make) -> None:
    make().ask()
    make(n_trials=40, sampler="random").ask()  # these may change
    with pytest.raises(UserError, match=r"toy in sqlite.* another search space"):
        make(SPACE | {"model.layers": "range(1,6)"})
    with pytest.raises(UserError, match="other objectives"):
        make(objective="loss/val", direction="minimize")
    with pytest.raises(UserError, match="no trial 7"):
        make().resume_trial(7)


def report_at_once(
    reporter: Any, values: list[float], environ: dict[str, str], ready: Any, answers: Any
) -> None:
    """Do what a job's process does: report one trial, when all processes are ready, and put the answers."""
    os.environ.update(environ)
    ready.wait(LIMIT)
    answers.put([reporter(evaluation, value) for evaluation, value in enumerate(values)])


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest) -> str | None:
    """Return where the study lies: the sweep's folder, or an empty database of the server."""
    if request.param == "sqlite":
        return None
    url = request.getfixturevalue("server_url")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"db{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.replace("/postgres?", f"/{name}?")


@pytest.mark.slow
def test_processes_report_at_once(make: Make, storage: str | None) -> None:
    search = make(storage=storage)
    numbers = [search.ask()[0] for _ in range(3)]
    values = {number: [number + evaluation / 10 for evaluation in range(5)] for number in numbers}
    ready, answers = FORKS.Barrier(3), FORKS.Queue()
    for number in numbers:
        arguments = (search.reporter(number), values[number], dict(os.environ), ready, answers)
        FORKS.Process(target=report_at_once, args=arguments, daemon=True).start()
    assert [answers.get(timeout=LIMIT) for _ in numbers] == [[False] * 5] * 3
    for number in numbers:
        search.tell(number, record(number, value=values[number][-1]))
    for trial in study_of(search).trials:
        assert trial.intermediate_values == dict(enumerate(values[trial.number]))
        assert trial.value == values[trial.number][-1]


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        ("median", {"n_startup_trials": 2}),
        ("halving", {"min_resource": 1, "reduction_factor": 2}),
        ("hyperband", {"min_resource": 1, "max_resource": 4, "reduction_factor": 2}),
    ],
)
@pytest.mark.slow
def test_bad_job_is_pruned(make: Make, storage: str | None, pruner: str, options: dict[str, int]) -> None:
    search = make(storage=storage, pruner=pruner, pruner_options=options)
    for good in range(6):
        run_job(search, [0.7 + good / 100 + step / 50 for step in range(5)])
    number, _ = search.ask()
    answers = report(search, number, [0.1] * 5)
    assert answers[-1]
    search.tell(number, record(number, "pruned", 0.1))
    trial = study_of(search).trials[number]
    assert trial.state.name == "PRUNED"
    assert len(trial.intermediate_values) == answers.index(True) + 1


def test_killed_search_resumes(make: Make, storage: str | None) -> None:
    settings = {"storage": storage, "pruner": "median", "n_trials": 6}
    search = make(**settings)
    run_trials(search, 3)
    number, texts = search.ask()
    report(search, number, [0.5])
    search = make(**settings)
    assert search.unfinished() == [number]
    assert search.resume_trial(number) == texts
    search.tell(number, record(number, value=2.0))
    run_trials(search, search.total)
    assert (search.count(), search.best(), search.unfinished()) == (6, [number], [])
    assert study_of(search).best_value == 2.0


def test_resumed_job_gets_the_same_answers(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1, "n_warmup_steps": 2})
    run_job(search, [0.5] * 4)
    number, _ = search.ask()
    values = [0.1, 0.1, 0.1]
    assert report(search, number, values) == [False, False, True]
    assert report(search, number, values) == [False, False, True]
    assert study_of(search).trials[number].intermediate_values == dict(enumerate(values))


def test_later_jobs_do_not_change_an_earlier_answer(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1})
    number, _ = search.ask()
    assert report(search, number, [0.5, 0.5]) == [False, False]
    for _ in range(2):
        run_job(search, [0.9] * 3)
    assert report(search, number, [0.5, 0.5, 0.5])[0] is False
    assert report(search, number, [0.5, 0.5, 0.5])[2] is True  # this was new


def test_second_attempt_is_pruned_too(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1})
    for value in (0.5, 0.6):
        run_job(search, [value])
    number = run_job(search, [math.nan, math.inf, 0.9], "failed")
    assert study_of(search).trials[number].intermediate_values == {2: 0.9}  # the finite one
    search.resume_trial(number)
    assert report(search, number, [0.1]) == [True]


def test_run_goes_on_where_the_database_is_lost(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = make(pruner="median")
    number, _ = search.ask()
    reporter = search.reporter(number)
    search.close()
    (tmp_path / "study.db").unlink()
    assert reporter is not None and [reporter(evaluation, 0.5) for evaluation in range(3)] == [False] * 3
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "The run goes on" in caplog.text
