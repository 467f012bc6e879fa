"""Shared by the tests of experiments."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from runner import run
from runner.engine.job import Result

STAND_IN = Path(__file__).parent / "stand_in"
# sizes of a small run
SIZES = {
    "mha_demo": (
        *("experiment=mha_demo", "threads=1", "task.heads=[1,2]", "task.queries=500"),
        *("data.train_size=8192", "data.val_size=256", "data.test_size=512"),
    ),
    "posenc_check": (
        *("experiment=posenc_check", "threads=1", "task.length=12", "task.d_model=8", "task.formula_rows=3"),
        *("data.lengths=[16,24]", "data.length_size=200"),
    ),
    "rnn_fashion": ("experiment=rnn_fashion", "data=fake_images", "threads=1", "model.hidden_size=24"),
}
# long enough to learn what the checks ask for; rnn_fashion's learning rate leaves mistakes to draw
TRAINING = {
    "mha_demo": ("loop.steps=300", "loop.eval_every=100", "optimizer.lr=0.01", "task.claims_from=300"),
    "posenc_check": ("loop.steps=250", "loop.eval_every=125", "task.claims_from=250"),
    "rnn_fashion": ("loop.epochs=3", "optimizer.lr=0.02"),
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """`finished(NAME)`: the trained run of an experiment of `SIZES`, one per session."""
    results: dict[str, Result] = {}

    def result_of(name: str) -> Result:
        if name not in results:
            outputs = tmp_path_factory.mktemp(name)
            command = (*SIZES[name], *TRAINING[name], f"outputs={outputs}")
            results[name] = run(*command, config_dir=STAND_IN)
        return results[name]

    return result_of


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of `tables/NAME.csv`."""
    with (folder / "tables" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_figures(folder: Path, names: set[str], least: int = 250, most: float = 0.9) -> None:
    """The folder holds these figures alone, none smaller than `least` pixels, none empty or full of ink."""
    figures = {path.stem: imread(path) for path in (folder / "figures").glob("*.png")}
    assert set(figures) == names
    for name, pixels in figures.items():
        ink = (np.asarray(pixels)[..., :3] < 0.9).any(-1).mean()
        assert min(pixels.shape[:2]) >= least and 0.01 < ink < most, (name, pixels.shape, ink)


def assert_same_figures(one: Path, other: Path, *names: str) -> None:
    """Two run folders hold these figures, alike to the pixel."""
    for name in names:
        pixels = [imread(folder / "figures" / f"{name}.png") for folder in (one, other)]
        np.testing.assert_array_equal(*pixels)


def assert_equal(one: object, other: object) -> None:
    """Nested dicts, lists and tensors are equal, to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other  # type: ignore[arg-type]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that the runner's log was given."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("runner")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Start torch's global stream at seed 0, on one thread; put both back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
