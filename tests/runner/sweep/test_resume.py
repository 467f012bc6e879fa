"""A sweep that is killed at any moment and taken up again ends as one that was not."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from filelock import FileLock

from runner.records.tracker import Tracker
from runner.sweep import store
from runner.sweep.record import read_records
from runner.sweep.search.storage import PASSWORD_VARIABLE
from tests.conftest import REPO, Outcome
from tests.runner.sweep.postgres import PASSWORD, server
from tests.runner.sweep.processes import opened

TOYS = REPO / "tests" / "toys"
FLAGS = ["--config-dir", str(TOYS), "-m"]
GRID = ["experiment=toy_paced", "optimizer.lr=0.01,0.1,0.3", "seed=0,1,2,3"]
SEARCH = [
    "experiment=toy_paced",
    "sweep=optuna",
    "sweep.n_trials=14",
    "optimizer.lr=tag(log,interval(0.001,1))",
]
PAUSE = {"TOY_PAUSE": "0.02"}
Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and are not what is tested here."""
    monkeypatch.setattr(Tracker, "curves", lambda *_: None)
    monkeypatch.setattr("runner.sweep.run.draw", lambda *_: [])


def table(path: Path) -> list[dict[str, str]]:
    """A CSV file without what differs between two runs of the same: seconds."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(file)]


def summaries(sweep: Path) -> dict[str, dict[str, Any]]:
    """The summaries that there are, by the job's folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}


def done(sweep: Path) -> set[str]:
    """The folders of the jobs that are done."""
    return {name for name, found in summaries(sweep).items() if found["status"] in ("done", "pruned")}


def logs(sweep: Path, names: set[str]) -> dict[str, bytes]:
    """What the jobs have logged, and when they ended."""
    return {
        n: (sweep / n / "run.log").read_bytes() + (sweep / n / "summary.json").read_bytes() for n in names
    }


def kill_and_resume(
    folder: Path, command: list[str], draw: random.Random, kills: int, more: list[str] | None = None
) -> dict[str, bytes]:
    """Start a sweep in `folder/sweep`, kill and resume it; the logs of the jobs that were done at each kill.

    `more` is what a resume is given besides the folder.
    """
    sweep = folder / "sweep"
    kept: dict[str, bytes] = {}
    for number in range(kills):
        begun = (sweep / ".sweep" / "sweep.json").exists()
        again = [*FLAGS, "resume=sweep", *(more or [])] if begun else command
        wanted = len(done(sweep)) + draw.randint(1, 3)
        with opened(folder, again, **PAUSE) as cli:
            assert cli.wait_until(lambda wanted=wanted: len(done(sweep)) >= wanted), cli.screen()
            time.sleep(draw.uniform(0, 0.3))
            cli.send(signal.SIGKILL)
            assert cli.end() == -signal.SIGKILL
        kept |= logs(sweep, done(sweep) - kept.keys())
        assert logs(sweep, set(kept)) == kept, f"a job that was done ran again before kill {number}"
    return kept


def half_done(sweep: Path) -> list[str]:
    """The jobs that a kill left with a checkpoint after their first step."""
    found = []
    for path in sweep.glob("*/metrics.csv"):
        if not (path.parent / "summary.json").exists() and len(path.read_text().splitlines()) > 3:
            found.append(path.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_killed_grid_ends_as_an_undisturbed_one(launcher: str, cli: Command, tmp_path: Path) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    command = [*FLAGS, *GRID, "sweep.dir=sweep", *side]
    kills = 3 if launcher == "basic" else 2
    kept = kill_and_resume(tmp_path, command, random.Random(launcher), kills)
    sweep = tmp_path / "sweep"
    assert 0 < len(kept) < 12
    left = half_done(sweep)
    # the same command, as good as resume=; only the joblib one needs processes of its own
    ended = cli(*FLAGS, *GRID, "sweep.dir=sweep") if launcher == "basic" else cli(*FLAGS, "resume=sweep")
    assert ended.status == 0, ended.out + ended.err
    assert logs(sweep, set(kept)) == kept
    assert len(done(sweep)) == len(list(sweep.glob("[0-9]*_*"))) == 12
    for name in left:
        assert re.search(r"resumed +at step [1-9]", (sweep / name / "run.log").read_text()), name
    assert cli(*FLAGS, *GRID, "sweep.dir=calm").status == 0
    for name in ("leaderboard.csv", "runs.csv"):
        assert table(sweep / name) == table(tmp_path / "calm" / name)


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "storage", "launcher"),
    [
        ("random", "sqlite", "basic"),
        ("random", "sqlite", "joblib"),  # whose draws depend on no other trial, be it still running
        ("tpe", "sqlite", "basic"),
        ("tpe", "postgresql", "basic"),
    ],
)
def test_a_killed_search_ends_as_an_undisturbed_one(
    sampler: str, storage: str, launcher: str, cli: Command, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("optuna")
    side = []
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    options = ["sweep.sampler=tpe", "+sweep.sampler_options.n_startup_trials=3", "sweep.pruner=median"]
    options = options if sampler == "tpe" else ["sweep.sampler=random"]
    where = [] if storage == "sqlite" else [f"sweep.storage='{request.getfixturevalue('server_url')}'"]
    command = [*FLAGS, *SEARCH, *options, *where, *side, "sweep.dir=sweep"]
    sweep = tmp_path / "sweep"
    kept = kill_and_resume(tmp_path, command, random.Random(sampler), 2, where)
    assert 0 < len(kept) < 14
    ended = cli(*FLAGS, "resume=sweep", *where)
    assert ended.status == 0, ended.out + ended.err
    assert logs(sweep, set(kept)) == kept
    assert cli(*FLAGS, *SEARCH, *options, "sweep.dir=calm").status == 0
    calm = tmp_path / "calm"
    assert table(sweep / "runs.csv") == table(calm / "runs.csv")  # the same settings were asked for
    assert table(sweep / "leaderboard.csv") == table(calm / "leaderboard.csv")
    assert sorted(record.number for record in read_records(sweep)) == list(range(14))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_database_s_password_is_on_no_disk_and_no_screen(
    launcher: str, cli: Command, tmp_path: Path, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        joblib = pytest.importorskip("joblib")
        joblib.Parallel(n_jobs=2)(
            joblib.delayed(int)() for _ in range(2)
        )  # processes from before the password
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    storage = f"sweep.storage='{server_url}'"
    side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    # two evaluations of each trial are reported, also by processes that were told no password
    command = [*FLAGS, "experiment=toy_paced", "optimizer.lr=interval(0.1,1)", "sweep=optuna", "loop.steps=2"]
    first = cli(*command, *side, "sweep.pruner=median", "sweep.n_trials=2", "sweep.dir=sweep", storage)
    assert first.status == 0, first.out + first.err
    logs = [path.read_text() for path in (tmp_path / "sweep").glob("*/run.log")]
    assert len(logs) == 2 and "The run goes on" not in "".join(logs)

    monkeypatch.delenv(PASSWORD_VARIABLE)
    more = ("resume=sweep", "sweep.n_trials=3")
    refused = cli(*FLAGS, *more)
    assert refused.status == 2 and "no password" in refused.err and "sweep.storage=" in refused.err
    wrong = cli(*FLAGS, *more, storage.replace(quote(PASSWORD, safe=""), "wrong-one"))
    assert wrong.status == 2 and "password authentication failed" in wrong.err
    misspelt = cli(*FLAGS, *more, storage.replace("sweep.", "sweep.no"))
    other = cli(*FLAGS, *more, storage.replace("tester", "other"))
    assert misspelt.status == other.status == 2
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert cli(*FLAGS, *more).status == 0
    monkeypatch.delenv("PGPASSWORD")
    again = cli(*FLAGS, "resume=sweep", "sweep.n_trials=4", storage)
    assert again.status == 0, again.out + again.err
    records = read_records(tmp_path / "sweep")
    overrides = [record.overrides for record in records]
    assert overrides == [
        ["experiment=toy_paced", "loop.steps=2", f"optimizer.lr={r.swept['optimizer.lr']}"] for r in records
    ]

    shown = [end.out + end.err for end in (first, refused, wrong, misspelt, other, again)]
    written = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), "wrong-one"):
        assert not any(secret in text for text in [*shown, *written])


def test_a_kill_before_the_sweep_was_frozen(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*FLAGS, *GRID, "sweep.dir=sweep", "loop.steps=1"]
    with monkeypatch.context() as killed:
        killed.setattr(store, "replace_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*command).status == 130
    assert not (tmp_path / "sweep" / ".sweep" / "sweep.json").exists()
    refused = cli(*FLAGS, "resume=sweep")
    assert refused.status == 2 and "give the whole command again" in refused.err
    assert cli(*command).status == 0
    assert len(done(tmp_path / "sweep")) == 12


def test_what_stands_in_yaml_by_then_changes_nothing(cli: Command, tmp_path: Path) -> None:
    """Configs are frozen; what differs between two looks at the YAML is a mistake that nobody sees."""
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    parts = {"experiment/toy_paced.yaml": "experiment/mine.yaml", "toys.py": "frozen_toys.py"}
    for part, name in (parts | {p: p for p in ("data/blobs.yaml", "model/mlp.yaml")}).items():
        (conf / name).parent.mkdir(exist_ok=True)
        text = (TOYS / part).read_text()
        (conf / name).write_text(text.replace("toys.", "frozen_toys.").replace("toy_paced", "mine"))
    flags = ["--config-dir", str(conf), "-m"]
    crash = ["task.end=once,well", "loop.steps=5"]
    assert cli(*flags, "experiment=mine", *crash, "sweep.dir=sweep").status == 1
    frozen = json.loads((tmp_path / "sweep" / ".sweep" / "jobs" / "0.json").read_text())
    (conf / "experiment" / "mine.yaml").write_text("no: experiment any more\n")
    (conf / "model" / "mlp.yaml").write_text("_target_: frozen_toys.Nothing\n")
    again = cli(*flags, "resume=sweep")
    assert again.status == 0, again.out + again.err
    assert done(tmp_path / "sweep") == {"0_end-once", "1_end-well"}
    assert json.loads((tmp_path / "sweep" / ".sweep" / "jobs" / "0.json").read_text()) == frozen
    assert "at step 3" in (tmp_path / "sweep" / "0_end-once" / "run.log").read_text()


def test_values_that_are_added_are_jobs_that_are_added(cli: Command, tmp_path: Path) -> None:
    command = [*FLAGS, "experiment=toy_paced", "loop.steps=1", "sweep.dir=sweep"]
    assert cli(*command, "seed=0,1", "optimizer.lr=0.1").status == 0
    kept = logs(tmp_path / "sweep", done(tmp_path / "sweep"))
    more = cli(*command, "seed=0,1,2", "optimizer.lr=0.1,0.2")
    assert more.status == 0, more.out + more.err
    assert logs(tmp_path / "sweep", set(kept)) == kept
    records = read_records(tmp_path / "sweep")
    assert [record.number for record in records] == list(range(6))
    pairs = {(record.config["seed"], record.config["optimizer"]["lr"]) for record in records}
    assert pairs == {(seed, lr) for seed in range(3) for lr in (0.1, 0.2)}
    assert "skipped: 0_seed-0" in more.out
    again = cli(*command, "seed=0,1,2", "optimizer.lr=0.1,0.2")
    assert again.status == 0 and len(done(tmp_path / "sweep")) == 6


@pytest.mark.slow
def test_two_calls_that_add_jobs_at_the_same_moment_take_different_numbers(tmp_path: Path) -> None:
    frozen = tmp_path / "sweep" / ".sweep"
    frozen.mkdir(parents=True)
    command = [*FLAGS, "experiment=toy_paced", "loop.steps=1", "sweep.dir=sweep"]
    with (
        FileLock(frozen / "freeze.lock") as held,
        opened(tmp_path, [*command, "seed=0,1,2"]) as first,
        opened(tmp_path, [*command, "seed=2,3"]) as second,
    ):
        for other in (first, second):  # both have planned their jobs from 0 on, and none is written yet
            assert other.wait_until(lambda other=other: " jobs\n" in other.screen()), other.screen()
        time.sleep(0.5)
        held.release()
        assert (first.end(), second.end()) == (0, 0), first.screen() + second.screen()
    records = read_records(tmp_path / "sweep")
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert sorted(record.config["seed"] for record in records) == [0, 1, 2, 3]
    assert {record.name for record in records} == done(tmp_path / "sweep")
    assert all(record.name == f"{record.number}_seed-{record.config['seed']}" for record in records)
    assert len(table(tmp_path / "sweep" / "runs.csv")) == 4


def test_a_folder_that_is_no_sweep(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "here" / "in").mkdir(parents=True)
    assert "is not a sweep's folder" in cli(*FLAGS, "resume=here").err
    assert "does not exist" in cli(*FLAGS, "resume=nowhere").err
    refused = cli(*FLAGS, *GRID, "sweep.dir=here")
    assert refused.status == 2 and "is not a sweep's folder" in refused.err
    twice = cli(*FLAGS, *GRID, "seed=0", "sweep.dir=sweep")
    assert twice.status == 2 and "seed is set twice: seed=0,1,2,3 and seed=0" in twice.err
    assert cli(*FLAGS, *GRID[:2], "loop.steps=1", "seed=0", "sweep.dir=sweep").status == 0
    alone = cli(*FLAGS[:2], "resume=sweep")
    assert alone.status == 2 and "add -m" in alone.err
    nowhere = cli(*FLAGS, *GRID, "sweep.dir=sweep/leaderboard.md/x")
    assert nowhere.status == 2 and "no folder can be made there" in nowhere.err
    refused = cli(*FLAGS, "resume=sweep", "optimizer.lr=3")
    assert refused.status == 2 and "as it was frozen" in refused.err and "sweep.dir=sweep" in refused.err
    inside = cli(*FLAGS, f"resume=sweep/{next(iter(done(tmp_path / 'sweep')))}")
    assert inside.status == 2 and "Did you mean sweep?" in inside.err
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["in"]
