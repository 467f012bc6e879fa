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
import yaml

from runner.errors import UserError
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.study import Search
from tests.conftest import LIMIT
from tests.runner.processes import FORKS
from tests.runner.sweep.conftest import SPACE
from tests.runner.sweep.helpers import cases, missing, tell

optuna = pytest.importorskip("optuna")
sqlalchemy = pytest.importorskip("sqlalchemy")

Make = Callable[..., Search]


def run_trials(search: Search, stop: int) -> list[dict[str, str]]:
    """Ask and tell until there are `stop` trials; return their settings."""
    asked = []
    while search.count() < stop:
        number, texts = search.ask()
        asked.append(texts)
        # best at a learning rate of 0.03, 3 layers and adam
        distance = abs(math.log10(float(texts["optimizer.lr"])) + 1.5) + abs(int(texts["model.layers"]) - 3)
        tell(search, number, 1 / (1 + distance) - 0.1 * (texts["optimizer"] == "sgd"))
    return asked


def study_of(search: Search) -> Any:
    """Return the search's study, read by Optuna alone."""
    return optuna.load_study(study_name="toy", storage=search.url)


def report(search: Search, number: int, values: list[float]) -> list[bool]:
    """Report a job's evaluations by a reporter that has travelled; return the answers."""
    reporter = pickle.loads(pickle.dumps(search.reporter(number)))
    return [reporter(evaluation, value) for evaluation, value in enumerate(values)]


def run_job(search: Search, values: list[float], status: str = "done") -> int:
    """Ask for a job that reports these values and is not pruned; return its number."""
    number, _ = search.ask()
    assert not any(report(search, number, values))
    tell(search, number, values[-1], status)
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
    assert [texts for stop in (1, 5, 7) for texts in run_trials(make(space, **settings), stop)] == whole
    assert len({tuple(texts.items()) for texts in whole}) > 4
    assert all(len({texts[key] for texts in whole[1:]}) > 1 for key in space)
    other = make(space, folder="undisturbed", **settings | {"seed": 4})
    assert other.ask()[1] != make(space, **settings).ask()[1]


def test_study_holds_settings_and_outcomes_of_the_jobs(make: Make) -> None:
    search = make()
    asked = [search.ask() for _ in range(6)]
    trials = study_of(search).trials
    assert [number for number, _ in asked] == [trial.number for trial in trials] == list(range(6))
    for (_, texts), trial in zip(asked, trials, strict=True):
        assert texts == {key: str(trial.params[key]) for key in SPACE}

    values = [0.5, 0.9, None, 0.95, None, None]  # the done one without a value was not finite
    for number, status in enumerate(["done", "done", "failed", "pruned", "done", "interrupted"]):
        tell(search, number, values[number], status)
    tell(search, 1, 0.1)  # the second time changes nothing
    study = study_of(search)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", "FAIL", "RUNNING"]
    assert (study.best_trial.number, study.best_value) == (1, 0.9)
    assert (search.best(), search.unfinished(), search.count()) == ([1], [5], 6)


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({}, [1]),
        ({"objective": "loss/val", "direction": "minimize"}, [2]),
        ({"sampler": "nsga2", "objectives": {"accuracy/val": "maximize", "seconds": "minimize"}}, [0, 1]),
    ],
    ids=["maximise", "minimise", "front"],
)
def test_best_of_one_objective_or_several(make: Make, settings: Any, best: list[int]) -> None:
    search, outcomes = make(**settings), [(0.5, 1.0), (0.9, 3.0), (0.2, 9.0)]
    for value, seconds in outcomes:
        number, _ = search.ask()
        tell(search, number, value, objective=settings.get("objective", "accuracy/val"), seconds=seconds)
    assert search.best() == best
    told = [tuple(trial.values) for trial in study_of(search).trials]
    assert told == [outcome[: len(search.objectives)] for outcome in outcomes]
    assert (search.reporter(0) is None) == (len(search.objectives) > 1)


def test_failed_job_keeps_its_number(make: Make) -> None:
    search = make(n_trials=4)
    texts = dict(search.ask() for _ in range(2))
    tell(search, 0, status="failed")
    tell(search, 1, 0.3)
    for _ in range(2):  # once more: no third attempt
        assert search.resume_trial(0) == texts[0]
        assert (search.unfinished(), search.count()) == ([0], 2)
    tell(search, 0, 0.8)
    assert (search.unfinished(), search.count(), search.best()) == ([], 2, [0])
    assert study_of(search).best_value == 0.8
    number, _ = search.ask()
    assert (number, search.count()) == (3, 3)  # the attempt has the 2
    tell(search, 3, status="failed")
    tell(search, 3, 0.9)  # tried again unseen
    assert (search.best(), search.count()) == ([3], 3)


def test_trial_killed_while_drawn_is_drawn_to_the_end(make: Make) -> None:
    whole = make(folder="undisturbed")
    run_trials(whole, 2)
    search = make()
    run_trials(search, 2)
    study = study_of(search)
    study._storage.create_new_trial(study._study_id)  # and then came the kill
    search, expected = make(), whole.ask()[1]
    assert search.unfinished() == [2]
    assert search.resume_trial(2) == search.resume_trial(2) == expected


def test_setting_enqueued_with_optuna_is_asked_next(make: Make) -> None:
    search, setting = make(), {"optimizer.lr": 0.5, "model.layers": 2, "optimizer": "adam"}
    expected = {key: str(value) for key, value in setting.items()}
    study_of(search).enqueue_trial(setting)
    assert search.unfinished() == [0] and search.resume_trial(0) == expected
    study_of(search).enqueue_trial(setting)
    assert search.ask() == (1, expected)


def test_grid_has_every_point_once(make: Make) -> None:
    space = {"a": "range(1,4)", "b": "x,y"}
    search = make(space, sampler="grid", n_trials=50)
    assert search.total == 6
    asked = []
    while search.count() < search.total:
        number, texts = search.ask()
        asked.append(tuple(texts.values()))
        tell(search, number, 0.5, "failed" if len(asked) == 2 else "done")
        if len(asked) == 2:  # a job that is tried again is no other point
            search.resume_trial(number)
            tell(search, number, 0.1)
    assert sorted(asked) == sorted((str(a), b) for a in (1, 2, 3) for b in "xy")
    assert make(space, sampler="grid", n_trials=4).total == 4


@cases("search", "typed", "names")
def test_search_that_optuna_cannot_do(make: Make, typed: str, names: str) -> None:
    pytest.importorskip("psycopg") if "psycopg" in typed else None
    with pytest.raises(UserError) as caught:
        make(**yaml.safe_load(typed))
    assert missing(names, caught.value) == []
    assert "secret" not in str(caught.value)


@cases("settings", "typed", "names")
def test_settings_out_of_range(typed: str, names: str) -> None:
    with pytest.raises(ValueError) as caught:
        SearchConfig(**yaml.safe_load(typed))
    assert missing(names, caught.value) == []
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
    search = make(folder="unmeasured", objectives={"acuracy/val": "maximize"})
    search.ask()
    with pytest.raises(UserError, match=r"acuracy/val.*did you mean .accuracy/val.\?"):
        tell(search, 0, 0.5)


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
    values = {search.ask()[0]: [number + step / 10 for step in range(5)] for number in range(3)}
    ready, answers = FORKS.Barrier(3), FORKS.Queue()
    for number in values:
        arguments = (search.reporter(number), values[number], dict(os.environ), ready, answers)
        FORKS.Process(target=report_at_once, args=arguments, daemon=True).start()
    assert [answers.get(timeout=LIMIT) for _ in values] == [[False] * 5] * 3
    for number in values:
        tell(search, number, values[number][-1])
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
    tell(search, number, 0.1, "pruned")
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
    tell(search, number, 2.0)
    run_trials(search, search.total)
    assert (search.count(), search.best(), search.unfinished()) == (6, [number], [])
    assert study_of(search).best_value == 2.0


def test_resumed_job_gets_the_same_answers_whatever_ended_meanwhile(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1, "n_warmup_steps": 1})
    early, _ = search.ask()
    assert report(search, early, [0.5] * 3) == [False] * 3
    for _ in range(2):
        run_job(search, [0.9] * 4)
    answers = report(search, early, [0.5] * 4)
    assert (answers[1], answers[3]) == (False, True)  # the last is new

    number, _ = search.ask()
    for _ in range(2):
        assert report(search, number, [0.1] * 3) == [False, True, True]
    assert study_of(search).trials[number].intermediate_values == {0: 0.1, 1: 0.1}

    # a second attempt
    number = run_job(search, [math.nan, math.inf, 0.9], "failed")
    assert study_of(search).trials[number].intermediate_values == {2: 0.9}  # the finite one
    search.resume_trial(number)
    assert report(search, number, [0.1] * 2) == [False, True]


def test_run_goes_on_where_the_database_is_lost(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = make(pruner="median")
    reporter: Any = search.reporter(search.ask()[0])
    search.close()
    (tmp_path / "study.db").unlink()
    assert [reporter(evaluation, 0.5) for evaluation in range(3)] == [False] * 3
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "The run goes on" in caplog.text
    with pytest.raises(UserError, match=r"study\.db cannot be used"):  # the search itself does not
        search.count()
