"""A search against Optuna's own reading of the study, in SQLite files and in a PostgreSQL server of our own."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.config.command import masked
from runner.errors import UserError
from runner.sweep.grid import parse_texts
from runner.sweep.record import Record
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.storage import PASSWORD, password_of, same_storage, with_password
from runner.sweep.search.study import Search, TrialReporter
from runner.sweep.space import read_space
from tests.runner.sweep.postgres import server

optuna = pytest.importorskip("optuna")
sqlalchemy = pytest.importorskip("sqlalchemy")

SPACE = {"optimizer.lr": "tag(log,interval(1e-4,1))", "model.layers": "range(1,5)", "optimizer": "sgd,adam"}
Make = Callable[..., Search]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Opens the test's one study as often as it is asked to."""
    opened = []

    def open_search(
        space: dict[str, str] = SPACE,
        objective: str | None = "accuracy/val",
        direction: str = "maximize",
        folder: Path = tmp_path,
        **settings: Any,
    ) -> Search:
        search = Search(
            SearchConfig(**settings), read_space(parse_texts(space)), folder, objective, direction, "toy"
        )
        opened.append(search)
        return search

    yield open_search
    for search in opened:
        search.close()


def record(number: int, status: str = "done", value: float | None = None, **more: Any) -> Record:
    """A job that has come to this."""
    given = {"metrics": {"val": {"accuracy": value}}, "seconds": 1.0} | more
    return Record(
        number, str(number), {}, {}, "", "accuracy/val", "maximize", [], [], status, None, value, **given
    )


def quality(texts: dict[str, str]) -> float:
    """A smooth accuracy with its best at a learning rate of 0.03, 3 layers and adam."""
    distance = abs(math.log10(float(texts["optimizer.lr"])) + 1.5) + abs(int(texts["model.layers"]) - 3)
    return 1 / (1 + distance) - 0.1 * (texts["optimizer"] == "sgd")


def search_on(search: Search, stop: int) -> list[dict[str, str]]:
    """Ask and tell until `stop` trials are there."""
    asked = []
    while search.count() < stop:
        number, texts = search.ask()
        asked.append(texts)
        search.tell(number, record(number, value=quality(texts)))
    return asked


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "QMCSampler", "grid"])
def test_a_search_that_is_opened_again_asks_what_an_undisturbed_one_would(
    make: Make, tmp_path: Path, sampler: str
) -> None:
    space = SPACE | ({"optimizer.lr": "0.1,0.01,0.001,0.0001"} if sampler == "grid" else {})
    options = {
        "tpe": {"n_startup_trials": 4},
        "nsga2": {"population_size": 4},
        "QMCSampler": {"scramble": True},
    }
    settings = {"sampler": sampler, "seed": 3, "sampler_options": options.get(sampler, {})}
    (tmp_path / "undisturbed").mkdir()
    whole = search_on(make(space, folder=tmp_path / "undisturbed", **settings), 12)
    pieces = []
    for stop in (1, 5, 6, 12):
        pieces += search_on(make(space, **settings), stop)
    assert pieces == whole
    assert len({tuple(texts.items()) for texts in whole}) > 8
    for key in space:
        assert len({texts[key] for texts in whole[1:]}) > 1
    other = make(space, folder=tmp_path / "undisturbed", **settings | {"seed": 4})
    assert other.ask()[1] != make(space, **settings).ask()[1]


def test_trials_are_numbered_like_jobs_and_hold_what_the_texts_say(make: Make, tmp_path: Path) -> None:
    search = make()
    asked = [search.ask() for _ in range(5)]
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [number for number, _ in asked] == [trial.number for trial in study.trials] == [0, 1, 2, 3, 4]
    for (_, texts), trial in zip(asked, study.trials, strict=True):
        assert list(texts) == list(SPACE)
        assert float(texts["optimizer.lr"]) == trial.params["optimizer.lr"]
        assert int(texts["model.layers"]) == trial.params["model.layers"]
        assert texts["optimizer"] == trial.params["optimizer"]


def test_what_is_told_is_what_the_study_says(make: Make, tmp_path: Path) -> None:
    search = make()
    for _ in range(6):
        search.ask()
    for told in (
        record(0, value=0.5),
        record(1, value=0.9),
        record(2, "failed"),
        record(3, "pruned", 0.95),
        record(4, value=None),  # not finite
        record(5, "interrupted"),
    ):
        search.tell(told.number, told)
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", "FAIL", "RUNNING"]
    assert (study.best_trial.number, study.best_value) == (1, 0.9)
    assert (search.best(), search.value(1), search.value(3)) == ([1], (0.9,), None)
    assert (search.unfinished(), search.count()) == ([5], 6)
    search.tell(1, record(1, value=0.1))
    assert search.value(1) == (0.9,)


def test_a_minimised_objective_is_minimised(make: Make) -> None:
    search = make(objective="loss/val", direction="minimize")
    for number, value in enumerate((0.5, 0.2, 0.9)):
        search.ask()
        told = record(number, value=value)
        told.objective = "loss/val"
        search.tell(number, told)
    assert search.best() == [1]


def test_a_failed_job_that_is_tried_again_keeps_its_number(make: Make) -> None:
    search = make(n_trials=4)
    texts = dict(search.ask() for _ in range(2))
    search.tell(0, record(0, "failed"))
    search.tell(1, record(1, value=0.3))
    assert search.take_up(0) == texts[0]
    assert (search.unfinished(), search.count()) == ([0], 2)
    assert search.take_up(0) == texts[0]  # once more: no third attempt
    search.tell(0, record(0, value=0.8))
    assert (search.unfinished(), search.count(), search.best()) == ([], 2, [0])
    assert search.value(0) == (0.8,)
    number, _ = search.ask()
    assert number == 3  # the attempt has the 2
    assert search.count() == 3
    search.tell(3, record(3, "failed"))
    search.tell(3, record(3, value=0.9))  # tried again unseen
    assert (search.best(), search.count()) == ([3], 3)


def test_a_trial_that_was_left_while_it_was_drawn_is_drawn_to_the_end(make: Make, tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    whole = make(folder=tmp_path / "undisturbed")
    search_on(whole, 2)
    expected = whole.ask()[1]
    search = make()
    search_on(search, 2)
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path / 'study.db'}")
    study._storage.create_new_trial(study._study_id)  # and then came the kill
    search = make()
    assert search.unfinished() == [2]
    assert search.take_up(2) == expected
    assert search.take_up(2) == expected


def test_a_setting_that_was_enqueued_with_optuna_is_asked_next(make: Make, tmp_path: Path) -> None:
    search = make()
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.enqueue_trial({"optimizer.lr": 0.5, "model.layers": 2, "optimizer": "adam"})
    assert search.unfinished() == [0]
    wanted = {"optimizer.lr": "0.5", "model.layers": "2", "optimizer": "adam"}
    assert search.take_up(0) == wanted
    study.enqueue_trial({"optimizer.lr": 0.5, "model.layers": 2, "optimizer": "adam"})
    assert search.ask() == (1, wanted)


def test_a_grid_has_every_point_once_and_ends(make: Make) -> None:
    space = {"a": "range(1,4)", "b": "x,y"}
    search = make(space, sampler="grid", n_trials=50)
    assert search.total == 6
    found = [tuple(texts.values()) for texts in search_on_grid(search)]
    assert sorted(found) == sorted((str(a), b) for a in (1, 2, 3) for b in "xy")
    assert make({"a": "range(1,4)", "b": "x,y"}, sampler="grid", n_trials=4).total == 4


def search_on_grid(search: Search) -> list[dict[str, str]]:
    """All of a grid, its second job tried twice."""
    asked = []
    while search.count() < search.total:
        number, texts = search.ask()
        asked.append(texts)
        search.tell(number, record(number, "failed" if len(asked) == 2 else "done", 0.5))
        if len(asked) == 2:
            search.take_up(number)
            search.tell(number, record(number, value=0.1))
    return asked


def test_several_objectives_have_a_front(make: Make) -> None:
    objectives = {"accuracy/val": "maximize", "seconds": "minimize"}
    search = make(sampler="nsga2", objectives=objectives)
    for number, (value, seconds) in enumerate([(0.5, 1.0), (0.9, 3.0), (0.8, 9.0)]):
        search.ask()
        search.tell(number, record(number, value=value, seconds=seconds))
    assert search.best() == [0, 1]
    assert search.value(2) == (0.8, 9.0)
    assert search.reporter(0) is None


def test_an_objective_that_no_run_measures_is_told_with_those_there_are(make: Make) -> None:
    search = make(objectives={"acuracy/val": "maximize"})
    search.ask()
    with pytest.raises(UserError, match=r"acuracy/val is not measured. Did you mean accuracy/val\?"):
        search.tell(0, record(0, value=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "tpee"}, r"sweep.sampler=tpee: there is no such sampler. Did you mean tpe\?"),
        ({"sampler": "TPESamplr"}, r"Did you mean TPESampler\?"),
        ({"pruner": "medain"}, r"sweep.pruner=medain: there is no such pruner. Did you mean median\?"),
        (
            {"sampler_options": {"n_start": 3}},
            r"TPESampler takes no n_start. Did you mean n_startup_trials\?",
        ),
        ({"sampler_options": {"seed": 3}}, "this is what sweep.seed says"),
        (
            {"sampler": "nsga2", "sampler_options": {"population_size": 1}},
            "sweep.sampler_options: NSGAIISampler",
        ),
        ({"pruner": "median", "pruner_options": {"n_warmup": 1}}, r"Did you mean n_warmup_steps\?"),
        (
            {"pruner": "median", "pruner_options": {"n_startup_trials": -1}},
            "sweep.pruner_options: MedianPruner",
        ),
        ({"pruner": "ThresholdPruner"}, "sweep.pruner_options: ThresholdPruner"),
        ({"pruner": "median", "objectives": {"loss/val": "minimize"}}, "judges a run by its own objective"),
        ({"objectives": {"accuracy/val": "minimize"}}, "accuracy/val is to maximize in the run"),
        ({"sampler": "grid"}, "optimizer.lr: an interval has no end of values"),
        ({"storage": "nosuchdb://localhost/x"}, "is no database's URL"),
        ({"storage": "sqlite:////no/such/folder/study.db"}, "cannot be used: unable to open database file"),
        ({"storage": "mysql+pymysql://me:secret@localhost/x"}, r"pip install 'pymysql'"),
        (
            {"storage": "postgresql+psycopg://me:secret@127.0.0.1:1/x"},
            r"me:\*\*\*@127.0.0.1:1/x cannot be used",
        ),
    ],
)
def test_what_optuna_does_not_have_is_one_message(make: Make, settings: Any, message: str) -> None:
    pytest.importorskip("psycopg") if "psycopg" in str(settings) else None
    with pytest.raises(UserError, match=message) as caught:
        make(**settings)
    assert "secret" not in str(caught.value)


def test_a_run_without_an_objective_has_nothing_to_search_for(make: Make) -> None:
    with pytest.raises(UserError, match="set objective=METRIC/val"):
        make(objective=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_trials": 0}, "n_trials must be 1 or more, not 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"storage": "study.db"}, "storage must be a database's URL.* not study.db"),
        ({"storage": "postgresql://me:se@cret@host/x"}, "write @ as %40"),  # else a part would be shown
        ({"storage": "postgresql://me:sec ret@host/x"}, "write @ as %40"),
        ({"objectives": {}}, "objectives must name a metric"),
        ({"objectives": {"accuracy": "maximize"}}, "objectives must be metrics such as accuracy/val"),
        ({"objectives": {"accuracy/val": "up"}}, "accuracy/val must be maximize or minimize, not up"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**settings)


def test_a_study_is_not_searched_on_in_another_space(make: Make) -> None:
    make().ask()
    make(n_trials=40, sampler="random").ask()  # these may change
    with pytest.raises(UserError, match=r"study toy in sqlite.* has another search space"):
        make(SPACE | {"model.layers": "range(1,6)"})
    with pytest.raises(UserError, match="has other objectives"):
        make(objective="loss/val", direction="minimize")


def test_a_study_that_was_lost_is_told(make: Make) -> None:
    with pytest.raises(UserError, match="has no trial 3, which the sweep's folder has a job for"):
        make().take_up(3)


def test_a_password_is_not_shown() -> None:
    assert masked("postgresql://me:p@ss@host/name") == "postgresql://me:***@host/name"
    assert (
        masked("postgresql://host/name?user=me&password=pass")
        == "postgresql://host/name?user=me&password=***"
    )
    assert masked("sqlite:////tmp/a@b/study.db") == "sqlite:////tmp/a@b/study.db"
    assert masked("'a://me:p w' and b://me:x@host, c@d") == "'a://me:p w' and b://me:***@host, c@d"
    assert "pass" not in repr(TrialReporter("postgresql://me:pass@host/name", "toy", 0))
    assert b"pass" not in pickle.dumps(TrialReporter("postgresql://me:pass@host/name", "toy", 0))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:se%2Fc%40ret@host:5432/name?connect_timeout=3",
        "postgresql://me:se%2Fc%40ret@/name?host=/tmp/x",
        "postgresql://host/name?user=me&password=se%2Fc%40ret&connect_timeout=3",
        "postgresql://host/name?password=se%2Fc%40ret",
        "mysql+pymysql://host/name?password=se%2Fc%40ret&charset=utf8",
    ],
)
def test_a_url_is_kept_without_its_password_and_gets_it_from_the_environment(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SQLAlchemy reads them."""
    monkeypatch.delenv(PASSWORD, raising=False)
    whole, kept = sqlalchemy.make_url(url), masked(url)
    assert password_of(url) == "se/c@ret" and "ret" not in kept
    bare = sqlalchemy.make_url(with_password(kept))
    assert bare.password is None and "password" not in bare.query
    assert (bare.host, bare.port, bare.database) == (whole.host, whole.port, whole.database)
    assert bare.query == {key: value for key, value in whole.query.items() if key != "password"}
    monkeypatch.setenv(PASSWORD, "se/c@ret")
    assert sqlalchemy.make_url(with_password(kept)) == whole
    assert with_password(url) == url and with_password("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"


def test_a_resume_may_add_the_password_alone(tmp_path: Path) -> None:
    typed = "postgresql://me:secret@host/name"
    for kept in (masked(typed), "postgresql://me@host/name", typed):
        assert same_storage(typed, kept, tmp_path) == typed
    for other in ("postgresql://me@elsewhere/name", "postgresql://you:***@host/name", None):
        with pytest.raises(UserError, match="a resume may add the password alone") as caught:
            same_storage(typed, other, tmp_path)
        assert "secret" not in str(caught.value)


# what a job's process does: the reports of one trial, and the verdicts
WORKER = """
import pickle, sys, time
reporter = pickle.loads(bytes.fromhex(sys.argv[1]))
time.sleep(max(0, float(sys.argv[2]) - time.time()))
print([reporter(evaluation, float(value)) for evaluation, value in enumerate(sys.argv[3:])])
"""


def start_worker(reporter: TrialReporter, values: list[float], at: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, pickle.dumps(reporter).hex(), str(at), *map(str, values)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def work(reporter: TrialReporter, values: list[float]) -> list[bool]:
    """Report values from another process; the verdicts."""
    output, _ = start_worker(reporter, values).communicate(timeout=60)
    return [word == "True" for word in output.strip().strip("[]").split(", ")]


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A PostgreSQL server for this file."""
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest) -> str | None:
    """Where the study lies: the sweep's folder, or an empty database of the server."""
    if request.param == "sqlite":
        return None
    url = request.getfixturevalue("server_url")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"db{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.replace("/postgres?", f"/{name}?")


def study_of(search: Search) -> Any:
    """The search's study, read by Optuna alone."""
    return optuna.load_study(study_name="toy", storage=search.url)


def test_processes_report_at_once(make: Make, storage: str | None) -> None:
    search = make(storage=storage)
    numbers = [search.ask()[0] for _ in range(3)]
    values = {number: [number + evaluation / 10 for evaluation in range(5)] for number in numbers}
    at = time.time() + 3
    workers = [start_worker(search.reporter(number), values[number], at) for number in numbers]
    for worker in workers:
        assert worker.communicate(timeout=60)[0].strip() == str([False] * 5)
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
def test_a_bad_job_is_pruned_from_its_own_process(
    make: Make, storage: str | None, pruner: str, options: dict[str, int]
) -> None:
    search = make(storage=storage, pruner=pruner, pruner_options=options)
    for good in range(6):
        number, _ = search.ask()
        report = search.reporter(number)
        assert not any([report(evaluation, 0.7 + good / 100 + evaluation / 50) for evaluation in range(5)])
        search.tell(number, record(number, value=0.9))
    number, _ = search.ask()
    verdicts = work(search.reporter(number), [0.1, 0.1, 0.1, 0.1, 0.1])
    assert verdicts[-1]
    search.tell(number, record(number, "pruned", 0.1))
    trial = study_of(search).trials[number]
    assert trial.state.name == "PRUNED"
    assert len(trial.intermediate_values) == verdicts.index(True) + 1


def test_a_killed_search_is_taken_up(make: Make, storage: str | None) -> None:
    settings = {"storage": storage, "pruner": "median", "n_trials": 8}
    search = make(**settings)
    search_on(search, 3)
    number, texts = search.ask()
    search.reporter(number)(0, 0.5)
    search = make(**settings)
    assert search.unfinished() == [number]
    assert search.take_up(number) == texts
    search.tell(number, record(number, value=2.0))
    search_on(search, search.total)
    assert (search.count(), search.best(), search.unfinished()) == (8, [number], [])
    assert study_of(search).best_value == 2.0


def test_a_resumed_job_gets_the_verdicts_that_it_had(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1, "n_warmup_steps": 2})
    number, _ = search.ask()
    for evaluation in range(4):
        search.reporter(number)(evaluation, 0.5)
    search.tell(number, record(number, value=0.5))
    number, _ = search.ask()
    values = [0.1, 0.1, 0.1]
    verdicts = [search.reporter(number)(evaluation, value) for evaluation, value in enumerate(values)]
    assert verdicts == [False, False, True]
    again = search.reporter(number)
    assert [again(evaluation, value) for evaluation, value in enumerate(values)] == verdicts
    assert study_of(search).trials[number].intermediate_values == dict(enumerate(values))


def test_what_others_came_to_meanwhile_does_not_change_an_earlier_verdict(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1})
    number, _ = search.ask()
    before = [search.reporter(number)(evaluation, 0.5) for evaluation in range(2)]
    for _ in range(2):
        other, _ = search.ask()
        for evaluation in range(3):
            search.reporter(other)(evaluation, 0.9)
        search.tell(other, record(other, value=0.9))
    again = search.reporter(number)
    assert [again(0, 0.5)] == before[:1] == [False]
    assert again(2, 0.5)  # this is new


def test_values_that_are_no_numbers_are_not_reported(make: Make) -> None:
    search = make(pruner="median")
    number, _ = search.ask()
    report = search.reporter(number)
    assert [report(0, float("nan")), report(1, float("inf")), report(2, 0.5)] == [False] * 3
    assert study_of(search).trials[0].intermediate_values == {2: 0.5}


def test_an_attempt_at_a_failed_job_is_judged_too(make: Make) -> None:
    search = make(pruner="median", pruner_options={"n_startup_trials": 1})
    for value in (0.5, 0.6):
        number, _ = search.ask()
        search.reporter(number)(0, value)
        search.tell(number, record(number, value=value))
    number, _ = search.ask()
    search.reporter(number)(0, 0.9)
    search.tell(number, record(number, "failed"))
    search.take_up(number)
    verdict = search.reporter(number)(0, 0.1)
    assert verdict is True


def test_a_run_goes_on_where_the_database_is_lost(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = make(pruner="median")
    number, _ = search.ask()
    report = search.reporter(number)
    search.close()
    (tmp_path / "study.db").unlink()
    assert [report(evaluation, 0.5) for evaluation in range(3)] == [False] * 3
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "The run goes on" in caplog.text
