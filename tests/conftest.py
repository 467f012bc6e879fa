"""Shared by all tests: the toys, and the command line, run in this process or in one of its own.

Every test that runs a command does so in its own `tmp_path`; what a run changes in the process is put back.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# before torch is imported: many small operations on two threads wait for each other where the cores are busy
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parent.parent
TOYS = REPO / "tests" / "toys"
LIMIT = 900  # seconds that anything may take on a busy machine
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Outcome:
    """What a command ended with: exit status and output."""

    status: int
    out: str
    err: str


@pytest.hookimpl(optionalhook=True)  # xdist may be switched off
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run chosen files or tests in this process, which starts sooner; a whole tier on every core."""
    return None if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves while a run trains, which is most of a toy's time, but in tests marked `curves`."""
    from runner.records.tracker import Tracker

    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr(Tracker, "curves", lambda *_: None)


@pytest.fixture
def toys() -> Path:
    """The folder of the toy experiments, for `--config-dir`."""
    return TOYS


@pytest.fixture
def clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder is `tmp_path`; what a run changes in this process is put back afterwards."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    environment, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    state = torch.get_rng_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(REPO / "runner" / "__main__.py")])
    yield
    own = [tmp_path, *(Path(entry) for entry in sys.path if entry not in path)]
    for name in set(sys.modules) - modules:  # else the next test's module of that name would be this one
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and any(Path(file).is_relative_to(folder) for folder in own):
            del sys.modules[name]
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)
    GlobalHydra.instance().clear()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def _composed_once(monkeypatch: pytest.MonkeyPatch, toys: Path) -> None:
    """Compose the same options once: the files of conf/ and of the toys stay as they are while tests run."""
    from runner.config import compose

    def compose_once(lines: list[str], command: Any) -> Any:
        if command.config_dir not in (None, toys):
            return original(lines, command)
        key = (command.config_dir, *lines)
        if key not in _COMPOSED:
            _COMPOSED[key] = pickle.dumps(original(lines, command))
        return pickle.loads(_COMPOSED[key])

    original = compose._compose
    monkeypatch.setattr(compose, "_compose", compose_once)


_COMPOSED: dict[tuple[object, ...], bytes] = {}


@pytest.fixture
def cli(clean_process: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cli("experiment=toy_checks", config_dir=toys)`: run a command in this process, in `tmp_path`."""
    from runner.cli import main

    def call(*argv: str, config_dir: Path | None = None) -> Outcome:
        flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
        capfd.readouterr()
        try:
            status = main([*flags, *argv])
        except SystemExit as end:  # Hydra's own flags end so
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capfd.readouterr()
        return Outcome(status, printed.out, printed.err)

    return call


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of a process of its own: this repository importable from anywhere, one thread."""
    return os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def process(tmp_path: Path, environment: dict[str, str]) -> Callable[..., Outcome]:
    """As `cli`, in a process of its own (2 s for torch alone: use it where the process is the point)."""

    def call(*argv: str, config_dir: Path | None = None) -> Outcome:
        flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
        command, how = [sys.executable, "-m", "runner", *flags, *argv], {"text": True, "timeout": LIMIT}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, **how)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def last_run(tmp_path: Path) -> Callable[[], Path]:
    """`last_run()`: the newest run folder under `tmp_path`'s outputs."""

    def find() -> Path:
        runs = [path.parent for path in (tmp_path / "outputs").glob("*/*/.hydra")]
        return max(runs, key=lambda folder: (folder.stat().st_ctime_ns, folder.name))

    return find
