"""Fixtures of the tests of sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.records.tracker import Tracker
from tests.runner.sweep.postgres import server


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
