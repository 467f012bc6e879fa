"""Fixtures of the tests of sweeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.records.tracker import Tracker
from runner.sweep.grid import parse_texts
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.study import Search
from runner.sweep.space import read_space
from tests.runner.sweep.postgres import server

SPACE = {"optimizer.lr": "tag(log,interval(1e-4,1))", "model.layers": "range(1,5)", "optimizer": "sgd,adam"}


@pytest.fixture(autouse=True)
def quick_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures of jobs and sweeps, which have tests of their own, the disk's flushes and the collector."""
    for name in ("curves", "figure", "animation"):
        monkeypatch.setattr(Tracker, name, lambda *_: None)
    monkeypatch.setattr("runner.sweep.run.draw", lambda *_: [])
    monkeypatch.setattr("runner.sweep.run._draw_study", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """Return the URL of a PostgreSQL server of the tests' own."""
    with server() as url:
        yield url


@pytest.fixture
def joblib() -> None:
    """Skip the test without Hydra's launcher for joblib."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return the folder that `sweep.dir=sweep` names."""
    return tmp_path / "sweep"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Search]]:
    """Return a function that opens the test's one study, over this space and with these settings."""
    pytest.importorskip("optuna")
    with contextlib.ExitStack() as opened:

        def open_search(
            texts: dict[str, str] = SPACE,
            objective: str | None = "accuracy/val",
            direction: str = "maximize",
            folder: str = "",
            **settings: Any,
        ) -> Search:
            (tmp_path / folder).mkdir(exist_ok=True)
            space = read_space(parse_texts(texts))
            config = SearchConfig(**settings)
            search = Search(config, space, tmp_path / folder, (objective, direction), "toy")
            opened.callback(search.close)
            return search

        yield open_search
