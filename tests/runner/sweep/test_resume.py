"""A sweep that is killed at any moment and resumed ends as one that was not."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from filelock import FileLock

from runner.engine import checkpoint
from runner.sweep import store
from runner.sweep.record import read_records
from runner.sweep.search.storage import PASSWORD_VARIABLE
from tests.conftest import Outcome
from tests.runner.sweep.helpers import FLAGS, JOBLIB, TOYS, done, timeless_table
from tests.runner.sweep.postgres import PASSWORD
from tests.runner.sweep.processes import opened

GRID = ["experiment=toy_paced", "optimizer.lr=0.01,0.1,0.3", "seed=0,1,2,3"]
SEARCH = [
    "experiment=toy_paced",
    "sweep=optuna",
    "sweep.n_trials=14",
    "optimizer.lr=tag(log,interval(0.001,1))",
]
Command = Callable[..., Outcome]


def logs(sweep: Path, names: set[str]) -> dict[str, bytes]:
    """Return what the jobs have logged, and when they ended."""
    files = ("run.log", "summary.json")
    return {name: b"".join((sweep / name / file).read_bytes() for file in files) for name in names}


def kill_and_resume(
    folder: Path, command: list[str], draw: random.Random, kills: int, more: list[str]
) -> dict[str, bytes]:
    """Start a sweep in `folder/sweep`, kill and resume it; return the logs of the jobs that were done at each kill.

    `more` is what a resume is given besides the folder.
    """
    sweep = folder / "sweep"
    logged: dict[str, bytes] = {}
    for number in range(kills):
        begun = (sweep / ".sweep" / "sweep.json").exists()
        target = len(done(sweep)) + draw.randint(1, 3)
        again = [*FLAGS, "resume=sweep", *more]
        with opened(folder, again if begun else command, TOY_PAUSE="0.02") as cli:
            assert cli.wait_until(lambda target=target: len(done(sweep)) >= target), cli.screen()
            time.sleep(draw.uniform(0, 0.3))
            cli.send(signal.SIGKILL)
            assert cli.end() == -signal.SIGKILL
        logged |= logs(sweep, done(sweep) - logged.keys())
        assert logs(sweep, set(logged)) == logged, f"a job that was done ran again before kill {number}"
    return logged


def half_done(sweep: Path) -> list[str]:
    """Return the jobs that a kill left with a checkpoint after their first step."""
    return [
        path.parent.parent.name
        for path in sweep.glob("*/checkpoints/last.pt")
        if not (path.parent.parent / "summary.json").exists() and checkpoint.load(path)["step"] > 0
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "storage", "launcher"),
    [
        ("grid", "", "basic"),
        ("grid", "", "joblib"),
        ("random", "sqlite", "basic"),
        ("random", "sqlite", "joblib"),  # whose draws depend on no other trial, be it still running
        ("tpe", "sqlite", "basic"),
        ("tpe", "postgresql", "basic"),
    ],
)
def test_killed_sweep(
    kind: str, storage: str, launcher: str, cli: Command, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    if kind != "grid":
        pytest.importorskip("optuna")
    more = {"tpe": ["+sweep.sampler_options.n_startup_trials=3", "sweep.pruner=median"]}.get(kind, [])
    command = [*FLAGS, *(GRID if kind == "grid" else [*SEARCH, f"sweep.sampler={kind}", *more])]
    where = [f"sweep.storage='{request.getfixturevalue('server_url')}'"] if storage == "postgresql" else []
    side = JOBLIB if launcher == "joblib" else []
    sweep, calm = tmp_path / "sweep", tmp_path / "calm"
    count = 12 if kind == "grid" else 14

    # killed twice
    started = [*command, *where, *side, "sweep.dir=sweep"]
    logged = kill_and_resume(tmp_path, started, random.Random(kind + launcher), 2, where)
    assert 0 < len(logged) < count
    left = half_done(sweep)

    # gone on with: for a grid the same command is as good as resume=
    same = kind == "grid" and launcher == "basic"
    ended = cli(*command, "sweep.dir=sweep") if same else cli(*FLAGS, "resume=sweep", *where)
    assert ended.status == 0, ended.out + ended.err
    assert logs(sweep, set(logged)) == logged
    assert len(list(sweep.glob("[0-9]*_*"))) == count
    assert [record.number for record in read_records(sweep)] == list(range(count))
    for name in left:
        assert re.search(r"resumed +at step [1-9]", (sweep / name / "run.log").read_text()), name

    # undisturbed
    assert cli(*command, "sweep.dir=calm").status == 0
    for name in ("leaderboard.csv", "runs.csv"):  # of a search: the same settings were asked for
        assert timeless_table(sweep / name) == timeless_table(calm / name)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_password_of_a_database_is_on_no_disk_and_no_screen(
    launcher: str, cli: Command, tmp_path: Path, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        joblib = pytest.importorskip("joblib")
        joblib.Parallel(n_jobs=2)(joblib.delayed(int)() for _ in range(2))  # from before the password
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    storage = f"sweep.storage='{server_url}'"
    side = JOBLIB if launcher == "joblib" else []
    # two evaluations of each trial are reported, also by processes that were given no password
    command = [*FLAGS, "experiment=toy_paced", "optimizer.lr=interval(0.1,1)", "sweep=optuna", "loop.steps=2"]
    first = cli(*command, *side, "sweep.pruner=median", "sweep.n_trials=2", "sweep.dir=sweep", storage)
    assert first.status == 0, first.out + first.err
    logged = [path.read_text() for path in (tmp_path / "sweep").glob("*/run.log")]
    assert len(logged) == 2 and "The run goes on" not in "".join(logged)

    # without the password, with a wrong one, with another URL
    monkeypatch.delenv(PASSWORD_VARIABLE)
    more = ("resume=sweep", "sweep.n_trials=3")
    refused = cli(*FLAGS, *more)
    assert refused.status == 2 and "no password" in refused.err and "sweep.storage=" in refused.err
    wrong = cli(*FLAGS, *more, storage.replace(quote(PASSWORD, safe=""), "wrong-one"))
    assert wrong.status == 2 and "password authentication failed" in wrong.err
    misspelt = cli(*FLAGS, *more, storage.replace("sweep.", "sweep.no"))
    other = cli(*FLAGS, *more, storage.replace("tester", "other"))
    assert misspelt.status == other.status == 2

    # with the password, from the environment and typed
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert cli(*FLAGS, *more).status == 0
    monkeypatch.delenv("PGPASSWORD")
    again = cli(*FLAGS, "resume=sweep", "sweep.n_trials=4", storage)
    assert again.status == 0, again.out + again.err
    records = read_records(tmp_path / "sweep")
    assert [record.overrides for record in records] == [
        ["experiment=toy_paced", "loop.steps=2", f"optimizer.lr={r.swept['optimizer.lr']}"] for r in records
    ]

    shown = [end.out + end.err for end in (first, refused, wrong, misspelt, other, again)]
    written = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), "wrong-one"):
        assert not any(secret in text for text in [*shown, *written])


def test_search_that_was_interrupted_before_its_first_trial_and_gets_more(
    cli: Command, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    with monkeypatch.context() as interrupted:
        ask = "runner.sweep.search.study.Search.ask"
        interrupted.setattr(ask, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ended = cli(*FLAGS, *SEARCH, "sweep.dir=sweep", "loop.steps=1")
    assert ended.status == 130 and "-m resume=sweep" in ended.out
    assert not read_records(sweep)
    assert cli(*FLAGS, "resume=sweep", "sweep.n_trials=2").status == 0
    assert [record.config["loop"]["steps"] for record in read_records(sweep)] == [1, 1]

    logged = logs(sweep, done(sweep))
    grid = cli(*FLAGS, *GRID, "sweep.dir=sweep")
    assert grid.status == 2 and "holds a search" in grid.err
    for wrong in ("sweep.n_trials=many", "sweep.storage=sqlite:////tmp/other.db", "sweep.storage=no.db"):
        refused = cli(*FLAGS, "resume=sweep", wrong)
        assert refused.status == 2 and wrong.partition("=")[2] in refused.err
    more = cli(*FLAGS, "resume=sweep", "sweep.n_trials=3")
    assert more.status == 0, more.out + more.err
    assert len(done(sweep)) == 3 and logs(sweep, set(logged)) == logged


def test_kill_before_the_sweep_was_saved(cli: Command, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*FLAGS, *GRID[:2], "seed=0", "sweep.dir=sweep", "loop.steps=1"]
    with monkeypatch.context() as killed:
        killed.setattr(store, "replace_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*command).status == 130
    assert not (sweep / ".sweep" / "sweep.json").exists()
    refused = cli(*FLAGS, "resume=sweep")
    assert refused.status == 2 and "give the whole command again" in refused.err
    assert cli(*command).status == 0
    assert len(done(sweep)) == 3


def test_yaml_edited_later_changes_nothing(cli: Command, tmp_path: Path, sweep: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    parts = {"experiment/toy_paced.yaml": "experiment/mine.yaml", "toys.py": "saved_toys.py"}
    for part, name in (parts | {p: p for p in ("data/blobs.yaml", "model/mlp.yaml")}).items():
        (conf / name).parent.mkdir(exist_ok=True)
        text = (TOYS / part).read_text()
        (conf / name).write_text(text.replace("toys.", "saved_toys.").replace("toy_paced", "mine"))
    flags = ["--config-dir", str(conf), "-m"]
    crash = ["task.end=once,well", "loop.steps=5"]
    assert cli(*flags, "experiment=mine", *crash, "sweep.dir=sweep").status == 1
    saved = (sweep / ".sweep" / "jobs" / "0.json").read_text()
    (conf / "experiment" / "mine.yaml").write_text("no: experiment any more\n")
    (conf / "model" / "mlp.yaml").write_text("_target_: saved_toys.Nothing\n")
    again = cli(*flags, "resume=sweep")
    assert again.status == 0, again.out + again.err
    assert done(sweep) == {"0_end-once", "1_end-well"}
    assert json.loads((sweep / ".sweep" / "jobs" / "0.json").read_text()) == json.loads(saved)
    assert "at step 3" in (sweep / "0_end-once" / "run.log").read_text()


def test_values_that_are_added_are_jobs_that_are_added(cli: Command, sweep: Path) -> None:
    command = [*FLAGS, "experiment=toy_paced", "loop.steps=1", "sweep.dir=sweep"]
    assert cli(*command, "seed=0,1", "optimizer.lr=0.1").status == 0
    logged = logs(sweep, done(sweep))
    more = cli(*command, "seed=0,1", "optimizer.lr=0.1,0.2")
    assert more.status == 0, more.out + more.err
    assert logs(sweep, set(logged)) == logged
    records = read_records(sweep)
    assert [record.number for record in records] == list(range(4))
    pairs = {(record.config["seed"], record.config["optimizer"]["lr"]) for record in records}
    assert pairs == {(seed, lr) for seed in range(2) for lr in (0.1, 0.2)}
    assert "skipped: 0_seed-0" in more.out and len(done(sweep)) == 4


@pytest.mark.slow
def test_commands_that_add_jobs_at_once_take_different_numbers(tmp_path: Path, sweep: Path) -> None:
    (sweep / ".sweep").mkdir(parents=True)
    command = [*FLAGS, "experiment=toy_paced", "loop.steps=1", "sweep.dir=sweep"]
    with (
        FileLock(sweep / ".sweep" / "freeze.lock") as held,
        opened(tmp_path, [*command, "seed=0,1,2"]) as first,
        opened(tmp_path, [*command, "seed=2,3"]) as second,
    ):
        for other in (first, second):  # both have planned their jobs from 0 on, and none is written yet
            assert other.wait_until(lambda other=other: " jobs\n" in other.screen()), other.screen()
        time.sleep(0.5)
        held.release()
        assert (first.end(), second.end()) == (0, 0), first.screen() + second.screen()
    records = read_records(sweep)
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert sorted(record.config["seed"] for record in records) == [0, 1, 2, 3]
    assert {record.name for record in records} == done(sweep)
    assert all(record.name == f"{record.number}_seed-{record.config['seed']}" for record in records)
    assert len(timeless_table(sweep / "runs.csv")) == 4


def test_folders_and_overrides_that_no_sweep_has(cli: Command, tmp_path: Path, sweep: Path) -> None:
    (tmp_path / "here" / "in").mkdir(parents=True)
    assert cli(*FLAGS, *GRID[:2], "loop.steps=1", "seed=0", "sweep.dir=sweep").status == 0
    job = next(iter(done(sweep)))
    for arguments, message in (
        ([*FLAGS, "resume=here"], "is not a sweep's folder"),
        ([*FLAGS, "resume=nowhere"], "does not exist"),
        ([*FLAGS, *GRID, "sweep.dir=here"], "is not a sweep's folder"),
        ([*FLAGS, *GRID, "seed=0", "sweep.dir=sweep"], "seed=0,1,2,3 and seed=0"),
        ([*FLAGS[:2], "resume=sweep"], "-m"),
        ([*FLAGS, *GRID, "sweep.dir=sweep/leaderboard.md/x"], "no folder can be made there"),
        ([*FLAGS, "resume=sweep", "optimizer.lr=3"], "sweep.dir=sweep"),
        ([*FLAGS, "resume=sweep", "sweep.n_trials=3"], "holds a grid"),
        ([*FLAGS, f"resume=sweep/{job}"], "Did you mean sweep?"),
    ):
        refused = cli(*arguments)
        assert refused.status == 2 and message in refused.err, refused.err
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["in"]
