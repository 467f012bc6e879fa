"""A sweep that is killed at any moment and resumed ends as one that was not."""

from __future__ import annotations

import itertools
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from filelock import FileLock

from runner.engine import checkpoint
from runner.sweep import store
from runner.sweep.record import read_records
from runner.sweep.search.storage import PASSWORD_VARIABLE
from runner.sweep.store import SavedSweep
from tests.conftest import Outcome
from tests.runner.processes import opened
from tests.runner.sweep.helpers import FLAGS, JOBLIB, TOYS, cases, done, logs, missing, timeless_table
from tests.runner.sweep.postgres import PASSWORD

PACED = [*FLAGS, "experiment=toy_paced", "sweep.dir=sweep"]
GRID = ["optimizer.lr=0.01,0.1,0.3", "seed=0,1,2,3"]
SEARCH = ["sweep=optuna", "sweep.n_trials=14", "optimizer.lr=tag(log,interval(0.001,1))"]
RESUME = [*FLAGS, "resume=sweep"]
Command = Callable[..., Outcome]


def half_done(sweep: Path) -> list[Path]:
    """Return the jobs that a kill left with a checkpoint after their first step."""
    ended = [folder for folder in sweep.glob("[0-9]*_*") if not (folder / "summary.json").exists()]
    files = [folder / "checkpoints" / "last.pt" for folder in ended]
    return [file.parents[1] for file in files if file.exists() and checkpoint.load(file)["step"] > 0]


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
    kind: str, storage: str, launcher: str, cli: Command, tmp_path: Path, sweep: Path, request: Any
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    if kind != "grid":
        pytest.importorskip("optuna")
    more = {"tpe": ["+sweep.sampler_options.n_startup_trials=3", "sweep.pruner=median"]}.get(kind, [])
    command = [*PACED, *(GRID if kind == "grid" else [*SEARCH, f"sweep.sampler={kind}", *more])]
    where = [f"sweep.storage='{request.getfixturevalue('server_url')}'"] if storage == "postgresql" else []
    count, draw = 12 if kind == "grid" else 14, random.Random(kind + launcher)

    # killed twice
    logged: dict[str, bytes] = {}
    for start in ([*command, *where, *JOBLIB * (launcher == "joblib")], [*RESUME, *where]):
        target = len(done(sweep)) + draw.randint(1, 3)
        with opened(tmp_path, start, TOY_PAUSE="0.02") as other:
            assert other.wait_until(lambda target=target: len(done(sweep)) >= target), other.screen()
            time.sleep(draw.uniform(0, 0.3))
            other.send(signal.SIGKILL)
            assert other.end() == -signal.SIGKILL
        assert logged.items() <= logs(sweep).items()  # no job that was done ran again
        logged = logs(sweep)
    assert 0 < len(logged) < count
    left = half_done(sweep)

    # gone on with: for a grid the same command is as good as resume=
    ended = cli(*command if (kind, launcher) == ("grid", "basic") else [*RESUME, *where])
    assert ended.status == 0, ended.out + ended.err
    assert logged.items() <= logs(sweep).items()
    assert len(list(sweep.glob("[0-9]*_*"))) == count
    assert [record.number for record in read_records(sweep)] == list(range(count))
    for folder in left:
        assert re.search(r"resumed +at step [1-9]", (folder / "run.log").read_text()), folder

    # undisturbed
    assert cli(*command, "sweep.dir=calm").status == 0
    for name in ("leaderboard.csv", "runs.csv"):  # of a search: the same settings were asked for
        assert timeless_table(sweep / name) == timeless_table(tmp_path / "calm" / name)


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
    # two evaluations of each trial are reported, also by processes that were given no password
    command = [*PACED, *SEARCH, *JOBLIB * (launcher == "joblib"), "loop.steps=2", "sweep.pruner=median"]
    first = cli(*command, "sweep.n_trials=2", storage)
    assert first.status == 0, first.out + first.err
    logged = [path.read_text() for path in (tmp_path / "sweep").glob("*/run.log")]
    assert len(logged) == 2 and "The run goes on" not in "".join(logged)

    # without the password, with a wrong one, with another URL
    monkeypatch.delenv(PASSWORD_VARIABLE)
    wrong = storage.replace(quote(PASSWORD, safe=""), "wrong-one")
    misspelt, other = storage.replace("sweep.", "sweep.no"), storage.replace("tester", "other")
    typed = [[], [wrong], [misspelt], [other]]
    refused = [cli(*RESUME, "sweep.n_trials=3", *more) for more in typed]
    assert [end.status for end in refused] == [2] * 4
    assert "no password" in refused[0].err and "sweep.storage=" in refused[0].err
    assert "password authentication failed" in refused[1].err

    # with the password, from the environment and typed
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert cli(*RESUME, "sweep.n_trials=3").status == 0
    monkeypatch.delenv("PGPASSWORD")
    again = cli(*RESUME, "sweep.n_trials=4", storage)
    assert again.status == 0, again.out + again.err
    for record in read_records(tmp_path / "sweep"):
        lr = f"optimizer.lr={record.swept['optimizer.lr']}"
        assert record.overrides == ["experiment=toy_paced", "loop.steps=2", lr]

    texts = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    texts += [end.out + end.err for end in (first, *refused, again)]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), "wrong-one"):
        assert not any(secret in text for text in texts)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_search_that_was_interrupted_before_its_first_trial_and_gets_more(
    cli: Command, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    with monkeypatch.context() as interrupted:
        ask = "runner.sweep.search.study.Search.ask"
        interrupted.setattr(ask, stop)
        ended = cli(*PACED, *SEARCH, "loop.steps=1")
    assert ended.status == 130 and "-m resume=sweep" in ended.out
    assert not read_records(sweep)
    assert cli(*RESUME, "sweep.n_trials=2").status == 0
    assert [record.config["loop"]["steps"] for record in read_records(sweep)] == [1, 1]

    logged = logs(sweep)
    grid = cli(*PACED, *GRID)
    assert grid.status == 2 and "holds a search" in grid.err
    for wrong in ("sweep.n_trials=many", "sweep.storage=sqlite:////tmp/other.db", "sweep.storage=no.db"):
        refused = cli(*RESUME, wrong)
        assert refused.status == 2 and wrong.partition("=")[2] in refused.err
    more = cli(*RESUME, "sweep.n_trials=3")
    assert more.status == 0, more.out + more.err
    assert len(logs(sweep)) == 3 and logged.items() <= logs(sweep).items()


def test_kill_before_the_sweep_was_saved(cli: Command, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*PACED, GRID[0], "loop.steps=1"]
    with monkeypatch.context() as killed:
        killed.setattr(store, "replace_file", stop)
        assert cli(*command).status == 130
    assert not (sweep / ".sweep" / "sweep.json").exists()
    refused = cli(*RESUME)
    assert refused.status == 2 and "give the whole command again" in refused.err
    assert cli(*command).status == 0
    assert len(done(sweep)) == 3


def test_yaml_edited_later_changes_nothing(cli: Command, tmp_path: Path, sweep: Path) -> None:
    conf = tmp_path / "conf"
    for part in ("experiment/toy_paced.yaml", "data/blobs.yaml", "model/mlp.yaml", "toys.py"):
        file = conf / part.replace("toys.py", "saved_toys.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((TOYS / part).read_text().replace("toys.", "saved_toys."))
    flags = ["--config-dir", str(conf), "-m"]
    assert cli(*flags, *PACED[-2:], "task.end=once,well", "loop.steps=5").status == 1
    saved = (sweep / ".sweep" / "jobs" / "0.json").read_bytes()
    (conf / "experiment" / "toy_paced.yaml").write_text("no: experiment any more\n")
    (conf / "model" / "mlp.yaml").write_text("_target_: saved_toys.Nothing\n")
    again = cli(*flags, "resume=sweep")
    assert again.status == 0, again.out + again.err
    assert done(sweep) == {"0_end-once", "1_end-well"}
    assert (sweep / ".sweep" / "jobs" / "0.json").read_bytes() == saved
    assert "at step 3" in (sweep / "0_end-once" / "run.log").read_text()


def test_values_that_are_added_are_jobs_that_are_added(cli: Command, sweep: Path) -> None:
    assert cli(*PACED, "loop.steps=1", "seed=0,1", "optimizer.lr=0.1").status == 0
    logged = logs(sweep)
    more = cli(*PACED, "loop.steps=1", "seed=0,1", "optimizer.lr=0.1,0.2")
    assert more.status == 0, more.out + more.err
    assert logged.items() <= logs(sweep).items()
    records = read_records(sweep)
    assert [record.number for record in records] == list(range(4))
    pairs = {(record.config["seed"], record.config["optimizer"]["lr"]) for record in records}
    assert pairs == set(itertools.product(range(2), (0.1, 0.2)))
    assert "skipped: 0_seed-0" in more.out and len(done(sweep)) == 4


@pytest.mark.slow
def test_commands_that_add_jobs_at_once_take_different_numbers(tmp_path: Path, sweep: Path) -> None:
    (sweep / ".sweep").mkdir(parents=True)
    with (
        FileLock(sweep / ".sweep" / "freeze.lock") as held,
        opened(tmp_path, [*PACED, "loop.steps=1", "seed=0,1,2"]) as first,
        opened(tmp_path, [*PACED, "loop.steps=1", "seed=2,3"]) as second,
    ):
        for other in (first, second):  # both have planned their jobs from 0 on, and none is written yet
            assert other.wait_until(lambda other=other: " jobs\n" in other.screen()), other.screen()
        time.sleep(0.5)
        held.release()
        assert (first.end(), second.end()) == (0, 0), first.screen() + second.screen()
    records = read_records(sweep)
    assert [(record.number, record.name) for record in records] == [
        (number, f"{number}_seed-{record.config['seed']}") for number, record in enumerate(records)
    ]
    assert sorted(record.config["seed"] for record in records) == [0, 1, 2, 3]
    assert {record.name for record in records} == done(sweep)
    assert len(timeless_table(sweep / "runs.csv")) == 4


@cases("folder", "typed", "names")
def test_folders_and_overrides_that_no_sweep_has(
    typed: str, names: str, cli: Command, tmp_path: Path
) -> None:
    for folder in ("here/in", "sweep/.sweep", "sweep/job/in"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sweep" / "leaderboard.md").touch()
    SavedSweep([], "continue", [], None, {}, "", [], []).write(tmp_path / "sweep")
    files = set(tmp_path.rglob("*"))
    refused = cli(*FLAGS[:2], *typed.replace("GRID", " ".join([*PACED[2:-1], *GRID])).split())
    assert refused.status == 2 and missing(names, refused.err) == [], refused.err
    assert set(tmp_path.rglob("*")) == files
